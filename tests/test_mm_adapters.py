"""Adapters of several modalities: what each stream owns, and what it learns of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import DEPTH, MODELS, SETTINGS, save_all
from mm_models import KINDS, NAMES, far, images, maps, network, of, set_shares, shares, unseen
from torch import nn
from torch.nn import functional as F

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.adapters.mm_adapter import OwnBottlenecks
from vfmseg.adapters.mm_lora import StreamLora
from vfmseg.adapters.streams import Mix, Route
from vfmseg.data.image import Image
from vfmseg.encoders.backbone import Backbone, BaseRecord
from vfmseg.encoders.build import ENCODERS, build_backbone
from vfmseg.encoders.tokens import Tokens
from vfmseg.errors import AdapterError
from vfmseg.model import Network


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("mm"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("C12", "P15")
def test_a_fresh_adapter_changes_no_stream(folders: dict[str, Path], kind: str, name: str) -> None:
    given = of(images(), "optical", "dem")
    plain = network(folders, kind, "none")
    options = {"targets": ("q", "k", "v", "o", "mlp")} if name == "mm_lora" else {}
    fresh = network(folders, kind, name, seed=None, **options)
    for stream in given:
        assert far(maps(plain, given, stream), maps(fresh, given, stream)) == 0
    assert far(maps(plain, given, "dem"), maps(network(folders, kind, name, **options), given, "dem")) > 0.1


@pytest.mark.parametrize(("width", "depth", "lora", "bottleneck"), [
    (768, 12, 1_032_240, 14_201_880),
    (1024, 24, 2_752_608, 50_454_576),
    (1280, 32, 4_587_648, 105_062_464),
])  # fmt: skip
@pytest.mark.pitfall("C10")
def test_counts_are_those_that_were_published(width: int, depth: int, lora: int, bottleneck: int) -> None:
    """For two streams of SAM B, L and H; weights are never made."""
    from transformers.models.sam import SamVisionConfig

    config = SamVisionConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=16, mlp_ratio=4.0, mlp_dim=4 * width,
        global_attn_indexes=[2],
    )  # fmt: skip
    for name, expected in (("mm_lora", lora), ("mm_adapter", bottleneck)):
        with torch.device("meta"):
            upstream = ENCODERS["sam"].model_class("sam_vision_model")(config)
            backbone = Backbone(ENCODERS["sam"], upstream, (depth,), False, BaseRecord("", None, ""))
            options = {**SETTINGS[name], "rank": 4} if name == "mm_lora" else SETTINGS[name]
            attached = ADAPTERS[name].attach(backbone, ("rgb", "dsm"), **options)
        assert sum(parameter.numel() for parameter in attached.added) == expected
        assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_w_says_how_much_comes_of_the_other_stream(folders: dict[str, Path], kind: str, name: str) -> None:
    model, given = network(folders, kind, name), of(images(), "optical", "dem")
    other = {**given, "dem": images(seed=2)["dem"]}
    assert far(maps(model, given, "optical"), maps(model, other, "optical")) > 1e-2
    # the same images in another order couple other pairs
    turned = {**given, "dem": Image(given["dem"].pixels.flip(0), given["dem"].valid)}
    assert far(maps(model, given, "optical"), maps(model, turned, "optical")) > 1e-2
    set_shares(model, 1.0)
    assert far(maps(model, given, "optical"), maps(model, other, "optical")) == 0
    # alone a stream has another batch, and other last bits
    alone = maps(model, of(given, "optical"), "optical")
    assert far(maps(model, given, "optical"), alone) < 1e-4
    assert far(maps(model, of(given, "dem"), "dem"), maps(model, given, "dem")) < 1e-4


@pytest.mark.parametrize("kind", MODELS)
def test_without_mix_each_stream_has_a_lora_for_itself(folders: dict[str, Path], kind: str) -> None:
    model, given = network(folders, kind, "mm_lora", mix=False), of(images(), "optical", "dem")
    assert shares(model) == {}
    other = {**given, "dem": images(seed=2)["dem"]}
    assert far(maps(model, given, "optical"), maps(model, other, "optical")) == 0
    for stream in given:
        assert far(maps(model, given, stream), maps(model, of(given, stream), stream)) < 1e-4


@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip"])
def test_one_stream_has_the_lora_of_peft(folders: dict[str, Path], kind: str) -> None:
    """The same A, B and alpha give the same maps in peft's layers."""
    given = of(images(), "optical")
    options = {"alpha": 6.0, "targets": ("q", "v", "mlp")}
    model = network(folders, kind, "mm_lora", ("optical",), **options)
    peft = network(folders, kind, "lora", ("optical",), **options)
    mine = {site: model.backbone.network.get_submodule(site) for site in model.attached.sites}
    assert set(mine) == set(peft.attached.sites)
    with torch.no_grad():
        for site, layer in mine.items():
            pair, theirs = layer.pairs("optical")["whole"], peft.backbone.network.get_submodule(site)  # type: ignore[operator]
            theirs.lora_A["default"].weight.copy_(pair.lora_A.weight)  # type: ignore[index, union-attr]
            theirs.lora_B["default"].weight.copy_(pair.lora_B.weight)  # type: ignore[index, union-attr]
    assert far(maps(model, given, "optical"), maps(peft, given, "optical")) < 1e-4
    assert far(maps(model, given, "optical"), maps(network(folders, kind, "none"), given, "optical")) > 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("C44", "P26")
def test_a_stream_that_has_seen_nothing_is_as_good_as_missing(folders: dict[str, Path], kind: str, name: str) -> None:
    """And what is left is the stream's own adapter; of three streams, the two others still talk to each other."""
    three = ("optical", "dem", "sar")
    model, given = network(folders, kind, name, three), images()
    nothing = unseen(given["dem"])
    present = maps(model, given, "optical")
    missing = maps(model, of(given, "optical", "sar"), "optical")
    assert far(maps(model, {**given, "dem": nothing}, "optical"), missing) < 1e-4
    assert far(present, missing) > 1e-2
    alone = maps(model, of(given, "optical"), "optical")
    assert far(maps(model, {**given, "dem": nothing, "sar": unseen(given["sar"])}, "optical"), alone) < 1e-4
    assert far(missing, alone) > 1e-2
    single = network(folders, kind, name, ("optical",))
    assert far(maps(single, of(given, "optical"), "optical"), alone) == 0
    assert shares(single) == {}  # it would never learn


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_order_of_streams_changes_nothing(folders: dict[str, Path], kind: str, name: str) -> None:
    given = images()
    one = network(folders, kind, name, ("optical", "dem", "sar"))
    two = network(folders, kind, name, ("sar", "optical", "dem"))
    for stream in given:
        assert far(maps(one, given, stream), maps(two, given, stream)) < 1e-4


def test_updates_are_mixed_by_the_formula() -> None:
    mix, generator = Mix(("a", "b", "c")), torch.Generator().manual_seed(0)
    update = {name: torch.randn(2, 3, 4, generator=generator) for name in "abc"}
    seen = {name: torch.ones(2, 3, 1) for name in "abc"}
    with torch.no_grad():
        mix.shares["of_a"].fill_(0.7)
    pair = mix({n: update[n] for n in "ab"}, seen)
    torch.testing.assert_close(pair["a"], 0.7 * update["a"] + 0.3 * update["b"])
    torch.testing.assert_close(pair["b"], 0.5 * update["a"] + 0.5 * update["b"])
    three = mix(update, seen)
    torch.testing.assert_close(three["a"], 0.7 * update["a"] + 0.3 * (update["b"] + update["c"]) / 2)
    seen["b"] = torch.tensor([0.0, 0.5, 1.0]).expand(2, 3)[..., None]
    pair = mix({n: update[n] for n in "ab"}, seen)
    torch.testing.assert_close(pair["a"], update["a"] + 0.3 * seen["b"] * (update["b"] - update["a"]))
    assert torch.equal(pair["a"][:, 0], update["a"][:, 0])
    # where b has seen nothing, c counts as it does without b
    without = mix({n: update[n] for n in "ac"}, seen)
    torch.testing.assert_close(mix(update, seen)["a"][:, 0], without["a"][:, 0])
    assert torch.equal(mix({"a": update["a"]}, seen)["a"], update["a"])


@pytest.mark.pitfall("C44")
def test_what_a_token_has_not_seen_is_not_mixed_in() -> None:
    """In a layer, where tokens are what they are; attention then carries a stream's own tokens further, in itself."""
    route, draws = Route(), torch.Generator().manual_seed(0)
    layer = StreamLora(nn.Linear(4, 5), route, ("a", "b"), (), Mix(("a", "b")), 2, 1.0, 0.0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=draws)
    seen = torch.ones(2, 6)
    seen[1, :3] = 0.0  # of b
    x = torch.randn(2, 2 + 6, 4, generator=draws)
    route.tell(1, Tokens(x, seen, (2, 3), 2), {"a": slice(0, 1), "b": slice(1, 2)})
    garbage = x.clone()
    garbage[1, 2:5] = 1e6
    assert torch.equal(layer(garbage)[0], layer(x)[0])
    garbage[1, 6] = 1.0
    changed = (layer(garbage)[0] - layer(x)[0]).abs().amax(dim=-1) > 1e-3
    assert changed.tolist() == [False] * 6 + [True, False]
    # prefix tokens count by the share of the image that was seen, here a half
    moved = x.clone()
    moved[1, 0] += 1.0
    some = (layer(moved) - layer(x))[0, 0]
    route.tell(1, Tokens(x, torch.ones(2, 6), (2, 3), 2), {"a": slice(0, 1), "b": slice(1, 2)})
    torch.testing.assert_close(2 * some, (layer(moved) - layer(x))[0, 0], atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_told_of_other_rows_says_so() -> None:
    route = Route()
    with pytest.raises(ValueError, match="no stream"):
        route.rows_of(torch.zeros(2, 3))
    route.tell(1, Tokens(torch.zeros(4, 3, 2), torch.ones(4, 3), (1, 3), 0), {"a": slice(0, 2), "b": slice(2, 4)})
    assert route.rows_of(torch.zeros(4 * 9, 1)) == {"a": slice(0, 18), "b": slice(18, 36)}  # nine windows an image
    with pytest.raises(ValueError, match="6 rows in a layer for 4 images of a, b"):
        route.rows_of(torch.zeros(6, 3))


@pytest.mark.parametrize("kind", MODELS)
def test_bottlenecks_come_after_the_attention_and_beside_the_mlp(folders: dict[str, Path], kind: str) -> None:
    """Of the first block, whose input is that of the frozen encoder; windows of an image are rows of its stream."""
    attention = {"clip": "self_attn", "sam": "attn"}.get(kind, "attention")
    given = of(images(), "optical", "dem")
    found: dict[str, dict[str, torch.Tensor]] = {}

    def watch(model: Network, name: str) -> None:
        found[name] = {}
        block = model.backbone.blocks[0][1]

        def keep(part: str) -> Any:
            def hook(_: nn.Module, x: Any, y: Any) -> None:
                found[name] |= {part: y[0] if isinstance(y, tuple) else y, f"{part} gets": x[0] if x else None}

            return hook

        block.get_submodule(attention).register_forward_hook(keep("attention"))
        block.get_submodule("mlp").register_forward_hook(keep("mlp"))
        maps(model, given, "dem")

    model = network(folders, kind, "mm_adapter")
    watch(network(folders, kind, "none"), "plain")
    watch(model, "adapted")
    block = model.backbone.blocks[0][1]
    after, beside = (m for m in block.modules() if isinstance(m, OwnBottlenecks))
    with torch.no_grad():
        answer = found["plain"]["attention"]
        for rows, stream in zip(answer.chunk(2), ("optical", "dem"), strict=True):
            layer: Any = after.own[f"of_{stream}"]
            expected = rows + layer.up(F.gelu(layer.down(rows)))
            got = found["adapted"]["attention"].chunk(2)[stream == "dem"]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(got, rows, atol=1e-2)
        x = found["adapted"]["mlp gets"]
        mine, other = (beside.own[f"of_{s}"](rows) for s, rows in zip(("optical", "dem"), x.chunk(2), strict=True))
        seen = beside.route.seen_of(x)  # less than 1 where patches reach beyond the image
        updates = [mine + 0.5 * seen["dem"] * (other - mine), other + 0.5 * seen["optical"] * (mine - other)]
        torch.testing.assert_close(found["adapted"]["mlp"], beside.part(x) + torch.cat(updates))


@pytest.mark.parametrize("targets", [("q", "v"), ("v",), ("q", "k")])
@pytest.mark.pitfall("P4")
def test_of_a_fused_layer_the_wanted_thirds_alone_are_changed(
    folders: dict[str, Path], targets: tuple[str, ...]
) -> None:
    model = network(folders, "sam", "mm_lora", targets=targets)
    site = model.attached.sites[0]
    layer: Any = model.backbone.network.get_submodule(site)
    x = torch.randn(4, 3, 3, 32)
    layer.route.tell(1, Tokens(x, torch.ones(4, 9), (3, 3), 0), {"optical": slice(0, 2), "dem": slice(2, 4)})
    with torch.no_grad():
        delta = layer(x) - layer.layer(x)
        for part, third in zip("qkv", delta.chunk(3, dim=-1), strict=True):
            for rows, stream in ((slice(0, 2), "optical"), (slice(2, 4), "dem")):
                pair = layer.pairs(stream).get(part)
                expected = torch.zeros(2, 3, 3, 32) if pair is None else pair.lora_B(pair.lora_A(x[rows]))
                torch.testing.assert_close(third[rows], expected, atol=1e-4, rtol=1e-4)
                assert (part in targets) == bool((third[rows] != 0).any())


@pytest.mark.pitfall("C11")
def test_alpha_and_rank_scale_every_update(folders: dict[str, Path]) -> None:
    """Left out, alpha is the rank: the update is B A x."""
    found = {}
    for alpha in (None, 2.0, 6.0):
        model = network(folders, "clip", "mm_lora", alpha=alpha, mix=False)
        x = torch.ones(2, 1, 32)
        model.attached.before[0](
            1, Tokens(x, torch.ones(2, 1), (1, 1), 0), {"optical": slice(0, 1), "dem": slice(1, 2)}
        )
        sites = [model.backbone.network.get_submodule(s) for s in model.attached.sites if not s.endswith("fc2")]
        with torch.no_grad():
            found[alpha] = torch.cat([(s(x) - s.layer(x)).flatten() for s in sites])  # type: ignore[operator]
    assert len(sites) == 3 * DEPTH
    torch.testing.assert_close(found[2.0], found[None])
    torch.testing.assert_close(found[6.0], 3 * found[None], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("C6", "C8", "P9", "P10", "P53")
def test_all_that_was_added_learns_and_checkpointing_changes_no_bit(
    folders: dict[str, Path], kind: str, name: str
) -> None:
    given, found = of(images(), "optical", "dem"), []
    for asked in (False, True):
        model = network(folders, kind, name, checkpointing=asked).train()
        model(given).square().sum().backward()
        # another run of other streams before the blocks of the first are run again
        (model(given).square().sum() + model(of(given, "dem")).sum()).backward()
        parts = model.parts()
        assert not any(p.requires_grad for p in parts["encoder"].values())
        assert {id(p) for p in parts["adapter"].values()} == {id(p) for p in model.attached.added}
        found.append({name: p.grad for name, p in parts["adapter"].items()})
    assert [name for name, gradient in found[0].items() if gradient is None or not gradient.any()] == []
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_layers_answer_in_the_type_that_the_frozen_ones_compute_in(
    folders: dict[str, Path], kind: str, name: str
) -> None:
    """Tokens of type float32 would take twice the memory in mixed precision."""
    model, given, types = network(folders, kind, name), of(images(), "optical", "dem"), set()
    whole = maps(model, given, "optical")
    for site in model.attached.sites:
        model.backbone.network.get_submodule(site).register_forward_hook(lambda _, x, y: types.add(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert far(maps(model, given, "optical"), whole) < 0.1
    assert types == {torch.bfloat16}


@pytest.mark.pitfall("P8")
def test_dropout_acts_on_updates_in_training(folders: dict[str, Path]) -> None:
    model, given = network(folders, "dinov2", "mm_lora", dropout=0.5), of(images(), "optical", "dem")
    assert far(maps(model, given, "dem"), maps(model, given, "dem")) == 0
    model.train()
    assert far(maps(model, given, "dem"), maps(model, given, "dem")) > 1e-2
    training = {n.rpartition(".")[2] for n, m in model.backbone.network.named_modules() if m.training}
    assert training == {"drop"}


@pytest.mark.pitfall("P11")
def test_what_cannot_be_attached_is_told_and_nothing_is_changed(folders: dict[str, Path]) -> None:
    for name, changes, words in (
        ("mm_lora", {"rank": 0}, "expected a rank"),
        ("mm_lora", {"targets": ()}, "targets names no layer"),
        ("mm_adapter", {"ratio": 0.001}, "expected a bottleneck"),
    ):
        with pytest.raises(AdapterError, match=words):
            network(folders, "clip", name, **changes)
    for part, words in (("mlp", "no part called mlp"), ("self_attn", "no one layer at the end of its attention")):
        backbone = build_backbone("clip", str(folders["clip"]))
        delattr(backbone.blocks[1][1], part)
        names = [name for name, _ in backbone.named_parameters()]
        with pytest.raises(AdapterError, match=words):
            ADAPTERS["mm_adapter"].attach(backbone, ("a", "b"), ratio=0.25)
        assert [name for name, p in backbone.named_parameters() if not p.requires_grad] == names


def four_classes(count: int, seed: int) -> tuple[dict[str, Image], torch.Tensor]:
    """Images of 2 x 2 cells of class 2 a + b: a is bright in the optical image alone, b in the dem alone."""
    draws = torch.Generator().manual_seed(seed)
    cells = torch.randint(2, (2, count, 1, 2, 2), generator=draws)
    found = {}
    for bright, (name, bands) in zip(cells, {"optical": 3, "dem": 1}.items(), strict=True):
        noise = 10 * torch.randn(count, bands, 28, 28, generator=draws)
        pixels = 60.0 + 80.0 * bright.repeat_interleave(14, 2).repeat_interleave(14, 3) + noise
        found[name] = Image(pixels, torch.ones(count, 28, 28, dtype=torch.bool))
    return found, (2 * cells[0] + cells[1])[:, 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.pitfall("P53")
def test_a_stream_learns_what_only_the_other_sees(folders: dict[str, Path], name: str) -> None:
    """Answers from the optical rows alone: at most half of four classes, unless the dem is mixed into them."""
    scores = {}
    for learns in (True, False):
        model = network(folders, "dinov2", name, seed=None)
        if not learns:
            set_shares(model, 1.0)
            for share in shares(model).values():
                share.requires_grad_(False)
        torch.manual_seed(0)
        head = nn.Conv2d(32, 4, 1)
        learning = [p for p in (*model.backbone.parameters(), *head.parameters()) if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=0.02)
        given, labels = four_classes(24, 0)
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(head(model.encode(given)["optical"].maps[-1]), labels).backward()
            optimizer.step()
        given, labels = four_classes(100, 1)
        turned = {**given, "dem": Image(given["dem"].pixels.flip(0), given["dem"].valid)}
        for what, one in (("paired", given), ("turned", turned)):
            found = head(maps(model, one, "optical")[-1]).argmax(dim=1)
            scores[learns, what] = float((found == labels).float().mean())
        if learns:
            mine = [float(share.detach()) for name, share in shares(model).items() if "optical" in name]
            assert min(abs(share - 0.5) for share in mine) > 1e-3
    print(scores)
    assert scores[True, "paired"] > 0.9
    assert max(scores[True, "turned"], scores[False, "paired"]) < 0.6
