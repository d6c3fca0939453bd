"""Which bands of a modality are read, in which order, and how their stored numbers become values.

The recipe, the training files and the file itself may each say something of that; `chosen_bands` settles it once a
raster, before the first pixel is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vfmseg.errors import DataError
from vfmseg.geo.derived import LOCAL_RADIUS
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.geo.said import BandSaid, numbers_by_name
from vfmseg.geo.validity import as_stored, hides_alone

BandOfFile = tuple[int, int]
"""Number of a file among those of a raster, from 0, and number of a band in that file, from 1."""


@dataclass(frozen=True)
class Bands:
    """What the recipe, and the training files, say of the bands of one modality.

    indexes: 1-based, in the order wanted; None = all but alpha. Value = stored * scale + offset; where both are None,
    those that each file says of its bands. nodata: a stored number that means "nothing here", beside the one that the
    file itself may name.
    like: what the bands of the training files say of themselves. A file that says where these bands are is read in
    their order, unless `chosen`; and it is scaled as it says if they were, else not.
    derive: names of bands to compute from the one that is read, see `derived`; local_radius: metres, for one of them;
    pixel_size: metres of a pixel where files have no CRS.

    For example, a model trained on files whose bands are called red, green, nir reads from a file of blue, green, red,
    nir the bands 3, 2, 4.
    """

    indexes: tuple[int, ...] | None = None
    scale: float | None = None
    offset: float | None = None
    nodata: float | None = None
    like: tuple[BandSaid, ...] | None = None
    chosen: bool = False  # indexes are meant for this very file
    derive: tuple[str, ...] = ()
    local_radius: float = LOCAL_RADIUS
    pixel_size: float | None = None


@dataclass(frozen=True)
class ReadBand:
    """One band to read: which file, which band of it, and how its numbers are taken.

    file: from 0; band: from 1. Value = stored * scale + offset.
    any_of: stored numbers that hide the pixel if this band holds one. all_of: {who says so, "recipe" or "file": stored
    number} that hides the pixel if all bands hold theirs.
    """

    file: int
    band: int
    dtype: np.dtype
    any_of: tuple[np.generic, ...]
    all_of: Mapping[str, np.generic]
    scale: float
    offset: float


def bands_in(files: Sequence[RasterFile]) -> list[BandOfFile]:
    """Every band of several files in the order in which bands are counted: files of 3 and 1 bands hold 1 to 4."""
    return [(number, band) for number, file in enumerate(files) for band in range(1, file.info.count + 1)]


def chosen_bands(bands: Bands, files: Sequence[RasterFile], name: str) -> tuple[ReadBand, ...]:
    """The bands to read, in the order of `pixels`. name: what messages call the raster.

    DataError if a band that is asked for is not there, holds complex numbers, or none is left.
    """
    there = bands_in(files)
    indexes = _indexes(bands, files, there)
    if indexes is None:
        chosen = [(file, band) for file, band in there if band not in files[file].info.alpha]
    else:
        for index in indexes:
            if not 1 <= index <= len(there):
                raise DataError(
                    f"{name}: band {index} is asked for, but there "
                    f"{'is 1 band' if len(there) == 1 else f'are {len(there)} bands'}; "
                    f"choose from 1 to {len(there)}"
                )
        chosen = [there[index - 1] for index in indexes]
    if not chosen:
        raise DataError(f"{name}: no band to read; expected at least one that is not alpha")
    if bands.derive and len(chosen) != 1:
        raise DataError(
            f"{name}: {len(chosen)} bands are read, but {', '.join(bands.derive)} can be derived from one alone; name "
            "the band that holds the elevation (data.modalities.NAME.bands, such as [1])"
        )
    return tuple(_read_band(bands, files[file], file, band) for file, band in chosen)


def _indexes(bands: Bands, files: Sequence[RasterFile], there: Sequence[BandOfFile]) -> tuple[int, ...] | None:
    """1-based numbers of the bands to read, counted through the files; None: all but alpha.

    The files' own names come first, then the number of bands that the model was trained on, then the recipe.
    """
    if bands.chosen or bands.like is None:
        return bands.indexes
    found = numbers_by_name(bands.like, [files[file].info.bands[band - 1] for file, band in there])
    if found is not None:
        return found
    # the number of bands that the model was trained on tells whether one that is marked as alpha is among them
    marked = [band in (*files[file].info.alpha, *files[file].info.not_alpha) for file, band in there]
    for indexes in (range(1, len(there) + 1), [i for i, is_marked in enumerate(marked, 1) if not is_marked]):
        if bands.indexes is None and len(indexes) == len(bands.like):
            return tuple(indexes)
    return bands.indexes


def _read_band(bands: Bands, file: RasterFile, number: int, band: int) -> ReadBand:
    info = file.info
    dtype = info.dtypes[band - 1]
    if dtype.startswith("complex"):
        raise DataError(
            f"{file.path}: band {band} holds complex numbers ({dtype}); expected real ones: "
            "write amplitude or intensity to a file and use that"
        )
    stored = np.dtype(dtype)
    any_of: list[np.generic] = []
    all_of: dict[str, np.generic] = {}
    # the recipe's number counts as the recipe's alone where the file says no other: the two may hide by other rules
    of_file = None if set(info.nodata) <= {None, bands.nodata} else info.nodata[band - 1]
    for source, value in (("recipe", bands.nodata), ("file", of_file)):
        mark = None if value is None else as_stored(value, stored)
        if value is None or mark is None:
            continue
        if hides_alone(value, stored, of_file=source == "file"):
            any_of.append(mark)
        else:
            all_of[source] = mark
    return ReadBand(number, band, stored, tuple(any_of), all_of, *_scaling(bands, info.bands[band - 1]))


def _scaling(bands: Bands, said: BandSaid) -> tuple[float, float]:
    """Scale and offset of a band: the recipe's, else the file's where the training files were scaled by theirs."""
    if bands.scale is not None or bands.offset is not None:
        return (1.0 if bands.scale is None else bands.scale), bands.offset or 0.0
    if bands.like is not None and not any(band.scaled for band in bands.like):
        return 1.0, 0.0
    return said.scale or 1.0, said.offset or 0.0
