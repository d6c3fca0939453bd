"""Map files of a scene of any size: resumed after any interruption, shared by processes, always the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import rasterio
from makers import apart, write_raster

from vfmseg.data.given import open_scene
from vfmseg.errors import DataError, MachineError
from vfmseg.geo import writer as writer_module
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import Window
from vfmseg.inference import shards as shards_module
from vfmseg.inference.contracts import Model, Tiles
from vfmseg.inference.job import Job, into_files, prepare
from vfmseg.inference.output import ALONE, Output, Team, targets_of
from vfmseg.inference.plan import Plan
from vfmseg.inference.products import Products
from vfmseg.inference.reading import stored_as
from vfmseg.inference.shards import Parts
from vfmseg.inference.views import averaged
from vfmseg.recipe.predict import PredictSection

WORKER = Path(__file__).with_name("label_worker.py")
PRODUCTS = Products((0, 1, 2), ("confidence",))
LAYERS = PRODUCTS.layers(("a", "b", "c"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)), {"vfmseg_recipe": "toy"})


def pointwise(tiles: Tiles) -> Any:
    images, _ = apart(tiles)
    import torch

    values = images["x"][:, 0]
    return torch.stack([-((values - k) ** 2) for k in range(3)], dim=1).softmax(dim=1)


class Breaks:
    """The model of one pixel, which ends with `error` at its call number `at`; `calls` counts them."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, tiles: Tiles) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return pointwise(tiles)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    array = rng.integers(1, 4, (1, 700, 300)).astype(np.uint8) - 1
    array[0, 100:160, 50:120] = 9
    return write_raster(tmp_path_factory.mktemp("scene") / "scene.tif", array, nodata=9)


def job_of(scene: Path, **changes: Any) -> Job:
    opened = open_scene({"x": str(scene)}, {"x": Bands()})
    settings = PredictSection(tile=32, overlap=0.25, blend=changes.get("blend", "hann"), batch_size=4)
    vote = averaged(changes.get("vote", pointwise), "none", (1.0,))
    return prepare([opened], stored_as(opened), {"x": 1}, Model(vote, 3), PRODUCTS, 2, settings)


def label(scene: Path, target: Path, fingerprint: dict[str, Any] | None = None, **how: Any) -> dict[str, Path]:
    changes = {name: how.pop(name) for name in ("vote", "blend") if name in how}
    team = how.pop("team", ALONE)
    into_files(job_of(scene, **changes), Output(target, **how), LAYERS, fingerprint or {}, team)
    return targets_of(target, LAYERS)


def worker(scene: Path, target: Path, *options: str, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*start, str(WORKER), str(scene), str(target), *options]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def undisturbed(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of the files of a run that nothing disturbed."""
    files = label(scene, tmp_path_factory.mktemp("whole") / "labels.tif")
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.pitfall("P36")
def test_files_hold_place_classes_and_values(scene: Path, tmp_path: Path) -> None:
    files = label(scene, tmp_path / "labels.tif")
    assert names_in(tmp_path) == ["labels.tif", "labels_confidence.tif"]
    with rasterio.open(scene) as source, rasterio.open(files["labels"]) as labels:
        assert (labels.crs, labels.transform, labels.shape) == (source.crs, source.transform, source.shape)
        values, written = source.read(1), labels.read(1)
        assert labels.nodata == 255
        assert labels.tags()["CLASS_2"] == "c"
    np.testing.assert_array_equal(written, np.where(values == 9, 255, values))
    with rasterio.open(files["confidence"]) as confidence:
        stored = confidence.read(1)
        assert confidence.scales == (pytest.approx(1 / 254),)
    best = 1 / (1 + np.exp(-1) + np.exp(-4))
    middle = 1 / (1 + 2 * np.exp(-1))
    expected = np.where(values == 1, middle, best) * 254
    np.testing.assert_allclose(stored[values != 9], expected[values != 9], atol=0.51)
    assert (stored[values == 9] == 255).all()


@pytest.mark.pitfall("P32")
def test_pieces_of_a_wide_map_are_joined_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).integers(0, 3, (1, 300, 1400)).astype(np.uint8)
    scene = write_raster(tmp_path / "scene.tif", array)
    job = job_of(scene)
    job = replace(job, plan=Plan(300, 1400, 32, 0.25, True, 4, 500))  # a border of strips is no border of blocks
    assert len(job.plan.strips) > 2
    monkeypatch.setattr(shards_module, "JOINED", 2 * 256 * 256)
    rows = shards_module.Parts._joined
    most = []

    def counted(self: Parts, name: str, window: Window) -> np.ndarray:
        joined = rows(self, name, window)
        most.append(joined.nbytes)
        return joined

    monkeypatch.setattr(shards_module.Parts, "_joined", counted)
    into_files(job, Output(tmp_path / "labels.tif"), LAYERS, {})
    assert max(most) <= 2 * 256 * 256
    with rasterio.open(tmp_path / "labels.tif") as labels:
        np.testing.assert_array_equal(labels.read(), array)


@pytest.mark.pitfall("P37")
def test_an_error_midway_keeps_finished_pieces_and_resume_runs_the_rest_alone(
    scene: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    breaks = Breaks(40, ArithmeticError("broke"))
    target = tmp_path / "labels.tif"
    with pytest.raises(ArithmeticError, match="broke"):
        label(scene, target, vote=breaks)
    assert names_in(tmp_path) == [".labels.tif.parts"]
    kept = [name for name in names_in(tmp_path / ".labels.tif.parts") if name.startswith("labels_")]
    assert kept
    assert not any("partial" in name for name in names_in(tmp_path / ".labels.tif.parts"))
    with rasterio.open(tmp_path / ".labels.tif.parts" / "labels.vrt") as view:
        assert view.shape == (700, 300)
        assert (view.read(1)[-10:] == 255).all()  # still to come
    with pytest.raises(DataError, match=r"pieces are done; go on with --resume"):
        label(scene, target)
    again = Breaks(0, AssertionError())
    files = label(scene, target, vote=again, resume=True)
    assert again.calls < 90  # of 104 batches about 35 were done
    assert {name: path.read_bytes() for name, path in files.items()} == undisturbed
    assert names_in(tmp_path) == ["labels.tif", "labels_confidence.tif"]


@pytest.mark.pitfall("P63")
def test_resume_of_other_work_is_refused_and_overwrite_starts_anew(
    scene: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    breaks = Breaks(40, KeyboardInterrupt())
    target = tmp_path / "labels.tif"
    with pytest.raises(KeyboardInterrupt):
        label(scene, target, {"tile": 16}, vote=breaks)
    with pytest.raises(DataError, match=r"other work \(tile was 16, is 32\)"):
        label(scene, target, {"tile": 32}, resume=True)
    files = label(scene, target, {"tile": 32}, overwrite=True)
    assert files["labels"].read_bytes() == undisturbed["labels"]


@pytest.mark.pitfall("P63")
def test_pieces_without_their_plan_are_of_unknown_work(
    scene: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """The removal of old pieces may have been interrupted after their plan had gone."""
    target = tmp_path / "labels.tif"
    with pytest.raises(KeyboardInterrupt):
        label(scene, target, {"tile": 16}, vote=Breaks(40, KeyboardInterrupt()))
    pieces = list((tmp_path / ".labels.tif.parts").glob("labels_*.tif"))
    assert pieces
    pieces[0].write_bytes(b"of another checkpoint")
    (tmp_path / ".labels.tif.parts" / "plan.json").unlink()
    files = label(scene, target, {"tile": 32}, resume=True)
    assert files["labels"].read_bytes() == undisturbed["labels"]


@pytest.mark.parametrize("content", [b"", b'{"tile": 1', b"[]", b"\xff\xfe"])
@pytest.mark.pitfall("P62")
def test_a_damaged_plan_is_named(scene: Path, tmp_path: Path, content: bytes) -> None:
    plan = tmp_path / ".labels.tif.parts" / "plan.json"
    plan.parent.mkdir()
    plan.write_bytes(content)
    with pytest.raises(DataError, match=r"plan\.json: is damaged.*start anew with --overwrite"):
        label(scene, tmp_path / "labels.tif", resume=True)
    label(scene, tmp_path / "labels.tif", overwrite=True)


@pytest.mark.pitfall("P62")
def test_a_folder_that_cannot_be_made_is_named(scene: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "folder")
    for folder in ("file", "file/x", "nowhere"):
        with pytest.raises(DataError, match=rf"{folder}/labels\.tif: cannot be created \("):
            label(scene, tmp_path / folder / "labels.tif")


@pytest.mark.pitfall("P62")
def test_a_process_that_does_not_see_the_pieces_says_so(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, whose disk is not that of the first process."""
    monkeypatch.setattr("vfmseg.inference.job.meet", lambda: None)
    with pytest.raises(MachineError, match="on a disk that they share"):
        label(scene, tmp_path / "labels.tif", team=Team(1, 2))


@pytest.mark.pitfall("P37")
def test_an_error_says_that_pieces_are_kept(scene: Path, tmp_path: Path) -> None:
    target = tmp_path / "labels.tif"
    with pytest.raises(MachineError, match=r"(?s)no room.*\d+ of \d+ pieces are done and kept: go on with --resume"):
        label(scene, target, vote=Breaks(40, MachineError("no room")))
    with pytest.raises(MachineError, match=r"^no room$"):  # nothing was done yet
        label(scene, tmp_path / "other.tif", vote=Breaks(1, MachineError("no room")))


@pytest.mark.pitfall("P37")
def test_full_disk_in_a_piece_or_at_the_end_leaves_no_target(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    honest = writer_module.MapWriter._flush
    target = tmp_path / "labels.tif"

    def full(self: Any, count: int) -> None:
        if self.path == target:
            raise MachineError(self._lost("No space left on device"))
        honest(self, count)

    monkeypatch.setattr(writer_module.MapWriter, "_flush", full)
    with pytest.raises(MachineError, match="No space left"):
        label(scene, target)
    assert not target.exists()
    monkeypatch.setattr(writer_module.MapWriter, "_flush", honest)

    def fails(tiles: Tiles) -> Any:
        raise AssertionError("everything was labelled already")

    files = label(scene, target, vote=fails, resume=True)
    assert files["labels"].read_bytes() == undisturbed["labels"]


def test_what_killed_processes_have_left_goes_when_the_target_is_complete(scene: Path, tmp_path: Path) -> None:
    names = [
        ".labels.tif.12.partial", ".labels.tif.13.partial.cog", ".labels.tif.14.partial.aux.xml",
        ".labels.tif.15.partial.cog.ovr.tmp", ".labels_confidence.tif.12.partial",
    ]  # fmt: skip
    others = [".labels.tif.mine.partial", ".labels.tif.12.partially", ".other.tif.12.partial"]
    for name in [*names, *others]:
        (tmp_path / name).touch()
    with pytest.raises(ArithmeticError):
        label(scene, tmp_path / "labels.tif", vote=Breaks(40, ArithmeticError()))
    assert {*names, *others} <= {*names_in(tmp_path)}  # not before
    label(scene, tmp_path / "labels.tif", resume=True)
    assert names_in(tmp_path) == sorted([*others, "labels.tif", "labels_confidence.tif"])


def test_an_error_before_the_first_piece_leaves_nothing(scene: Path, tmp_path: Path) -> None:
    def breaks(tiles: Tiles) -> Any:
        raise ArithmeticError("broke")

    with pytest.raises(ArithmeticError):
        label(scene, tmp_path / "labels.tif", vote=breaks)
    assert names_in(tmp_path) == []


def _killed_and_resumed(scene: Path, folder: Path, seed: int, processes: int, whole: bytes) -> dict[str, bytes]:
    """Kill the workers at random moments until one run ends; the bytes of its files. `whole`: those of the labels."""
    chance = random.Random(seed)
    target = folder / "labels.tif"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for attempt in range(30):
        command = worker(scene, target, *(["--resume"] if attempt else []), "--slow", processes=processes)
        running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        parts = folder / ".labels.tif.parts"
        before = len(list(parts.glob("labels_*.tif"))) if parts.is_dir() else 0
        # wait until it has done something, then a random moment more
        while running.poll() is None and len(list(parts.glob("labels_*.tif")) if parts.is_dir() else []) <= before:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.4))
        if running.poll() is None:
            _kill(running)
        if running.wait() == 0 or (target.exists() and not parts.exists()):
            break  # also where it was killed with everything done, on its way out
        # killed between the last rename and the removal of the pieces, the map is there, and complete
        assert not target.exists() or target.read_bytes() == whole
    else:
        raise AssertionError("never finished")
    return {"labels": target.read_bytes(), "confidence": (folder / "labels_confidence.tif").read_bytes()}


def _kill(running: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started: a launcher's workers would go on without it."""
    parent = psutil.Process(running.pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.pitfall("P37")
def test_killed_and_resumed_gives_the_same_bytes(scene: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert _killed_and_resumed(scene, tmp_path, 0, 1, undisturbed["labels"]) == undisturbed


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.pitfall("P37")
def test_killed_at_twenty_random_moments_gives_the_same_bytes(
    scene: Path, tmp_path: Path, undisturbed: dict[str, bytes], seed: int
) -> None:
    ended = _killed_and_resumed(scene, tmp_path, seed, 1 + seed % 2, undisturbed["labels"])
    assert ended == undisturbed


def test_two_processes_share_a_scene_and_give_the_same_bytes(
    scene: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    done = subprocess.run(
        worker(scene, tmp_path / "labels.tif", processes=2), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == ["rank0", "rank1"]
    tiles = {int(line.split()[1]) for line in done.stdout.splitlines()}
    assert min(tiles) > 100  # each has done about half
    assert (tmp_path / "labels.tif").read_bytes() == undisturbed["labels"]
    assert (tmp_path / "labels_confidence.tif").read_bytes() == undisturbed["confidence"]
    assert names_in(tmp_path) == ["labels.tif", "labels_confidence.tif"]


def interrupted(scene: Path, target: Path, fingerprint: dict[str, Any]) -> Parts:
    """Label until three pieces are finished, or a few more: they are written beside the model's work."""
    job = job_of(scene)
    parts = Parts(target, job.plan, job.grid, LAYERS, fingerprint)

    def fails(tiles: Tiles) -> Any:
        if len(parts.finished()) >= 3:
            raise ArithmeticError
        return pointwise(tiles)

    with pytest.raises(ArithmeticError):
        label(scene, target, fingerprint, vote=fails)
    return parts


@pytest.mark.pitfall("P37")
def test_a_piece_that_was_cut_short_is_labelled_anew(
    scene: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    parts = interrupted(scene, tmp_path / "labels.tif", {})
    before, first = parts.finished(), parts.plan.shards[0]
    piece = parts.path("labels", first)
    piece.write_bytes(piece.read_bytes()[:400])
    assert parts.finished() == before - {first} != before
    files = label(scene, tmp_path / "labels.tif", resume=True)
    assert {name: path.read_bytes() for name, path in files.items()} == undisturbed


@pytest.mark.parametrize("place", [0.0, 0.2, 0.7, 0.95], ids=["header", "pixels", "tables", "end"])
@pytest.mark.pitfall("F8")
def test_a_flipped_bit_in_a_piece_never_reaches_the_map(
    scene: Path, tmp_path: Path, undisturbed: dict[str, bytes], place: float
) -> None:
    target = tmp_path / "labels.tif"
    parts = interrupted(scene, target, {})
    piece = parts.path("labels", parts.plan.shards[0])
    content = bytearray(piece.read_bytes())
    content[int(place * (len(content) - 120))] ^= 4  # before the seal
    piece.write_bytes(content)
    pieces = len(parts.plan.shards)
    told = rf"(?s)labels_000_00000\.tif: is damaged.*it was removed.*{pieces - 1} of {pieces} pieces are done and kept"
    with pytest.raises(DataError, match=told):
        label(scene, target, resume=True)
    assert not target.exists()
    assert not piece.exists()
    files = label(scene, target, resume=True)
    assert {name: path.read_bytes() for name, path in files.items()} == undisturbed


@pytest.mark.pitfall("F1")
def test_a_piece_of_other_work_never_reaches_the_map(scene: Path, tmp_path: Path) -> None:
    """Locks may not reach every machine that sees a disk: what was joined is of one work all the same."""
    foreign = interrupted(scene, tmp_path / "other.tif", {"checkpoint": "B"})
    target = tmp_path / "labels.tif"
    job = job_of(scene)
    parts = Parts(target, job.plan, job.grid, LAYERS, {"checkpoint": "A"})
    first = job.plan.shards[0]

    def with_another_run(tiles: Tiles) -> Any:
        if len(parts.finished()) >= 5 and not seen:
            os.replace(foreign.path("labels", first), parts.path("labels", first))
            seen.append(True)
        return pointwise(tiles)

    seen: list[bool] = []
    with pytest.raises(DataError, match=r"labels_000_00000\.tif: is of other work: another run has written there"):
        label(scene, target, {"checkpoint": "A"}, vote=with_another_run)
    assert not target.exists()

    def without_a_piece(tiles: Tiles) -> Any:
        parts.path("labels", job.plan.shards[3]).unlink(missing_ok=True)
        return pointwise(tiles)

    with pytest.raises(DataError, match=r"labels_000_\d+\.tif: is gone: removed meanwhile by hand, or by another run"):
        label(scene, target, {"checkpoint": "A"}, vote=without_a_piece, resume=True)
    assert not target.exists()


@pytest.mark.pitfall("F1")
def test_a_temporary_file_that_another_run_removes_is_not_blamed_on_the_disk(scene: Path, tmp_path: Path) -> None:
    def swept(tiles: Tiles) -> Any:
        for file in (tmp_path / ".labels.tif.parts").glob(".*.partial"):
            file.unlink()
        return pointwise(tiles)

    with pytest.raises(MachineError, match="its temporary file was removed meanwhile, by hand or by another run"):
        label(scene, tmp_path / "labels.tif", vote=swept)
