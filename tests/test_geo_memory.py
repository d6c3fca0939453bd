"""Arrays read by the rules of files: every type, every band, nothing that GDAL would guess about them."""

from __future__ import annotations

import numpy as np
import pytest

from vfmseg.errors import DataError
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import IDENTITY, Window
from vfmseg.geo.memory import ArrayRaster

TYPES = ["bool", "uint8", "int8", "uint16", ">u2", "int16", "uint32", "int32", "uint64", "int64"]


def read_all(array: np.ndarray, bands: Bands | None = None) -> tuple[np.ndarray, np.ndarray]:
    with ArrayRaster(array, bands or Bands(), "rgb") as raster:
        chip = raster.read(Window(0, 0, *array.shape[1:]))
    return chip.pixels, chip.valid


@pytest.mark.parametrize("dtype", [*TYPES, "float16", "float32", "float64"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.pitfall("P24")
def test_arrays_of_every_type_and_number_of_bands_keep_their_values(dtype: str, count: int) -> None:
    """Of four 8-bit bands, GDAL would take the last one for alpha."""
    array = np.random.default_rng(0).integers(0, 120, (count, 5, 7)).astype(dtype)
    if "float" in dtype:
        array = array / np.array(16, dtype=dtype)
    pixels, valid = read_all(array)
    assert valid.all()
    np.testing.assert_array_equal(pixels, array.astype(np.float32))


@pytest.mark.pitfall("P26")
def test_nodata_and_nan_of_arrays_hide_as_those_of_files() -> None:
    array = np.ones((2, 3, 4), dtype=np.float32)
    array[0, 0, 0] = np.nan
    array[1, 1, 1] = -9
    pixels, valid = read_all(array, Bands(scale=2, offset=1, nodata=-9))
    assert (~valid).nonzero()[0].tolist() == [0, 1]
    assert set(pixels[:, valid].ravel()) == {3}
    assert not pixels[:, ~valid].any()


def test_arrays_have_no_place_and_are_released_when_closed() -> None:
    raster = ArrayRaster(np.ones((1, 2, 3), dtype=np.uint8), Bands(), "rgb")
    other = ArrayRaster(np.zeros((1, 2, 3), dtype=np.uint8), Bands(), "rgb")  # of the same name, and yet another
    assert (raster.grid.crs, raster.grid.transform, raster.grid.width) == (None, IDENTITY, 3)
    raster.close()
    with pytest.raises(DataError):
        raster.read(Window(0, 0, 1, 1))
    assert not other.read(Window(0, 0, 2, 3)).pixels.any()
    other.close()


@pytest.mark.pitfall("P63")
def test_arrays_are_told_apart_by_what_they_hold() -> None:
    one = np.arange(24).reshape(2, 3, 4).astype(np.uint16)
    other = one.copy()
    other[1, 2, 3] += 1
    turned = np.asfortranarray(one)  # the same numbers, stored in another order
    arrays = [one, one.copy(), turned, other, one.astype("u4"), one.astype(">u2"), one.reshape(2, 4, 3), one * 1.0]
    said = []
    for array in arrays:
        with ArrayRaster(array, Bands(), "rgb") as raster:
            said += raster.infos
    assert said[0] == said[1] == said[2]
    assert len(set(said)) == len(arrays) - 2


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones((4, 5)), r"the array for 'rgb' has shape \(4, 5\); expected \(bands, height, width\)"),
        (np.ones((3, 0, 5)), r"has shape \(3, 0, 5\)"),
        (np.ones((0, 4, 5)), r"has shape \(0, 4, 5\)"),
        (np.ones((1, 4, 5), dtype=np.complex64), "holds complex64; expected integers or real numbers"),
        (np.full((1, 4, 5), "a"), "holds <U1; expected integers or real numbers"),
        (np.full((1, 4, 5), None), "holds object; expected integers or real numbers"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ArrayRaster(array, Bands(), "rgb")
