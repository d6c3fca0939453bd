"""One frozen row per published checkpoint: what it is, its licence, and how its images were normalised.

No torch here: recipes are checked against these rows before anything heavy is imported. `python -m vfmseg.catalog`
prints `checkpoints.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vfmseg.disk.jsonfile import read_json
from vfmseg.errors import CheckpointError, nearest

RgbStatistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and std of red, green and blue in images scaled to 0..1."""

IMAGENET: RgbStatistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# CLIP was trained on its own collection and has that collection's mean and std.
CLIP: RgbStatistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class FamilyFacts:
    """What can be said of a family of encoders without building one.

    about: one sentence for people. statistics: that its weights expect, where a checkpoint does not say others.
    model_types: values of `model_type` in config.json that it reads. published: whether recipes name a checkpoint.
    """

    about: str
    statistics: RgbStatistics
    model_types: tuple[str, ...]
    published: bool = True


FAMILIES: dict[str, FamilyFacts] = {
    "sam": FamilyFacts("The image encoder of Segment Anything.", IMAGENET, ("sam", "sam_vision_model")),
    "dinov2": FamilyFacts("DINOv2, with or without registers.", IMAGENET, ("dinov2", "dinov2_with_registers")),
    "clip": FamilyFacts("The image tower of CLIP.", CLIP, ("clip", "clip_vision_model")),
    "builtin": FamilyFacts("A small ViT in DINOv2's layout, in the package.", IMAGENET, ("dinov2",), published=False),
}
"""Families by their name in recipes (`model.encoder.name`)."""

PUBLISHED_FAMILIES = tuple(name for name, facts in FAMILIES.items() if facts.published)


@dataclass(frozen=True)
class Published:
    """Facts about the image encoder of one published checkpoint."""

    family: str  # name of the encoder in recipes
    checkpoint: str  # id on the Hugging Face hub
    licence: str  # SPDX identifier of the weights
    mean: tuple[float, float, float]  # red, green, blue of images scaled to 0..1
    std: tuple[float, float, float]
    patch: int  # pixels per side of a patch
    width: int  # channels of a token
    depth: int  # number of blocks
    parameters: int  # of the image encoder alone, as the class in `loads_with` counts them
    loads_with: str  # class of transformers


def _sam(size: str, width: int, depth: int, parameters: int) -> Published:
    return Published(
        "sam", f"facebook/sam-vit-{size}", "Apache-2.0", *IMAGENET, 16, width, depth, parameters, "SamVisionModel"
    )


def _dinov2(size: str, width: int, depth: int, parameters: int) -> Published:
    return Published(
        "dinov2", f"facebook/dinov2-{size}", "Apache-2.0", *IMAGENET, 14, width, depth, parameters, "Dinov2Model"
    )


def _registers(size: str, width: int, depth: int, parameters: int) -> Published:
    checkpoint, loads_with = f"facebook/dinov2-with-registers-{size}", "Dinov2WithRegistersModel"
    return Published("dinov2", checkpoint, "Apache-2.0", *IMAGENET, 14, width, depth, parameters, loads_with)


def _clip(size: str, patch: int, width: int, depth: int, parameters: int) -> Published:
    return Published(
        "clip", f"openai/clip-vit-{size}", "MIT", *CLIP, patch, width, depth, parameters, "CLIPVisionModel"
    )


_ROWS = (
    _sam("base", 768, 12, 89_670_912),
    _sam("large", 1024, 24, 308_278_272),
    _sam("huge", 1280, 32, 637_026_048),
    _dinov2("small", 384, 12, 22_056_576),
    _dinov2("base", 768, 12, 86_580_480),
    _dinov2("large", 1024, 24, 304_368_640),
    _dinov2("giant", 1536, 40, 1_136_480_768),
    _registers("small", 384, 12, 22_058_112),
    _registers("base", 768, 12, 86_583_552),
    _registers("large", 1024, 24, 304_372_736),
    _registers("giant", 1536, 40, 1_136_486_912),
    _clip("base-patch32", 32, 768, 12, 87_456_000),
    _clip("base-patch16", 16, 768, 12, 85_799_424),
    _clip("large-patch14", 14, 1024, 24, 303_179_776),
    _clip("large-patch14-336", 14, 1024, 24, 303_507_456),
)

CATALOG: dict[str, Published] = {row.checkpoint: row for row in _ROWS}

BUILTIN = Published("builtin", "", "Apache-2.0", *IMAGENET, 14, 384, 7, 6_551_808, "Dinov2Model")
"""The encoder in the package, as people read of it; what is built is what its own config.json says."""


def published_statistics(family: str, checkpoint: str | None) -> RgbStatistics:
    """Mean and std (red, green, blue; images scaled to 0..1) that the weights of a checkpoint expect.

    A local folder says them itself if it holds a preprocessor_config.json; else, outside the catalog, they are those of
    the family. Raises CheckpointError for an unknown family, a checkpoint of another family, or a file that cannot be
    understood.
    """
    if family not in FAMILIES:
        raise CheckpointError(f"encoder family '{family}' is not known; {nearest(family, FAMILIES)}")
    row = CATALOG.get(checkpoint or "")
    if row is None:
        return _of_folder(checkpoint) or FAMILIES[family].statistics
    if row.family != family:
        raise CheckpointError(f"{checkpoint} is a {row.family} checkpoint, not {family}; use the encoder {row.family}")
    return row.mean, row.std


def _of_folder(checkpoint: str | None) -> RgbStatistics | None:
    """What the preprocessor_config.json of a local folder says, as transformers' image processors write it."""
    file = Path(checkpoint or "").expanduser() / "preprocessor_config.json"
    if checkpoint is None or not file.is_file():
        return None
    try:
        content = read_json(file)
        if not content.get("do_normalize", True) or "image_mean" not in content:
            return None
        (r, g, b), (sr, sg, sb) = ([float(value) for value in content[key]] for key in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
        raise CheckpointError(
            f"{file}: not understood ({type(error).__name__}: {error}); expected image_mean and image_std with three "
            "numbers each, as transformers writes them; copy the folder again"
        ) from None
    if not all(math.isfinite(value) for value in (r, g, b)):
        raise CheckpointError(f"{file}: image_mean = {[r, g, b]}; expected finite numbers; copy the folder again")
    if not all(0 < value < math.inf for value in (sr, sg, sb)):
        raise CheckpointError(f"{file}: image_std = {[sr, sg, sb]}; expected numbers above 0; copy the folder again")
    return (r, g, b), (sr, sg, sb)


_HEADER = """\
# Checkpoints

Published checkpoints that vfmseg is made for. This page is the output of `python -m vfmseg.catalog`.

Mean and std are those of red, green and blue in images scaled to 0..1; vfmseg applies them itself. Parameters are those
of the image encoder alone, as the class of transformers in the last column counts them. Weights are downloaded from
the Hugging Face hub on first use, under the licence of their publisher; any local folder that such a class has saved
works too. `builtin` comes with vfmseg and has no hub id.

| encoder | hub id | licence | patch | width | blocks | parameters | mean | std | loads with |
|---|---|---|---:|---:|---:|---:|---|---|---|
"""

_BUILTIN = """
`{name: builtin}` is a small ViT in the layout of DINOv2, cut out of a larger one and trained on overhead imagery to
answer as that does. Its weights lie in the package, in half precision, and are under Apache-2.0 with the notices in
`vfmseg/assets/builtin/NOTICE`; `vfmseg/assets/builtin/README.md` says what they were made from.
"""


def _row(row: Published) -> str:
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (row.mean, row.std))
    cells = (
        row.family,
        f"`{row.checkpoint}`" if row.checkpoint else "in the package",
        row.licence,
        str(row.patch),
        str(row.width),
        str(row.depth),
        f"{row.parameters:,}",
        mean,
        std,
        f"`{row.loads_with}`",
    )
    return f"| {' | '.join(cells)} |"


def checkpoints_markdown() -> str:
    """The page `checkpoints.md`: one line per row of the catalog."""
    return _HEADER + "\n".join(_row(row) for row in (*CATALOG.values(), BUILTIN)) + "\n" + _BUILTIN


if __name__ == "__main__":
    print(checkpoints_markdown(), end="")
