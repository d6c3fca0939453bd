"""The demo's data as installed: small, georeferenced, labels on their images, places kept apart, sources named."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import Compression, MaskFlags

FOLDER = Path(__file__).resolve().parents[1] / "vfmseg" / "assets" / "demo"
with open(FOLDER / "split.csv", newline="", encoding="utf-8") as _file:
    ROWS = list(csv.DictReader(_file))
PLACES = {"zanzibar": "train", "nairobi": "train", "kampala": "val", "banepa": "test"}
TILE = 256
TILES = {"train": 218, "val": 14, "test": 32}  # tiles that the scenes were joined from

scene = pytest.mark.parametrize("row", ROWS, ids=[row["scene"] for row in ROWS])


def labels_of(row: dict[str, str]) -> np.ndarray:
    with rasterio.open(FOLDER / row["label"]) as source:
        return source.read(1)  # (H, W) uint8


def tiles_of(array: np.ndarray) -> np.ndarray:
    """(H, W) -> (tiles, TILE * TILE): the blocks of the web-map grid."""
    rows, cols = array.shape[0] // TILE, array.shape[1] // TILE
    return array.reshape(rows, TILE, cols, TILE).transpose(0, 2, 1, 3).reshape(rows * cols, TILE * TILE)


def test_demo_data_fit_into_the_package() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 9_000_000


def test_demo_split_table_lists_exactly_the_files() -> None:
    assert list(ROWS[0]) == ["scene", "split", "image", "label"]
    listed = Counter(row[column] for row in ROWS for column in ("image", "label"))
    present = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.tif")}
    assert set(listed) == present
    assert set(listed.values()) == {1}  # no file stands in two splits


def test_demo_splits_are_places() -> None:
    assert {(row["scene"].rpartition("_")[0], row["split"]) for row in ROWS} == set(PLACES.items())


def test_demo_scenes_do_not_overlap() -> None:
    boxes = {}
    for row in ROWS:
        with rasterio.open(FOLDER / row["image"]) as source:
            boxes[row["scene"]] = source.bounds
    for name, a in boxes.items():
        for other, b in boxes.items():
            apart = a.right <= b.left or b.right <= a.left or a.top <= b.bottom or b.top <= a.bottom
            assert name == other or apart, f"{name} and {other} share ground"


@pytest.mark.parametrize("split", TILES)
def test_demo_keeps_every_tile(split: str) -> None:
    kept = 0
    for row in ROWS:
        if row["split"] == split:
            labelled = tiles_of(labels_of(row) != 255)
            assert (labelled.all(axis=1) == labelled.any(axis=1)).all()  # a tile is labelled whole or not at all
            kept += int(labelled.all(axis=1).sum())
    assert kept == TILES[split]


@scene
def test_demo_label_and_image_share_one_grid(row: dict[str, str]) -> None:
    with rasterio.open(FOLDER / row["image"]) as image, rasterio.open(FOLDER / row["label"]) as label:
        assert image.crs.to_epsg() == label.crs.to_epsg() == 3857
        assert image.transform == label.transform
        assert image.shape == label.shape
        assert image.shape[0] % TILE == image.shape[1] % TILE == 0
        # zoom 20 of the web-map scheme: 2 pi 6378137 m / 256 / 2^20 a pixel, corners on the grid of tiles
        side = 2 * np.pi * 6378137.0 / 2**20
        assert image.transform.a == pytest.approx(side / TILE, rel=1e-12)
        corner = np.array([image.transform.c, image.transform.f]) / side
        np.testing.assert_allclose(corner, corner.round(), rtol=0, atol=1e-6)


@scene
def test_demo_files_are_tiled_and_compressed(row: dict[str, str]) -> None:
    with rasterio.open(FOLDER / row["image"]) as image, rasterio.open(FOLDER / row["label"]) as label:
        assert (image.count, image.dtypes[0], image.block_shapes[0]) == (3, "uint8", (TILE, TILE))
        assert (label.count, label.dtypes[0], label.block_shapes[0]) == (1, "uint8", (TILE, TILE))
        assert image.compression == Compression.jpeg
        assert label.compression == Compression.deflate
        assert image.mask_flag_enums[0] == [MaskFlags.per_dataset]  # in the file, not beside it
        assert label.nodata == 255


@scene
def test_demo_label_ids(row: dict[str, str]) -> None:
    labels = labels_of(row)
    assert set(np.unique(labels)) <= {0, 1, 255}
    share = (labels == 1).sum() / (labels != 255).sum()
    assert 0.1 < share < 0.6  # every scene holds both classes


@scene
def test_demo_mask_follows_the_tiles(row: dict[str, str]) -> None:
    with rasterio.open(FOLDER / row["image"]) as image:
        valid = tiles_of(image.dataset_mask() > 0)
        bright = tiles_of(image.read().max(axis=0))
    labelled = tiles_of(labels_of(row) != 255).all(axis=1)
    assert not valid[~labelled].any()  # a missing tile has no valid pixel
    assert valid[labelled].mean(axis=1).min() > 0.9  # a tile that is there has nearly all (its alpha 0 apart)
    assert (bright[labelled].max(axis=1) > 100).all()
    assert (bright[~labelled] == 0).all()


@scene
def test_demo_labels_lie_on_buildings(row: dict[str, str]) -> None:
    # Roofs end where their outline does: along true outlines the image changes more than along the same outlines
    # moved by 4.5 m, a fifth to half of a building. A transposed, flipped or shifted label loses that.
    with rasterio.open(FOLDER / row["image"]) as image:
        grey = image.read().astype(float).mean(axis=0)
        valid = image.dataset_mask() > 0
    gradient = np.hypot(*np.gradient(grey))
    building = labels_of(row) == 1
    edge = np.zeros_like(building)
    edge[1:, :] |= building[1:, :] != building[:-1, :]
    edge[:, 1:] |= building[:, 1:] != building[:, :-1]
    inner = valid & np.roll(valid, 2, 0) & np.roll(valid, -2, 0) & np.roll(valid, 2, 1) & np.roll(valid, -2, 1)

    def strength(rows: int, cols: int) -> float:
        return float(gradient[np.roll(edge, (rows, cols), (0, 1)) & inner].mean())

    moved = [strength(rows, cols) for rows, cols in ((30, 0), (-30, 0), (0, 30), (0, -30))]
    assert strength(0, 0) > 1.15 * max(moved)


def test_demo_notice_names_sources_licences_and_changes() -> None:
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    credit = "Imagery © OpenAerialMap contributors (CC BY 4.0). Buildings © OpenStreetMap contributors (ODbL)."
    assert credit in notice
    assert "creativecommons.org/licenses/by/4.0" in notice
    assert "opendatacommons.org/licenses/odbl" in notice
    assert "Changes:" in notice
