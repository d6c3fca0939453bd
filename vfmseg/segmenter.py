"""Segmenter: load a trained segmenter, label scenes, measure it, pass it on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmseg.checkpoint.folder import fingerprint_of, segmenter_folder
from vfmseg.checkpoint.hub import local_segmenter
from vfmseg.checkpoint.reading import Loaded, load_segmenter
from vfmseg.checkpoint.writing import versions
from vfmseg.data.given import tell_types
from vfmseg.data.image import Known
from vfmseg.data.inputs import Inputs, bands_in
from vfmseg.data.scene import Scene, speakers
from vfmseg.disk.lock import LOCK, held, lock_beside
from vfmseg.errors import CheckpointError, DataError, RecipeError, nearest
from vfmseg.inference.contracts import Tiles
from vfmseg.inference.ranks import own_device, usable_device
from vfmseg.inference.votes import Model, voter
from vfmseg.labeller import Labeller
from vfmseg.model import Network
from vfmseg.recipe import Recipe, load_recipe
from vfmseg.recipe.data import ClassSpec
from vfmseg.recipe.predict import PredictSection, settled
from vfmseg.training.run_folder import segmenter_run

MOST_SUBSETS_OF = 6
"""Modalities of which all 63 subsets are measured; each subset labels all scenes anew."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TrainedVotes:
    """What a trained segmenter says of tiles: one kind of `Votes`."""

    def __init__(self, loaded: Loaded, device: torch.device, dtype: torch.dtype, compile: bool) -> None:
        self.model: Network = loaded.model.to(device).eval()
        self.classes: Mapping[int, ClassSpec] = loaded.recipe.data.classes
        self.inputs: Inputs = loaded.inputs
        self.device = device
        self.known: Known = self.model.known
        self.identity = tags_of(loaded.recipe, loaded.record, loaded.fingerprint)
        self.runs_on = {"dtype": str(dtype), "device": device.type, "compiled": compile, "torch": torch.__version__}
        self.one_batch_size = compile  # any other size would be compiled anew, which takes a minute
        self._run: Model = torch.compile(self.model) if compile else self.model
        self._dtype = dtype

    def __call__(self, tiles: Tiles) -> Tensor:
        """Logits float32 (B, K, t, t) on the device."""
        # made for each call: a function that was kept would hold on to the model of who is copied or pickled
        return voter(self._run, self.device, self._dtype)(tiles)


class Segmenter(Labeller):
    """A trained segmentation model that labels arrays and scenes of any size.

    segmenter = Segmenter.from_pretrained("runs/flood/best")
    segmenter.predict("scene.tif", output="labels.tif")
    """

    def __init__(self, loaded: Loaded, folder: Path, votes: TrainedVotes) -> None:
        super().__init__(votes, with_tile(loaded.recipe))
        self.folder = folder
        self.recipe = loaded.recipe
        self.record = loaded.record
        self.fingerprint = loaded.fingerprint  # a training run may replace the folder at any time
        self.model = votes.model
        self.device = votes.device

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        device: str | None = None,
        dtype: str = "fp32",
        encoder: str | Mapping[str, str] | None = None,
        compile: bool = False,
    ) -> Segmenter:
        """Load a segmenter folder or hub id.

        `device`: a torch device, by default this process's accelerator, else the CPU. `dtype`: fp32, fp16 (needs an
        accelerator) or bf16. `encoder`: where the base encoder lies now, if it has moved; {modality: folder} for
        that of a modality with an encoder of its own. `compile`: with torch.compile, which takes a minute first.
        Raises CheckpointError if anything is missing, damaged, or belongs to another encoder.
        """
        if dtype not in DTYPES:
            raise RecipeError(f"dtype = {dtype!r} is not known; expected one of {', '.join(DTYPES)}")
        chosen = usable_device(device or own_device())
        if dtype == "fp16" and chosen.type == "cpu":
            raise RecipeError("dtype = fp16 needs an accelerator; use fp32 or bf16 on the CPU")
        folder = local_segmenter(checkpoint)
        loaded = load_segmenter(folder, encoder=encoder)
        return cls(loaded, folder, TrainedVotes(loaded, chosen, DTYPES[dtype], compile))

    def evaluate(
        self,
        recipe: str | Path | Recipe,
        split: str = "test",
        progress: Callable[[int, int], None] | None = None,
        only: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Scores of the labels that `predict` writes if told what `recipe.predict` says, over all scenes of a split.

        One confusion matrix over all labelled, valid pixels at the native grid; returns miou, overall_accuracy,
        kappa, per-class iou, f1, precision, recall and support, the names of absent classes, and `pixels`, how many
        were scored. `only`: with these modalities, as if the scenes had no others; pixels where they have no answer
        are not scored, and scenes without any of them are not counted.
        """
        names = None if only is None else self._subset(only)
        scenes, how, outside = self._labelled_scenes(recipe, split)
        return self._scores(scenes, how, split, outside, names, progress)

    def evaluate_subsets(
        self, recipe: str | Path | Recipe, split: str = "test", progress: Callable[[int, int], None] | None = None
    ) -> dict[str, dict[str, Any]]:
        """What `evaluate` returns with each subset of the modalities alone: {"rgb": ..., "sar": ..., "rgb+sar": ...}.

        RecipeError for a segmenter that needs all of them.
        """
        names = [one.name for one in self.inputs]
        if len(names) > MOST_SUBSETS_OF:
            raise RecipeError(
                f"{len(names)} modalities have {2 ** len(names) - 1} subsets, more than can be measured; expected "
                f"{MOST_SUBSETS_OF} modalities at most: name some subsets with only=... (--only)"
            )
        subsets = [self._subset(some) for n in range(1, len(names) + 1) for some in combinations(names, n)]
        scenes, how, outside = self._labelled_scenes(recipe, split)
        found = {}
        for number, some in enumerate(subsets):
            before = number * len(scenes)

            def told(done: int, _: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, len(subsets) * len(scenes))

            found["+".join(some)] = self._scores(scenes, how, split, outside, some, told)
        return found

    def _subset(self, only: Sequence[str]) -> tuple[str, ...]:
        """Names of modalities in the order of the model; RecipeError unless it answers with these alone."""
        names = [one.name for one in self.inputs]
        only = [only] if isinstance(only, str) else only
        for name in only:
            if name not in names:
                raise RecipeError(f"only: '{name}' is no modality of this segmenter; {nearest(name, names)}")
        chosen = tuple(name for name in names if name in only)
        if not chosen or (self.votes.known == "all" and len(chosen) < len(names)):
            reason = "answers only where all of them are valid" if chosen else "needs one of them at least"
            raise RecipeError(f"only = {', '.join(chosen) or 'nothing'}: this segmenter of {', '.join(names)} {reason}")
        return chosen

    def _scores(
        self,
        scenes: Sequence[Scene],
        how: PredictSection,
        split: str,
        outside: Sequence[str],
        only: Sequence[str] | None,
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, Any]:
        confusion = self.score(scenes, how, progress, only)
        counted = [scene for scene in scenes if only is None or set(only) & set(scene.bands())]
        found = confusion.scores([self.classes[i] for i in self.ids], outside) | {
            "split": split,
            "scenes": len(counted),
        }
        return found if only is None else found | {"modalities": list(only)}

    def _labelled_scenes(
        self, recipe: str | Path | Recipe, split: str
    ) -> tuple[list[Scene], PredictSection, list[str]]:
        """The scenes of a split as this segmenter reads them, how they are labelled, and classes out of the mean."""
        from vfmseg.build.data import open_split, require_same_task
        from vfmseg.build.remarks import tell_missing

        if split not in ("train", "val", "test"):
            raise RecipeError(f"split = {split!r}; expected train, val or test")
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe)
        require_same_task(recipe, self.recipe)
        scenes = open_split(recipe, split, {one.name: one.said for one in self.inputs}, self.recipe)
        tell_types({name: scene.dtypes()[name] for name, scene in speakers(scenes).items()}, self.inputs)
        tell_missing(recipe, split, scenes)
        counts = bands_in(self.inputs)
        for scene in scenes:
            if scene.bands() != {name: counts[name] for name in scene.bands()}:
                raise DataError(
                    f"{scene.name}: has bands {scene.bands()}, but the segmenter was trained on {counts}; "
                    "choose the same with data.modalities.NAME.bands"
                )
            if self.votes.known == "all" and (missing := [name for name in counts if name not in scene.bands()]):
                raise DataError(
                    f"{scene.name}: has no {', '.join(missing)}, but the segmenter answers only where all modalities "
                    "are valid; leave the scene out"
                )
        # the tile of the training, unless it is asked for: what is in a tile changes what the model says
        outside = [spec.name for spec in recipe.data.classes.values() if not spec.in_mean]
        return scenes, settled(recipe.predict, {"tile": recipe.predict.tile or self.how.tile}), outside

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


def with_tile(recipe: Recipe) -> PredictSection:
    """How the recipe labels; without a tile of its own with that of the training."""
    return settled(recipe.predict, {"tile": recipe.predict.tile or recipe.data.tile})


def tags_of(recipe: Recipe, record: Mapping[str, Any], fingerprint: str) -> dict[str, str]:
    """Tags of every map that a segmenter makes."""
    return {
        "vfmseg_recipe": recipe.name,
        "vfmseg_encoder": str(record["encoder"]["id"]),
        "vfmseg_checkpoint": fingerprint,
        "vfmseg_version": versions()["vfmseg"],
    }
