"""The `data` section: classes, modalities and where the labelled scenes of each split come from."""

from __future__ import annotations

import colorsys
import difflib
import keyword
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal, cast

from pydantic import Field, GetJsonSchemaHandler, field_validator
from pydantic import ValidationInfo as Info
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from vfmseg.errors import nearest, show
from vfmseg.recipe.base import Flag, Name, Number, Problem, Section, Whole
from vfmseg.recipe.splits import SOURCE_KEYS, AnySource, FlatSource, Source, Sources, same_scenes

Color = tuple[
    Annotated[Whole, Field(ge=0, le=255)], Annotated[Whole, Field(ge=0, le=255)], Annotated[Whole, Field(ge=0, le=255)]
]
ClassId = Annotated[Whole, Field(gt=-(2**31), lt=2**31)]  # the smallest 32-bit number is left for nodata
LARGEST_TILE = 2**16  # pixels a side
MOST_CLASSES = 4096  # each has a number for every pixel in memory
MOST_BANDS = 1024  # of one modality
DerivedName = Literal["height", "slope", "height_above_local"]  # those of `vfmseg.geo.derived`
TileSide = Annotated[Whole, Field(ge=1, le=LARGEST_TILE)]

SPLITS = ("train", "val", "test")
# Told apart also by most colour-blind readers; further classes get hues a golden angle apart.
PALETTE: tuple[tuple[int, int, int], ...] = (
    (60, 60, 60),
    (230, 80, 60),
    (0, 114, 178),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
)


def default_color(position: int) -> tuple[int, int, int]:
    """Colour (red, green, blue, 0-255) of the class at this position in id order."""
    if position < len(PALETTE):
        return PALETTE[position]
    hue, value = (position * 0.618034) % 1, (0.95, 0.75, 0.55)[position % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65, value)
    return round(red * 255), round(green * 255), round(blue * 255)


class ClassSpec(Section):
    """A class: its name alone, or name and colour."""

    name: Name
    color: Annotated[Color, Field(examples=[[230, 80, 60]], json_schema_extra=lambda s: s.pop("default", None))] = (
        PALETTE[0]
    )
    """Red, green, blue, 0-255; left out: taken from a palette."""
    in_mean: Flag = True
    """False: learned and counted as a class, but not in the mean IoU, such as "clutter" of published protocols."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(core)]}


Groups = Annotated[
    tuple[Annotated[tuple[Annotated[Whole, Field(ge=1, le=MOST_BANDS)], ...], Field(min_length=1)], ...] | None,
    Field(min_length=2, max_length=64, examples=[[[1, 2, 3], [4, 5, 6], [7, 8]]]),
]


class ModalitySection(Section):
    """One kind of image, and how its stored numbers are read: value = stored * scale + offset.

    Where both are left out, those that the files themselves say are used, if they say any.
    """

    bands: tuple[Annotated[Whole, Field(ge=1, le=65535)], ...] | None = Field(
        default=None, min_length=1, max_length=MOST_BANDS, examples=[[1, 2, 3]]
    )
    """Bands to read, counted from 1, in this order; left out: all."""
    scale: Annotated[Number | None, Field(examples=[0.0001])] = None
    """Left out: the files' own; 1 takes stored numbers as they are."""
    offset: Number | None = None
    nodata: float | None = Field(default=None, strict=True, examples=[0])
    """Stored value, or `.nan`, that means "nothing measured here" in any band (0: in all), beside the file's own."""
    normalize: Literal["encoder", "dataset"] | None = None
    """Mean and std of the encoder's own training, or of the training split; left out: encoder for 8-bit RGB."""
    derive: Annotated[tuple[DerivedName, ...], Field(examples=[["slope", "height_above_local"]])] = ()
    """Bands to compute from one band of elevation in metres, and to give to the model instead of it."""
    local_radius: Annotated[Number | None, Field(gt=0, le=1e6, examples=[100])] = None
    """Metres to each side whose mean `height_above_local` is measured from (at most 256 pixels); left out: 100."""
    pixel_size: Annotated[Number | None, Field(gt=0, le=1e6, examples=[10])] = None
    """Metres of a pixel for `derive`, where files (or arrays) have no CRS; left out: their coordinates are metres."""
    optional: Flag = False
    """A scene may lack it, in training and in prediction."""
    groups: Groups = None
    """Bands that enter the encoder together, 1 the first that is read: each group gives a token of each patch."""

    @property
    def count(self) -> int | None:
        """How many bands the model gets of it, as far as the recipe says."""
        return len(self.derive or self.bands or ()) or None

    def _problems(self) -> Iterator[Problem]:
        if self.scale == 0:
            yield Problem("scale", "= 0 must not be 0: it would erase the image; 1 takes stored numbers as they are")
        if self.bands and len(set(self.bands)) < len(self.bands):
            yield Problem("bands", f"= {show(self.bands)} must name each band once")
        grouped = [band for group in self.groups or () for band in group]
        if self.groups and sorted(grouped) != list(range(1, (self.count or len(grouped)) + 1)):
            yield Problem(
                "groups",
                f"= {show([list(group) for group in self.groups])} must have each band that is read in one group, by "
                f"its number there: 1 to {self.count or 'their number'}",
            )
        if self.derive:
            yield from self._derive_problems()
            return
        for key in ("local_radius", "pixel_size"):
            if getattr(self, key) is not None:
                yield Problem(key, "is for derive: [height_above_local] and the like; add that, or drop it")
        if self.normalize == "encoder" and self.bands and len(self.bands) != 3:
            yield Problem(
                "normalize", f"= 'encoder' needs 3 bands (red, green, blue), not {len(self.bands)}; use dataset"
            )

    def _derive_problems(self) -> Iterator[Problem]:
        if len(set(self.derive)) < len(self.derive):
            yield Problem("derive", f"= {show(self.derive)} must name each band once")
        if self.bands and len(self.bands) != 1:
            yield Problem("bands", f"= {show(self.bands)} must name one band: the elevation")
        if self.normalize == "encoder":
            yield Problem("normalize", "= 'encoder' is for red, green and blue, not for derived bands; use dataset")
        if self.local_radius is not None and "height_above_local" not in self.derive:
            yield Problem("local_radius", "is for height_above_local, which is not in derive; add it, or drop the key")


def name_problems(modalities: Mapping[str, ModalitySection]) -> Iterator[Problem]:
    """Modalities whose name cannot be a key of a source."""
    for name in modalities:
        if not name.isidentifier() or keyword.iskeyword(name):
            yield Problem(
                f"modalities.{name}", "must be a plain name: letters, digits and _, not starting with a digit"
            )
        elif name in SOURCE_KEYS:
            yield Problem(f"modalities.{name}", f"has a name that sources use themselves; try {name}_image")


def unknown_problems(place: str, source: FlatSource, modalities: Mapping[str, ModalitySection]) -> Iterator[Problem]:
    """Images that a source names and that are of no modality; `place`: its key below `data`."""
    for name in source.images:
        if name not in modalities:
            keys = difflib.get_close_matches(name, SOURCE_KEYS, n=1)
            yield Problem(f"{place}.{name}", f"is not one of data.modalities; {nearest(name, [*modalities, *keys])}")


def weight_problems(weights: Mapping[str, float | None]) -> Iterator[Problem]:
    """A weight that nothing is weighed against, of {key of a source below `data`: its weight}."""
    weighed = [place for place, weight in weights.items() if weight is not None]
    if len(weighed) != 1:
        return
    if "." not in weighed[0]:
        why = "there is only one source; drop it, or list several sources"
    else:
        why = "it shares draws with the other sources that have a weight, and none has; drop it, or give others one"
    yield Problem(f"{weighed[0]}.weight", f"is not used: {why}")


def in_order_of(found: Any, order: Sequence[str]) -> Any:
    """A source, or each of several, with its images in this order, so that the order inside it means nothing."""
    if isinstance(found, tuple):
        return tuple(in_order_of(source, order) for source in found)
    if found is None or not set(found.images) <= set(order):
        return found
    return found.in_order([name for name in order if name in found.images])


class ClassesSection(Section):
    """What label files hold: classes, and a value that means none."""

    classes: Annotated[
        dict[ClassId, ClassSpec],
        Field(
            min_length=2,
            max_length=MOST_CLASSES,
            examples=[{0: "land", 1: "water"}],
            json_schema_extra={"propertyNames": {"pattern": r"^-?[0-9]+$"}},
        ),
    ]
    """Class id in the label files: name, or {name, color}."""
    ignore_index: ClassId = 255
    """Label value of pixels that belong to no class; they count in no loss and no metric."""

    @field_validator("classes", mode="before")
    @classmethod
    def _fill_classes(cls, value: Any) -> Any:
        """`1: water` means {name: water}; classes without a colour take the palette's, in id order."""
        if not isinstance(value, Mapping):
            return value
        places = {key: place for place, key in enumerate(sorted(key for key in value if isinstance(key, int)))}
        filled = {}
        for key, spec in value.items():
            spec = {"name": spec} if isinstance(spec, str) else spec
            if isinstance(spec, Mapping) and key in places:
                spec = {"color": default_color(places[key]), **spec}
            filled[key] = spec
        return filled

    def _problems(self) -> Iterator[Problem]:
        if self.ignore_index in self.classes:
            ids = show(sorted(self.classes)).strip("[]")
            yield Problem(
                "ignore_index",
                f"= {self.ignore_index} must not be a class id ({ids}); "
                f"try {255 if 255 not in self.classes else max(self.classes) + 1}, or drop the class",
            )
        if not any(spec.in_mean for spec in self.classes.values()):
            yield Problem("classes", "has no class in the mean IoU; leave in_mean out of some")
        names: dict[str, int] = {}
        for number, spec in self.classes.items():
            if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in spec.name):  # no map file could carry it
                yield Problem(
                    f"classes.{number}", f"= {spec.name!r} holds a control character; write the name without it"
                )
            if spec.name in names:
                yield Problem(
                    f"classes.{number}",
                    f"= '{spec.name}' is already the name of class {names[spec.name]}; give every class its own name",
                )
            names.setdefault(spec.name, number)


class DataSection(ClassesSection):
    """Classes, modalities and splits. Every split names the labels, and an entry for each modality.

    The entry of an optional modality may be left out.
    """

    modalities: Annotated[
        dict[str, ModalitySection], Field(min_length=1, max_length=64, examples=[{"rgb": {"bands": [1, 2, 3]}}])
    ]
    """One or several kinds of image of the same place; the first is the reference grid."""
    only: Annotated[tuple[Name, ...] | None, Field(min_length=1, max_length=64, examples=[["rgb"]])] = None
    """Train with these modalities alone, as if the recipe named no others; left out: with all."""
    train: Annotated[Sources, Field(examples=[{"rgb": "train/*.tif", "labels": "train_labels/*.tif"}])]
    """Scenes to learn from: files, a table (CSV) or a data set, or a list of such sources, which may have weights."""
    fraction: Annotated[Number, Field(gt=0, le=1, examples=[0.25])] = 1.0
    """Share of the tiles of data.train that are learned from, drawn once by the seed: how much do labels matter?"""
    val: Source | None = None
    """Scenes that choose the best checkpoint."""
    test: Source | None = None
    """Scenes that are only measured, at the end."""
    tile: TileSide = 256
    """Side of a training window in pixels of the reference grid."""
    samples_per_epoch: Whole | None = Field(default=None, ge=1, le=10**7, examples=[500])
    """Windows drawn per epoch; left out: as many as cover the training scenes once."""
    workers: Annotated[Whole, Field(ge=0, le=256)] = 0
    """Processes that read beside the training; 0 reads in the training process."""

    @field_validator("val", "test", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            raise ValueError("must be one source; only data.train may be a list of them")
        return value

    @field_validator(*SPLITS)
    @classmethod
    def _order_modalities(cls, found: Sources | None, info: Info) -> Sources | None:
        return cast("Sources | None", in_order_of(found, list(info.data.get("modalities", ()))))

    def sources(self, split: str) -> dict[str, AnySource]:
        """{its key below `data`: source} of a split, in order: `train`, or `train.0`, `train.1` of a list.

        Empty if the recipe does not have the split.
        """
        found = getattr(self, split)
        if isinstance(found, tuple):
            return {f"{split}.{number}": source for number, source in enumerate(found)}
        return {} if found is None else {split: found}

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        yield from self._modality_problems()
        yield from self._weight_problems()
        yield from self._leaks()

    def _modality_problems(self) -> Iterator[Problem]:
        yield from name_problems(self.modalities)
        for place, source in [pair for split in SPLITS for pair in self.sources(split).items()]:
            yield from unknown_problems(place, source, self.modalities)
            for name, modality in self.modalities.items():
                if name not in source.images and not modality.optional:
                    yield Problem(f"{place}.{name}", f"is missing; say where the images of modality {name} are")

    def _weight_problems(self) -> Iterator[Problem]:
        """Weights that nothing is weighed against."""
        weights = {split: {p: one.weight for p, one in self.sources(split).items()} for split in SPLITS}
        for place, weight in [*weights["val"].items(), *weights["test"].items()]:
            if weight is not None:
                yield Problem(
                    f"{place}.weight", "is not used: only the sources of data.train are drawn by weight; drop it"
                )
        yield from weight_problems(weights["train"])

    def _leaks(self) -> Iterator[Problem]:
        """A model must not be chosen or measured on scenes that it saw in training."""
        for later, earlier in (("val", "train"), ("test", "train"), ("test", "val")):
            for (place, first), second in product(self.sources(earlier).items(), self.sources(later).values()):
                if shared := same_scenes(first, second):
                    text = f"names the same scenes as data.{place} ({shared}); give {later} scenes of its own"
                    yield Problem(later, text)
