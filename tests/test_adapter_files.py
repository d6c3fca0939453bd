"""Files of adapters: plain peft reads them, they load strictly, and merged or beside they give the same maps."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import LORA, MODELS, attach, build, build_encoder, last_map, picture, save_all, train, upstream
from safetensors.torch import load_file, save_file
from torch import Tensor

from vfmseg.adapters import lora
from vfmseg.encoders.backbone import BaseRecord, sha256_of
from vfmseg.errors import CheckpointError


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("saved-adapters"))


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
            attached.save(folder)
            with torch.no_grad():
                made[kind, name] = (folder, last_map(encoder))
        return made[kind, name]

    return make


@pytest.mark.parametrize("name", ["lora", "adapter"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("P6")
def test_a_saved_adapter_gives_the_same_maps(
    folders: dict[str, Path], trained: Callable[..., Any], kind: str, name: str
) -> None:
    folder, expected = trained(kind, name)
    encoder = build(folders, kind)
    with torch.no_grad():
        assert not torch.allclose(last_map(encoder), expected, atol=1e-2)
        attach(encoder, name).load(folder)
        assert torch.equal(last_map(encoder), expected)
    tensors = load_file(next(folder.glob("*.safetensors")))
    count = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert sum(t.numel() for t in tensors.values()) == count  # C10: nothing that learns is left out


@pytest.mark.parametrize("name", ["lora", "adapter"])
@pytest.mark.pitfall("P14", "C14")
def test_adapter_files_load_strictly(
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
        digest = sha256_of(encoder.backbone.network.state_dict())
        with pytest.raises(CheckpointError, match=words) as caught:
            attached.load(tmp_path)
        assert str(tmp_path / weights) in str(caught.value)
        assert sha256_of(encoder.backbone.network.state_dict()) == digest  # nothing half loaded
        if name == "lora":
            with pytest.raises(CheckpointError, match=words):
                lora.merge(build(folders, "sam").backbone, tmp_path, 2, 4.0, 0.0, ("q", "v"))
    (tmp_path / weights).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        attached.load(tmp_path)


@pytest.mark.pitfall("P14")
def test_an_adapter_of_another_scale_is_refused(folders: dict[str, Path], trained: Callable[..., Any]) -> None:
    folder, _ = trained("sam", "adapter")
    encoder = build(folders, "sam")
    attached = attach(encoder, "adapter", scale=0.3)
    digest = sha256_of(encoder.backbone.network.state_dict())
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: adapters of scale 0\.\d+, .* says 0\.3"):
        attached.load(folder)
    assert sha256_of(encoder.backbone.network.state_dict()) == digest


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("P6")
def test_plain_peft_reads_the_file_on_the_upstream_model(
    folders: dict[str, Path], trained: Callable[..., Any], kind: str
) -> None:
    from peft import PeftModel

    folder, _ = trained(kind)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    encoder = build(folders, kind)
    attach(encoder, "lora").load(folder)
    cls = encoder.backbone.family.model_class("dinov2_with_registers" if kind == "registers" else kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of tensors that it misses
        plain = PeftModel.from_pretrained(cls.from_pretrained(folders[kind]), str(folder)).eval()
    # upstream's own forward at its own size, against ours: the last hidden state before any further norm
    side = {"dinov2": 56, "registers": 56, "clip": 48, "sam": 64}[kind]
    images, valid = picture(side, side)
    with torch.no_grad():
        states = plain(encoder.prepare(images, valid), output_hidden_states=True).hidden_states[-1]
        expected = encoder.backbone.family.finish(encoder.backbone.network, states.flatten(1, -2))[
            :, encoder.backbone.prefix :
        ]
        found = encoder(images, valid).maps[-1].flatten(2).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.pitfall("P13")
def test_the_file_names_the_base_it_stands_on(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the hub is not asked for that base at every save."""
    encoder = build(folders, "clip")
    encoder.backbone.base = BaseRecord("owner/name", "0123abc", encoder.backbone.base.sha256)
    attached = attach(encoder, "lora")
    asked: list[str] = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda name, *_, **__: asked.append(name)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attached.save(tmp_path / "adapter")
    assert asked == []
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "0123abc")
    assert (config["r"], config["lora_alpha"]) == (LORA["rank"], LORA["alpha"])


@pytest.mark.pitfall("P1")
def test_many_targets_stay_spelled_out(tmp_path: Path) -> None:
    """Peft shortens 20 targets and more to suffixes; on the whole model those hit the blocks that were trimmed."""
    from peft import PeftModel

    model = upstream("dinov2", num_hidden_layers=12)
    model.save_pretrained(tmp_path / "base")
    encoder = build_encoder("dinov2", str(tmp_path / "base"), 3, layers=[11])
    attached = attach(encoder, "lora")
    attached.save(tmp_path / "adapter")
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
from vfmseg.adapters.lora import merge
folders, places = json.loads(sys.argv[1])
for kind, place in places.items():
    encoder = build(folders, kind)
    merge(encoder.backbone, Path(place), 2, 4.0, 0.0, ("q", "v"))
    assert not any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        torch.save(encoder(*picture(50, 70)).maps[-1], Path(place).parent / "merged.pt")
print(sorted(n for n in sys.modules if n.split(".")[0] == "peft"))
"""
    places = {kind: trained(kind) for kind in MODELS}
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


def refused(folders: dict[str, Path], kind: str, folder: Path, words: str, **changes: Any) -> None:
    """Loading beside and merging into the frozen weights must refuse alike, and change nothing."""
    settings = {**LORA, **changes}
    beside, into = build(folders, kind), build(folders, kind)
    attached = attach(beside, "lora", **changes)
    digests = [sha256_of(encoder.state_dict()) for encoder in (beside, into)]
    with pytest.raises(CheckpointError, match=words):
        attached.load(folder)
    with pytest.raises(CheckpointError, match=words):
        lora.merge(into.backbone, folder, **settings)
    assert [sha256_of(encoder.state_dict()) for encoder in (beside, into)] == digests


@pytest.mark.pitfall("P13", "P14")
def test_an_adapter_of_another_recipe_is_refused_by_loading_and_merging(
    folders: dict[str, Path], trained: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = trained("clip")
    refused(folders, "clip", folder, r"rank 2 and alpha 4\.0, but recipe\.yaml says 4 and 4\.0", rank=4)
    refused(folders, "clip", folder, r"rank 2 and alpha 4\.0, but recipe\.yaml says 2 and 8\.0", alpha=8.0)
    refused(folders, "clip", folder, "missing", targets=("q", "v", "o"))
    for change, words in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"target_modules": ["q_proj"]}, r"trained on other targets .*encoder\.layers\.0\.self_attn\.q_proj"),
    ):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
        refused(folders, "clip", tmp_path, words)


@pytest.mark.pitfall("P1", "P14")
def test_targets_of_a_fused_layer_are_told_by_its_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    """Names and shapes are the same whichever of q, k and v was trained."""
    encoder = build(folders, "sam")
    attached = attach(encoder, "lora", targets=("q", "k"))
    train(encoder)
    attached.save(tmp_path / "qk")
    refused(folders, "sam", tmp_path / "qk", r"other targets .*\(k of vision_encoder\.layers\.0\.attn\.qkv")
    again = build(folders, "sam")
    attach(again, "lora", targets=("q", "k", "v")).load(tmp_path / "qk")  # a third may learn nothing
