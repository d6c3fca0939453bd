"""What a labelling writes and where, who shares its work, and who is told of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vfmseg.disk.files import check_label_file, local_path, require_new, unfit_name
from vfmseg.errors import DataError, RecipeError
from vfmseg.geo.compression import check_compression
from vfmseg.inference.contracts import Tick
from vfmseg.inference.products import EXTRAS
from vfmseg.vector.polygons import check_polygons, unfit_vector_name
from vfmseg.vector.vectorfile import is_ours

if TYPE_CHECKING:
    from vfmseg.inference.job import Job


@dataclass(frozen=True)
class Output:
    """What is written, and how an existing file is treated.

    target: a GeoTIFF of class ids, or for a list of scenes a folder. extras: confidence, uncertainty, probabilities,
    each in a file beside the labels. area: polygons (a vector file) or bounds (west, south, east, north) in the CRS of
    the scene; only that is labelled. cog: cloud-optimised files with overviews. compress: deflate, zstd or lzw.
    polygons: suffix of a vector file (".gpkg") that the first process makes of the labels, without polygons smaller
    than `min_area` (square units of the CRS), outlines moved by at most `simplify` (units). resume: go on with an
    interrupted labelling, and leave files as they are that the same work has finished. overwrite: replace files.
    skip_unreadable: damaged blocks become nodata instead of an error.
    """

    target: str | Path
    extras: tuple[str, ...] = ()
    area: str | Path | tuple[float, ...] | None = None
    cog: bool = False
    compress: str = "deflate"
    polygons: str | None = None
    min_area: float = 0.0
    simplify: float = 0.0
    resume: bool = False
    overwrite: bool = False
    skip_unreadable: bool = False

    def to(self, target: Path) -> Output:
        """The same for another target, such as one scene of a list."""
        return replace(self, target=target)

    @property
    def path(self) -> Path:
        """The target as a path; DataError if it is none of this machine, or has no name."""
        path = local_path(self.target)
        if not path.name:
            raise DataError(
                f"{path}: is a folder; expected the name of a GeoTIFF to write, or of a new folder for a list"
            )
        return path

    @property
    def maps(self) -> dict[str, Path]:
        """{product: its GeoTIFF}: the labels have the name of the target, others one made from it."""
        return targets_of(self.path, ("labels", *self.extras))

    @property
    def vector(self) -> Path | None:
        """The vector file."""
        return None if self.polygons is None else self.path.with_suffix(self.polygons)

    @property
    def named_area(self) -> list[str]:
        """The file that the area is read from, if it is one."""
        return [str(self.area)] if isinstance(self.area, str | Path) else []

    def unfit(self) -> str | None:
        """Why files of these names cannot be written; None if they can."""
        found = [why for file in self.maps.values() if (why := unfit_name(file)) is not None]
        if found or self.vector is None:
            return next(iter(found), None)
        return unfit_name(self.vector) or unfit_vector_name(self.vector)

    def check(self) -> None:
        """RecipeError for words that are not known, DataError or MachineError for what cannot be written."""
        check_compression(self.compress)
        unknown = [name for name in self.extras if name not in EXTRAS]
        if unknown:
            raise RecipeError(f"extras = {', '.join(unknown)}: not known; expected some of {', '.join(EXTRAS)}")
        self.check_words()
        for file in self.maps.values():
            check_label_file(file)
        self.check_vector()

    def check_words(self) -> None:
        """RecipeError for a suffix of polygons that is none."""
        if self.polygons is not None and not re.fullmatch(r"\.[^/\\]*[^./\\]", self.polygons):
            raise RecipeError(f"--polygons {self.polygons}: expected a suffix with its dot, such as .gpkg")

    def check_vector(self) -> None:
        """DataError or MachineError for polygons that cannot be written: before hours of labelling, not after."""
        if self.vector is None:
            return
        check_polygons(self.vector, self.min_area, self.simplify)
        goes_on = self.resume and self.path.exists() and self.vector.is_file() and is_ours(self.vector)
        if not self.overwrite and not goes_on:
            require_new(self.vector)


def targets_of(target: Path, products: Iterable[str]) -> dict[str, Path]:
    """{product: its file}: labels.tif, labels_confidence.tif, ..."""
    return {name: target if name == "labels" else product_path(target, name) for name in products}


def product_path(target: Path, product: str) -> Path:
    """labels.tif -> labels_confidence.tif."""
    return target.with_name(f"{target.stem}_{product}{target.suffix}")


class Team(NamedTuple):
    """Processes that label one scene together: number of this one, from 0, and how many they are."""

    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class Watch:
    """Who is told. planned(job, pixels): before the first tile, with the pixels that this process has to label;
    progress(tick): when rows are finished; labelled(): when the maps are there, before polygons are made."""

    planned: Callable[[Job, int], None] | None = None
    progress: Callable[[Tick], None] | None = None
    labelled: Callable[[], None] | None = None


ALONE = Team()
SILENT = Watch()
