"""Adapters: found by structure, identity at first, frozen means frozen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoder_models import (
    ALL,
    DEPTH,
    MODELS,
    SETTINGS,
    Encoder,
    attach,
    backward,
    build,
    build_encoder,
    last_map,
    picture,
    save_all,
    train,
    upstream,
)
from torch import Tensor, nn

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.adapters.bottleneck import ParallelMlp
from vfmseg.adapters.sites import chosen_sites
from vfmseg.encoders.backbone import sha256_of
from vfmseg.errors import AdapterError
from vfmseg.model import parameter_table


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("adapted"))


def frozen_digest(encoder: Encoder) -> str:
    frozen = {n: p for n, p in encoder.named_parameters() if not p.requires_grad}
    return sha256_of({**frozen, **dict(encoder.named_buffers())})


def test_every_adapter_is_tested_here() -> None:
    assert set(SETTINGS) == set(ADAPTERS)


ATTENTION = {
    "dinov2": ("encoder.layer", "attention", ("q_proj", "k_proj", "v_proj", "o_proj"), ("mlp.fc1", "mlp.fc2")),
    "registers": ("encoder.layer", "attention", ("q_proj", "k_proj", "v_proj", "o_proj"), ("mlp.fc1", "mlp.fc2")),
    "clip": (
        "encoder.layers",
        "self_attn",
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("mlp.fc1", "mlp.fc2"),
    ),
    "sam": ("vision_encoder.layers", "attn", ("qkv", "qkv", "qkv", "proj"), ("mlp.lin1", "mlp.lin2")),
}


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("o",), ("mlp",), ALL])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("P1", "P2")
def test_targets_are_these_layers_of_the_image_encoder(
    folders: dict[str, Path], kind: str, targets: tuple[str, ...]
) -> None:
    """By name, for the installed transformers; nothing of SAM's mask decoder or CLIP's text tower."""
    place, attention, leaves, mlp = ATTENTION[kind]
    expected = set()
    for i in range(DEPTH):
        expected |= {f"{place}.{i}.{attention}.{leaves['qkvo'.index(t)]}" for t in targets if t != "mlp"}
        expected |= {f"{place}.{i}.{name}" for name in mlp} if "mlp" in targets else set()
    encoder = build(folders, kind)
    attached = attach(encoder, "lora", targets=targets)
    assert set(attached.sites) == expected
    adapted = {name.split(".lora_A")[0] for name, _ in encoder.backbone.network.named_parameters() if "lora_A" in name}
    assert adapted == expected


def old_block(separate: bool) -> nn.Module:
    """Names of ViTs in older transformers: query, key, value; two layers called dense."""
    parts = {"query": nn.Linear(6, 6), "key": nn.Linear(6, 6), "value": nn.Linear(6, 6)}
    attention = nn.ModuleDict({"attention": nn.ModuleDict(parts), "output": nn.ModuleDict({"dense": nn.Linear(6, 6)})})
    if separate:
        rest = {
            "intermediate": nn.ModuleDict({"dense": nn.Linear(6, 12)}),
            "output": nn.ModuleDict({"dense": nn.Linear(12, 6)}),
        }
    else:
        rest = {"mlp": nn.ModuleDict({"fc1": nn.Linear(6, 12), "fc2": nn.Linear(12, 6)})}
    return nn.ModuleDict({"norm1": nn.LayerNorm(6), "attention": attention, **rest})


def fake(*blocks: nn.Module) -> Any:
    return SimpleNamespace(
        family=SimpleNamespace(name="dinov2"), blocks=[(f"encoder.layer.{i}", b) for i, b in enumerate(blocks)]
    )


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.pitfall("P2")
def test_names_of_older_transformers_are_known(separate: bool) -> None:
    encoder = fake(old_block(separate))
    start = "encoder.layer.0."
    assert list(chosen_sites(encoder, ("q", "v"))) == [
        f"{start}attention.attention.query",
        f"{start}attention.attention.value",
    ]
    assert list(chosen_sites(encoder, ("o",))) == [f"{start}attention.output.dense"]
    mlp = ("intermediate.dense", "output.dense") if separate else ("mlp.fc1", "mlp.fc2")
    assert list(chosen_sites(encoder, ("mlp",))) == [f"{start}{name}" for name in mlp]


@pytest.mark.pitfall("P3")
def test_a_target_without_match_is_an_error_with_near_names(folders: dict[str, Path]) -> None:
    stranger = nn.ModuleDict({"attn": nn.ModuleDict({"q_projection": nn.Linear(6, 6)})})
    with pytest.raises(AdapterError, match=r"'q' matches no layer of encoder\.layer\.0 .*attn\.q_projection"):
        chosen_sites(fake(stranger), ("q",))
    # in one block of two is no match either
    with pytest.raises(AdapterError, match=r"'v' matches no layer of encoder\.layer\.1"):
        chosen_sites(fake(old_block(False), stranger), ("v",))
    # a layer called qkv that does not hold three equal parts is none
    odd = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(6, 12)})})
    with pytest.raises(AdapterError, match="'q' matches no layer"):
        chosen_sites(fake(odd), ("q",))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(AdapterError, match="expected a rank"):
            attach(build(folders, "clip"), "lora", **wrong)


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("C12", "P15")
def test_a_fresh_adapter_changes_nothing(folders: dict[str, Path], kind: str, name: str) -> None:
    encoder = build(folders, kind)
    images = picture(50, 70)
    with torch.no_grad():
        before = encoder(*images).maps
        attach(encoder, name, **({"targets": ALL} if name.endswith("lora") else {}))
        after = encoder(*images).maps
    assert all((a - b).abs().max() == 0 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("C6", "C8", "P4", "P5", "P16")
def test_only_the_adapter_learns_and_all_of_it(folders: dict[str, Path], kind: str, name: str) -> None:
    encoder = build(folders, kind, in_channels=4)
    backbone = encoder.backbone.network
    before = {n: (p.dtype, p.device) for n, p in backbone.named_parameters()}
    attached = attach(encoder, name)
    marks = {
        "none": "stems.",
        "full": "",
        "lora": ".lora_",
        "adapter": ".mlp.",
        "mm_lora": ".lora_",
        "mm_adapter": ".own.",
    }
    learning = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    assert "stems.of_image.mix.extra.weight" in learning  # what maps further bands in is no part of the frozen backbone
    assert all(marks[name] in n or n.startswith("stems.") for n in learning)
    if name == "adapter":
        assert not any(".mlp.mlp." in n for n in learning)
    elif name == "full":
        assert {f"backbone.network.{n}" for n in before} | {"stems.of_image.mix.extra.weight"} == set(learning)
    # the frozen parameters are those that were there, of their type and place
    frozen = [p for p in encoder.parameters() if not p.requires_grad]
    assert len(frozen) == (0 if name == "full" else len(before))
    assert {(p.dtype, p.device) for p in frozen} <= set(before.values())

    digest, start = frozen_digest(encoder), copy.deepcopy(learning)
    backward(encoder)
    assert [n for n, p in learning.items() if p.grad is None] == []
    train(encoder)
    assert frozen_digest(encoder) == digest
    if name == "lora":
        ups = [n for n in learning if "lora_B" in n]
        assert len(ups) == len(attached.sites)
        assert all(not torch.equal(learning[n], start[n]) for n in ups)
    unmoved = [n for n, p in learning.items() if torch.equal(p, start[n])]
    assert unmoved == []


@pytest.mark.parametrize("name", ["none", "lora", "adapter"])
@pytest.mark.pitfall("C7")
def test_a_parameter_that_sounds_like_an_adapter_stays_frozen(folders: dict[str, Path], name: str) -> None:
    encoder = build(folders, "clip")
    block = encoder.backbone.blocks[0][1]
    for sound in ("adapter_x", "lora_x", "up"):
        block.register_parameter(sound, nn.Parameter(torch.ones(2)))
    attach(encoder, name)
    assert not any(
        p.requires_grad for n, p in encoder.named_parameters() if n.split(".")[-1] in ("adapter_x", "lora_x")
    )
    assert not block.get_parameter("up").requires_grad


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("C11")
def test_alpha_counts_in_every_layer(folders: dict[str, Path], kind: str) -> None:
    deltas: dict[float, dict[str, Tensor]] = {}
    for alpha in (1.0, 2.0):
        encoder = build(folders, kind)
        attached = attach(encoder, "lora", targets=ALL, alpha=alpha)
        generator = torch.Generator().manual_seed(5)
        deltas[alpha] = {}
        for site in attached.sites:
            layer: Any = encoder.backbone.network.get_submodule(site)
            with torch.no_grad():
                for part in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                    part.copy_(torch.randn(part.shape, generator=generator))
                x = torch.randn(2, layer.in_features, generator=generator)
                deltas[alpha][site] = layer(x) - layer.base_layer(x)
    assert len(deltas[1.0]) == DEPTH * (4 if kind == "sam" else 6)
    for site, single in deltas[1.0].items():
        assert single.abs().max() > 0.1
        assert torch.allclose(deltas[2.0][site], 2 * single, rtol=1e-3, atol=1e-4)


def test_adaptformer_follows_its_formula() -> None:
    adapter = ParallelMlp(nn.Linear(5, 5), 5, 3, 0.25)
    x = torch.randn(2, 4, 5)
    assert torch.equal(adapter(x), adapter.mlp(x))
    nn.init.normal_(adapter.up.weight)
    expected = adapter.mlp(x) + 0.25 * adapter.up((adapter.down(x)).clamp(min=0))
    assert not torch.allclose(adapter.down(x).clamp(min=0), adapter.down(x))
    torch.testing.assert_close(adapter(x), expected)


@pytest.mark.parametrize("targets", [("q", "v"), ("q",), ("k", "v"), ("q", "k", "v")])
@pytest.mark.pitfall("P1")
def test_fused_qkv_learns_the_wanted_thirds_alone(folders: dict[str, Path], targets: tuple[str, ...]) -> None:
    encoder = build(folders, "sam")
    attached = attach(encoder, "lora", targets=targets)
    train(encoder)
    for site in attached.sites:
        layer: Any = encoder.backbone.network.get_submodule(site)
        for part, rows in zip("qkv", layer.lora_B["default"].weight.chunk(3), strict=True):
            assert bool((rows != 0).any()) == (part in targets)


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda e: e.to(torch.bfloat16), lambda e: pickle.loads(pickle.dumps(e))]
)
@pytest.mark.pitfall("P1", "C10")
def test_unwanted_thirds_stay_zero_in_a_copied_or_cast_model(
    folders: dict[str, Path], change: Callable[[Encoder], Encoder]
) -> None:
    """What holds them must travel with the module; `train` decays the weights too."""
    encoder = build(folders, "sam")
    attached = attach(encoder, "lora", targets=("q", "v"))
    changed = change(encoder)
    train(changed)
    for site in attached.sites:
        q, k, v = changed.backbone.network.get_submodule(site).lora_B["default"].weight.chunk(3)  # type: ignore[union-attr]
        assert bool(q.any())
        assert not bool(k.any())
        assert bool(v.any())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("P9", "P10")
def test_checkpointing_gives_adapters_the_same_gradient(folders: dict[str, Path], kind: str) -> None:
    found = []
    for asked in (False, True):
        encoder = build(folders, kind, gradient_checkpointing=asked)
        torch.manual_seed(0)
        attach(encoder, "lora")
        encoder.train()
        backward(encoder)
        found.append({n: p.grad for n, p in encoder.named_parameters() if p.requires_grad})
    ups = [n for n in found[0] if "lora_B" in n]
    assert ups
    for name in ups:
        assert found[0][name] is not None
        assert found[1][name] is not None
        assert found[0][name].abs().max() > 0
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.pitfall("P8")
def test_dropout_acts_in_the_adapter_alone(tmp_path: Path) -> None:
    upstream("dinov2", drop_path_rate=0.5, attention_probs_dropout_prob=0.5).save_pretrained(tmp_path)
    encoder = build_encoder("dinov2", str(tmp_path), 3)
    attached = attach(encoder, "lora", dropout=0.5)
    assert not any(m.training for m in encoder.modules())  # as the encoder was
    with torch.no_grad():
        for site in attached.sites:
            layer: Any = encoder.backbone.network.get_submodule(site)
            nn.init.normal_(layer.lora_B["default"].weight)
        assert encoder.train() is encoder  # C9
        assert not torch.equal(last_map(encoder), last_map(encoder))
        training = {n for n, m in encoder.backbone.network.named_modules() if m.training}
        assert training
        assert all("lora_dropout" in n for n in training)
        encoder.eval()
        assert torch.equal(last_map(encoder), last_map(encoder))


@pytest.mark.pitfall("P8")
def test_an_encoder_that_learns_as_a_whole_drops_as_published(tmp_path: Path) -> None:
    upstream("dinov2", drop_path_rate=0.5, attention_probs_dropout_prob=0.5).save_pretrained(tmp_path)
    encoder = build_encoder("dinov2", str(tmp_path), 3)
    attach(encoder, "full")
    with torch.no_grad():
        encoder.train()
        assert not torch.equal(last_map(encoder), last_map(encoder))
        encoder.eval()
        assert torch.equal(last_map(encoder), last_map(encoder))


@pytest.mark.pitfall("C13")
def test_switching_modes_merges_nothing(folders: dict[str, Path]) -> None:
    encoder = build(folders, "clip")
    attached = attach(encoder, "lora")
    train(encoder)
    with torch.no_grad():
        first = last_map(encoder)
        for mode in (True, False, True, False):
            encoder.train(mode)
            merged = [encoder.backbone.network.get_submodule(site).merged for site in attached.sites]
            assert merged == [False] * len(attached.sites)
            assert torch.equal(last_map(encoder), first)


@pytest.mark.pitfall("C10")
def test_table_counts_what_learns(folders: dict[str, Path]) -> None:
    encoder = build(folders, "sam")
    published = sum(p.numel() for p in encoder.parameters())
    attach(encoder, "lora")
    width, rank = 32, 2
    expected = DEPTH * rank * (width + 3 * width)
    encoder.decoder = nn.Linear(4, 2)
    assert parameter_table(encoder) == [
        ("encoder", 0, published),
        ("adapter", expected, expected),
        ("decoder", 10, 10),
        ("all", expected + 10, published + expected + 10),
    ]


@pytest.mark.pitfall("C10")
def test_table_of_a_trained_encoder_has_no_adapter(folders: dict[str, Path]) -> None:
    encoder = build(folders, "dinov2")
    attach(encoder, "full")
    total = sum(p.numel() for p in encoder.parameters())
    assert parameter_table(encoder)[0] == ("encoder", total, total)


def test_attaching_says_nothing(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    for kind in MODELS:
        attach(build(folders, kind), "lora").save(tmp_path / kind)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize("name", ["lora", "adapter"])
@pytest.mark.pitfall("P11")
def test_an_error_while_injecting_surfaces_and_thaws_nothing(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken layer")

    encoder = build(folders, "sam")
    monkeypatch.setattr(
        "peft.tuners.lora.layer.LoraLayer.update_layer" if name == "lora" else "torch.nn.init.zeros_", fails
    )
    with pytest.raises(RuntimeError, match="broken layer"):
        attach(encoder, name)
    assert not any(p.requires_grad for n, p in encoder.named_parameters() if "lora" not in n)


@pytest.mark.pitfall("P11")
def test_an_encoder_without_the_expected_parts_is_an_error(folders: dict[str, Path]) -> None:
    encoder = build(folders, "clip")
    encoder.backbone.blocks[1][1].feed_forward = encoder.backbone.blocks[1][1].mlp  # type: ignore[assignment]
    del encoder.backbone.blocks[1][1].mlp
    with pytest.raises(AdapterError, match=r"block encoder\.layers\.1 has no part called mlp, but .*; choose lora"):
        attach(encoder, "adapter")
    with pytest.raises(AdapterError, match="targets"):
        attach(build(folders, "clip"), "lora", targets=())
