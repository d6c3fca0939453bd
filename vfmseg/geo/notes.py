"""What a person should know of how a raster is read: where a file says one thing and its numbers or the recipe another.

Each note is a kind, by which repetitions are counted, and a text that follows the name of the file.
"""

from __future__ import annotations

from collections.abc import Sequence

from vfmseg.geo.derived import MOST
from vfmseg.geo.reader import Raster
from vfmseg.geo.said import BandSaid, numbers_by_name


def notes_of(raster: Raster) -> dict[str, str]:
    """{kind: text} of everything about this raster that is read otherwise than somebody may expect."""
    infos = list(raster.infos.values())
    notes: dict[str, str] = {}
    turned = next((info.turn.orientation for info in infos if info.turn.orientation != 1), None)
    if turned:
        notes["turned"] = f"is stored turned or mirrored and is read as it is shown (EXIF orientation {turned})"
    if raster.palette:
        notes["palette"] = (
            "holds a colour table, and the numbers of its colours are taken as values; if colours are meant, "
            "`gdal_translate -expand rgb` makes bands of them"
        )
    marked = [band for info in infos for band in info.not_alpha]
    if marked and len(infos) == 1:
        numbers = ", ".join(map(str, marked))
        notes["alpha"] = (
            f"marks band {numbers} as alpha, but it holds other numbers than an alpha band does: it hides nothing"
            + (", and is read as a band" if set(marked) & set(raster.band_numbers) else "")
        )
    if not raster.bands.chosen:
        notes |= _of_order(raster, [band for info in infos for band in info.bands])
    notes |= _of_derived(raster, infos[0].grid.crs)
    return notes | _of_scale(raster, [band for info in infos for band in info.bands])


def _of_order(raster: Raster, there: Sequence[BandSaid]) -> dict[str, str]:
    like = raster.bands.like
    if like is None:
        return {}
    names = ", ".join(band.called for band in like)
    numbers = ", ".join(map(str, raster.band_numbers))
    if numbers_by_name(like, there) is not None:
        count = len(there) - sum(len(info.alpha) for info in raster.infos.values())
        expected = raster.bands.indexes or tuple(range(1, count + 1))
        moved = raster.band_numbers != expected
        return {"order": f"has {names} as its bands {numbers}, and is read so"} if moved else {}
    taken = zip(raster.band_numbers, like, strict=False)
    pairs = [(number, there[number - 1].meaning, band.meaning) for number, band in taken]
    other = [(str(number), its, ours) for number, its, ours in pairs if its and ours and its != ours]
    if other:  # and the rest is not told, so that moving some might tear apart what belongs together
        wrong, its, ours = (", ".join(column) for column in zip(*other, strict=True))
        return {
            "order": f"says that its bands {wrong} are {its}, and in the training files they are {ours}: they are "
            "taken by their places all the same; name the right ones (--bands, data.modalities.NAME.bands)"
        }
    if numbers_by_name(like, like) is None or len(like) == len(there) == 1:  # nobody says it, or there is no order
        return {}
    return {"unnamed": f"does not say which of its bands are {names}: {numbers} are taken for them"}


def _of_scale(raster: Raster, there: Sequence[BandSaid]) -> dict[str, str]:
    ours, like = raster.bands, raster.bands.like
    first = there[raster.band_numbers[0] - 1]
    tags = f"scale {first.scale:g} and offset {first.offset:g}"
    tagged = any(there[number - 1].scaled for number in raster.band_numbers)
    if ours.scale is not None or ours.offset is not None:
        same = all((there[n - 1].scale, there[n - 1].offset) == (ours.scale, ours.offset) for n in raster.band_numbers)
        return {"scale": f"says {tags}, but the recipe's are used"} if tagged and not same else {}
    if like is None or tagged == any(band.scaled for band in like):
        return {}
    if tagged:
        return {"scale": f"says {tags}, the training files nothing: its stored numbers are taken as they are"}
    return {
        "scale": "carries no scale and offset, the training files do: its stored numbers are taken for values; if they "
        "are none, give it its own (gdal_edit.py -scale S -offset O)"
    }


def _of_derived(raster: Raster, crs: str | None) -> dict[str, str]:
    """Of bands that are computed: what metres are where the files do not say, and a radius that was cut."""
    derivation = raster.derivation
    if derivation is None:
        return {}
    notes = {}
    if crs is None and raster.grid.crs is None and raster.bands.pixel_size is None:
        down, across = derivation.pixel
        notes["metres"] = (
            f"has no CRS: {', '.join(derivation.names)} take a pixel for {down:g} x {across:g} m; if they are others, "
            "say so (data.modalities.NAME.pixel_size, metres), or give the files a CRS and transform"
        )
    far = max(derivation.wanted)
    if "height_above_local" in derivation.names and far > MOST + 0.5:
        notes["radius"] = (
            f"has pixels so small that height_above_local would be the mean over {far:.0f} of them to each side, and "
            f"takes {MOST}; choose data.modalities.NAME.local_radius by that, or a coarser elevation model"
        )
    return notes
