"""Fusions of features and answers: what must be true of each mechanism, on features made up here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vfmseg.encoders.tokens import Features
from vfmseg.errors import RecipeError
from vfmseg.fusion.alignment import coral, info_nce, mmd
from vfmseg.fusion.attention import Attention, masked_attention, unwindowed, windows
from vfmseg.fusion.build import FUSIONS
from vfmseg.fusion.contract import Fusion
from vfmseg.fusion.decision import Decision
from vfmseg.fusion.gated import Gated
from vfmseg.fusion.linear import Linear
from vfmseg.fusion.reconstruction import Reconstruction, name_of, normed
from vfmseg.fusion.refine import Refine
from vfmseg.fusion.se import Se

STREAMS = ("rgb", "dem", "sar")
CHANNELS = (6, 8)

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "concat": ("linear", {"op": "concat", "at": "all"}),
    "sum": ("linear", {"op": "sum", "at": "all"}),
    "weighted": ("linear", {"op": "weighted", "at": "all"}),
    "last": ("linear", {"op": "concat", "at": "last"}),
    "single": ("attention", {"mode": "single", "query": "dem", "window": 4, "width": 8, "heads": 2}),
    "mutual": ("attention", {"mode": "mutual", "query": None, "window": 3, "width": 8, "heads": 2}),
    "se": ("se", {"reduction": 2}),
    "independent": ("gated", {"mode": "independent"}),
    "complementary": ("gated", {"mode": "complementary"}),
    "cross": ("gated", {"mode": "cross"}),
    "self_reconstruction": ("reconstruction", {"mode": "self", "width": 8, "recover": False}),
    "cross_reconstruction": ("reconstruction", {"mode": "cross", "width": 8, "recover": False}),
    "recovery": ("reconstruction", {"mode": "cross", "width": 8, "recover": True}),
    **{
        by: ("alignment", {"by": by, "width": 8, "temperature": 0.1})
        for by in ("contrastive", "mmd", "coral", "projection")
    },
}
"""Every mechanism and mode, with small options."""


def built(kind: str, streams: tuple[str, ...] = STREAMS, seed: int = 0) -> Fusion:
    """A fusion whose every tensor is random: nothing is hidden by a start at zero."""
    name, options = OPTIONS[kind]
    build: Callable[..., Fusion] = FUSIONS[name]
    torch.manual_seed(seed)
    fuse = build(streams, CHANNELS, **options)
    with torch.no_grad():
        for parameter in fuse.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return fuse


def features(seed: int, size: tuple[int, int] = (5, 7), batch: int = 2) -> Features:
    draws = torch.Generator().manual_seed(seed)
    maps = tuple(torch.randn(batch, c, *size, generator=draws) for c in CHANNELS)
    return Features(maps, (torch.ones(batch, *size),) * 2, (4.0, 4.0))


def found() -> dict[str, Features]:
    return {name: features(i) for i, name in enumerate(STREAMS)}


def hidden(one: Features, where: Tensor | None = None) -> Features:
    """The features with nothing seen (`where`: there), and garbage in its place."""
    where = torch.ones_like(one.seen[0], dtype=torch.bool) if where is None else where
    maps = tuple(torch.where(where[:, None], 1e4, values) for values in one.maps)
    return Features(maps, tuple(torch.where(where, 0.0, seen) for seen in one.seen), one.strides)


def same(one: Features, two: Features) -> None:
    for a, b in zip(one.maps, two.maps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for a, b in zip(one.seen, two.seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.pitfall("C44")
@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_a_stream_that_has_seen_nothing_is_as_good_as_missing(kind: str) -> None:
    """Every subset of the streams has an answer, and garbage in what is hidden changes nothing."""
    fuse, given = built(kind), found()
    for number in range(1, 2 ** len(STREAMS)):
        there = {name: one for i, (name, one) in enumerate(given.items()) if number >> i & 1}
        masked = {name: one if name in there else hidden(one) for name, one in given.items()}
        same(fuse(masked), fuse(there))
        assert all(torch.isfinite(values).all() for values in fuse(there).maps)
    assert not torch.allclose(fuse(given).maps[-1], fuse({"rgb": given["rgb"], "sar": given["sar"]}).maps[-1])


@pytest.mark.pitfall("C44", "P26")
@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_what_is_hidden_in_a_part_of_a_map_reaches_no_cell(kind: str) -> None:
    """Also through attention, and through what a channel is on average."""
    fuse, given = built(kind), found()
    where = torch.zeros(2, 5, 7, dtype=torch.bool)
    where[:, :2, 3:] = True
    garbage, zeros = hidden(given["dem"], where), hidden(given["dem"], where)
    zeros = Features(tuple(torch.where(where[:, None], 0.0, m) for m in zeros.maps), zeros.seen, zeros.strides)
    one, two = (fuse({**given, "dem": dem}) for dem in (garbage, zeros))
    same(one, two)
    other = fuse({**given, "dem": hidden(features(9), where)})
    assert not torch.allclose(one.maps[-1], other.maps[-1])  # what is seen does count


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_the_order_of_the_streams_that_come_means_nothing(kind: str) -> None:
    fuse, given = built(kind), found()
    same(fuse(given), fuse(dict(reversed(given.items()))))


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_an_image_of_a_batch_knows_nothing_of_the_others(kind: str) -> None:
    fuse, given = built(kind), found()
    alone = {
        name: Features(tuple(m[1:] for m in one.maps), tuple(s[1:] for s in one.seen), one.strides)
        for name, one in given.items()
    }
    torch.testing.assert_close(fuse(given).maps[-1][1:], fuse(alone).maps[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.pitfall("C8", "P53")
@pytest.mark.parametrize("kind", OPTIONS)
def test_everything_that_learns_gets_a_gradient(kind: str) -> None:
    """Also with a stream of which nothing is seen: a process of a group may not be left without."""
    fuse = built(kind).train()
    for given in (found(), {**found(), "sar": hidden(features(2))}):
        fuse.zero_grad()
        fused = fuse(given)
        terms = fuse.terms(given, fused)
        assert all(value.shape == (2,) for value in terms.values())
        (sum(m.square().sum() for m in fused.maps) + sum(t.sum() for t in terms.values())).backward()  # type: ignore[union-attr]
        assert [name for name, p in fuse.named_parameters() if p.requires_grad and p.grad is None] == []
        assert all(torch.isfinite(p.grad).all() for p in fuse.parameters() if p.grad is not None)


def test_a_fresh_fusion_starts_from_the_plain_streams() -> None:
    """Their mean, or half of their sum where gates are half open."""
    given = {name: one for name, one in found().items() if name != "sar"}
    mean = torch.stack([one.maps[1] for one in given.values()]).mean(dim=0)
    for kind in ("concat", "weighted", "mutual", "independent", "complementary", "contrastive", "cross"):
        name, options = OPTIONS[kind]
        build: Callable[..., Fusion] = FUSIONS[name]
        fused = build(tuple(given), CHANNELS, **options)(given)
        torch.testing.assert_close(fused.maps[1], mean, atol=1e-5, rtol=1e-5)


# linear


@torch.no_grad()
def test_a_list_of_the_last_level_is_the_last_level() -> None:
    fusions = []
    for at in ("last", (2,)):
        torch.manual_seed(3)
        fusions.append(Linear(STREAMS, CHANNELS, "concat", at))  # type: ignore[arg-type]
    same(fusions[0](found()), fusions[1](found()))
    assert len(fusions[0](found()).maps) == 1
    assert fusions[0].levels == (1,)
    with pytest.raises(RecipeError, match=r"names map 3, but model.encoder.layers gives 2"):
        Linear(STREAMS, CHANNELS, "sum", (1, 3))
    with pytest.raises(RecipeError, match="leaves out map 2, the deepest"):
        Linear(STREAMS, CHANNELS, "sum", (1,))
    with pytest.raises(RecipeError, match="leaves out map 2, the deepest"):
        Linear(STREAMS, CHANNELS, "sum", (1,))


@torch.no_grad()
def test_a_sum_is_the_sum_and_weights_are_those_of_each_channel() -> None:
    given = found()
    total = torch.stack([one.maps[0] for one in given.values()]).sum(dim=0)
    torch.testing.assert_close(Linear(STREAMS, CHANNELS, "sum", "all")(given).maps[0], total)
    weighted = Linear(STREAMS, CHANNELS, "weighted", "all")
    assert weighted.weights is not None
    weighted.weights[0][1, :3] = 30.0  # of dem, three channels
    fused = weighted(given).maps[0]
    torch.testing.assert_close(fused[:, :3], given["dem"].maps[0][:, :3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fused[:, 3:], total[:, 3:] / 3, atol=1e-5, rtol=1e-5)


# gated


@torch.no_grad()
def test_complementary_gates_share_each_cell() -> None:
    fuse, given = built("complementary"), found()
    assert isinstance(fuse, Gated)
    given["dem"] = hidden(given["dem"], torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5)
    for gates in fuse.gates(given):
        torch.testing.assert_close(gates.sum(dim=0), torch.ones(2, 5, 7))
        assert (gates[1][given["dem"].seen[0] == 0] == 0).all()
        assert gates.std() > 0.01  # they are not one number


@pytest.mark.parametrize("mode", ["independent", "complementary", "cross"])
@torch.no_grad()
def test_a_saturated_gate_is_the_model_of_one_modality(mode: str) -> None:
    fuse, given = built(mode, STREAMS[:2]), {name: one for name, one in found().items() if name != "sar"}
    assert isinstance(fuse, Gated)
    for gates in filter(None, (fuse.own, fuse.others)):
        for name, gate in gates.items():
            gate.weight.zero_()  # type: ignore[operator]
            gate.bias.fill_(60.0 if "rgb" in name else -60.0)  # type: ignore[operator]
    only = fuse({"rgb": given["rgb"]})
    same(fuse(given), only)
    assert not torch.allclose(only.maps[0], fuse({"dem": given["dem"]}).maps[0])


@torch.no_grad()
def test_a_cross_gate_is_opened_by_the_other_modality_alone() -> None:
    fuse, given = built("cross", STREAMS[:2]), {name: one for name, one in found().items() if name != "sar"}
    assert isinstance(fuse, Gated)
    changed = {**given, "dem": features(9)}
    before, after = fuse.gates(given)[1], fuse.gates(changed)[1]
    assert torch.equal(before[1], after[1])  # dem's own gate hears rgb
    assert not torch.allclose(before[0], after[0])
    own = built("independent", STREAMS[:2])
    assert isinstance(own, Gated)
    before, after = own.gates(given)[1], own.gates(changed)[1]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def learned(fuse: Fusion, clean: str, steps: int = 150) -> dict[str, Features]:
    """Train a fusion and a linear layer to tell two classes that only `clean` knows; the other is noise."""
    torch.manual_seed(0)
    head = nn.Conv2d(CHANNELS[1], 2, 1)
    optimizer = torch.optim.Adam([*fuse.parameters(), *head.parameters()], lr=0.03)
    for step in range(steps):
        given, labels = clean_and_noise(step, clean)
        loss = nn.functional.cross_entropy(head(fuse(given).maps[1]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clean_and_noise(steps, clean)[0]


def clean_and_noise(seed: int, clean: str) -> tuple[dict[str, Features], Tensor]:
    """Features of which one stream carries the class in one channel, beside noise, and the other noise alone."""
    draws = torch.Generator().manual_seed(1000 + seed)
    labels = torch.randint(2, (8, 6, 6), generator=draws)
    given = {}
    for name in STREAMS[:2]:
        maps = [torch.randn(8, c, 6, 6, generator=draws) for c in CHANNELS]
        if name == clean:
            maps[1][:, 0] = 4.0 * labels - 2.0
            maps[1][:, 1] = 2.0  # what this stream always says
        given[name] = Features(tuple(maps), (torch.ones(8, 6, 6),) * 2, (4.0, 4.0))
    return given, labels


@pytest.mark.parametrize("clean", ["rgb", "dem"])
def test_noise_closes_its_gate(clean: str) -> None:
    fuse = Gated(STREAMS[:2], CHANNELS, "complementary")
    given = learned(fuse, clean)
    with torch.no_grad():
        gates = dict(zip(given, fuse.gates(given)[1].flatten(1).mean(dim=1).tolist(), strict=True))
    other = next(name for name in gates if name != clean)
    assert gates[clean] > 0.7
    assert gates[other] < 0.3


# se


@torch.no_grad()
def test_channel_weights_are_shares_that_follow_the_content() -> None:
    fuse, given = built("se"), found()
    assert isinstance(fuse, Se)
    for weights in fuse.weights(given):
        assert ((weights > 0) & (weights < 1)).all()
        assert not torch.allclose(weights[0, 0], weights[0, 1], atol=1e-3)  # two images of one stream
    brighter = {**given, "rgb": features(11)}
    assert not torch.allclose(fuse.weights(given)[0][0], fuse.weights(brighter)[0][0], atol=1e-3)
    torch.testing.assert_close(fuse.weights(given)[0][1], fuse.weights(brighter)[0][1])


@torch.no_grad()
def test_a_closed_channel_gate_is_as_good_as_no_modality() -> None:
    fuse, given = built("se"), found()
    assert isinstance(fuse, Se)
    for name, squeeze in fuse.squeeze.items():
        if "dem" in name:
            last = list(squeeze.children())[-1]
            last.weight.zero_()  # type: ignore[operator]
            last.bias.fill_(-200.0)  # type: ignore[operator]
    same(fuse(given), fuse({name: one for name, one in given.items() if name != "dem"}))


# attention


@torch.no_grad()
def test_a_constant_guide_is_looked_at_evenly() -> None:
    draws = torch.Generator().manual_seed(0)
    queries, values = (torch.randn(3, 9, 8, generator=draws) for _ in range(2))
    keys = torch.randn(3, 1, 8, generator=draws).expand(3, 9, 8)
    open_ = torch.rand(3, 9, generator=draws) > 0.3
    open_[2] = False
    looked = masked_attention(queries, keys, values, open_, heads=2)
    mean = (values * open_[..., None]).sum(dim=1) / open_.sum(dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(looked, mean[:, None].expand_as(looked), atol=1e-5, rtol=1e-5)
    assert (looked[2] == 0).all()
    other = masked_attention(queries, torch.randn(3, 9, 8, generator=draws), values, open_, heads=2)
    assert not torch.allclose(other[0], looked[0], atol=1e-2)


@torch.no_grad()
def test_swapped_modalities_swap_the_branches() -> None:
    """Streams that change names, and parameters that change with them, answer the same; one alone does not."""
    given = {"rgb": features(0), "dem": features(1)}
    swapped = {"rgb": given["dem"], "dem": given["rgb"]}
    for kind in ("mutual", "complementary", "se", "cross"):
        fuse, other = built(kind, STREAMS[:2]), built(kind, STREAMS[:2])
        turned = {"of_rgb": "of_dem", "of_dem": "of_rgb"}
        state = fuse.state_dict()
        other.load_state_dict({_renamed(name, turned): tensor for name, tensor in state.items()})
        same(fuse(given), other(swapped))
        assert not torch.allclose(fuse(given).maps[0], fuse(swapped).maps[0], atol=1e-2)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    return ".".join(
        next((new + part[len(old) :] for old, new in names.items() if part.startswith(old)), part)
        for part in name.split(".")
    )


@torch.no_grad()
def test_one_modality_asks_and_the_direction_counts() -> None:
    given = {"rgb": features(0), "dem": features(1)}
    _, options = OPTIONS["single"]
    found_ = {}
    for query in given:
        torch.manual_seed(0)
        fuse = Attention(STREAMS[:2], CHANNELS, **{**options, "query": query})
        for look in fuse.looks.values():
            nn.init.normal_(look.out.weight)  # type: ignore[union-attr, arg-type]
        found_[query] = fuse(given).maps[0]
        added = found_[query] - given[query].maps[0]
        assert added.abs().mean() > 0.1
    assert not torch.allclose(found_["rgb"], found_["dem"], atol=1e-2)
    with pytest.raises(RecipeError, match="'ir' is no modality"):
        Attention(STREAMS[:2], CHANNELS, **{**options, "query": "ir"})


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8), (3, 17)])
@pytest.mark.parametrize(("side", "offset"), [(4, 0), (4, 2), (3, 1), (8, 4)])
def test_windows_lose_and_mix_no_cell(size: tuple[int, int], side: int, offset: int) -> None:
    values = torch.arange(2 * 3 * size[0] * size[1], dtype=torch.float32).reshape(2, 3, *size)
    cut = windows(values, side, offset)
    assert torch.equal(unwindowed(cut, size, side, offset), values)
    # the first window holds the north-western corner, moved in by the offset
    assert cut[0, offset * side + offset, 0] == values[0, 0, 0, 0]


@torch.no_grad()
def test_attention_stays_in_its_windows() -> None:
    """Its cost so grows with the area; a cell far away is not heard at the first level."""
    fuse = built("mutual", STREAMS[:2])
    given = {name: features(i, (12, 12)) for i, name in enumerate(STREAMS[:2])}
    far = [values.clone() for values in given["dem"].maps]
    far[0][:, :, 11, 11] += 5.0
    changed = {**given, "dem": Features(tuple(far), given["dem"].seen, given["dem"].strides)}
    difference = (fuse(given).maps[0] - fuse(changed).maps[0]).abs().amax(dim=(0, 1))
    assert (difference[:9, :9] == 0).all()
    assert (difference[9:, 9:] > 0).all()  # windows of three


# decision


def answers(seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 4, 6, 5, generator=draws) for name in STREAMS}


def everywhere(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(2, 6, 5, dtype=torch.bool) for name in names or STREAMS}


@torch.no_grad()
def test_decisions_are_joined_as_their_names_say() -> None:
    given = answers(0)
    each = torch.stack([one.softmax(dim=1) for one in given.values()])
    mean = Decision(STREAMS, 4, "mean")(given, everywhere(), {}).softmax(dim=1)
    torch.testing.assert_close(mean, each.mean(dim=0))
    product = Decision(STREAMS, 4, "product")(given, everywhere(), {}).softmax(dim=1)
    torch.testing.assert_close(product, each.prod(dim=0) / each.prod(dim=0).sum(dim=1, keepdim=True))
    weighted = Decision(STREAMS, 4, "weighted")
    torch.testing.assert_close(weighted(given, everywhere(), {}).softmax(dim=1), each.mean(dim=0))
    assert weighted.weights is not None
    weighted.weights[1] = 50.0
    torch.testing.assert_close(weighted(given, everywhere(), {}).softmax(dim=1), each[1])


@pytest.mark.pitfall("C44")
@pytest.mark.parametrize("op", ["mean", "weighted", "product"])
@torch.no_grad()
def test_a_pixel_hears_only_what_is_valid_there(op: Any) -> None:
    given, decision = answers(1), Decision(STREAMS, 4, op)
    for parameter in decision.parameters():
        nn.init.normal_(parameter)
    valid = everywhere()
    valid["dem"][:, :3] = False
    without = {name: one for name, one in given.items() if name != "dem"}
    two = decision(without, everywhere(*without), {})
    noisy = {**given, "dem": torch.where(valid["dem"][:, None], given["dem"], 1e6)}
    joined = decision(noisy, valid, {})
    torch.testing.assert_close(joined[:, :, :3].softmax(dim=1), two[:, :, :3].softmax(dim=1))
    assert not torch.allclose(joined[:, :, 3:].softmax(dim=1), two[:, :, 3:].softmax(dim=1), atol=1e-3)
    nowhere = {name: torch.zeros_like(one) for name, one in valid.items()}
    assert torch.isfinite(decision(given, nowhere, {})).all()


@torch.no_grad()
def test_refinement_follows_the_edges_of_its_guide() -> None:
    """Noise is smoothed on both sides of a step in the guide, and nothing crosses the step, or what is invalid."""
    draws = torch.Generator().manual_seed(0)
    truth = torch.zeros(1, 2, 16, 16)
    truth[:, 0, :, :8], truth[:, 1, :, 8:] = 4.0, 4.0
    guide = torch.zeros(1, 1, 16, 16)
    guide[..., 8:] = 10.0
    noisy = truth + 3 * torch.randn(truth.shape, generator=draws)
    refine, valid = Refine("dem", 5), torch.ones(1, 16, 16, dtype=torch.bool)
    better = refine(noisy, guide, valid)

    def wrong(scores: Tensor) -> float:
        return (scores.argmax(dim=1) != truth.argmax(dim=1)).float().mean().item()

    assert wrong(noisy) > 0.1
    assert wrong(better) < 0.02
    flat = refine(truth, torch.zeros_like(guide), valid)
    torch.testing.assert_close(refine(truth, guide, valid), truth, atol=1e-3, rtol=0)  # nothing crosses the step
    assert (flat - truth).abs().amax() > 0.5  # without an edge it does
    hole = valid.clone()
    hole[:, 4:8, 4:8] = False
    garbage = torch.where(hole[:, None], guide, 1e9)
    kept = refine(noisy, garbage, hole)
    assert torch.equal(kept[:, :, 4:8, 4:8], noisy[:, :, 4:8, 4:8])
    torch.testing.assert_close(kept, refine(noisy, torch.where(hole[:, None], guide, 0.0), hole))


# reconstruction


def rebuilt(correlated: bool) -> float:
    """What is left of the variance after training to rebuild dem from rgb, on cells that were not trained on."""
    torch.manual_seed(0)
    fuse = Reconstruction(STREAMS[:2], CHANNELS, "cross", 16, False)
    mixing = torch.randn(CHANNELS[1], CHANNELS[1])
    optimizer = torch.optim.Adam(fuse.parameters(), lr=0.01)

    def batch(seed: int) -> dict[str, Features]:
        given = {"rgb": features(seed, (8, 8), 8), "dem": features(seed + 10**6, (8, 8), 8)}
        if correlated:
            deep = torch.einsum("oc,bchw->bohw", mixing, given["rgb"].maps[1])
            given["dem"] = Features((given["rgb"].maps[0], deep), given["dem"].seen, given["dem"].strides)
        return given

    for step in range(200):
        given = batch(step)
        loss = fuse.terms(given, fuse(given))["reconstruction"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        given = batch(5000)
        assert fuse.decoders is not None
        guess = fuse.decoders[name_of("rgb", "dem", 1)](given["rgb"].maps[1])
        target = normed(given["dem"].maps[1])
        variance = (target - target.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
        return ((guess - target).square().mean() / variance).item()


def test_rebuilding_beats_the_mean_only_where_modalities_have_something_in_common() -> None:
    assert rebuilt(correlated=True) < 0.3
    assert rebuilt(correlated=False) > 0.95  # the mean of each channel would have 1


@torch.no_grad()
def test_decoders_that_training_alone_needs_are_nothing_afterwards() -> None:
    fuse, given = built("cross_reconstruction"), found()
    before = fuse(given)
    fuse.auxiliary = None
    same(fuse(given), before)
    kept = built("recovery")
    assert kept.auxiliary is None  # these are run in prediction


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_stream_may_be_called_like_a_word_of_the_code(kind: str) -> None:
    """The answer is that of streams with other names, and so are the losses; no two parts share tensors."""
    names = ("float", "dem" if kind == "single" else "a_to_b", "fused")
    others = ("rgb", "dem", "sar")  # the same order in the alphabet, in which tensors become random
    one, two = built(kind, names), built(kind, others)
    assert len(list(one.parameters())) == len(list(two.parameters()))
    renamed, plain = dict(zip(names, found().values(), strict=True)), dict(zip(others, found().values(), strict=True))
    same(one(renamed), two(plain))
    terms = one.terms(renamed, one(renamed)), two.terms(plain, two(plain))
    for name, values in terms[0].items():
        torch.testing.assert_close(values, terms[1][name])


def test_no_two_decoders_have_one_name() -> None:
    streams = ("a", "b_to_c", "a_to_b", "c")
    fuse = Reconstruction(streams, CHANNELS, "cross", 8, True)
    assert fuse.kept is not None
    assert len(fuse.kept) == len(streams) * (len(streams) - 1) * len(CHANNELS)


@torch.no_grad()
def test_a_missing_stream_is_rebuilt_where_that_was_asked_for() -> None:
    """Recovered features enter the fusion as the missing ones would have, cell by cell."""
    fuse, given = built("recovery", STREAMS[:2]), {"rgb": features(0), "dem": features(1)}
    assert isinstance(fuse, Reconstruction)
    assert fuse.kept is not None
    stand_in = Features(
        tuple(fuse.kept[name_of("rgb", "dem", i)](values) for i, values in enumerate(given["rgb"].maps)),
        given["rgb"].seen,
        given["rgb"].strides,
    )
    rgb = Features(tuple(normed(values) for values in given["rgb"].maps), given["rgb"].seen, given["rgb"].strides)
    same(fuse({"rgb": given["rgb"]}), fuse.join({"rgb": rgb, "dem": stand_in}))
    # what decoders rebuild is normed; so is what it stands in for, whatever its scale
    louder = Features(tuple(20 * values + 3 for values in given["dem"].maps), given["dem"].seen, given["dem"].strides)
    torch.testing.assert_close(
        fuse({"dem": louder, "rgb": given["rgb"]}).maps[1], fuse(given).maps[1], atol=1e-3, rtol=1e-3
    )


# alignment


def test_distances_of_samples_are_zero_for_equal_ones_and_grow() -> None:
    draws = torch.Generator().manual_seed(0)
    one, two = (torch.randn(200, 4, generator=draws) for _ in range(2))
    for distance in (mmd, coral):
        assert distance(one, one).item() == pytest.approx(0.0, abs=1e-5)
        near, far, wider = distance(one, two), distance(one, two + 1), distance(one, 3 * two)
        assert near < 0.1 * far
        assert near < 0.1 * wider
    rows = one.clone().requires_grad_()
    mmd(rows, rows.detach()).backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("kind", ["contrastive", "mmd", "coral", "projection"])
def test_half_precision_does_not_reach_the_distances(kind: str) -> None:
    """Nearly equal rows: bfloat16 products would be off by more than what lies between them."""
    fuse = built(kind, STREAMS[:2])
    near = torch.nn.functional.normalize(1 + 0.05 * torch.randn(1, 8, 16, 16), dim=1)
    other = torch.nn.functional.normalize(near + 0.002 * torch.randn(1, 8, 16, 16), dim=1)
    seen = Features((near, near), (torch.ones(1, 16, 16),) * 2, (4.0, 4.0))
    given = {"rgb": seen, "dem": seen}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fuse, "projected", lambda found: {"rgb": near, "dem": other})
        exact = fuse.terms(given, seen)["alignment"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = fuse.terms(given, seen)["alignment"]
    assert torch.equal(exact, half)


def retrieved(misplaced: bool) -> float:
    """Share of cells whose partner is found first among 64, on cells that were not trained on."""
    mixing = torch.randn(CHANNELS[1], CHANNELS[1], generator=torch.Generator().manual_seed(0))

    def batch(seed: int) -> dict[str, Features]:
        rgb = features(seed, (8, 8), 4)
        deep = torch.einsum("oc,bchw->bohw", mixing, rgb.maps[1])
        if misplaced:  # each cell has the partner of another place, at random
            order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
            deep = deep.flatten(2)[:, :, order].unflatten(2, (8, 8))
        return {"rgb": rgb, "dem": Features((rgb.maps[0], deep), rgb.seen, rgb.strides)}

    return share_found(trained_to_align("contrastive", batch), batch(5000))


@torch.no_grad()
def share_found(fuse: Fusion, given: dict[str, Features]) -> float:
    """Share of cells whose partner is the likest of all 64 after the projection."""
    one, two = (values.flatten(2) for values in fuse.projected(given).values())  # type: ignore[operator]
    scores = torch.einsum("bcn,bcm->bnm", one, two)
    return (scores.argmax(dim=2) == torch.arange(64)).float().mean().item()


def test_partners_of_one_place_are_found_and_those_of_other_places_are_not() -> None:
    assert retrieved(misplaced=False) > 0.5
    assert retrieved(misplaced=True) < 0.1  # chance is 1/64


def trained_to_align(by: str, given: Callable[[int], dict[str, Features]], steps: int = 200) -> Fusion:
    """An alignment whose only loss is its own, on a new batch each step."""
    torch.manual_seed(0)
    fuse = FUSIONS["alignment"](STREAMS[:2], CHANNELS, by=by, width=8, temperature=0.1)  # type: ignore[call-arg]
    optimizer = torch.optim.Adam([one for one in fuse.parameters() if one.requires_grad], lr=0.02)
    for step in range(steps):
        batch = given(step)
        loss = fuse.terms(batch, fuse(batch))["alignment"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return fuse


@pytest.mark.parametrize("by", ["mmd", "coral"])
def test_streams_of_other_mean_and_spread_are_brought_together_and_not_silenced(by: str) -> None:
    """Half of the channels of one stream are louder and off by 2: its scale and shift undo that."""

    def batch(seed: int) -> dict[str, Features]:
        rgb, dem = features(seed, (8, 8), 4), features(1000 + seed, (8, 8), 4)
        louder = torch.cat([2 + 3 * dem.maps[1][:, :4], dem.maps[1][:, 4:]], dim=1)
        return {"rgb": rgb, "dem": Features((dem.maps[0], louder), dem.seen, dem.strides)}

    fuse = trained_to_align(by, batch, 400)
    assert not any(one.requires_grad for one in fuse.auxiliary.parameters())  # type: ignore[union-attr]
    with torch.no_grad():
        spoken = {name: fuse.voices(name, 1, one.maps[1]) for name, one in batch(9000).items()}  # type: ignore[operator]
    means = {name: values.mean(dim=(0, 2, 3)) for name, values in spoken.items()}
    spreads = {name: values.std(dim=(0, 2, 3)) for name, values in spoken.items()}
    own = spreads["rgb"].mean()
    assert own > 0.3  # it was 1
    assert (means["rgb"] - means["dem"]).abs().mean() < 0.4 * own  # it was 1
    assert (spreads["rgb"] - spreads["dem"]).abs().mean() < 0.4 * own  # it was 1


def test_a_shared_projection_finds_what_the_streams_share() -> None:
    """2 of 8 channels are common, the others four times as loud and each stream's own."""

    def batch(seed: int) -> dict[str, Features]:
        found = {}
        for number, name in enumerate(STREAMS[:2]):
            one, common = features(seed + 5000 * (number + 1), (8, 8), 4), features(seed, (8, 8), 4)
            deep = torch.cat([common.maps[1][:, :2], 4 * one.maps[1][:, 2:]], dim=1)
            found[name] = Features((one.maps[0], deep), one.seen, one.strides)
        return found

    assert share_found(trained_to_align("projection", batch, 1), batch(90000)) < 0.1
    assert share_found(trained_to_align("projection", batch), batch(90000)) > 0.3  # chance is 1/64


def test_the_contrastive_loss_is_the_cross_entropy_of_finding_the_partner() -> None:
    one = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    scores = (one @ one.T / 0.5).softmax(dim=1).diagonal()
    assert info_nce(one, one, 0.5).item() == pytest.approx(-scores.log().mean().item(), abs=1e-5)


@torch.no_grad()
def test_windows_of_every_second_level_are_moved_so_that_no_border_is_one_at_all_levels() -> None:
    fuse = built("mutual", STREAMS[:2])
    given = {name: features(i, (12, 12)) for i, name in enumerate(STREAMS[:2])}  # windows of three
    near = [values.clone() for values in given["dem"].maps]
    for values in near:
        values[:, :, 3, 3] += 5.0
    changed = {**given, "dem": Features(tuple(near), given["dem"].seen, given["dem"].strides)}
    one, two = fuse(given), fuse(changed)
    heard = [(a - b).abs().amax(dim=(0, 1)) > 0 for a, b in zip(one.maps, two.maps, strict=True)]
    assert not heard[0][2, 2]  # a border between cells 2 and 3
    assert heard[1][2, 2]


def test_the_features_that_are_to_be_rebuilt_are_not_drawn_to_the_guess() -> None:
    fuse, given = built("self_reconstruction"), found()
    with torch.no_grad():
        fused = fuse(given)
    for one in given.values():
        for values in one.maps:
            values.requires_grad_()
    fuse.terms(given, fused)["reconstruction"].sum().backward()
    assert all(values.grad is None for one in given.values() for values in one.maps)
