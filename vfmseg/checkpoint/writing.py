"""Writing a segmenter folder: the trained tensors, what they stand on, and a card for people."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vfmseg.catalog import CATALOG
from vfmseg.checkpoint.folder import FORMATS, MARK, segmenter_folder
from vfmseg.checkpoint.record import input_entry
from vfmseg.data.inputs import Inputs
from vfmseg.disk.digests import signed
from vfmseg.disk.tensors import plain_tensors
from vfmseg.encoders.build import config_of
from vfmseg.metrics import mean_text
from vfmseg.model import Network
from vfmseg.recipe import Recipe, dump_recipe

LIBRARIES = ("torch", "torchvision", "transformers", "peft", "accelerate", "rasterio", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Versions of vfmseg, Python and the libraries a result depends on."""
    found = {"python": platform.python_version(), "vfmseg": version("vfmseg")}
    return found | {name: version(name) for name in LIBRARIES}


def save_segmenter(folder: Path, model: Network, recipe: Recipe, inputs: Inputs, metrics: Mapping[str, Any]) -> None:
    """Write a segmenter folder that `load_segmenter` and a stranger can use; replaces an older one whole."""
    backbone = model.backbone
    trains_encoder = recipe.model.adapter.name == "full"
    record: dict[str, Any] = {
        "format": FORMATS[-1],
        "encoder": {"name": backbone.family.name, **asdict(backbone.base), "stored": trains_encoder},
        "input": {one.name: input_entry(one) for one in inputs},
        "parameters": {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total": sum(p.numel() for p in model.parameters()),
        },
        "metrics": dict(metrics),
        "versions": versions(),
    }
    own = model.own_encoders
    if own:
        bases = {name: {"name": one.backbone.family.name, **asdict(one.backbone.base)} for name, one in own.items()}
        record["encoders"] = bases
    with segmenter_folder(folder) as aside:
        (aside / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        if trains_encoder:
            record["encoder"]["config"] = config_of(backbone)
            save_file(plain_tensors(backbone.network.state_dict()), aside / "encoder.safetensors")
        save_file(plain_tensors(model.head_state()), aside / "head.safetensors")
        model.attached.save(aside / "adapters" / "+".join(one.name for one in inputs))
        for name, one in own.items():
            one.attached.save(aside / "adapters" / name)
        names = {path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()}
        (aside / MARK).write_text(json.dumps(signed(record, aside, names), indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_card(recipe, record), encoding="utf-8")


def _own_lines(recipe: Recipe, encoders: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Lines of the card on the published encoders of single modalities."""
    return [
        f"- Encoder of {name}: {base['name']} `{base['id']}`{_licence(base['id'])}, SHA-256 `{base['sha256'][:16]}`, "
        f"adapter {recipe.model.adapter_of(name).name}"
        for name, base in encoders.items()
    ]


def _licence(checkpoint: str) -> str:
    published = CATALOG.get(checkpoint)
    return f" ({published.licence})" if published else ""


def _card(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """A short model card: what it labels, on what it stands, how good it was on validation."""
    base = record["encoder"]
    scores = record["metrics"].get("validation") or {}
    inputs = ", ".join(f"{name} ({entry['bands']} bands)" for name, entry in record["input"].items())
    lines = [
        f"# {recipe.name}",
        "",
        "A segmentation model made with vfmseg.",
        "",
        f"- Classes: {', '.join(f'{i} {c.name}' for i, c in recipe.data.classes.items())}",
        f"- Input: {inputs}",
        f"- Base encoder: {base['name']} `{base['id']}`{_licence(base['id'])}, SHA-256 `{base['sha256'][:16]}`",
        *_own_lines(recipe, record.get("encoders", {})),
        f"- Adapter: {recipe.model.adapter.name}; decoder: {recipe.model.decoder.name}",
        f"- Trainable parameters: {record['parameters']['trainable']:,} of {record['parameters']['total']:,}",
    ]
    if scores:
        lines.append(f"- Validation mIoU: {mean_text(scores, 4)} (epoch {record['metrics'].get('epoch')})")
    lines += [
        "",
        "```python",
        "from vfmseg import Segmenter",
        'segmenter = Segmenter.from_pretrained("this-folder")',
        'segmenter.predict("scene.tif", output="labels.tif")',
        "```",
        "",
    ]
    return "\n".join(lines)
