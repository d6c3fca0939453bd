"""The catalog of published checkpoints: its page is current, its numbers are those of the classes, statistics fit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import Dinov2WithRegistersConfig
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionModel

from vfmseg.catalog import CATALOG, FAMILIES, Published, checkpoints_markdown, published_statistics
from vfmseg.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
# of the published configurations: attention heads by width; image size that the position table was trained for
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
SAM_GLOBAL = {12: [2, 5, 8, 11], 24: [5, 11, 17, 23], 32: [7, 15, 23, 31]}


def published_encoder(row: Published) -> torch.nn.Module:
    """The image encoder as published, without weights; takes no memory."""
    shape = {
        "hidden_size": row.width,
        "num_hidden_layers": row.depth,
        "num_attention_heads": HEADS[row.width],
        "patch_size": row.patch,
    }
    with torch.device("meta"):
        if row.loads_with == "SamVisionModel":
            windows = SAM_GLOBAL[row.depth]
            return SamVisionModel(SamVisionConfig(**shape, mlp_dim=4 * row.width, global_attn_indexes=windows))
        if row.loads_with == "CLIPVisionModel":
            size = 336 if row.checkpoint.endswith("336") else 224
            return CLIPVisionModel(CLIPVisionConfig(**shape, intermediate_size=4 * row.width, image_size=size))
        shape |= {"image_size": 518, "use_swiglu_ffn": row.checkpoint.endswith("giant")}
        if row.loads_with == "Dinov2Model":
            return Dinov2Model(Dinov2Config(**shape))
        assert row.loads_with == "Dinov2WithRegistersModel"
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=4))


@pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.checkpoint)
def test_catalog_counts_are_those_of_the_class(row: Published) -> None:
    assert sum(p.numel() for p in published_encoder(row).parameters()) == row.parameters


def test_catalog_names_the_checkpoints_that_were_promised() -> None:
    sizes = ("small", "base", "large", "giant")
    expected = {f"facebook/sam-vit-{size}" for size in ("base", "large", "huge")}
    expected |= {f"facebook/dinov2-{size}" for size in sizes}
    expected |= {f"facebook/dinov2-with-registers-{size}" for size in sizes}
    clip = ("base-patch32", "base-patch16", "large-patch14", "large-patch14-336")
    expected |= {f"openai/clip-vit-{name}" for name in clip}
    assert set(CATALOG) == expected
    assert all(row.checkpoint == key for key, row in CATALOG.items())
    licences = {(row.family, row.licence) for row in CATALOG.values()}
    assert licences == {("sam", "Apache-2.0"), ("dinov2", "Apache-2.0"), ("clip", "MIT")}


@pytest.mark.pitfall("P21")
def test_normalisation_belongs_to_the_weights() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    expected = {"sam": imagenet, "dinov2": imagenet, "clip": clip}
    for row in CATALOG.values():
        assert (row.mean, row.std) == expected[row.family]
        assert published_statistics(row.family, row.checkpoint) == expected[row.family]
        assert FAMILIES[row.family].statistics == expected[row.family]
    # a local folder is in no catalog: its family decides
    assert published_statistics("clip", "/models/my-clip") == clip
    assert published_statistics("builtin", None) == imagenet


@pytest.mark.pitfall("P21")
def test_statistics_of_another_family_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"openai/clip-vit-base-patch16 is a clip checkpoint, not dinov2"):
        published_statistics("dinov2", "openai/clip-vit-base-patch16")
    with pytest.raises(CheckpointError, match=r"'dino' is not known; did you mean 'dinov2'\?"):
        published_statistics("dino", "facebook/dinov2-small")


def test_catalog_rows_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CATALOG["facebook/dinov2-small"].mean = (0.0, 0.0, 0.0)


def test_checkpoints_page_is_current() -> None:
    written = (ROOT / "checkpoints.md").read_text(encoding="utf-8")
    assert written == checkpoints_markdown(), "run: python -m vfmseg.catalog > checkpoints.md"
    for row in CATALOG.values():
        (line,) = [line for line in written.splitlines() if f"| `{row.checkpoint}` |" in line]
        for cell in (row.family, row.licence, str(row.patch), f"{row.parameters:,}", row.loads_with):
            assert cell in line
    (line,) = [line for line in written.splitlines() if line.startswith("| builtin |")]
    assert "| in the package |" in line


def test_catalog_prints_its_page_without_torch() -> None:
    code = (
        "import sys, runpy; runpy.run_module('vfmseg.catalog', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout.decode() == checkpoints_markdown()


@pytest.mark.pitfall("P21")
def test_a_local_folder_says_its_own_statistics(tmp_path: Path) -> None:
    assert published_statistics("dinov2", str(tmp_path)) == FAMILIES["dinov2"].statistics
    own = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143], "do_normalize": True}
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(own))
    assert published_statistics("dinov2", str(tmp_path)) == ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))
    file.write_text(json.dumps(own | {"do_normalize": False}))
    assert published_statistics("dinov2", str(tmp_path)) == FAMILIES["dinov2"].statistics
    for wrong in ('{"image_mean": [0.4, 0.4, 0.4]}', '{"image_mean": [1], "image_std": [1]}', "[1]", "{"):
        file.write_text(wrong)
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: not understood"):
            published_statistics("dinov2", str(tmp_path))
    file.write_text(json.dumps(own | {"image_std": [0.2, 0.0, 0.1]}))
    with pytest.raises(CheckpointError, match="expected numbers above 0"):
        published_statistics("dinov2", str(tmp_path))
