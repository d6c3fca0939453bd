"""A second run of `vfmseg predict`: what it must not take for the same, replace or remove."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from makers import finished_run, sign, toy_scene, write_raster
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vfmseg import cli
from vfmseg.checkpoint import reading as checkpoint
from vfmseg.checkpoint.folder import fingerprint_of
from vfmseg.data.given import open_scene
from vfmseg.errors import BusyError, CheckpointError, DataError, MachineError
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.layer import Layer
from vfmseg.geo.mosaic import mosaic
from vfmseg.geo.reader import Raster
from vfmseg.inference.output import Output, Team
from vfmseg.inference.reading import stored_as
from vfmseg.inference.shards import RunSink
from vfmseg.inference.tolerant import Tolerant, Unreadable
from vfmseg.predict import predict
from vfmseg.segmenter import Segmenter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("again"))


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Segmenter:
    return Segmenter.from_pretrained(folder / "run" / "best")


def label(
    segmenter: Segmenter, scene: Path | str, target: Path, how: dict[str, Any] | None = None, **wanted: Any
) -> int:
    """Pixels that were labelled."""
    (record,) = predict(segmenter, str(scene), Output(target, **wanted), how or {})
    return int(record["pixels"])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(segmenter: Segmenter, scene: Path, target: Path, monkeypatch: pytest.MonkeyPatch, **wanted: Any) -> int:
    """Label until the first piece is finished; how many there are to be."""

    def enough(self: RunSink, *_: Any, honest: Any = RunSink.write) -> None:
        honest(self, *_)
        if not self._writers:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunSink, "write", enough)
        with pytest.raises(KeyboardInterrupt):
            label(segmenter, scene, target, **wanted)
    parts = target.with_name(f".{target.name}.parts")
    return len(list(parts.glob("labels_*.tif")))


@contextmanager
def labelling(segmenter: Segmenter, scene: Path, target: Path, **wanted: Any) -> Iterator[None]:
    """A run that is in the middle of labelling, in a thread of its own, while the block runs; then it ends."""
    there, go_on, errors = threading.Event(), threading.Event(), []
    honest = RunSink.write

    def write(self: RunSink, *rows: Any) -> None:
        honest(self, *rows)
        if self._parts.target == target:
            there.set()
            assert go_on.wait(20)

    def run() -> None:
        try:
            label(segmenter, scene, target, **wanted)
        except BaseException as error:
            errors.append(error)
            there.set()

    thread = threading.Thread(target=run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunSink, "write", write)
        thread.start()
        try:
            assert there.wait(20)
            yield
        finally:
            go_on.set()
            thread.join()
    assert errors == []


@pytest.mark.pitfall("F1")
def test_a_second_run_for_the_same_files_is_refused_and_the_first_ends_as_if_alone(
    segmenter: Segmenter, tmp_path: Path
) -> None:
    pytest.importorskip("pyogrio")
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 600, 50)[0])
    other = write_raster(tmp_path / "other.tif", toy_scene(2, 600, 50)[0])
    alone = tmp_path / "alone"
    alone.mkdir()
    label(segmenter, scene, alone / "m.tif", extras=("confidence",), polygons=".gpkg")
    together = tmp_path / "together"
    with labelling(segmenter, scene, together / "m.tif", extras=("confidence",), polygons=".gpkg"):
        held = {path.name for path in together.rglob("*")}
        for target, wanted in (
            ("m.tif", {"overwrite": True}),
            ("m.tif", {"resume": True}),
            ("m.tif", {}),
            ("m_confidence.tif", {}),  # what the first run writes beside its labels
            ("m.tiff", {"polygons": ".gpkg"}),
        ):
            with pytest.raises(BusyError, match=rf"another run is writing it \(process {os.getpid()} on .*labelling m"):
                label(segmenter, other, together / target, **wanted)
        with pytest.raises(BusyError):
            segmenter.predict(other, together / "m.tif", overwrite=True)
        assert {path.name for path in together.rglob("*")} == held
        label(segmenter, other, together / "n.tif")  # another output is no matter
    assert names_in(together) == ["m.gpkg", "m.tif", "m_confidence.tif", "n.tif"]
    for name in ("m.tif", "m_confidence.tif"):
        assert (together / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.pitfall("F1")
def test_a_run_for_files_that_are_being_written_ends_with_exit_code_2(
    folder: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 600, 50)[0])
    words = ["predict", str(folder / "run" / "best"), str(scene), "-o", str(tmp_path / "labels.tif"), "--overwrite"]
    with labelling(segmenter, scene, tmp_path / "labels.tif"):
        done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2
    assert "labels.tif: another run is writing it" in done.stderr
    assert "wait until it has ended, stop it, or choose another output" in done.stderr


@pytest.mark.pitfall("F1")
def test_a_map_names_the_checkpoint_that_was_loaded(folder: Path, tmp_path: Path) -> None:
    """A training run may have replaced the folder since."""
    shutil.copytree(folder / "run" / "last", tmp_path / "best")
    segmenter = Segmenter.from_pretrained(tmp_path / "best")
    loaded = fingerprint_of(tmp_path / "best")
    with (tmp_path / "best" / "segmenter.json").open("a") as record:
        record.write("\n")
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    label(segmenter, scene, tmp_path / "labels.tif")
    with rasterio.open(tmp_path / "labels.tif") as labels:
        assert labels.tags()["vfmseg_checkpoint"] == loaded


@pytest.mark.pitfall("F1")
def test_a_checkpoint_that_is_replaced_while_it_is_loaded_is_never_mixed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = tmp_path / "best"
    shutil.copytree(folder / "run" / "best", best)
    shutil.copytree(folder / "run" / "best", tmp_path / "newer")
    head = load_file(best / "head.safetensors")
    newer = {name: tensor + 1 for name, tensor in head.items()}
    save_file(newer, tmp_path / "newer" / "head.safetensors")
    sign(tmp_path / "newer")
    honest = checkpoint.load_recipe

    def replaced(path: Path) -> Any:
        if (tmp_path / "newer").exists():
            shutil.rmtree(best)
            (tmp_path / "newer").rename(best)
        return honest(path)

    monkeypatch.setattr(checkpoint, "load_recipe", replaced)
    loaded = checkpoint.load_segmenter(best)
    assert loaded.fingerprint == fingerprint_of(best)
    state = loaded.model.head_state()
    assert all((state[name] == newer[name]).all() for name in newer)

    def again_and_again(path: Path) -> Any:
        shutil.copytree(best, tmp_path / "newer")
        return replaced(path)

    monkeypatch.setattr(checkpoint, "load_recipe", again_and_again)
    with pytest.raises(CheckpointError, match="was replaced three times while it was read"):
        checkpoint.load_segmenter(best)


def vrt_over(path: Path, part: str, height: int = 70, width: int = 50) -> Path:
    layer = Layer("uint8", 0, ("r", "g", "b"))
    path.write_text(mosaic(Grid(None, IDENTITY, height, width), layer, [(part, Window(0, 0, height, width))]))
    return path


@pytest.mark.pitfall("P63")
def test_a_tile_of_a_vrt_in_a_vrt_is_an_input(segmenter: Segmenter, tmp_path: Path) -> None:
    """GDAL names the files of a VRT one level deep."""
    tile = write_raster(tmp_path / "tile.tif", toy_scene(1, 70, 50)[0])
    before = tile.read_bytes()
    vrt_over(tmp_path / "inner.vrt", "tile.tif")
    outer = vrt_over(tmp_path / "outer.vrt", "inner.vrt")
    with pytest.raises(DataError, match=r"tile\.tif: is the scene itself, or a part of it"):
        label(segmenter, outer, tile, overwrite=True)
    assert tile.read_bytes() == before
    label(segmenter, outer, tmp_path / "labels.tif")
    assert label(segmenter, outer, tmp_path / "labels.tif", resume=True) == 0
    os.utime(tile, ns=(1, 1))
    with pytest.raises(DataError, match="exists already"):
        label(segmenter, outer, tmp_path / "labels.tif", resume=True)


@pytest.mark.parametrize("change", ["nodata", "crs"])
@pytest.mark.pitfall("P63")
def test_what_a_sidecar_says_of_a_scene_belongs_to_it(segmenter: Segmenter, tmp_path: Path, change: str) -> None:
    """Of formats that are opened for reading only, nodata and place live in an .aux.xml, as do statistics."""
    source = write_raster(tmp_path / "source.tif", toy_scene(1, 70, 50)[0], crs=None)
    rasterio.shutil.copy(source, tmp_path / "scene.png", driver="PNG")
    label(segmenter, tmp_path / "scene.png", tmp_path / "labels.tif")
    sidecar = tmp_path / "scene.png.aux.xml"
    sidecar.write_text("<PAMDataset><Metadata><MDI key='a'>b</MDI></Metadata></PAMDataset>")
    assert label(segmenter, tmp_path / "scene.png", tmp_path / "labels.tif", resume=True) == 0
    bands = "".join(f"<PAMRasterBand band='{i}'><NoDataValue>70</NoDataValue></PAMRasterBand>" for i in (1, 2, 3))
    place = "<SRS>EPSG:32633</SRS><GeoTransform>5e5,10,0,5e6,0,-10</GeoTransform>"
    sidecar.write_text(f"<PAMDataset>{bands if change == 'nodata' else place}</PAMDataset>")
    with pytest.raises(DataError, match="exists already"):
        label(segmenter, tmp_path / "scene.png", tmp_path / "labels.tif", resume=True)


@pytest.mark.pitfall("P63")
def test_a_file_behind_a_server_is_told_by_its_pixels(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    (tmp_path / "served").mkdir()
    # GDAL remembers what it has fetched, so each time under another name, as another process would see it
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_raster(tmp_path / "served" / f"{name}.tif", toy_scene(seed, 70, 50)[0])
    words = [sys.executable, str(Path(__file__).with_name("range_server.py")), str(tmp_path / "served")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = f"/vsicurl/http://127.0.0.1:{int(process.stdout.readline())}"
            works = []
            for name in ("a", "b", "c"):
                monkeypatch.setattr("vfmseg.inference.provenance._stamp", lambda path: "one address")
                label(segmenter, f"{address}/{name}.tif", tmp_path / f"{name}.tif")
                with rasterio.open(tmp_path / f"{name}.tif") as labels:
                    works.append(labels.tags()["vfmseg_work"])
        finally:
            process.kill()
    assert works[0] == works[1] != works[2]


@pytest.mark.pitfall("P63")
def test_a_vector_file_that_is_not_ours_is_not_replaced_by_resume(segmenter: Segmenter, tmp_path: Path) -> None:
    pyogrio = pytest.importorskip("pyogrio")
    shapely = pytest.importorskip("shapely")
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    label(segmenter, scene, tmp_path / "labels.tif")
    drawn = shapely.to_wkb(np.array([shapely.box(0, 0, 1, 1)]))
    pyogrio.raw.write(
        tmp_path / "labels.gpkg", drawn, [np.array([1])], ["house"], driver="GPKG", geometry_type="Polygon",
        crs="EPSG:32633",
    )  # fmt: skip
    before = (tmp_path / "labels.gpkg").read_bytes()
    with pytest.raises(DataError, match=r"labels\.gpkg: exists already"):
        label(segmenter, scene, tmp_path / "labels.tif", polygons=".gpkg", resume=True)
    (tmp_path / "labels.fgb").write_bytes(b"no vector file")
    with pytest.raises(DataError, match=r"labels\.fgb: exists already"):
        label(segmenter, scene, tmp_path / "labels.tif", polygons=".fgb", resume=True)
    assert (tmp_path / "labels.gpkg").read_bytes() == before
    assert (tmp_path / "labels.fgb").read_bytes() == b"no vector file"


@pytest.mark.pitfall("P37")
def test_what_a_killed_process_left_of_polygons_goes(segmenter: Segmenter, tmp_path: Path) -> None:
    pytest.importorskip("pyogrio")
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    left = tmp_path / ".labels.gpkg.1.partial"
    left.mkdir()
    (left / "polygons.gpkg").write_text("half")
    label(segmenter, scene, tmp_path / "labels.tif", polygons=".gpkg")
    assert names_in(tmp_path) == ["labels.gpkg", "labels.tif", "scene.tif"]


@pytest.mark.pitfall("P63")
def test_pieces_of_other_work_survive_the_resume_of_a_finished_map(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 600, 50)[0])
    target = tmp_path / "labels.tif"
    label(segmenter, scene, target)
    pieces = interrupted(segmenter, scene, target, monkeypatch, how={"tta": "flips"}, overwrite=True)
    assert pieces > 0
    assert label(segmenter, scene, target, resume=True) == 0
    parts = tmp_path / ".labels.tif.parts"
    assert len(list(parts.glob("labels_*.tif"))) == pieces
    (parts / "plan.json").write_text("no json")
    assert label(segmenter, scene, target, resume=True) == 0  # pieces of work that nobody knows are of no use
    assert not parts.exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.pitfall("P62")
def test_processes_that_are_not_connected_label_no_scene_together(
    segmenter: Segmenter, tmp_path: Path, rank: int
) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    kept = tmp_path / ".labels.tif.parts"
    kept.mkdir()
    (kept / "labels_000_00000.tif").touch()
    with pytest.raises(MachineError, match="connected to none"):
        segmenter.label(scene, tmp_path / "labels.tif", team=Team(rank, 2))
    assert names_in(kept) == ["labels_000_00000.tif"]


@pytest.mark.pitfall("P33")
def test_an_area_of_numpy_numbers_is_an_area(segmenter: Segmenter, tmp_path: Path) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    bounds = np.array([500100, 4999500, 500300, 4999900], dtype=np.float32)
    maps = []
    for name, area in (("a", bounds), ("b", tuple(bounds)), ("c", bounds.tolist())):
        segmenter.label(scene, Output(tmp_path / f"{name}.tif", area=area))
        with rasterio.open(tmp_path / f"{name}.tif") as labels:
            maps.append(labels.read(1))
    assert (maps[0] != 255).sum() == 20 * 40
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[0], maps[2])


@pytest.mark.parametrize("output", [".", "/"])
@pytest.mark.pitfall("P62")
def test_a_folder_is_no_name_for_a_map(segmenter: Segmenter, tmp_path: Path, output: str) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    with pytest.raises(DataError, match="is a folder; expected the name"):
        predict(segmenter, str(scene), Output(output, extras=("confidence",), polygons=".gpkg"))


@pytest.mark.pitfall("P33")
def test_an_empty_area_is_not_the_whole_scene(folder: Path, tmp_path: Path) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    words = ["predict", str(folder / "run" / "best"), str(scene), "-o", str(tmp_path / "labels.tif"), "--area", ""]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2
    assert not (tmp_path / "labels.tif").exists()


@pytest.mark.pitfall("P62")
def test_a_tile_wider_than_any_strip_is_named(segmenter: Segmenter, tmp_path: Path) -> None:
    scene = tmp_path / "wide.tif"
    with rasterio.open(
        scene, "w", driver="GTiff", width=10304, height=1, count=3, dtype="uint8", crs="EPSG:32633",
        transform=rasterio.transform.from_origin(5e5, 5e6, 10, 10),
    ):  # fmt: skip
        pass
    with pytest.raises(MachineError, match=r"tiles of 10304 px are wider than a strip may be \(10240 px\)"):
        segmenter.label(scene, tmp_path / "labels.tif", {"tile": 10304})


@pytest.mark.pitfall("P62")
def test_blocks_that_are_lost_are_told_by_the_process_that_lost_them(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a list, each process labels scenes of its own."""
    paths = [write_raster(tmp_path / "in" / f"{name}.tif", toy_scene(1, 70, 50)[0]) for name in ("whole", "hurt")]
    paths[1].write_bytes(paths[1].read_bytes()[:-4000])
    monkeypatch.setattr("vfmseg.terminal.rank", lambda: 1)
    predict(segmenter, [*map(str, paths)], Output(tmp_path / "out", skip_unreadable=True))
    assert "left out as nodata" in capsys.readouterr().err


@pytest.mark.pitfall("P62")
def test_a_scene_that_vanishes_is_no_damage(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    scene = open_scene({"rgb": str(path)}, {"rgb": Bands()})
    unreadable = Unreadable()
    tolerant = Tolerant(scene, {"rgb": 3}, stored_as(scene).block, unreadable)
    tolerant.read(Window(0, 0, 10, 10))
    scene.close()
    path.unlink()
    with pytest.raises(DataError, match="there is no such file"):
        tolerant.read(Window(0, 0, 10, 10))
    assert not unreadable.blocks


def test_blocks_of_a_mosaic_are_those_of_its_tiles(tmp_path: Path) -> None:
    for name, side in (("small", 256), ("large", 1024), ("huge", 2048)):
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", width=2048, height=2048, count=3, dtype="uint8", tiled=True,
            blockxsize=side, blockysize=side, compress="deflate", sparse_ok=True, crs="EPSG:32633",
            transform=rasterio.transform.from_origin(5e5, 5e6, 10, 10),
        ):  # fmt: skip
            pass
        vrt = vrt_over(tmp_path / f"{name}.vrt", f"{name}.tif", 2048, 2048)
        with Raster(str(vrt)) as raster:
            assert raster.block == (min(side, 1024), side)  # a higher one would be kept whole
