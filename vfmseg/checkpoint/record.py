"""What segmenter.json says, checked: it decides how pixels are read, and may come from a stranger."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vfmseg.build.data import bands_of
from vfmseg.build.model import normalized_by, published_in_image_units
from vfmseg.data.inputs import Input, Inputs
from vfmseg.data.statistics import BandStatistics
from vfmseg.errors import CheckpointError, show
from vfmseg.geo.said import BandSaid
from vfmseg.recipe import Recipe
from vfmseg.recipe.data import MOST_BANDS, ModalitySection

_HASH = re.compile(r"[0-9a-f]{64}")
_LARGEST = 1e30  # of a mean or std: far from where float32 ends


def inputs_in(path: Path, record: Mapping[str, Any], recipe: Recipe) -> Inputs:
    """What was noted of the training data, in the recipe's order; it must be that of the recipe beside it."""
    entries = record.get("input")
    if not isinstance(entries, dict) or set(entries) != set(recipe.data.modalities):
        names = show(list(entries)) if isinstance(entries, dict) else show(entries)
        raise _wrong(path, "input", names, f"the modalities of recipe.yaml ({', '.join(recipe.data.modalities)})")
    return tuple(_input(path, name, entries[name], recipe) for name in recipe.data.modalities)


def _input(path: Path, name: str, entry: Any, recipe: Recipe) -> Input:
    modality, place = recipe.data.modalities[name], f"input.{name}"
    if not isinstance(entry, dict):
        raise _wrong(path, place, entry, "a mapping")
    count, dtype = entry.get("bands"), entry.get("dtype")
    wanted = modality.count
    if type(count) is not int or not 1 <= count <= MOST_BANDS or count != (wanted or count):
        raise _wrong(path, f"{place}.bands", count, f"{wanted or 'a whole number'} as in recipe.yaml")
    if not isinstance(dtype, str) or not 0 < len(dtype) < 32:
        raise _wrong(path, f"{place}.dtype", dtype, "the name of a type")
    said = _said(path, f"{place}.said", entry.get("said"), 1 if modality.derive else count, modality)
    whose = normalized_by(recipe, name, count, dtype, not any(band.scaled for band in said))
    if entry.get("normalize") != whose:
        raise _wrong(path, f"{place}.normalize", entry.get("normalize"), f"{whose} as in recipe.yaml")
    statistics = None
    if entry.get("statistics") is not None:
        statistics = _statistics(path, f"{place}.statistics", entry["statistics"], count)
    if whose == "encoder":
        statistics = published_in_image_units(recipe, name)
    elif statistics is None:
        raise _wrong(path, f"{place}.statistics", None, "mean and std of each band")
    optional = modality.optional or name in recipe.train.dropout_of(recipe.data.modalities)
    return Input(name, replace(bands_of(recipe)[name], like=said), count, dtype, whose, *statistics, optional)


def input_entry(one: Input) -> dict[str, Any]:
    """What segmenter.json notes of a modality; of those that the encoder normalises, the encoder knows mean and std."""
    return {
        "bands": one.count,
        "dtype": one.dtype,
        "normalize": one.normalize,
        "statistics": (one.mean, one.std) if one.normalize == "dataset" else None,
        "said": [asdict(band) for band in one.said],
    }


def _said(path: Path, place: str, value: Any, bands: int, modality: ModalitySection) -> tuple[BandSaid, ...]:
    """What the training files said of the bands; of segmenters that do not keep it, how the recipe scales them."""
    if value is None:
        scale = 1.0 if modality.scale is None else modality.scale
        return (BandSaid(scale=scale, offset=modality.offset or 0.0),) * bands
    entries = value if isinstance(value, list) and len(value) == bands else ()
    texts, numbers = ("name", "color"), ("scale", "offset")
    for entry in entries:
        right = isinstance(entry, dict) and set(entry) == {*texts, *numbers}
        right = right and all(isinstance(entry[key], str) for key in texts) and entry["scale"] != 0
        if not right or not all(
            entry[key] is None or (_is_number(entry[key]) and abs(entry[key]) <= _LARGEST) for key in numbers
        ):
            entries = ()
            break
    if not entries:
        raise _wrong(path, place, value, f"name, color, scale and offset of {bands} bands")
    return tuple(BandSaid(**entry) for entry in entries)


def _statistics(path: Path, place: str, value: Any, bands: int) -> BandStatistics:
    pairs = value if isinstance(value, list) and len(value) == 2 else ()
    for part, least in zip(pairs, (-_LARGEST, 1 / _LARGEST), strict=False):
        right = isinstance(part, list) and len(part) == bands
        if not right or not all(_is_number(number) and least <= number <= _LARGEST for number in part):
            pairs = ()
            break
    if not pairs:
        raise _wrong(path, place, value, f"two lists of {bands} numbers: means, and stds above 0")
    mean, std = pairs
    return tuple(map(float, mean)), tuple(map(float, std))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def encoder_of(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """What was noted of the encoder: name, id, sha256, stored, and the config of one that is stored."""
    found = record.get("encoder")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: does not say which encoder it needs; copy the checkpoint again")
    _require_kinds(path, "encoder", found, {"name": str, "id": str, "sha256": str, "stored": bool})
    if not found["stored"] and not _HASH.fullmatch(found["sha256"]):
        raise _wrong(path, "encoder.sha256", found["sha256"], "64 hexadecimal digits")
    if found["stored"] and not isinstance(found.get("config"), dict):
        raise _wrong(path, "encoder.config", found.get("config"), "the config of the encoder that is stored")
    return found


def own_encoders_of(path: Path, record: Mapping[str, Any], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """{modality: name, id, sha256} of the published encoders that modalities have for themselves.

    Exactly those of the recipe beside it; a folder without any may lack the key, as those of before do.
    """
    wanted, found = recipe.model.own_encoders, record.get("encoders", {})
    if not isinstance(found, dict) or set(found) != set(wanted):
        names = show(list(found)) if isinstance(found, dict) else show(found)
        raise _wrong(
            path, "encoders", names, f"those of model.modalities in recipe.yaml ({', '.join(wanted) or 'none'})"
        )
    for modality, entry in found.items():
        place = f"encoders.{modality}"
        if not isinstance(entry, dict):
            raise _wrong(path, place, entry, "a mapping")
        _require_kinds(path, place, entry, {"name": str, "id": str, "sha256": str})
        if entry["name"] != wanted[modality].name:
            raise _wrong(path, f"{place}.name", entry["name"], f"{wanted[modality].name} as in recipe.yaml")
        if not _HASH.fullmatch(entry["sha256"]):
            raise _wrong(path, f"{place}.sha256", entry["sha256"], "64 hexadecimal digits")
    return found


def _require_kinds(path: Path, place: str, found: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """CheckpointError unless each key is there and holds its kind: short text, or true or false."""
    for key, expected in kinds.items():
        if not isinstance(found.get(key), expected) or len(str(found[key])) > 1000:
            what = "true or false" if expected is bool else "text"
            raise _wrong(path, f"{place}.{key}", found.get(key), f"{what}, to know which encoder it needs")


def _wrong(path: Path, place: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {place} = {show(value)}; expected {expected}; the folder is damaged or mixes two checkpoints, "
        "copy it again"
    )
