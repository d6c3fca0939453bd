"""Segmenter: load a trained segmenter, label scenes, measure it, pass it on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfmseg.checkpoint.folder import fingerprint_of, segmenter_folder
from vfmseg.checkpoint.hub import local_segmenter
from vfmseg.checkpoint.reading import Loaded, load_segmenter
from vfmseg.checkpoint.writing import versions
from vfmseg.data.given import GivenScene, hidden_by, open_scenes, tell_types
from vfmseg.data.raster_scene import RasterScene
from vfmseg.disk.files import check_label_file, local_path, never_an_input, require_new
from vfmseg.disk.lock import LOCK, held, lock_beside
from vfmseg.errors import CheckpointError, DataError, RecipeError
from vfmseg.geo.compression import check_compression
from vfmseg.geo.layer import label_type
from vfmseg.geo.validity import Hidden
from vfmseg.inference.contracts import Area, Finished, Model, Predictor, Product, Report, Tick
from vfmseg.inference.how import How, Settled, settle
from vfmseg.inference.job import Arrays, Job, into, into_files, prepare, targets_of
from vfmseg.inference.products import EXTRAS, Products
from vfmseg.inference.provenance import finished_before, mark_of, work_of
from vfmseg.inference.ranks import alone, own_device, usable_device
from vfmseg.inference.reading import SceneSource, Stored, stored_as
from vfmseg.inference.scoring import Scores, class_indexes
from vfmseg.inference.shards import tidy
from vfmseg.inference.tolerant import Tolerant, Unreadable
from vfmseg.inference.views import averaged
from vfmseg.inference.votes import filled_up, voter
from vfmseg.metrics import Confusion
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.training.run_folder import segmenter_run
from vfmseg.vector.area import read_area

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Labelled:
    """A scene that was labelled: its files by product, what this process did, and what could not be read.

    before: everything was there already, of the very same work. hidden {modality: what has hidden which share of the
    pixels that this process has read}.
    """

    files: dict[str, Path]
    report: Report
    unreadable: Unreadable
    before: bool = False
    hidden: dict[str, Hidden] = field(default_factory=dict)


class Segmenter:
    """A trained segmentation model that labels arrays and scenes of any size.

    segmenter = Segmenter.from_pretrained("runs/flood/best")
    segmenter.predict("scene.tif", output="labels.tif")
    """

    def __init__(
        self, loaded: Loaded, folder: Path, device: torch.device, dtype: torch.dtype, compile: bool = False
    ) -> None:
        self.folder = folder
        self.recipe = loaded.recipe
        self.record = loaded.record
        self.inputs = loaded.inputs
        self.fingerprint = loaded.fingerprint  # a training run may replace the folder at any time
        self.device = device
        self.dtype = dtype
        self.model = loaded.model.to(device).eval()
        self.ids = tuple(sorted(loaded.recipe.data.classes))
        self._compiled = compile
        self._run: Callable[..., Tensor] = torch.compile(self.model) if compile else self.model

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        device: str | None = None,
        dtype: str = "fp32",
        encoder: str | None = None,
        compile: bool = False,
    ) -> Segmenter:
        """Load a segmenter folder or hub id.

        `device`: a torch device, by default this process's accelerator, else the CPU. `dtype`: fp32, fp16 (needs an
        accelerator) or bf16. `encoder`: where the base encoder lies now, if it has moved. `compile`: with
        torch.compile, which takes a minute first. Raises CheckpointError if anything is missing, damaged, or belongs
        to another encoder.
        """
        if dtype not in DTYPES:
            raise RecipeError(f"dtype = {dtype!r} is not known; expected one of {', '.join(DTYPES)}")
        chosen = usable_device(device or own_device())
        if dtype == "fp16" and chosen.type == "cpu":
            raise RecipeError("dtype = fp16 needs an accelerator; use fp32 or bf16 on the CPU")
        folder = local_segmenter(checkpoint)
        return cls(load_segmenter(folder, encoder=encoder), folder, chosen, DTYPES[dtype], compile)

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
        scene: GivenScene,
        output: str | Path | None = None,
        *,
        tile: int | None = None,
        overlap: float | None = None,
        blend: str | None = None,
        batch_size: int | None = None,
        tta: str | None = None,
        bands: Mapping[str, Sequence[int]] | None = None,
        overwrite: bool = False,
        progress: Callable[[Tick], None] | None = None,
    ) -> np.ndarray | Path:
        """Label a scene.

        `scene`: an array (C, H, W) in the units of the training files (NaN = invalid; if those say a scale, whole
        numbers are scaled by it and others taken as values), a path that GDAL can read, the paths of one modality's
        files, or {modality: one of these}. Bands are found by their names where the files say them, else taken by their
        places; `bands` {modality: numbers from 1} says which they are. With `output` the labels are streamed into a
        GeoTIFF and its path is returned; without, class ids (H, W) are returned, `self.nodata` where the scene is
        invalid. `tile` in pixels, `overlap` as a share of the tile, and so on as in `How`; what is left out is as in
        the recipe. An existing `output` is refused (DataError) unless `overwrite`. For other products, a part of a
        scene, or resuming, see `label`.
        """
        how = How(tile, overlap, blend, batch_size, tta=tta, bands=bands)
        if output is not None:
            return self.label(scene, output, how, overwrite=overwrite, progress=progress).files["labels"]
        return self._arrays(scene, how, Products(self.ids), progress)["labels"][0]

    def probabilities(self, scene: GivenScene, how: How | None = None) -> np.ndarray:
        """Class probabilities float32 (K, H, W) of a scene that fits in memory, classes in the order of their ids."""
        how = how or How()
        products = Products(self.ids, logits=settle(how, self.recipe).logits)

        def shares(finished: Finished) -> dict[str, np.ndarray]:
            return {"probabilities": products.shares(finished).cpu().numpy().copy()}

        return self._arrays(scene, how, shares)["probabilities"]

    def label(
        self,
        scene: GivenScene,
        output: str | Path,
        how: How | None = None,
        *,
        extras: Sequence[str] = (),
        area: str | Path | Sequence[float] | None = None,
        cog: bool = False,
        compress: str = "deflate",
        resume: bool = False,
        overwrite: bool = False,
        skip_unreadable: bool = False,
        rank: int = 0,
        ranks: int = 1,
        beside: Mapping[Path, Callable[[Path], object]] | None = None,
        planned: Callable[[Job, int], None] | None = None,
        progress: Callable[[Tick], None] | None = None,
    ) -> Labelled:
        """Label a scene of any size into files, piece by piece, so that an interrupted run can be resumed.

        `output`: a GeoTIFF of class ids; `extras` (confidence, uncertainty, probabilities) are written beside it.
        `area`: polygons (a vector file) or bounds in the CRS of the scene; only that is labelled. `cog`: write
        cloud-optimised files with overviews. `compress`: the files by deflate, zstd or lzw (MachineError where GDAL
        lacks it). `skip_unreadable`: damaged blocks become nodata instead of an error.
        `rank`, `ranks`: this process and the number of processes that label this scene together. `planned` is told the
        job, and the pixels that this process has to label, before it starts. With `resume`, files that the same work
        has finished before, in the same form, are left as they are. `beside` {file: what writes it, given the labels}:
        what the first process makes of the map. BusyError if another run is writing any of these files.
        """
        target = local_path(output)
        check_compression(compress)
        unknown = [name for name in extras if name not in EXTRAS]
        if unknown:
            raise RecipeError(f"extras = {', '.join(unknown)}: not known; expected some of {', '.join(EXTRAS)}")
        settled = settle(how or How(), self.recipe)
        scenes = self._open(scene, settled)
        try:
            files = targets_of(target, ("labels", *extras))
            for file in files.values():
                check_label_file(file)
            never_an_input(
                files.values(), [*scenes[0].read_from(), *([str(area)] if isinstance(area, str | Path) else [])]
            )
            unreadable = Unreadable()
            products = Products(self.ids, tuple(extras), settled.logits)
            job = self._file_job(scenes, settled, products, unreadable if skip_unreadable else None, area)
            tags = tags_of(self.recipe, self.record, self.fingerprint)
            work = tags | work_of(scenes[0], job, settled, products.extras, area, skip_unreadable) | self._runs_on()
            mark = mark_of(work, {"cog": cog, "compress": compress})
            classes = [self.recipe.data.classes[i] for i in self.ids]
            layers = products.layers([c.name for c in classes], [c.color for c in classes], tags | mark)
            with alone([*files.values(), *(beside or {})], rank, ranks):
                done = finished_before(files.values(), mark) if resume else set()
                before = done == set(files.values())
                if before and rank == 0:
                    tidy(target, done, work)  # after a run that was killed at its very last step but one
                for file in files.values():
                    if not overwrite and file not in done:
                        require_new(file)
                report = Report() if before else into_files(
                    job, target, layers, work, rank=rank, ranks=ranks,
                    resume=resume, overwrite=overwrite, cog=cog, compress=compress, planned=planned, progress=progress,
                )  # fmt: skip
                for write in (beside or {}).values() if rank == 0 else ():
                    write(target)
        finally:
            for one in scenes:
                one.close()
        return Labelled(files, report, unreadable, before, hidden_by(scenes))

    def evaluate(
        self, recipe: str | Path | Recipe, split: str = "test", progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        """Scores of the labels that `predict` writes if told what `recipe.predict` says, over all scenes of a split.

        One confusion matrix over all labelled, valid pixels at the native grid; returns miou, overall_accuracy,
        kappa, per-class iou, f1, precision, recall and support, and the names of absent classes.
        """
        from vfmseg.build.data import open_split, require_same_task

        if split not in ("train", "val", "test"):
            raise RecipeError(f"split = {split!r}; expected train, val or test")
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe)
        require_same_task(recipe, self.recipe)
        confusion = Confusion(len(self.ids))
        scenes = open_split(recipe, split, {one.name: one.said for one in self.inputs}, self.recipe)
        tell_types(scenes[0].dtypes(), self.inputs)
        # the tile of the training, unless it is asked for: what is in a tile changes what the model says
        settled = settle(How(tile=recipe.predict.tile or self.recipe.predict.tile or self.recipe.data.tile), recipe)
        for number, scene in enumerate(scenes, start=1):
            if scene.bands() != self._counts:
                raise DataError(
                    f"{scene.name}: has bands {scene.bands()}, but the segmenter was trained on {self._counts}; "
                    "choose the same with data.modalities.NAME.bands"
                )
            into(self._job([scene], Stored(), settled, class_indexes, 8), Scores(scene, confusion))
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
        # a run's best/ and last/ are written under the run's own lock
        lock = target.parent / LOCK if segmenter_run(target.parent).holds_run() else lock_beside(target)
        with held(lock, target, "saving a segmenter"), segmenter_folder(target) as aside:
            shutil.copytree(self.folder, aside, dirs_exist_ok=True)
            if fingerprint_of(aside) != self.fingerprint:
                raise CheckpointError(f"{self.folder}: is no longer the segmenter that was loaded; load it again")
        return Path(folder)

    # -----------------------------------------------------------------------------------------------------------

    def _open(self, scene: GivenScene, settled: Settled) -> list[RasterScene]:
        inputs = tuple(
            replace(one, bands=replace(one.bands, indexes=settled.bands[one.name], chosen=True))
            if one.name in settled.bands
            else one
            for one in self.inputs
        )
        return open_scenes(scene, inputs, settled.readers)

    @property
    def _counts(self) -> dict[str, int]:
        """{modality: number of its bands}."""
        return {one.name: one.count for one in self.inputs}

    def _arrays(
        self, scene: GivenScene, how: How, product: Product, progress: Callable[[Tick], None] | None = None
    ) -> dict[str, np.ndarray]:
        """Label a scene into memory: {product: (bands, H, W)}."""
        settled = settle(how, self.recipe)
        scenes = self._open(scene, settled)
        try:
            kept = Arrays(scenes[0].grid.height, scenes[0].grid.width)
            into(self._job(list(scenes), stored_as(scenes[0]), settled, product, 4), kept, progress)
        finally:
            for one in scenes:
                one.close()
        return kept.kept

    def _file_job(
        self,
        scenes: Sequence[RasterScene],
        settled: Settled,
        products: Products,
        unreadable: Unreadable | None,
        area: str | Path | Sequence[float] | None,
    ) -> Job:
        stored = stored_as(scenes[0])
        sources: list[SceneSource] = list(scenes)
        if unreadable is not None:
            sources = [Tolerant(scene, self._counts, stored.block, unreadable) for scene in scenes]
        polygons = None if area is None else read_area(area, scenes[0].grid)
        wanted = None if polygons is None else Area(polygons.touches, polygons.mask)
        return self._job(sources, stored, settled, products, products.bytes_a_pixel, wanted)

    def _job(
        self,
        scenes: Sequence[SceneSource],
        stored: Stored,
        settled: Settled,
        product: Product,
        product_bytes: int,
        area: Area | None = None,
    ) -> Job:
        model = Model(self._predictor(settled), len(self.ids), str(self.device))
        return prepare(scenes, stored, self._counts, model, product, product_bytes, settled.settings, area)

    def _predictor(self, settled: Settled) -> Predictor:
        vote = voter(self._run, self.device, self.dtype, settled.logits)
        if self._compiled:
            vote = filled_up(vote, settled.settings.batch_size)
        return averaged(vote, settled.tta, settled.scales)

    def _runs_on(self) -> dict[str, Any]:
        """What else the last bits of an answer hang on."""
        return {
            "dtype": str(self.dtype), "device": self.device.type, "compiled": self._compiled, "torch": torch.__version__
        }  # fmt: skip


def tags_of(recipe: Recipe, record: Mapping[str, Any], fingerprint: str) -> dict[str, str]:
    """Tags of every map that a segmenter makes."""
    return {
        "vfmseg_recipe": recipe.name,
        "vfmseg_encoder": str(record["encoder"]["id"]),
        "vfmseg_checkpoint": fingerprint,
        "vfmseg_version": versions()["vfmseg"],
    }
