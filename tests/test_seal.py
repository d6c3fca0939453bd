"""Seals: every changed bit of a sealed file is seen, and what reads the file sees none of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from makers import write_raster

from vfmseg.disk.seal import is_intact, mark_of_seal, seal


@pytest.mark.pitfall("F8")
def test_every_flipped_bit_of_a_sealed_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    seal(path, "abc123")
    assert mark_of_seal(path) == "abc123"
    assert is_intact(path)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert mark_of_seal(path) != "abc123" or not is_intact(path), bit


@pytest.mark.pitfall("F8")
def test_what_was_cut_short_or_lengthened_is_not_intact(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    assert mark_of_seal(path) is None
    assert not is_intact(path)
    seal(path, "work")
    whole = path.read_bytes()
    for changed in (whole[:-1], whole[:500], whole[1:], whole + b"\n", b""):
        path.write_bytes(changed)
        assert not is_intact(path)
    path.unlink()
    assert mark_of_seal(path) is None


@pytest.mark.pitfall("F8")
def test_a_sealed_raster_is_read_as_before(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 9, (1, 70, 50)).astype(np.uint8)
    path = write_raster(tmp_path / "a.tif", array)
    seal(path, "work")
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(dataset.read(), array)
    assert is_intact(path)
