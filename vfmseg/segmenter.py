"""Segmenter: load a trained segmenter, label scenes, measure it, pass it on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from vfmseg.checkpoint import Loaded, load_segmenter, segmenter_folder
from vfmseg.errors import CheckpointError, DataError, MachineError, RecipeError, nearest
from vfmseg.files import check_label_file
from vfmseg.geo.labels import IGNORE
from vfmseg.geo.reader import Chip
from vfmseg.geo.writer import LabelWriter, label_type
from vfmseg.inference.sources import OpenScene, Source
from vfmseg.inference.stream import Predictor, Rows, SceneSource, stream_rows
from vfmseg.metrics import Confusion
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.recipe.train import PredictSection
from vfmseg.terminal import say_once

# one array (C, H, W) or one file; with several modalities a dictionary of them
Input = Source | Mapping[str, Source]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Segmenter:
    """A trained segmentation model that labels arrays and scenes of any size.

    segmenter = Segmenter.from_pretrained("runs/flood/best")
    segmenter.predict("scene.tif", output="labels.tif")
    """

    def __init__(self, loaded: Loaded, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder = folder
        self.recipe = loaded.recipe
        self.record = loaded.record
        self.facts = loaded.facts
        self.device = device
        self.dtype = dtype
        self.model = loaded.model.to(device).eval()
        self.ids = tuple(sorted(loaded.recipe.data.classes))

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        device: str | None = None,
        dtype: str = "fp32",
        encoder: str | None = None,
    ) -> Segmenter:
        """Load a segmenter folder or hub id.

        `device`: a torch device, by default the first accelerator, else the CPU. `dtype`: fp32, fp16 (needs an
        accelerator) or bf16. `encoder`: where the base encoder lies now, if it has moved. Raises CheckpointError
        if anything is missing, damaged, or belongs to another encoder.
        """
        if dtype not in DTYPES:
            raise RecipeError(f"dtype = {dtype!r} is not known; expected one of {', '.join(DTYPES)}")
        chosen = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype == "fp16" and chosen.type == "cpu":
            raise RecipeError("dtype = fp16 needs an accelerator; use fp32 or bf16 on the CPU")
        folder = _local_folder(checkpoint)
        return cls(load_segmenter(folder, encoder=encoder), folder, chosen, DTYPES[dtype])

    @property
    def classes(self) -> dict[int, str]:
        """Class names by id."""
        return {i: self.recipe.data.classes[i].name for i in self.ids}

    @property
    def nodata(self) -> int:
        """The value that stands for "no label" in arrays and files: outside the class ids."""
        return label_type(self.ids)[1]

    def predict(
        self,
        scene: Input,
        output: str | Path | None = None,
        *,
        tile: int | None = None,
        overlap: float | None = None,
        blend: str | None = None,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | Path:
        """Label a scene.

        `scene`: an array (C, H, W) in the units of the training files (NaN = invalid), a path that GDAL can read, or
        {modality: array or path}. With `output` the labels are streamed into a GeoTIFF and its path is returned;
        without, class ids (H, W) are returned, `self.nodata` where the scene is invalid. `tile` in pixels,
        `overlap` as a share of the tile (0 <= overlap < 1), `blend` hann, gaussian, average or none; what is left
        out is as in the recipe.
        """
        source = self._source(scene)
        if output is not None:
            check_label_file(Path(output), [path for raster in source.rasters.values() for path in raster.paths])
        rows = self._rows(source, tile, overlap, blend, batch_size, progress)
        if output is None:
            labels = np.empty((source.grid.height, source.grid.width), dtype=np.int64)
            for band in rows:
                labels[band.row : band.row + len(band.labels)] = band.labels
            return self._to_ids(labels)
        classes = [self.recipe.data.classes[i] for i in self.ids]
        tags = {"vfmseg_recipe": self.recipe.name, "vfmseg_encoder": str(self.record["encoder"]["id"])}
        with LabelWriter(
            str(output), source.grid, self.ids, [c.name for c in classes], [c.color for c in classes], tags
        ) as writer:
            for band in rows:
                writer.write(band.row, band.labels)
        return Path(output)

    def probabilities(
        self,
        scene: Input,
        *,
        tile: int | None = None,
        overlap: float | None = None,
        blend: str | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Class probabilities float32 (K, H, W) of a scene that fits in memory, classes in the order of their ids."""
        source = self._source(scene)
        bands = [b.probabilities for b in self._rows(source, tile, overlap, blend, batch_size, None)]
        return np.concatenate(bands, axis=1)

    def evaluate(
        self, recipe: str | Path | Recipe, split: str = "test", progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        """Scores of the labels that `predict` would write, over all scenes of a split.

        One confusion matrix over all labelled, valid pixels at the native grid; returns miou, overall_accuracy,
        kappa, per-class iou, f1, precision, recall and support, and the names of absent classes.
        """
        from vfmseg.scenes import open_split

        if split not in ("train", "val", "test"):
            raise RecipeError(f"split = {split!r}; expected train, val or test")
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe)
        self._check_same_task(recipe)
        confusion = Confusion(len(self.ids))
        scenes = open_split(recipe, split)
        for number, scene in enumerate(scenes, start=1):
            if scene.bands() != self.facts.bands:
                raise DataError(
                    f"{scene.name}: has bands {scene.bands()}, but the segmenter was trained on {self.facts.bands}; "
                    "choose the same with data.modalities.NAME.bands"
                )
            for rows in self._rows(scene, None, None, None, None, None):
                truth = _read_label_rows(scene, rows)
                confusion.update(torch.from_numpy(np.maximum(rows.labels, 0)), torch.from_numpy(truth))
            if progress is not None:
                progress(number, len(scenes))
        return confusion.scores([self.classes[i] for i in self.ids]) | {"split": split, "scenes": len(scenes)}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write this segmenter to another folder, complete: what `from_pretrained` reads and a hub can hold.

        Replaces an older segmenter there; a folder that holds anything else is refused (CheckpointError).
        """
        target, source = Path(folder).expanduser().resolve(), self.folder.resolve()
        if target == source:
            return Path(folder)
        if source in target.parents or target in source.parents:
            raise CheckpointError(f"{folder}: one of it and {self.folder} lies in the other; choose a folder beside it")
        with segmenter_folder(target) as aside:
            shutil.copytree(self.folder, aside, dirs_exist_ok=True)
        return Path(folder)

    # -----------------------------------------------------------------------------------------------------------

    def _source(self, scene: Input) -> OpenScene:
        from vfmseg.scenes import bands_of

        bands = bands_of(self.recipe)
        given = scene if isinstance(scene, Mapping) else {next(iter(bands)): scene}
        if set(given) != set(bands):
            raise DataError(
                f"the segmenter needs the modalities {', '.join(bands)}, but got {', '.join(map(str, given))}; pass "
                "one path or array for each"
            )
        for name, one in given.items():
            if isinstance(one, np.ma.MaskedArray):
                raise DataError(f"'{name}' is a masked array; pass array.astype('float32').filled(numpy.nan) instead")
            if not isinstance(one, str | Path | np.ndarray | list | tuple):
                raise DataError(f"'{name}' is a {type(one).__name__}; expected a path or a numpy array (bands, H, W)")
        source = OpenScene({name: given[name] for name in bands}, bands)
        self._tell(source, files=not isinstance(given[next(iter(bands))], np.ndarray))
        for name, expected in self.facts.bands.items():
            if source.bands()[name] != expected:
                place = f"the array for '{name}'" if isinstance(given[name], np.ndarray) else source.rasters[name].path
                raise DataError(
                    f"{place}: {source.bands()[name]} bands are read, but the model was trained "
                    f"on {expected} bands for '{name}'; choose them with data.modalities.{name}.bands when training"
                )
        return source

    def _tell(self, source: OpenScene, files: bool) -> None:
        """What is allowed but seldom meant, said once: another stored type than in training, a file without a CRS."""
        for name, trained in self.facts.dtypes.items():
            given = source.rasters[name].dtype
            if given != trained:
                say_once(
                    f"{name}: this scene holds {given}, the training scenes {trained}; its values are taken as they "
                    "are, so they must be in the same units"
                )
        if files and not source.grid.georeferenced:
            say_once("the scene carries no CRS: its labels will have none either")

    def _rows(
        self,
        source: SceneSource,
        tile: int | None,
        overlap: float | None,
        blend: str | None,
        batch_size: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[Rows]:
        section = self.recipe.predict
        return stream_rows(
            source,
            self._predictor(),
            len(self.ids),
            tile=_positive("tile", (section.tile or self.recipe.data.tile) if tile is None else tile),
            overlap=_share(section.overlap if overlap is None else overlap),
            blend=section.blend if blend is None else _known("blend", blend, section),
            batch_size=_positive("batch_size", section.batch_size if batch_size is None else batch_size),
            progress=progress,
        )

    def _predictor(self) -> Predictor:
        def predict(chips: list[dict[str, Chip]]) -> np.ndarray:
            images, valid = {}, {}
            for name in self.facts.bands:
                images[name] = torch.from_numpy(np.stack([c[name].pixels for c in chips])).to(self.device)
                valid[name] = torch.from_numpy(np.stack([c[name].valid for c in chips])).to(self.device)
            enabled = self.dtype is not torch.float32
            with torch.inference_mode(), torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
                logits = self.model(images, valid)  # (N, K, tile, tile)
            return logits.float().softmax(dim=1).cpu().numpy()

        return predict

    def _to_ids(self, labels: np.ndarray) -> np.ndarray:
        """Indexes and IGNORE -> class ids and nodata, in the smallest type that the label file would have too."""
        table = np.array([*self.ids, self.nodata])
        return table[np.where(labels == IGNORE, len(self.ids), labels)].astype(label_type(self.ids)[0])

    def _check_same_task(self, recipe: Recipe) -> None:
        theirs = {i: recipe.data.classes[i].name for i in sorted(recipe.data.classes)}
        if self.classes != theirs:
            raise RecipeError(
                f"{recipe.name}: data.classes are {theirs}, but the segmenter knows {self.classes}; evaluate on a "
                "recipe with the same classes"
            )
        if set(recipe.data.modalities) != set(self.facts.bands):
            raise RecipeError(
                f"{recipe.name}: data.modalities are {', '.join(recipe.data.modalities)}, but the segmenter needs "
                f"{', '.join(self.facts.bands)}"
            )


def _read_label_rows(scene: Any, rows: Rows) -> np.ndarray:
    """The true labels of finished rows, ignored where the image is invalid: nodata never reaches a metric."""
    from vfmseg.geo.grid import Window

    truth = scene.read_labels(Window(rows.row, 0, rows.labels.shape[0], rows.labels.shape[1]))
    return np.where(rows.labels == IGNORE, IGNORE, truth)


def _local_folder(checkpoint: str | Path) -> Path:
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    looks_like_path = path.is_absolute() or str(checkpoint).startswith((".", "~")) or str(checkpoint).count("/") != 1
    if looks_like_path or path.exists():
        raise CheckpointError(f"{checkpoint}: no such folder; expected a segmenter folder such as runs/NAME/best")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(checkpoint)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise CheckpointError(
            f"{checkpoint}: no such folder here, and not to be had from the hub{offline}: {type(error).__name__}; "
            "check the name, or download it first"
        ) from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device = {name!r} is not known; expected cpu, cuda, cuda:1, mps, ...") from None
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch built without it, no driver, no such number
        raise MachineError(f"device = {name}: {str(error).splitlines()[0]}; use another one, such as cpu") from None
    return device


def _known(name: str, value: str, section: PredictSection) -> str:
    known = get_args(type(section).model_fields[name].annotation)
    if value not in known:
        raise RecipeError(f"{name} = {value!r}; {nearest(value, known)}")
    return value


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise RecipeError(f"{name} = {value}; expected a whole number of at least 1")
    return value


def _share(overlap: float) -> float:
    if not 0 <= overlap < 1:
        raise RecipeError(f"overlap = {overlap}; expected a share of the tile, at least 0 and below 1, such as 0.25")
    return overlap
