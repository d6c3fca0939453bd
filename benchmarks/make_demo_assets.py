"""Make `vfmseg/assets/demo/` from the folder of 256-pixel web-map tiles it comes from.

    python benchmarks/make_demo_assets.py DATA_FOLDER OUT_FOLDER

DATA_FOLDER holds `split.csv` (columns image, label, split, place) and the tiles it names,
`<place>_<zoom>_<x>_<y>`. OUT_FOLDER gets `images/<scene>.tif`, `labels/<scene>.tif`, `split.csv` and
`NOTICE`.

Scenes. Tiles of one place no more than two tile steps apart (`REACH`) become one scene, so neighbours in it
miss at most one tile between them. Strictly connected groups would leave seven scenes of one or two tiles in
Zanzibar and cut Kampala, of which every second tile was kept, into strips; one mosaic a place would be up to
97 % empty, because the blocks of a place lie hundreds of metres apart. Two tile steps give two scenes for
each of the four places, named `<place>_a` and `<place>_b` from north to south. A place is in one split only.

Grid. Web-map tiles of one zoom share one grid (EPSG:3857), so tiles are pasted, never resampled. The
transform is computed from the tile numbers and must agree with every label's own to a millionth of a pixel.

Pixels. Images are JPEG (YCbCr 4:2:0) in blocks of 256 pixels, each block exactly one source tile. The JPEG
sources were all written at quality 75 with the same subsampling; at that quality, on the same blocks, coding
them again changes them by 0.3 of 255 on average. Scenes with lossless sources are written at quality 95.
Missing tiles and pixels with alpha 0 are invalid in an internal mask. Labels are deflate, 255 where there is
no tile; below alpha 0 they stay as published, so scores count the same pixels.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import Affine

TILE = 256  # pixels
REACH = 2  # tile steps
NO_LABEL = 255
HALF_WORLD = math.pi * 6378137.0  # metres from the centre of EPSG:3857 to its edge
LIMIT = 9_000_000  # bytes of the whole folder

NOTICE = """\
Demo data of vfmseg
===================

Imagery © OpenAerialMap contributors (CC BY 4.0). Buildings © OpenStreetMap contributors (ODbL).

images/   {tiles} web-map tiles of OpenAerialMap imagery at zoom {zoom}: Zanzibar, Nairobi, Kampala, Banepa.
          Creative Commons Attribution 4.0 International, https://creativecommons.org/licenses/by/4.0/
labels/   Building footprints of OpenStreetMap, burnt into rasters (0 not building, 1 building, 255 no label).
          Open Database License 1.0, https://opendatacommons.org/licenses/odbl/1-0/

The tiles were collected by the Humanitarian OpenStreetMap Team in hotosm/fAIr-utilities
(ramp-data/TRAIN/HOTOSM/2/data and ramp-data/sample_2/input).

Changes: tiles chosen from the collection (in Zanzibar one in four of those without a building, in Kampala
every second one); polygons reduced to geometry and rasterised by the pixel-centre rule; tiles joined without
resampling into georeferenced scenes (EPSG:3857) and coded again as JPEG inside GeoTIFF; missing tiles and
transparent pixels marked in an internal mask.

Known weaknesses: some buildings are not labelled or are shifted by about one metre (Nairobi, Banepa).

These files are not covered by the licence of the vfmseg code.
"""


@dataclass(frozen=True)
class TileFile:
    """One source tile: its place, its numbers in the web-map scheme and its files."""

    place: str
    split: str
    zoom: int
    x: int
    y: int
    image: Path
    label: Path

    def near(self, other: TileFile) -> bool:
        """Whether both tiles belong to one scene."""
        steps = max(abs(self.x - other.x), abs(self.y - other.y))
        return self.place == other.place and steps <= REACH


@dataclass(frozen=True)
class Mosaic:
    """The tiles of one scene and the rectangle of tiles that holds them."""

    name: str
    tiles: tuple[TileFile, ...]

    @property
    def left(self) -> int:
        """Smallest tile number x."""
        return min(tile.x for tile in self.tiles)

    @property
    def top(self) -> int:
        """Smallest tile number y (north)."""
        return min(tile.y for tile in self.tiles)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        rows = max(tile.y for tile in self.tiles) - self.top + 1
        cols = max(tile.x for tile in self.tiles) - self.left + 1
        return rows * TILE, cols * TILE

    @property
    def transform(self) -> Affine:
        """Pixel to metres of EPSG:3857."""
        return tile_transform(self.tiles[0].zoom, self.left, self.top)

    def slices(self, tile: TileFile) -> tuple[slice, slice]:
        """Rows and columns of a tile in the scene."""
        row, col = (tile.y - self.top) * TILE, (tile.x - self.left) * TILE
        return slice(row, row + TILE), slice(col, col + TILE)


def tile_transform(zoom: int, x: int, y: int) -> Affine:
    """Pixel to metres of a web-map tile's upper left corner."""
    pixel = 2 * HALF_WORLD / TILE / 2**zoom
    return Affine(pixel, 0.0, -HALF_WORLD + x * TILE * pixel, 0.0, -pixel, HALF_WORLD - y * TILE * pixel)


def read_tiles(folder: Path) -> list[TileFile]:
    """Every row of the folder's `split.csv`."""
    tiles = []
    with open(folder / "split.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            place, zoom, x, y = Path(row["image"]).stem.split("_")
            tiles.append(
                TileFile(
                    place,
                    row["split"],
                    int(zoom),
                    int(x),
                    int(y),
                    folder / row["image"],
                    folder / row["label"],
                )
            )
    return tiles


def group(tiles: Sequence[TileFile]) -> list[Mosaic]:
    """Scenes of tiles that lie near each other, by place, from north to south."""
    left, clusters = list(tiles), []
    while left:
        cluster = [left.pop()]
        for member in cluster:  # grows while it is walked
            close = [tile for tile in left if tile.near(member)]
            cluster += close
            left = [tile for tile in left if tile not in close]
        clusters.append(tuple(sorted(cluster, key=lambda tile: (tile.y, tile.x))))
    mosaics: list[Mosaic] = []
    for place in sorted({tile.place for tile in tiles}):
        own = sorted((c for c in clusters if c[0].place == place), key=lambda c: (c[0].y, c[0].x))
        mosaics += [Mosaic(f"{place}_{chr(ord('a') + number)}", c) for number, c in enumerate(own)]
    return mosaics


def paint(mosaic: Mosaic) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (3, H, W) uint8, valid (H, W) bool and labels (H, W) uint8 of a scene."""
    pixels = np.zeros((3, *mosaic.shape), np.uint8)
    valid = np.zeros(mosaic.shape, bool)
    labels = np.full(mosaic.shape, NO_LABEL, np.uint8)
    for tile in mosaic.tiles:
        rows, cols = mosaic.slices(tile)
        with rasterio.open(tile.image) as source:
            pixels[:, rows, cols] = source.read((1, 2, 3))
            valid[rows, cols] = source.read(4) > 0 if source.count == 4 else True
        with rasterio.open(tile.label) as source:
            here = tile_transform(tile.zoom, tile.x, tile.y)
            corner = ~here * (source.transform * (0, 0)), ~here * (source.transform * (TILE, TILE))
            off = np.abs(np.subtract(corner, ((0, 0), (TILE, TILE)))).max()  # pixels
            if off > 1e-6 or source.crs.to_epsg() != 3857 or source.shape != (TILE, TILE):
                raise SystemExit(f"{tile.label}: lies {off} pixels off its tile number, in {source.crs}")
            labels[rows, cols] = source.read(1)
    return pixels, valid, labels


def write(mosaic: Mosaic, out: Path) -> None:
    """Write image and label of a scene and read them back: labels and mask exact, pixels close."""
    pixels, valid, labels = paint(mosaic)
    lossless = any(tile.image.suffix == ".png" for tile in mosaic.tiles)
    common = {
        "driver": "GTiff",
        "crs": "EPSG:3857",
        "transform": mosaic.transform,
        "height": mosaic.shape[0],
        "width": mosaic.shape[1],
        "dtype": "uint8",
        "tiled": True,
        "blockxsize": TILE,
        "blockysize": TILE,
        "sparse_ok": True,
    }
    jpeg = {"compress": "jpeg", "photometric": "ycbcr", "jpeg_quality": 95 if lossless else 75}
    image, label = out / "images" / f"{mosaic.name}.tif", out / "labels" / f"{mosaic.name}.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(image, "w", count=3, **common, **jpeg) as target:
            target.update_tags(TIFFTAG_COPYRIGHT="OpenAerialMap contributors, CC BY 4.0")
            target.write(pixels)
            target.write_mask(valid)
        with rasterio.open(label, "w", count=1, compress="deflate", zlevel=9, nodata=NO_LABEL, **common) as target:
            target.update_tags(TIFFTAG_COPYRIGHT="OpenStreetMap contributors, ODbL 1.0")
            target.write(labels, 1)
    with rasterio.open(image) as source:
        difference = np.abs(source.read().astype(int) - pixels)[:, valid]
        mask_kept = np.array_equal(source.dataset_mask() > 0, valid)
    with rasterio.open(label) as source:
        labels_kept = np.array_equal(source.read(1), labels)
    if not (mask_kept and labels_kept and difference.mean() < 3):
        raise SystemExit(f"{mosaic.name}: mask kept {mask_kept}, labels kept {labels_kept}, {difference.mean()=}")
    print(
        f"{mosaic.name}: {len(mosaic.tiles)} tiles in {mosaic.shape[0]} x {mosaic.shape[1]} pixels, "
        f"{valid.mean():.0%} valid, {(labels == 1).sum() / (labels != NO_LABEL).sum():.1%} building, "
        f"mean change {difference.mean():.2f} of 255, image {image.stat().st_size} bytes"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the folder and refuse one that is too large to install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    options = parser.parse_args(arguments)
    tiles = read_tiles(options.data)
    mosaics = group(tiles)
    for folder in ("images", "labels"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    lines = ["scene,split,image,label"]
    for mosaic in mosaics:
        (split,) = {tile.split for tile in mosaic.tiles}  # a scene in two splits would be a leak
        write(mosaic, options.out)
        lines.append(f"{mosaic.name},{split},images/{mosaic.name}.tif,labels/{mosaic.name}.tif")
    (options.out / "split.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    notice = NOTICE.format(tiles=len(tiles), zoom=tiles[0].zoom)
    (options.out / "NOTICE").write_text(notice, encoding="utf-8")
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{len(tiles)} tiles, {len(mosaics)} scenes, {size} bytes")
    if size > LIMIT:
        raise SystemExit(f"{options.out}: {size} bytes, at most {LIMIT} may be installed; lower the JPEG quality")


if __name__ == "__main__":
    main()
