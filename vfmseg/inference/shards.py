"""Pieces of a map: a file for each product of each shard, kept beside the target until all are there and joined.

    labels.tif                          the target, made last
    .labels.tif.parts/plan.json         the fingerprint: scene, checkpoint and settings that the pieces are made with
    .labels.tif.parts/labels_001_00012.tif     shard 12 of strip 1
    .labels.tif.parts/labels.vrt        the pieces that are there already, for a look at a map in the making

A piece is written under another name and renamed, so one that is there is complete. At its end stands a seal: the mark
of its work (a digest of the fingerprint) and a checksum of its bytes. So a run that was interrupted goes on with the
pieces of the same work, and no piece of other work or with damaged bytes gets into a map.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vfmseg.disk.files import not_created, remove_leftovers, whole_file, write_json
from vfmseg.disk.jsonfile import read_json
from vfmseg.disk.seal import is_intact, mark_of_seal, seal
from vfmseg.errors import DataError
from vfmseg.geo.grid import Grid, Window
from vfmseg.geo.layer import Layer
from vfmseg.geo.mosaic import mosaic, read_map
from vfmseg.geo.writer import BLOCK, MapWriter
from vfmseg.inference.plan import Plan, Run, Shard

PLAN = "plan.json"

JOINED = 16 * 2**20
"""Bytes of a map that are joined at a time.

A row of blocks (256 pixel rows) of labels in 8 bits takes that at 65536 px width; a wider map, or one of more bands, is
joined in ranges of columns.
"""


def pieces_folder(target: Path) -> Path:
    """The folder in which the pieces of a target are kept: .labels.tif.parts beside labels.tif."""
    return target.with_name(f".{target.name}.parts")


def tidy(target: Path, complete: Iterable[Path], fingerprint: Mapping[str, Any]) -> None:
    """Remove what a process that was killed has left beside finished files: temporary files, and pieces of this work.

    `complete`: the target and its other products. Pieces of other work stay: somebody may want to go on with that.
    """
    for file in complete:
        remove_leftovers(file)
    folder = pieces_folder(target)
    try:
        other = (folder / PLAN).is_file() and _plan_in(folder / PLAN) != dict(fingerprint)
    except DataError:  # of no use to anybody
        other = False
    if not other:
        shutil.rmtree(folder, ignore_errors=True)


class Parts:
    """The folder of a target's pieces, its plan, and the file of each product.

    `layers` {product: how its file is written}. `fingerprint`: all that decides the bytes; other work has another one.
    """

    def __init__(
        self, target: Path, plan: Plan, grid: Grid, layers: Mapping[str, Layer], fingerprint: Mapping[str, Any]
    ) -> None:
        self.target = target
        self.folder = pieces_folder(target)
        self.plan = plan
        self.grid = grid
        self.layers = dict(layers)
        self.fingerprint = dict(fingerprint)
        self.mark = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self._intact: set[Path] = set()  # pieces whose checksum was right; each is read in several parts

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Make the folder, or with `resume` keep one of the same work.

        DataError if pieces of other work are there, or any that neither `resume` nor `overwrite` says what to do with.
        """
        known = self.folder / PLAN
        # pieces without a plan are what an interrupted removal has left, of whatever work
        if self.folder.exists() and not (resume and known.is_file()):
            if not resume and not overwrite and known.is_file():
                raise DataError(
                    f"{self.folder}: an interrupted labelling of {self.target.name} is here, "
                    f"{len(self.finished())} of {len(self.plan.shards)} pieces are done; go on with --resume, or start "
                    "anew with --overwrite"
                )
            shutil.rmtree(self.folder)
        if known.is_file():
            self._require_same_work(_plan_in(known), self.fingerprint)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise not_created(self.target, error) from error
        write_json(known, self.fingerprint)

    def _require_same_work(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if changed:
            was = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed[:3])
            raise DataError(
                f"{self.folder}: the pieces here are of other work ({was}); resume with the same scene, checkpoint and "
                "settings, or start anew with --overwrite"
            )

    def path(self, product: str, shard: Shard) -> Path:
        """The file of a product of a shard, whether it is there or not."""
        return self.folder / f"{product}_{shard.name}.tif"

    def finished(self) -> set[Shard]:
        """The shards of which all products are there, with the mark of this work."""
        return {s for s in self.plan.shards if all(self._is_ours(self.path(name, s)) for name in self.layers)}

    def _is_ours(self, piece: Path) -> bool:
        return mark_of_seal(piece) == self.mark

    def missing(self, shards: Iterable[Shard]) -> list[Shard]:
        """The shards that are still to be labelled."""
        done = self.finished()
        return [shard for shard in shards if shard not in done]

    def forget(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def show(self) -> None:
        """Write a VRT of the pieces that are there, for each product, so that a map in the making can be looked at."""
        for name, layer in self.layers.items():
            pieces = [(self.path(name, s).name, s.window) for s in self.plan.shards if self.path(name, s).is_file()]
            with whole_file(self.folder / f"{name}.vrt") as aside:
                aside.write_text(mosaic(self.grid, layer, pieces), encoding="utf-8")

    def assemble(self, targets: Mapping[str, Path], cog: bool, compress: str) -> None:
        """Join the pieces into `targets` {product: file} and remove the folder.

        The labels come last: where they are there, all other products are.
        """
        for name in sorted(self.layers, key=lambda n: n == "labels"):
            with MapWriter(targets[name], self.grid, self.layers[name], cog=cog, compress=compress) as writer:
                for window in self._windows(self.layers[name]):
                    writer.write(window.row, self._joined(name, window), window.col)
            remove_leftovers(targets[name])
        shutil.rmtree(self.folder)

    def _windows(self, layer: Layer) -> Iterator[Window]:
        """What is joined at a time: rows of blocks, each within one row of shards, in ranges of columns.

        Rows are counted from the top of a shard, as are the blocks of its files: so no row of blocks is decoded twice.
        """
        # columns whose BLOCK rows take JOINED bytes, a multiple of BLOCK and at least one
        wide = JOINED // (BLOCK * len(layer.names) * np.dtype(layer.dtype).itemsize) // BLOCK * BLOCK or BLOCK
        spans = sorted({(s.window.row, s.window.row + s.window.height) for s in self.plan.shards})
        for col in range(0, self.grid.width, wide):
            for top, end in spans:
                for row in range(top, end, BLOCK):
                    yield Window(row, col, min(BLOCK, end - row), min(wide, self.grid.width - col))

    def _joined(self, name: str, window: Window) -> np.ndarray:
        """Stored numbers (bands, h, w) of a window within one row of shards, from the strips that it meets."""
        pieces = []
        for shard in self.plan.across(window):  # every strip is cut at the same rows
            # the window, counted from the first pixel of the piece; it may begin left of it
            seen = Window(window.row - shard.window.row, window.col - shard.window.col, *window.shape)
            pieces.append(self._piece(name, shard, seen.clip(*shard.window.shape)))
        return np.concatenate(pieces, axis=2)

    def _piece(self, name: str, shard: Shard, part: Window) -> np.ndarray:
        """Stored numbers (bands, h, w) of a window of a piece, counted from its first pixel.

        DataError if it is not as it was written; then it is removed, so that it counts as missing.
        """
        path = self.path(name, shard)
        if not path.is_file():
            raise DataError(
                f"{path}: is gone: removed meanwhile by hand, or by another run that writes there; --resume labels it "
                "anew"
            )
        try:
            if path not in self._intact:
                self._require_intact(path)
                self._intact.add(path)
            return read_map(path, part)
        except DataError as error:
            path.unlink(missing_ok=True)
            raise DataError(f"{error}; it was removed, so that --resume labels it anew") from error

    def _require_intact(self, piece: Path) -> None:
        """DataError if a piece is of other work, or its bytes do not have the checksum of its seal."""
        if not self._is_ours(piece) and mark_of_seal(piece) is not None:
            raise DataError(f"{piece}: is of other work: another run has written there meanwhile")
        if not is_intact(piece):
            raise DataError(f"{piece}: is damaged: it does not hold what was written (checksum)")


def _plan_in(known: Path) -> dict[str, Any]:
    """The fingerprint that a plan.json holds; DataError if it holds none."""
    try:
        before = read_json(known)
    except ValueError:  # no text, or no JSON
        before = None
    if not isinstance(before, dict):
        raise DataError(
            f"{known}: is damaged; expected the plan of an interrupted labelling, without which nobody knows of what "
            "work its pieces are: start anew with --overwrite instead of --resume"
        )
    return before


class RunSink:
    """A sink that writes the rows of a run into the files of its shards, one shard after the other.

    Use in a `with` statement: an error, or an end within a shard, leaves no file of that shard.
    """

    def __init__(self, parts: Parts, run: Run, done: Callable[[], None]) -> None:
        """`done` is called when the files of a shard are complete."""
        self._parts = parts
        self._shards = list(run.shards)
        self._done = done
        self._stack = ExitStack()
        self._writers: dict[str, MapWriter] = {}

    def __enter__(self) -> RunSink:
        return self

    def write(self, window: Window, arrays: Mapping[str, np.ndarray]) -> None:
        """Take {product: stored numbers (bands, h, w)} of the next rows of the strip; none lie in two shards."""
        shard = self._shards[0]
        if not self._writers:
            grid = self._parts.grid.crop(shard.window)
            for name, layer in self._parts.layers.items():
                finish = partial(seal, mark=self._parts.mark)
                # compressed fast: it will be read once, and written anew
                writer = MapWriter(self._parts.path(name, shard), grid, layer, level=1, last=finish)
                self._writers[name] = self._stack.enter_context(writer)
        for name, writer in self._writers.items():
            writer.write(window.row - shard.window.row, arrays[name])
        if window.row + window.height == shard.window.row + shard.window.height:
            self._writers = {}
            self._stack.close()
            self._stack = ExitStack()
            self._shards.pop(0)
            self._done()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._writers:
            return
        problem = error or RuntimeError("a run ended inside a shard; please report this")
        self._stack.__exit__(type(problem), problem, problem.__traceback__)
