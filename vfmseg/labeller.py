"""Labels scenes of any size with votes of any kind: a trained model is one, and what a test makes up is another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vfmseg.data.given import GivenScene, hidden_by, open_scenes
from vfmseg.data.inputs import Inputs
from vfmseg.data.raster_scene import RasterScene
from vfmseg.data.scene import Scene
from vfmseg.disk.files import never_an_input, require_new
from vfmseg.errors import RecipeError, nearest, show
from vfmseg.geo.layer import Layer, label_type
from vfmseg.geo.validity import Hidden
from vfmseg.inference.contracts import Area, Finished, Model, Product, Report, Tick, Votes
from vfmseg.inference.job import Arrays, Job, into, into_files, prepare
from vfmseg.inference.output import ALONE, SILENT, Output, Team, Watch
from vfmseg.inference.products import Products
from vfmseg.inference.provenance import MODALITIES_TAG, finished_before, mark_of, work_of
from vfmseg.inference.ranks import alone
from vfmseg.inference.reading import SceneSource, Stored, stored_as
from vfmseg.inference.scoring import Only, Scores, class_indexes
from vfmseg.inference.shards import tidy
from vfmseg.inference.tolerant import Tolerant, Unreadable
from vfmseg.inference.views import averaged
from vfmseg.inference.votes import as_probabilities, filled_up
from vfmseg.metrics import Confusion
from vfmseg.recipe.predict import PredictSection, settled
from vfmseg.vector.area import read_area
from vfmseg.vector.polygons import check_place, write_polygons

How = Mapping[str, Any]
"""Other values than the labeller's own for keys of the recipe's `predict` section, such as {"tile": 512}."""

BandsChosen = Mapping[str, Sequence[int]]
"""{modality: numbers from 1}: which bands of a scene's files are those of the model, in its order."""


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


class Labeller:
    """Labels arrays and scenes of any size by the votes it is given, as its settings say."""

    def __init__(self, votes: Votes, how: PredictSection) -> None:
        """`how`: settings with a tile (RecipeError without); methods take other values for single keys of it."""
        if how.tile is None:
            raise RecipeError(
                "tile is missing; expected the side of a tile in pixels, such as PredictSection(tile=512)"
            )
        self.votes = votes
        self.how = how
        self.ids = tuple(sorted(votes.classes))

    @property
    def classes(self) -> dict[int, str]:
        """Class names by id."""
        return {number: self.votes.classes[number].name for number in self.ids}

    @property
    def inputs(self) -> Inputs:
        """What is needed of a scene: its modalities, and how they are read."""
        return self.votes.inputs

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
        bands: BandsChosen | None = None,
        overwrite: bool = False,
        progress: Callable[[Tick], None] | None = None,
    ) -> np.ndarray | Path:
        """Label a scene.

        `scene`: an array (C, H, W) in the units of the training files (NaN = invalid; if those say a scale, whole
        numbers are scaled by it and others taken as values), a path that GDAL can read, the paths of one modality's
        files, or {modality: one of these}; modalities may be missing if the model answers without them. Bands are found
        by their names where the files say them, else taken by their places; `bands` {modality: numbers from 1} says
        which they are. With `output` the labels are streamed into a GeoTIFF and its path is returned; without, class
        ids (H, W) are returned, `self.nodata` where the scene is invalid. `tile` in pixels, `overlap` as a share of the
        tile, and so on as in the recipe's section `predict`; what is left out is as there. An existing `output` is
        refused (DataError) unless `overwrite`. For other products, a part of a scene, or resuming, see `label`.
        """
        how = {"tile": tile, "overlap": overlap, "blend": blend, "batch_size": batch_size, "tta": tta}
        if output is not None:
            written = self.label(scene, Output(output, overwrite=overwrite), how, bands, watch=Watch(progress=progress))
            return written.files["labels"]
        return self._arrays(scene, how, bands, Products(self.ids), progress)["labels"][0]

    def probabilities(self, scene: GivenScene, how: How | None = None, bands: BandsChosen | None = None) -> np.ndarray:
        """Class probabilities float32 (K, H, W) of a scene that fits in memory, classes in the order of their ids."""
        products = Products(self.ids, logits=self._settled(how).average == "logits")

        def shares(finished: Finished) -> dict[str, np.ndarray]:
            return {"probabilities": products.shares(finished).cpu().numpy().copy()}

        return self._arrays(scene, how, bands, shares)["probabilities"]

    def label(
        self,
        scene: GivenScene,
        output: Output | str | Path,
        how: How | None = None,
        bands: BandsChosen | None = None,
        team: Team = ALONE,
        watch: Watch = SILENT,
    ) -> Labelled:
        """Label a scene of any size into files, piece by piece, so that an interrupted run can be resumed.

        `output`: where the labels go (a GeoTIFF), or an `Output` that also asks for other products, a part of the
        scene, polygons, or to go on. `how` {key of the recipe's section predict: value}; `bands`: as in `predict`.
        `team`: this process and the number of those that label this scene together. BusyError if another run is writing
        any of these files.
        """
        output = output if isinstance(output, Output) else Output(output)
        output.check()
        settings, chosen = self._settled(how), self._chosen(bands or {})
        with self._opened(scene, settings, chosen) as scenes:
            written = [*output.maps.values(), *filter(None, [output.vector])]
            never_an_input(written, [*scenes[0].read_from(), *output.named_area])
            if output.vector is not None:
                check_place(output.vector, scenes[0].grid, next(iter(scenes[0].rasters.values())).paths[0])
            unreadable = Unreadable()
            products = Products(self.ids, tuple(output.extras), settings.average == "logits")
            job = self._file_job(scenes, settings, products, unreadable, output)
            tags = {**self.votes.identity, **self._tags(scenes[0])}
            work = {**tags, **work_of(scenes[0], job, output, chosen), **self.votes.runs_on}
            mark = mark_of(work, {"cog": output.cog, "compress": output.compress})
            with alone(written, *team):
                layers = self._layers(products, {**tags, **mark})
                report, before = self._into_maps(job, output, layers, work, mark, team, watch)
                if watch.labelled is not None:
                    watch.labelled()
                if output.vector is not None and team.rank == 0:
                    # also of a map that was there: older polygons may be of another scene or other options
                    write_polygons(output.path, output.vector, min_area=output.min_area, simplify=output.simplify)
        return Labelled(output.maps, report, unreadable, before, hidden_by(scenes))

    def score(
        self,
        scenes: Sequence[Scene],
        how: PredictSection,
        progress: Callable[[int, int], None] | None = None,
        only: Sequence[str] | None = None,
    ) -> Confusion:
        """Counts of (truth, label) pairs over all labelled pixels of scenes that have an answer.

        `only`: these modalities of each scene, as if it had no others; left out: all. `progress` is told how many
        scenes are done.
        """
        confusion = Confusion(len(self.ids))
        for number, scene in enumerate(scenes, start=1):
            seen = Only(scene, [one.name for one in self.inputs] if only is None else only)
            if seen.bands():
                into(self._job([seen], seen.bands(), Stored(), how, class_indexes, 8), Scores(seen, confusion))
            if progress is not None:
                progress(number, len(scenes))
        return confusion

    # -----------------------------------------------------------------------------------------------------------

    def _into_maps(
        self,
        job: Job,
        output: Output,
        layers: Mapping[str, Layer],
        work: Mapping[str, Any],
        mark: Mapping[str, str],
        team: Team,
        watch: Watch,
    ) -> tuple[Report, bool]:
        """Write the maps unless the same work has written them; what this process did, and whether they were there."""
        files = set(output.maps.values())
        done = finished_before(files, mark) if output.resume else set()
        if done == files and team.rank == 0:
            tidy(output.path, done, work)  # after a run that was killed at its very last step but one
        for file in output.maps.values():
            if not output.overwrite and file not in done:
                require_new(file)
        if done == files:
            return Report(), True
        return into_files(job, output, layers, work, team, watch), False

    def _tags(self, scene: RasterScene) -> dict[str, str]:
        """For models of several modalities: which of them the scene has."""
        return {MODALITIES_TAG: "+".join(scene.rasters)} if len(self.inputs) > 1 else {}

    def _layers(self, products: Products, tags: Mapping[str, str]) -> dict[str, Layer]:
        classes = [self.votes.classes[number] for number in self.ids]
        names, colors = [one.name for one in classes], [one.color for one in classes]
        return products.layers(names, colors, tags)

    def _settled(self, how: How | None) -> PredictSection:
        """The settings with what a call says instead; arrays of NumPy are taken as lists."""
        if not isinstance(how or {}, Mapping):
            raise RecipeError(
                f'how is a {type(how).__name__}; expected keys of predict with values: {{"overlap": 0.5}}'
            )
        return settled(self.how, {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in (how or {}).items()})

    def _chosen(self, bands: BandsChosen) -> dict[str, tuple[int, ...]]:
        """Checked: RecipeError for a modality that there is not, or numbers that are no bands."""
        chosen = {}
        known = [one.name for one in self.inputs]
        if not isinstance(bands, Mapping):
            raise RecipeError(
                f"bands = {show(bands)}; expected numbers by modality, such as {{'{known[0]}': [3, 2, 1]}}"
            )
        for name, numbers in bands.items():
            if name not in known:
                raise RecipeError(f"bands: '{name}' is no modality of this segmenter; {nearest(name, known)}")
            listed = numbers if isinstance(numbers, Sequence | np.ndarray) else [numbers]
            chosen[name] = tuple(int(number) if _is_band(number) else 0 for number in listed)
            if 0 in chosen[name] or not chosen[name] or len(set(chosen[name])) < len(chosen[name]):
                raise RecipeError(
                    f"bands of {name} = {show(list(listed))}; expected numbers of bands from 1 to 65535, each once"
                )
        return chosen

    @contextmanager
    def _opened(self, scene: GivenScene, settings: PredictSection, bands: BandsChosen) -> Any:
        """The scene once for each reader thread; closed at the end."""
        inputs = tuple(
            replace(one, bands=replace(one.bands, indexes=tuple(bands[one.name]), chosen=True))
            if one.name in bands
            else one
            for one in self.inputs
        )
        scenes = open_scenes(scene, inputs, settings.readers, self.votes.known)
        try:
            absent = [name for name in bands if name not in scenes[0].rasters]
            if absent:
                raise RecipeError(f"bands: '{absent[0]}' is not among the modalities that are given; leave it out")
            yield scenes
        finally:
            for one in scenes:
                one.close()

    def _arrays(
        self,
        scene: GivenScene,
        how: How | None,
        bands: BandsChosen | None,
        product: Product,
        progress: Callable[[Tick], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Label a scene into memory: {product: (bands, H, W)}."""
        settings = self._settled(how)
        with self._opened(scene, settings, self._chosen(bands or {})) as scenes:
            kept = Arrays(scenes[0].grid.height, scenes[0].grid.width)
            into(self._job(list(scenes), scenes[0].bands(), stored_as(scenes[0]), settings, product, 4), kept, progress)
        return kept.kept

    def _file_job(
        self,
        scenes: Sequence[RasterScene],
        settings: PredictSection,
        products: Products,
        unreadable: Unreadable,
        output: Output,
    ) -> Job:
        stored, bands = stored_as(scenes[0]), scenes[0].bands()
        sources: list[SceneSource] = list(scenes)
        if output.skip_unreadable:
            sources = [Tolerant(scene, bands, stored.block, unreadable) for scene in scenes]
        polygons = None if output.area is None else read_area(output.area, scenes[0].grid)
        wanted = None if polygons is None else Area(polygons.touches, polygons.mask)
        return self._job(sources, bands, stored, settings, products, products.bytes_a_pixel, wanted)

    def _job(
        self,
        scenes: Sequence[SceneSource],
        bands: Mapping[str, int],
        stored: Stored,
        settings: PredictSection,
        product: Product,
        product_bytes: int,
        area: Area | None = None,
    ) -> Job:
        vote = filled_up(self.votes, settings.batch_size) if self.votes.one_batch_size else self.votes
        if settings.average == "probabilities":
            vote = as_probabilities(vote)
        vote = averaged(vote, settings.tta, settings.scales)
        model = Model(vote, len(self.ids), str(self.votes.device), self.votes.known)
        return prepare(scenes, stored, bands, model, product, product_bytes, settings, area)


def _is_band(number: Any) -> bool:
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    return whole and 1 <= number <= 65535
