"""The folder of a pretrained encoder: transformers' own files, which any recipe takes as `model.encoder.checkpoint`.

Beside them lie the recipe, `encoder.json`, which says what it was made from and how far training was, and what of stems
and adapters was trained (`encoders/pretrained.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.checkpoint.record import input_entry
from vfmseg.checkpoint.writing import versions
from vfmseg.data.inputs import Inputs
from vfmseg.disk.digests import changed, signed
from vfmseg.disk.files import require_own, whole_folder, write_json
from vfmseg.disk.jsonfile import read_json
from vfmseg.disk.tensors import plain_tensors
from vfmseg.encoders.backbone import Backbone, sha256_of
from vfmseg.encoders.build import build_backbone_from_config, config_of, whole_network
from vfmseg.encoders.pretrained import ADAPTER, MARK, STEMS, kind_of, stem_tensors
from vfmseg.encoders.stem import Stem
from vfmseg.model import Encoder
from vfmseg.recipe import PretrainRecipe, dump_recipe
from vfmseg.recipe.model import FullAdapter, LoraAdapter

OWN = frozenset({MARK, STEMS, ADAPTER, "recipe.yaml", "config.json", "model.safetensors", "preprocessor_config.json"})


def save_encoder(
    folder: Path, model: Encoder, recipe: PretrainRecipe, inputs: Inputs, metrics: Mapping[str, Any]
) -> None:
    """Write the encoder with its adapter merged into it, and stems and adapter beside; replaces an older one whole."""
    require_own(folder, MARK)
    stems = {name: stem for name in model.streams if isinstance(stem := model.stem(name), Stem)}
    kinds = {name: kind for name, stem in stems.items() if (kind := kind_of(stem)) is not None}
    adapter = recipe.model.adapter
    with whole_folder(folder, OWN) as aside:
        network = whole_network(_merged(model, adapter, aside / ADAPTER))
        config = cast(Any, network).config
        config.architectures = [type(network).__name__]
        config.save_pretrained(aside)
        save_file(plain_tensors(network.state_dict()), aside / "model.safetensors", {"format": "pt"})
        if kinds:
            save_file(plain_tensors(stem_tensors(stems)), aside / STEMS)
        rgb = next((one for one in inputs if one.normalize == "encoder"), None)
        if rgb is not None:
            mean, std = ([value / 255 for value in values] for values in (rgb.mean, rgb.std))
            write_json(aside / "preprocessor_config.json", {"image_mean": mean, "image_std": std})
        (aside / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        record = {
            "base": asdict(model.backbone.base),
            "input": {one.name: input_entry(one) for one in inputs},
            "stems": {name: {"bands": kind.bands, "input": kind.input} for name, kind in kinds.items()},
            "adapter": {"name": adapter.name, **adapter.settings()} if (aside / ADAPTER).is_dir() else None,
            "tensors": sha256_of(network.state_dict()),
            "metrics": dict(metrics),
            "versions": versions(),
        }
        names = {path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()}
        write_json(aside / MARK, signed(record, aside, names))


def encoder_epoch(folder: Path) -> int | None:
    """The epoch after which an encoder's folder was written; None if it is not there, or not whole."""
    try:
        record = read_json(folder / MARK)
        return int(record["metrics"]["epoch"]) if changed(record, folder)[0] is None else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _merged(model: Encoder, section: FullAdapter | LoraAdapter, folder: Path) -> Backbone:
    """The backbone as it answers now, with its own names of tensors.

    If an adapter is merged into it, it is a copy, and the adapter by itself is written into `folder`.
    """
    merge = ADAPTERS[section.name].merge
    if merge is None:
        return model.backbone
    model.attached.save(folder)
    plain = build_backbone_from_config(model.backbone.family.name, config_of(model.backbone), model.backbone.layers)
    # peft keeps a frozen layer one level deeper, beside what it adds
    tensors = model.backbone.network.state_dict().items()
    plain.network.load_state_dict(
        {name.replace(".base_layer.", "."): tensor for name, tensor in tensors if ".lora_" not in name}
    )
    merge(plain, folder, **section.settings())
    return plain
