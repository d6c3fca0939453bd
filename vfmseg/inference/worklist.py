"""Which scenes are to be labelled: one path, a folder, a pattern, a list in a text file, or a STAC item collection."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vfmseg.disk.jsonfile import read_json
from vfmseg.disk.paths import readings, require_file
from vfmseg.errors import DataError
from vfmseg.inference.output import product_path

IMAGES = (".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg", ".img")
"""Suffixes that count as scenes in a folder."""


def scenes_of(given: str) -> list[str] | None:
    """Paths of the scenes that a folder, pattern, list (.txt) or STAC file (.json, .geojson) names; None: one scene.

    DataError if it names none.
    """
    path = Path(os.path.expanduser(given))
    require_file(path)
    if path.is_dir() and path.suffix.upper() != ".SAFE":
        found = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith("."))
        below = f"{given.rstrip('/')}/**/*.tif"
        message = f"{given}: the folder holds no image ({', '.join(IMAGES)})"
        return _some(found, f"{message}; images in folders below are found by '{below}'")
    if path.suffix.lower() == ".txt":
        return _some(_lines(path), f"{given}: the list names no scene; expected one path a line")
    if path.suffix.lower() in (".json", ".geojson"):
        return _some(_stac(path), f"{given}: no item has an image asset; expected a STAC item or item collection")
    if not path.exists() and "://" not in given and not given.startswith("/vsi") and any(c in given for c in "*?["):
        found = next((some for one in readings(str(path)) if (some := glob.glob(one, recursive=True))), [])
        return _some(sorted(str(Path(p)) for p in found), f"{given}: no file matches; check the pattern")
    return None


def targets_for(scenes: Sequence[str], folder: Path, products: Sequence[str] = ()) -> list[Path]:
    """A label file in `folder` for each scene, named after it; DataError if two scenes would write one file.

    `products`: what else is written beside the labels, under their name and its own.
    """
    if folder.suffix.lower() in (".tif", ".tiff") and not folder.is_dir():
        raise DataError(f"{folder}: {len(scenes)} scenes are a list, which is written into a folder; name one")
    # an address may end with a question (a signature)
    targets = [folder / f"{Path(scene.split('?')[0] if '://' in scene else scene).stem}.tif" for scene in scenes]
    seen: dict[Path, str] = {}
    for scene, target in zip(scenes, targets, strict=True):
        for file in (target, *(product_path(target, product) for product in products)):
            if file in seen:
                both = f"{seen[file]} and {scene}"
                raise DataError(f"{both} would both be written to {file}; label them into two folders")
            if file.resolve() == Path(scene).resolve():
                raise DataError(f"{scene}: its labels would replace it; choose another output folder")
            seen[file] = scene
    return targets


def _some(found: list[str], message: str) -> list[str]:
    if not found:
        raise DataError(message)
    return found


def _lines(path: Path) -> list[str]:
    """Paths in a text file, relative ones from its folder; empty lines and those that start with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as a list of scenes ({error}); expected one path a line, in UTF-8"
        ) from None
    wanted = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return [_from(path.parent, line) for line in wanted]


def _from(folder: Path, name: str) -> str:
    name = os.path.expanduser(name)
    remote = "://" in name or name.startswith("/vsi")
    return name if remote or Path(name).is_absolute() else str(folder / name)


def _stac(path: Path) -> list[str]:
    """One image of each item: the asset with the role `data`, else the first that is an image."""
    try:
        content = read_json(path)
        items = content["features"] if content["type"] == "FeatureCollection" else [content]
        hrefs = [_image_of(item["assets"]) for item in items]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is not a STAC item or item collection ({type(error).__name__}: {error}); expected items with "
            "assets; check the file, or list the scenes in a .txt"
        ) from None
    for item, href in zip(items, hrefs, strict=True):
        if href is None:
            raise DataError(
                f"{path}: item {item.get('id')!r} has no image among its assets {list(item['assets'])}; expected one "
                "with a type image/... or the suffix of an image: leave the item out"
            )
    return [_from(path.parent, href) for href in hrefs if href is not None]


def _image_of(assets: dict[str, Any]) -> str | None:
    images = [a for a in assets.values() if a.get("href") and _is_image(a)]
    images = [a for a in images if not {"thumbnail", "overview"} & set(a.get("roles") or ())]
    data = [a for a in images if "data" in (a.get("roles") or ())]
    chosen = (data or images)[:1]
    return str(chosen[0]["href"]) if chosen else None


def _is_image(asset: dict[str, Any]) -> bool:
    if asset.get("type"):
        return str(asset["type"]).startswith("image/")
    return Path(str(asset["href"]).split("?")[0]).suffix.lower() in IMAGES
