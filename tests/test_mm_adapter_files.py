"""Files of adapters of several modalities: whole, strict, and those of a copy are its own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import MODELS, save_all
from mm_models import NAMES, far, fill, images, maps, network, of, set_shares, shares
from safetensors.torch import load_file, save_file

from vfmseg.errors import CheckpointError
from vfmseg.model import Network


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("mm"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("P6", "P12")
def test_a_copy_has_a_route_and_files_of_its_own(
    folders: dict[str, Path], kind: str, name: str, tmp_path: Path
) -> None:
    model, given = network(folders, kind, name), of(images(), "optical", "dem")
    before = maps(model, given, "optical")
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert twin.state_dict().keys() == model.state_dict().keys()
        assert far(maps(twin, given, "optical"), before) == 0
        maps(model, of(images(batch=3), "dem"), "dem")  # the original is told of other rows
        (twin.encode(given)["optical"].maps[-1] ** 3).sum().backward()
        assert all(p.grad is None for p in model.attached.added)
        assert any(p.grad is not None for p in twin.attached.added)
        fill(twin, 5)
        assert far(maps(twin, given, "optical"), before) > 1e-2
        assert far(maps(model, given, "optical"), before) == 0
        twin.attached.save(tmp_path / str(number))
        again = network(folders, kind, name, seed=None)
        again.attached.load(tmp_path / str(number))
        assert far(maps(again, given, "optical"), maps(twin, given, "optical")) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("P6", "P14", "C10", "C14")
def test_files_hold_all_of_it_and_load_strictly(folders: dict[str, Path], kind: str, name: str, tmp_path: Path) -> None:
    model, given = network(folders, kind, name), of(images(), "optical", "dem")
    set_shares(model, 0.25)
    model.attached.save(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter.safetensors"
    tensors = load_file(file)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.attached.added)
    again = network(folders, kind, name, ("dem", "optical"), seed=None)  # whatever their order
    again.attached.load(tmp_path / "saved")
    for stream in given:
        assert far(maps(again, given, stream), maps(model, given, stream)) < 1e-4
    assert {float(share.detach()) for share in shares(again).values()} == {0.25}

    fits: dict[str, dict[str, Any]] = {
        "mm_lora": {
            "another shape": {"rank": 3},
            "alpha 2.0, .* says 5.0": {"alpha": 5.0},
            "not expected": {"mix": False},
        },
        "mm_adapter": {"another shape": {"ratio": 0.5}, "ratio 0.25, .* says 0.26": {"ratio": 0.26}},
    }
    for words, changes in fits[name].items():
        refuses(network(folders, kind, name, **changes), tmp_path / "saved", words)
    refuses(network(folders, kind, name, ("optical", "sar")), tmp_path / "saved", "missing")
    refuses(network(folders, kind, name, ("optical",)), tmp_path / "saved", "not expected")
    victim = next(n for n in tensors if n.endswith("dem.w"))
    for words, changed in {
        "1 tensors missing": {n: t for n, t in tensors.items() if n != victim},
        "1 tensors not expected": {**tensors, "stranger": torch.zeros(1)},
        "with NaN": {**tensors, victim: torch.tensor(torch.nan)},
    }.items():
        save_file(changed, file)
        refuses(model, tmp_path / "saved", words)
    file.unlink()
    refuses(model, tmp_path / "saved", "missing; the checkpoint is incomplete")


def refuses(model: Network, folder: Path, words: str) -> None:
    """Nothing is half loaded."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        model.attached.load(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_names_in_files_say_site_stream_and_part(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = {
        ("sam", "mm_lora"): ["attn.qkv.dem.q.lora_A.weight", "mlp.lin1.dem.lora_B.weight", "mlp.lin2.optical.w"],
        ("clip", "mm_lora"): ["self_attn.q_proj.optical.lora_A.weight", "mlp.fc1.dem.w"],
        ("registers", "mm_adapter"): ["attention.o_proj.dem.down.weight", "mlp.optical.up.bias", "mlp.dem.w"],
    }
    for (kind, name), ends in expected.items():
        model = network(folders, kind, name)
        model.attached.save(tmp_path / kind / name)
        names = set(load_file(tmp_path / kind / name / "adapter.safetensors"))
        prefix = model.backbone.blocks[0][0]
        assert {f"{prefix}.{end}" for end in ends} <= names
