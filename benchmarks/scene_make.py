"""Textured scenes of any size for the scene benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import Affine
from rasterio.windows import Window

BLOCK = 256  # pixels a side of the blocks
PERIOD = 1024  # pixels after which the texture comes again, on another brightness


def write_scene(target: Path, width: int, height: int) -> None:
    """A textured scene: uint16, 4 bands, blocks of 256 px, deflate, EPSG:32633; one row of blocks in memory at a time.

    Blobs of many sizes and fine grain, which compress about as satellite images do. The brightness drifts over the
    scene, so no two blocks are equal.
    """
    base = texture()
    cols = np.arange(width)
    drift = (300 * np.sin(cols / 9000)).astype(np.int16)
    aside = target.with_suffix(".partial")
    profile = {
        "driver": "GTiff", "width": width, "height": height, "count": len(base), "dtype": "uint16",
        "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "zlevel": 1,
        "num_threads": "all_cpus", "bigtiff": "if_safer", "crs": "EPSG:32633",
        "transform": Affine(1.0, 0.0, 5e5, 0.0, -1.0, 5e6),
    }  # fmt: skip
    with rasterio.Env(GDAL_CACHEMAX=64 * 2**20), rasterio.open(aside, "w", **profile) as dataset:
        for top in range(0, height, BLOCK):
            rows = np.arange(top, min(top + BLOCK, height))
            part = np.take(base[:, rows % PERIOD], cols % PERIOD, axis=2)
            part += drift + (300 * np.cos(rows / 7000)).astype(np.int16)[:, None]
            dataset.write(part.view(np.uint16), window=Window(0, top, width, len(rows)))
    aside.rename(target)


def texture() -> np.ndarray:
    """int16 (4, PERIOD, PERIOD) from about 700 to 3300, which continues over its edges."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(PERIOD)[:, None], np.fft.rfftfreq(PERIOD)[None])
    frequency[0, 0] = np.inf
    bands = []
    for _ in range(4):
        spectrum = np.fft.rfft2(rng.standard_normal((PERIOD, PERIOD))) / frequency**1.5
        blobs = np.fft.irfft2(spectrum, (PERIOD, PERIOD))
        grain = 10 * rng.standard_normal((PERIOD, PERIOD))
        bands.append(np.clip(2000 + 450 * blobs / blobs.std() + grain, 700, 3300))
    return np.stack(bands).astype(np.int16)
