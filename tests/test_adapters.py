"""Adapters: found by structure, identity at first, frozen means frozen, files that plain peft reads, strict loading."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoder_models import DEPTH, build, picture, save_all, upstream
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vfmseg.adapters.attach import ADAPTERS, Attached, load_adapter, merge_lora, parameter_table, save_adapter
from vfmseg.adapters.sites import chosen_sites
from vfmseg.encoders.base import Encoder, sha256_of
from vfmseg.encoders.build import build_encoder
from vfmseg.errors import AdapterError, CheckpointError

ALL = ("q", "k", "v", "o", "mlp")
FAMILIES = ("dinov2", "registers", "clip", "sam")
LORA: dict[str, Any] = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ("q", "v")}
SETTINGS: dict[str, dict[str, Any]] = {"none": {}, "full": {}, "lora": LORA, "adapter": {"hidden": 4, "scale": 0.5}}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("adapted"))


def attach(encoder: Encoder, name: str, **changes: Any) -> Attached:
    return ADAPTERS[name](encoder, **{**SETTINGS[name], **changes})


def last_map(encoder: Encoder) -> Tensor:
    return encoder(*picture(50, 70, bands=encoder.in_channels)).maps[
        -1
    ]  # H and W differ, and are multiples of no patch


def backward(encoder: Encoder) -> None:
    """Gradient of a fixed random sum over all maps (their squares are constant, as maps are normed)."""
    generator = torch.Generator().manual_seed(3)
    maps = encoder(*picture(50, 70, bands=encoder.in_channels)).maps
    torch.stack([(m * torch.randn(m.shape, generator=generator)).sum() for m in maps]).sum().backward()


def train(encoder: Encoder, steps: int = 3) -> None:
    learning = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.02, weight_decay=0.1)
    encoder.train()
    for _ in range(steps):
        optimizer.zero_grad()
        backward(encoder)
        optimizer.step()
    encoder.eval()


def frozen_digest(encoder: Encoder) -> str:
    frozen = {n: p for n, p in encoder.named_parameters() if not p.requires_grad}
    return sha256_of({**frozen, **dict(encoder.named_buffers())})


def test_every_adapter_is_tested_here() -> None:
    assert set(SETTINGS) == set(ADAPTERS)


ATTENTION = {
    "dinov2": ("encoder.layer", "attention", ("q_proj", "k_proj", "v_proj", "o_proj"), ("mlp.fc1", "mlp.fc2")),
    "registers": ("encoder.layer", "attention", ("q_proj", "k_proj", "v_proj", "o_proj"), ("mlp.fc1", "mlp.fc2")),
    "clip": ("encoder.layers", "self_attn", ("q_proj", "k_proj", "v_proj", "out_proj"), ("mlp.fc1", "mlp.fc2")),
    "sam": ("vision_encoder.layers", "attn", ("qkv", "qkv", "qkv", "proj"), ("mlp.lin1", "mlp.lin2")),
}


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("o",), ("mlp",), ALL])
@pytest.mark.parametrize("kind", FAMILIES)
def test_p1_p2_targets_are_these_layers_of_the_image_encoder(
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
    adapted = {name.split(".lora_A")[0] for name, _ in encoder.backbone.named_parameters() if "lora_A" in name}
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
    return SimpleNamespace(family="dinov2", blocks=[(f"encoder.layer.{i}", b) for i, b in enumerate(blocks)])


@pytest.mark.parametrize("separate", [False, True])
def test_p2_names_of_older_transformers_are_known(separate: bool) -> None:
    encoder = fake(old_block(separate))
    start = "encoder.layer.0."
    assert list(chosen_sites(encoder, ("q", "v"))) == [
        f"{start}attention.attention.query",
        f"{start}attention.attention.value",
    ]
    assert list(chosen_sites(encoder, ("o",))) == [f"{start}attention.output.dense"]
    mlp = ("intermediate.dense", "output.dense") if separate else ("mlp.fc1", "mlp.fc2")
    assert list(chosen_sites(encoder, ("mlp",))) == [f"{start}{name}" for name in mlp]


def test_p3_a_target_without_match_is_an_error_with_near_names(folders: dict[str, Path]) -> None:
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
@pytest.mark.parametrize("kind", FAMILIES)
def test_c12_p15_a_fresh_adapter_changes_nothing(folders: dict[str, Path], kind: str, name: str) -> None:
    encoder = build(folders, kind)
    images = picture(50, 70)
    with torch.no_grad():
        before = encoder(*images).maps
        attach(encoder, name, **({"targets": ALL} if name == "lora" else {}))
        after = encoder(*images).maps
    assert all((a - b).abs().max() == 0 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("kind", FAMILIES)
def test_c6_c8_p4_p5_p16_only_the_adapter_learns_and_all_of_it(folders: dict[str, Path], kind: str, name: str) -> None:
    encoder = build(folders, kind, in_channels=4)
    backbone = encoder.backbone
    before = {n: (p.dtype, p.device) for n, p in backbone.named_parameters()}
    attached = attach(encoder, name)
    marks = {"none": "stem.", "full": "", "lora": ".lora_", "adapter": ".mlp."}
    learning = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    assert "stem.extra.weight" in learning  # what maps further bands in is no part of the frozen backbone
    assert all(marks[name] in n or n.startswith("stem.") for n in learning)
    if name == "adapter":
        assert not any(".mlp.mlp." in n for n in learning)
    elif name == "full":
        assert {f"backbone.{n}" for n in before} | {"stem.extra.weight"} == set(learning)
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
def test_c7_a_parameter_that_sounds_like_an_adapter_stays_frozen(folders: dict[str, Path], name: str) -> None:
    encoder = build(folders, "clip")
    block = encoder.blocks[0][1]
    for sound in ("adapter_x", "lora_x", "up"):
        block.register_parameter(sound, nn.Parameter(torch.ones(2)))
    attach(encoder, name)
    assert not any(
        p.requires_grad for n, p in encoder.named_parameters() if n.split(".")[-1] in ("adapter_x", "lora_x")
    )
    assert not block.get_parameter("up").requires_grad


@pytest.mark.parametrize("kind", FAMILIES)
def test_c11_alpha_counts_in_every_layer(folders: dict[str, Path], kind: str) -> None:
    deltas: dict[float, dict[str, Tensor]] = {}
    for alpha in (1.0, 2.0):
        encoder = build(folders, kind)
        attached = attach(encoder, "lora", targets=ALL, alpha=alpha)
        generator = torch.Generator().manual_seed(5)
        deltas[alpha] = {}
        for site in attached.sites:
            layer: Any = encoder.backbone.get_submodule(site)
            with torch.no_grad():
                for part in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                    part.copy_(torch.randn(part.shape, generator=generator))
                x = torch.randn(2, layer.in_features, generator=generator)
                deltas[alpha][site] = layer(x) - layer.base_layer(x)
    assert len(deltas[1.0]) == DEPTH * (4 if kind == "sam" else 6)
    for site, single in deltas[1.0].items():
        assert single.abs().max() > 0.1
        assert torch.allclose(deltas[2.0][site], 2 * single, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("targets", [("q", "v"), ("q",), ("k", "v"), ("q", "k", "v")])
def test_p1_fused_qkv_learns_the_wanted_thirds_alone(folders: dict[str, Path], targets: tuple[str, ...]) -> None:
    encoder = build(folders, "sam")
    attached = attach(encoder, "lora", targets=targets)
    train(encoder)
    for site in attached.sites:
        layer: Any = encoder.backbone.get_submodule(site)
        for part, rows in zip("qkv", layer.lora_B["default"].weight.chunk(3), strict=True):
            assert bool((rows != 0).any()) == (part in targets)


@pytest.mark.parametrize("kind", FAMILIES)
def test_p9_p10_checkpointing_gives_adapters_the_same_gradient(folders: dict[str, Path], kind: str) -> None:
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


def test_p8_dropout_acts_in_the_adapter_alone(tmp_path: Path) -> None:
    upstream("dinov2", drop_path_rate=0.5, attention_probs_dropout_prob=0.5).save_pretrained(tmp_path)
    encoder = build_encoder("dinov2", str(tmp_path), 3)
    attached = attach(encoder, "lora", dropout=0.5)
    with torch.no_grad():
        for site in attached.sites:
            layer: Any = encoder.backbone.get_submodule(site)
            nn.init.normal_(layer.lora_B["default"].weight)
        assert encoder.train() is encoder  # C9
        assert not torch.equal(last_map(encoder), last_map(encoder))
        training = {n for n, m in encoder.backbone.named_modules() if m.training}
        assert training
        assert all("lora_dropout" in n for n in training)
        encoder.eval()
        assert torch.equal(last_map(encoder), last_map(encoder))


def test_c13_switching_modes_merges_nothing(folders: dict[str, Path]) -> None:
    encoder = build(folders, "clip")
    attached = attach(encoder, "lora")
    train(encoder)
    with torch.no_grad():
        first = last_map(encoder)
        for mode in (True, False, True, False):
            encoder.train(mode)
            merged = [encoder.backbone.get_submodule(site).merged for site in attached.sites]
            assert merged == [False] * len(attached.sites)
            assert torch.equal(last_map(encoder), first)


@pytest.fixture(scope="session")
def trained(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(kind, adapter name) -> (folder of the saved adapter, map of the trained encoder); made once each."""
    made: dict[tuple[str, str], tuple[Path, Tensor]] = {}

    def make(kind: str, name: str = "lora") -> tuple[Path, Tensor]:
        if (kind, name) not in made:
            encoder = build(folders, kind)
            attached = attach(encoder, name)
            train(encoder)
            folder = tmp_path_factory.mktemp("saved") / kind
            save_adapter(attached, folder)
            with torch.no_grad():
                made[kind, name] = (folder, last_map(encoder))
        return made[kind, name]

    return make


@pytest.mark.parametrize("name", ["lora", "adapter"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_p6_a_saved_adapter_gives_the_same_maps(
    folders: dict[str, Path], trained: Callable[..., Any], kind: str, name: str
) -> None:
    folder, expected = trained(kind, name)
    encoder = build(folders, kind)
    with torch.no_grad():
        assert not torch.allclose(last_map(encoder), expected, atol=1e-2)
        load_adapter(encoder, attach(encoder, name), folder)
        assert torch.equal(last_map(encoder), expected)
    tensors = load_file(next(folder.glob("*.safetensors")))
    count = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert sum(t.numel() for t in tensors.values()) == count  # C10: nothing that learns is left out


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_p14_c14_adapter_files_load_strictly(
    folders: dict[str, Path], trained: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    folder, _ = trained("sam", name)
    weights = next(folder.glob("*.safetensors")).name
    tensors = load_file(folder / weights)
    victim = sorted(tensors)[1]
    cases = {
        r"1 tensors missing": {n: t for n, t in tensors.items() if n != victim},
        r"1 tensors not expected \(stranger": {**tensors, "stranger": torch.zeros(1)},
        r"1 tensors of another shape": {**tensors, victim: torch.zeros(9, 9)},
    }
    for words, changed in cases.items():
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        save_file(changed, tmp_path / weights)
        encoder = build(folders, "sam")
        attached = attach(encoder, name)
        digest = sha256_of(encoder.backbone.state_dict())
        with pytest.raises(CheckpointError, match=words) as caught:
            load_adapter(encoder, attached, tmp_path)
        assert str(tmp_path / weights) in str(caught.value)
        assert sha256_of(encoder.backbone.state_dict()) == digest  # nothing half loaded
        if name == "lora":
            with pytest.raises(CheckpointError, match=words):
                merge_lora(build(folders, "sam"), tmp_path, 2, 4.0, ("q", "v"))
    (tmp_path / weights).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_adapter(encoder, attached, tmp_path)


@pytest.mark.parametrize("kind", FAMILIES)
def test_p6_plain_peft_reads_the_file_on_the_upstream_model(
    folders: dict[str, Path], trained: Callable[..., Any], kind: str
) -> None:
    from peft import PeftModel

    folder, _ = trained(kind)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    encoder = build(folders, kind)
    load_adapter(encoder, attach(encoder, "lora"), folder)
    cls = encoder.anatomy.model_class("dinov2_with_registers" if kind == "registers" else kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of tensors that it misses
        plain = PeftModel.from_pretrained(cls.from_pretrained(folders[kind]), str(folder)).eval()
    # upstream's own forward at its own size, against ours: the last hidden state before any further norm
    side = {"dinov2": 56, "registers": 56, "clip": 48, "sam": 64}[kind]
    images, valid = picture(side, side)
    with torch.no_grad():
        states = plain(encoder.prepare(images, valid), output_hidden_states=True).hidden_states[-1]
        expected = encoder.anatomy.finish(encoder.backbone, states.flatten(1, -2))[:, encoder.prefix :]
        found = encoder(images, valid).maps[-1].flatten(2).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-5)


def test_p1_many_targets_stay_spelled_out(tmp_path: Path) -> None:
    """Peft shortens 20 targets and more to suffixes; on the whole model those hit the blocks that were trimmed."""
    from peft import PeftModel

    model = upstream("dinov2", num_hidden_layers=12)
    model.save_pretrained(tmp_path / "base")
    encoder = build_encoder("dinov2", str(tmp_path / "base"), 3, layers=[11])
    attached = attach(encoder, "lora")
    save_adapter(attached, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == list(attached.sites)
    assert len(attached.sites) == 22
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of layers that the file says nothing about
        PeftModel.from_pretrained(model, str(tmp_path / "adapter"))


def test_merged_lora_equals_peft_and_needs_no_peft(folders: dict[str, Path], trained: Callable[..., Any]) -> None:
    program = """
import json, sys, torch
from pathlib import Path
from encoder_models import build, picture
from vfmseg.adapters.attach import merge_lora
folders, places = json.loads(sys.argv[1])
for kind, place in places.items():
    encoder = build(folders, kind)
    attached = merge_lora(encoder, Path(place), 2, 4.0, ("q", "v"))
    assert not any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        torch.save(encoder(*picture(50, 70)).maps[-1], Path(place).parent / "merged.pt")
print(sorted(n for n in sys.modules if n.split(".")[0] == "peft"))
"""
    places = {kind: trained(kind) for kind in FAMILIES}
    argument = json.dumps([{k: str(v) for k, v in folders.items()}, {k: str(p) for k, (p, _) in places.items()}])
    done = subprocess.run(
        [sys.executable, "-c", program, argument],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""  # whole CLIP and SAM folders, and yet no reports and progress bars
    for folder, expected in places.values():
        assert torch.allclose(torch.load(folder.parent / "merged.pt"), expected, atol=1e-5)


def test_merging_refuses_what_is_not_this_lora(
    folders: dict[str, Path], trained: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = trained("clip")
    encoder = build(folders, "clip")
    digest = sha256_of(encoder.backbone.state_dict())
    with pytest.raises(CheckpointError, match=r"rank 2 and alpha 4\.0, but recipe\.yaml says 4 and 4\.0"):
        merge_lora(encoder, folder, 4, 4.0, ("q", "v"))
    with pytest.raises(CheckpointError, match="missing"):
        merge_lora(encoder, folder, 2, 4.0, ("q", "v", "o"))
    for change, words in (({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "peft_type = IA3")):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=words):
            merge_lora(encoder, tmp_path, 2, 4.0, ("q", "v"))
    assert sha256_of(encoder.backbone.state_dict()) == digest


def test_c10_table_counts_what_learns(folders: dict[str, Path]) -> None:
    encoder = build(folders, "sam")
    attach(encoder, "lora")
    width, rank = 32, 2
    expected = DEPTH * rank * (width + 3 * width)
    total = sum(p.numel() for p in encoder.parameters())
    head = nn.Linear(4, 2)
    assert parameter_table({"encoder": encoder, "decoder": head}) == [
        ("encoder", expected, total),
        ("decoder", 10, 10),
        ("all", expected + 10, total + 10),
    ]


def test_attaching_says_nothing(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    for kind in FAMILIES:
        save_adapter(attach(build(folders, kind), "lora"), tmp_path / kind)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
