"""`vfmseg predict` as a user meets it: one scene or many, one process or two, whole or in parts, interrupted or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from makers import finished_run, hear_ctrl_c, toy_scene, write_raster

from vfmseg.errors import DataError, MachineError, RecipeError
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.layer import Layer
from vfmseg.geo.mosaic import mosaic
from vfmseg.inference.output import Output
from vfmseg.inference.shards import Parts
from vfmseg.inference.worklist import scenes_of
from vfmseg.predict import predict
from vfmseg.progress import LabelProgress
from vfmseg.segmenter import Segmenter

ENVIRONMENT = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in run/ and a scene of 300 x 260 px with a hole."""
    folder = finished_run(tmp_path_factory.mktemp("place"))
    image, _ = toy_scene(7, 300, 260)
    image[:, 100:180, 60:150] = 0
    write_raster(folder / "scene.tif", image, nodata=0)
    return folder


@pytest.fixture(scope="module")
def segmenter(place: Path) -> Segmenter:
    return Segmenter.from_pretrained(place / "run" / "best")


def command(place: Path, *arguments: object, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*start, "-m", "vfmseg.cli", "predict", str(place / "run" / "best"), *map(str, arguments)]


def run(place: Path, *arguments: object, processes: int = 1) -> str:
    """What the command prints; it must succeed."""
    done = subprocess.run(
        command(place, *arguments, processes=processes),
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def label(
    segmenter: Segmenter, scene: Path, output: Path, how: dict[str, Any] | None = None, **wanted: Any
) -> list[dict[str, Any]]:
    return predict(segmenter, scenes_of(str(scene)) or str(scene), Output(output, **wanted), how or {})


def broken(*_: Any) -> None:
    raise MachineError("no room")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_processes_write_the_bytes_of_one(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    label(segmenter, place / "scene.tif", tmp_path / "one.tif", extras=("confidence",))
    arguments = (place / "scene.tif", "-o", tmp_path / "two.tif", "--confidence", "--json")
    record = json.loads(run(place, *arguments, processes=2))  # from the first process alone
    assert record["pixels"] == 300 * 260
    assert 0 <= record["queue_fill"] <= 1
    for end in ("", "_confidence"):
        assert (tmp_path / f"one{end}.tif").read_bytes() == (tmp_path / f"two{end}.tif").read_bytes()


def test_the_map_is_what_predict_returns(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    (record,) = label(segmenter, place / "scene.tif", tmp_path / "labels.tif", cog=True)
    with rasterio.open(tmp_path / "labels.tif") as labels:
        written = labels.read(1)
        tags = labels.tags()
        assert labels.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    np.testing.assert_array_equal(written, segmenter.predict(place / "scene.tif"))
    assert (written[100:180, 60:150] == 255).all()
    assert len(tags["vfmseg_checkpoint"]) == 64
    assert record["tiles_left_out"] > 0
    assert sum(record["stage_shares"].values()) == pytest.approx(1, abs=0.01)


@pytest.mark.pitfall("P63")
def test_an_existing_file_is_kept_unless_overwriting_is_allowed(
    place: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    target = tmp_path / "labels.tif"
    target.write_text("precious")
    with pytest.raises(DataError, match=r"labels\.tif: exists already"):
        label(segmenter, place / "scene.tif", target)
    assert target.read_text() == "precious"
    label(segmenter, place / "scene.tif", target, overwrite=True)
    assert names_in(tmp_path) == ["labels.tif"]
    with rasterio.open(target) as labels:
        assert labels.shape == (300, 260)


def test_an_area_and_polygons(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    pytest.importorskip("pyogrio")
    bounds = (500000.0, 4999000.0, 501000.0, 5000000.0)  # the first 100 x 100 pixels
    (record,) = label(segmenter, place / "scene.tif", tmp_path / "a.tif", area=bounds, polygons=".gpkg", min_area=1e4)
    with rasterio.open(tmp_path / "a.tif") as labels:
        written = labels.read(1)
    whole = segmenter.predict(place / "scene.tif")
    inside = np.zeros_like(whole, dtype=bool)
    inside[:100, :100] = True
    np.testing.assert_array_equal(written, np.where(inside, whole, 255))
    assert record["tiles_run"] < record["tiles_left_out"]
    import pyogrio

    meta = pyogrio.read_info(record["files"]["polygons"])
    assert meta["features"] >= 1
    assert "32633" in meta["crs"]


def test_the_plan_and_the_record_say_tiles_and_the_fill_of_the_queue(
    segmenter: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    seen = []
    honest = LabelProgress.add

    def add(self: LabelProgress, pixels: int, busy: Any, queued: int) -> None:
        queued = len(seen) % 3
        seen.append(queued)
        honest(self, pixels, busy, queued)

    monkeypatch.setattr(LabelProgress, "add", add)
    (record,) = label(segmenter, scene, tmp_path / "labels.tif")
    assert record["queue_fill"] == pytest.approx(np.mean(seen) / 2, abs=1e-3)
    assert len(seen) > 2
    assert "70 x 50 px, 6 tiles of" in capsys.readouterr().err
    (record,) = label(segmenter, scene, tmp_path / "labels.tif", resume=True)
    assert record["queue_fill"] is None
    label(segmenter, scene, tmp_path / "a.tif", area=(500000.0, 4999900.0, 500100.0, 5000000.0))
    assert "70 x 50 px, at most 6 tiles of" in capsys.readouterr().err


@pytest.mark.pitfall("P60")
def test_bfloat16_labels_alike(place: Path, segmenter: Segmenter) -> None:
    """A model of random features, trained for seconds, is seldom sure: still, few labels may change."""
    scene = place / "scene.tif"
    whole = segmenter.predict(scene)
    half = Segmenter.from_pretrained(place / "run" / "best", dtype="bf16")
    probabilities, exact = half.probabilities(str(scene)), segmenter.probabilities(str(scene))
    difference = np.abs(probabilities - exact)[:, whole != 255]
    assert 0 < difference.max() < 0.1  # 0: bfloat16 was never used
    assert (half.predict(scene) == whole).mean() > 0.99


def test_a_folder_of_scenes(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_raster(tmp_path / "in" / f"s{seed}.tif", toy_scene(seed, 70, 50)[0])
    records = label(segmenter, tmp_path / "in", tmp_path / "out")
    assert names_in(tmp_path / "out") == ["s1.tif", "s2.tif"]
    assert [r["pixels"] for r in records] == [3500, 3500]
    with pytest.raises(DataError, match=r"s1\.tif: exists already"):
        label(segmenter, tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "s2.tif").unlink()
    before = (tmp_path / "out" / "s1.tif").stat().st_mtime_ns
    records = label(segmenter, tmp_path / "in", tmp_path / "out", resume=True)
    assert [r["pixels"] for r in records] == [0, 3500]  # of this run
    assert (tmp_path / "out" / "s1.tif").stat().st_mtime_ns == before
    records = label(segmenter, tmp_path / "in", tmp_path / "out", {"overlap": 0.5}, resume=True)
    assert all("exists already" in r["error"] for r in records)  # finished, but as other work
    assert (tmp_path / "out" / "s1.tif").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match="goes with one scene"):
        predict(segmenter, [str(tmp_path / "in" / "s1.tif")], Output(tmp_path / "o"), others={"dem": "x.tif"})


@pytest.mark.pitfall("P63")
def test_resume_sees_what_lies_behind_a_path(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    array = toy_scene(1, 70, 50)[0]
    tile = write_raster(tmp_path / "tile.tif", array)
    zipped = tmp_path / "a.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.write(tile, "a.tif")
    layer = Layer("uint8", 0, ("r", "g", "b"))
    shown = mosaic(Grid(None, IDENTITY, 70, 50), layer, [("tile.tif", Window(0, 0, 70, 50))])
    (tmp_path / "mosaic.vrt").write_text(shown)
    behind = {str(tile): tile, str(tmp_path / "mosaic.vrt"): tile, f"/vsizip/{zipped}/a.tif": zipped}
    for number, (name, file) in enumerate(behind.items()):
        target = tmp_path / "labels.tif"
        label(segmenter, name, target)
        file.with_name(f"{file.name}.aux.xml").write_text("<PAMDataset/>")  # somebody looked at it
        (record,) = label(segmenter, name, target, resume=True)
        assert record["pixels"] == 0
        os.utime(file, ns=(number, number))
        with pytest.raises(DataError, match=r"exists already"):
            label(segmenter, name, target, resume=True)
        target.unlink()


@pytest.mark.pitfall("P63")
def test_a_finished_map_of_another_form_is_not_taken_for_the_one_wanted(
    place: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    label(segmenter, scene, tmp_path / "labels.tif")
    with pytest.raises(DataError, match=r"labels\.tif: exists already"):
        label(segmenter, scene, tmp_path / "labels.tif", cog=True, resume=True)
    label(segmenter, scene, tmp_path / "labels.tif", cog=True, overwrite=True)
    (record,) = label(segmenter, scene, tmp_path / "labels.tif", cog=True, resume=True)
    assert record["pixels"] == 0
    with pytest.raises(DataError, match=r"labels\.tif: exists already"):
        label(segmenter, scene, tmp_path / "labels.tif", cog=True, compress="zstd", resume=True)


@pytest.mark.pitfall("P62")
def test_a_compression_that_cannot_be_is_found_before_labelling(
    place: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="compress = 'zst'"):
        label(segmenter, place / "scene.tif", tmp_path / "labels.tif", compress="zst")
    assert names_in(tmp_path) == []


def test_pieces_may_be_resumed_into_files_of_another_form(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "assemble", broken)
        with pytest.raises(MachineError, match="are done and kept"):
            label(segmenter, scene, tmp_path / "labels.tif")
    for _ in range(2):  # the second finds what the first has finished
        (record,) = label(segmenter, scene, tmp_path / "labels.tif", cog=True, compress="zstd", resume=True)
        assert record["pixels"] == 0
    with rasterio.open(tmp_path / "labels.tif") as labels:
        structure = labels.tags(ns="IMAGE_STRUCTURE")
        assert (structure["LAYOUT"], structure["COMPRESSION"]) == ("COG", "ZSTD")


@pytest.mark.pitfall("P63")
def test_an_array_is_resumed_with_the_same_array_alone(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = toy_scene(1, 70, 50)[0]
    other = array.copy()
    other[0, 0, 0] ^= 1
    target = tmp_path / "labels.tif"
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "assemble", broken)
        with pytest.raises(MachineError, match="are done and kept"):
            segmenter.label(array, target)
    with pytest.raises(DataError, match=r"other work \(scene was .*array of 3 x 70 x 50 \|u1 "):
        segmenter.label(other, Output(target, resume=True))
    assert segmenter.label(array.copy(), Output(target, resume=True)).report.pixels == 0
    assert segmenter.label(array, Output(target, resume=True)).before
    with pytest.raises(DataError, match="exists already"):
        segmenter.label(other, Output(target, resume=True))


@pytest.mark.pitfall("P63")
def test_what_a_scene_is_read_from_is_never_replaced(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    tile = write_raster(tmp_path / "tile.tif", toy_scene(1, 70, 50)[0])
    shown = mosaic(
        Grid(None, IDENTITY, 70, 50), Layer("uint8", 0, ("r", "g", "b")), [("tile.tif", Window(0, 0, 70, 50))]
    )
    (tmp_path / "m.vrt").write_text(shown)
    package = tmp_path / "g.gpkg"
    rasterio.shutil.copy(tile, package, driver="GPKG")
    before = [path.read_bytes() for path in (tile, package)]
    with pytest.raises(DataError, match=r"tile\.tif: is the scene itself, or a part of it"):
        segmenter.predict(tmp_path / "m.vrt", output=tile, overwrite=True)
    with pytest.raises(DataError, match=r"g\.gpkg: is the scene itself"):
        predict(segmenter, str(package), Output(tmp_path / "g.tif", polygons=".gpkg", overwrite=True))
    assert [path.read_bytes() for path in (tile, package)] == before
    segmenter.predict(tile, output=tmp_path / "labels.tif")
    with pytest.raises(DataError, match=r"labels\.tif: exists already"):
        segmenter.predict(tile, output=tmp_path / "labels.tif")
    segmenter.predict(tile, output=tmp_path / "labels.tif", overwrite=True)


@pytest.mark.pitfall("F12")
def test_no_file_below_a_scene_is_replaced_however_it_is_named(
    place: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    image = toy_scene(1, 70, 50)[0]
    tile = write_raster(tmp_path / "tile.tif", image)
    package = tmp_path / "scene.gpkg"
    rasterio.shutil.copy(tile, package, driver="GPKG")
    inside = f"GPKG:{package}:scene"
    rasterio.shutil.copy(inside, tmp_path / "over.vrt", driver="VRT")
    os.link(tile, tmp_path / "link.tif")
    (tmp_path / "soft.tif").symlink_to(tile)
    pieces = write_raster(tmp_path / ".far.tif.parts" / "labels_000_00000.tif", image)
    sidecar = tmp_path / "map.tif.ovr"
    sidecar.write_bytes(tile.read_bytes())
    text = (tmp_path / "over.vrt").read_text()
    kept = [tile, package, pieces, sidecar]
    before = [path.read_bytes() for path in kept]
    refused: list[tuple[str, str, str | None]] = [
        (inside, "scene.tif", ".gpkg"),
        (str(tmp_path / "over.vrt"), "scene.tif", ".gpkg"),
        (text.replace('"1">GPKG:scene.gpkg', f'"0">GPKG:{package}'), "scene.tif", ".gpkg"),
        (f"vrt://{tile}?bands=1,2,3", "tile.tif", None),
        (f"GTIFF_DIR:1:{tile}", "link.tif", None),
        (str(tile), "soft.tif", None),
        (str(pieces), "far.tif", None),
        (str(sidecar), "map.tif", None),
    ]
    for scene, target, suffix in refused:
        with pytest.raises(DataError, match=r"is the scene itself, or a part of it|its pieces are kept in"):
            predict(segmenter, scene, Output(tmp_path / target, polygons=suffix, overwrite=True))
    assert [path.read_bytes() for path in kept] == before


@pytest.mark.pitfall("F12")
def test_a_list_replaces_no_part_of_another_of_its_scenes(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    tile = write_raster(tmp_path / "out" / "a.tif", toy_scene(1, 70, 50)[0])
    rasterio.shutil.copy(tile, tmp_path / "mosaic.vrt", driver="VRT")
    first = write_raster(tmp_path / "a.tif", toy_scene(2, 70, 50)[0])
    before = tile.read_bytes()
    with pytest.raises(DataError, match=r"out/a\.tif: is the scene itself, or a part of it"):
        predict(segmenter, [str(first), str(tmp_path / "mosaic.vrt")], Output(tmp_path / "out", overwrite=True))
    assert tile.read_bytes() == before


def test_pieces_left_at_the_very_end_are_removed(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    label(segmenter, place / "scene.tif", tmp_path / "labels.tif")
    (tmp_path / ".labels.tif.parts").mkdir()
    (tmp_path / ".labels.tif.12.partial").touch()
    (record,) = label(segmenter, place / "scene.tif", tmp_path / "labels.tif", resume=True)
    assert record["pixels"] == record["tiles_run"] == 0
    assert names_in(tmp_path) == ["labels.tif"]


@pytest.mark.pitfall("P62")
def test_a_damaged_block_is_an_error_or_nodata(
    place: Path, segmenter: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, _ = toy_scene(7, 256, 256)
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", width=256, height=256, count=3, dtype="uint8", tiled=True,
        blockxsize=64, blockysize=64, compress="deflate", interleave="pixel", crs="EPSG:32633",
        transform=rasterio.transform.from_origin(5e5, 5e6, 10, 10),
    ) as target:  # fmt: skip
        target.write(image)
    whole = segmenter.predict(tmp_path / "scene.tif")
    content = bytearray((tmp_path / "scene.tif").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = b"\xff" * 300
    (tmp_path / "scene.tif").write_bytes(content)
    with pytest.raises(DataError, match=r"scene\.tif: rows .* cannot be read"):
        label(segmenter, tmp_path / "scene.tif", tmp_path / "a.tif")
    (record,) = label(segmenter, tmp_path / "scene.tif", tmp_path / "b.tif", skip_unreadable=True)
    assert "left out as nodata" in capsys.readouterr().err
    with rasterio.open(tmp_path / "b.tif") as labels:
        written = labels.read(1)
    lost = written == 255
    assert 0 < record["unreadable_pixels"] == lost.sum() <= 3 * 64 * 64
    far = np.ones_like(lost)
    rows, cols = np.nonzero(lost)
    far[max(0, rows.min() - 40) : rows.max() + 40, max(0, cols.min() - 40) : cols.max() + 40] = False
    np.testing.assert_array_equal(written[far], whole[far])


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.pitfall("P37")
def test_ctrl_c_prints_the_line_that_resumes(place: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    image, _ = toy_scene(3, 1500, 600)
    write_raster(tmp_path / "scene.tif", image)
    arguments = (tmp_path / "scene.tif", "-o", tmp_path / "labels.tif", "--overlap", "0.6", "--batch-size", "2")
    running = subprocess.Popen(
        command(place, *arguments), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=hear_ctrl_c
    )
    parts = tmp_path / ".labels.tif.parts"
    while running.poll() is None and not (parts.is_dir() and list(parts.glob("labels_*.tif"))):
        time.sleep(0.05)
    running.send_signal(sent)
    assert running.stderr is not None
    message = running.stderr.read()
    assert running.wait() == code, message
    assert "Traceback" not in message
    assert "--overlap 0.6" in message
    assert message.rstrip().endswith("--resume")
    assert names_in(tmp_path) == [".labels.tif.parts", "scene.tif"]
    done = subprocess.run(command(place, *arguments, "--resume"), capture_output=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert names_in(tmp_path) == ["labels.tif", "scene.tif"]


def test_a_list_over_processes_needs_no_meeting_between_scenes(place: Path, tmp_path: Path) -> None:
    """Three scenes on two processes, one of them labelled before: nobody waits for a process that has less to do."""
    for seed in (1, 2, 3):
        write_raster(tmp_path / "in" / f"s{seed}.tif", toy_scene(seed, 70, 50)[0])
    again: list[str] = []
    for _ in range(2):
        told = run(place, tmp_path / "in", "-o", tmp_path / "out", "--json", *again, processes=2)
        records = json.loads(told)["scenes"]  # one object, from the first process, with the scenes of both
        assert [Path(r["scene"]).stem for r in records] == ["s1", "s2", "s3"]
        assert names_in(tmp_path / "out") == ["s1.tif", "s2.tif", "s3.tif"]
        (tmp_path / "out" / "s1.tif").unlink()
        again = ["--resume"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.pitfall("P62")
def test_a_scene_that_cannot_be_labelled_does_not_stop_a_list(place: Path, tmp_path: Path, processes: int) -> None:
    for seed in (1, 2, 3):
        write_raster(tmp_path / "in" / f"s{seed}.tif", toy_scene(seed, 70, 50)[0])
    (tmp_path / "in" / "s2.tif").write_bytes(b"no raster")  # of two processes, the second one's
    arguments = [tmp_path / "in", "-o", tmp_path / "out", "--json", "--resume"]

    def end() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(place, *arguments, processes=processes), capture_output=True, text=True, timeout=200,
            env=ENVIRONMENT, check=False,
        )  # fmt: skip

    done = end()
    assert done.returncode == (2 if processes == 1 else 1), done.stderr  # 1: the launcher's own
    assert "s2.tif: not labelled: " in done.stderr
    assert "vfmseg: 1 of 3 scenes could not be labelled, see above; mend them and go on with --resume" in done.stderr
    first, second, third = json.loads(done.stdout)["scenes"]
    assert {*second} == {"scene", "error"}
    assert "is not a raster" in second["error"]
    assert first["pixels"] == third["pixels"] == 3500
    assert names_in(tmp_path / "out") == ["s1.tif", "s3.tif"]
    if processes == 1:
        write_raster(tmp_path / "in" / "s2.tif", toy_scene(2, 70, 50)[0])
        done = end()
        assert done.returncode == 0, done.stderr
        assert [r["pixels"] for r in json.loads(done.stdout)["scenes"]] == [0, 3500, 0]


@pytest.mark.pitfall("P63")
def test_what_exists_is_found_before_the_first_scene_of_a_list(segmenter: Segmenter, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_raster(tmp_path / "in" / f"s{seed}.tif", toy_scene(seed, 70, 50)[0])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "s2_confidence.tif").write_text("precious")
    with pytest.raises(DataError, match=r"s2_confidence\.tif: exists already"):
        label(segmenter, tmp_path / "in", tmp_path / "out", extras=("confidence",))
    assert names_in(tmp_path / "out") == ["s2_confidence.tif"]


def test_a_tilde_is_the_home_folder(
    place: Path, segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(place)
    write_raster(tmp_path / "scene.tif", toy_scene(1, 70, 50)[0])
    (record,) = predict(segmenter, "~/scene.tif", Output("~/labels.tif"))
    assert record["output"] == str(tmp_path / "labels.tif")
    assert names_in(tmp_path) == ["labels.tif", "scene.tif"]


def test_a_tilde_in_other_options_is_the_home_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from vfmseg.cli import app

    def told(self: Segmenter, inputs: dict[str, str], output: Output, *_: Any) -> None:
        raise DataError(f"{inputs['dem']} {output.area}")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Segmenter, "label", told)
    arguments = [place / "scene.tif", "-o", tmp_path / "x.tif", "--modality", "dem=~/dem.tif", "--area", "~/a.gpkg"]
    done = CliRunner().invoke(app, [*command(place, *arguments)[3:]])
    assert f"{tmp_path}/dem.tif {tmp_path}/a.gpkg" in done.stderr


def test_scenes_outside_the_area_are_left_out_of_a_list(
    place: Path, segmenter: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_raster(tmp_path / "in" / "here.tif", toy_scene(1, 70, 50)[0])
    write_raster(tmp_path / "in" / "there.tif", toy_scene(2, 70, 50)[0], origin=(700000, 5000000))
    bounds = (500100.0, 4999500.0, 500300.0, 4999900.0)
    (record,) = label(segmenter, tmp_path / "in", tmp_path / "out", area=bounds)
    assert Path(record["scene"]).stem == "here"
    assert names_in(tmp_path / "out") == ["here.tif"]
    assert "there.tif: left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="the area holds nothing of any of the 2 scenes"):
        label(segmenter, tmp_path / "in", tmp_path / "none", area=(0.0, 0.0, 1.0, 1.0))


def test_what_stops_polygons_is_found_before_labelling(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    town = tmp_path / "town.geojson"
    town.write_text("precious")
    nowhere = write_raster(tmp_path / "nowhere.tif", toy_scene(1, 70, 50)[0], crs=None)
    for suffix, message, wanted in (
        ("gpkg", "expected a suffix with its dot", {}),
        (".shp", "polygons cannot be written as", {}),
        (".gpkg", "min_area -1", {"min_area": -1.0}),
        (".geojson", "is the area of interest", {"area": str(town)}),
        (".geojson", r"town\.geojson: exists already", {}),
        (".geojson", "has no coordinate reference system, but town.geojson needs one", {"overwrite": True}),
    ):
        scene = nowhere if "reference" in message else place / "scene.tif"
        with pytest.raises((DataError, RecipeError), match=message):
            label(segmenter, scene, tmp_path / "town.tif", polygons=suffix, **wanted)
    assert names_in(tmp_path) == ["nowhere.tif", "town.geojson"]
    assert town.read_text() == "precious"


@pytest.mark.pitfall("P63")
def test_other_products_do_not_replace_files_either(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "x_confidence.tif").write_text("precious")
    with pytest.raises(DataError, match=r"x_confidence\.tif: exists already"):
        label(segmenter, place / "scene.tif", tmp_path / "x.tif", extras=("confidence",))
    scene = tmp_path / "y_confidence.tif"
    scene.write_bytes((place / "scene.tif").read_bytes())
    with pytest.raises(DataError, match="is the scene itself"):
        label(segmenter, scene, tmp_path / "y.tif", extras=("confidence",), overwrite=True)
    assert (tmp_path / "x_confidence.tif").read_text() == "precious"


@pytest.mark.parametrize("output", ["s3://bucket/labels.tif", "/vsis3/bucket/labels.tif"])
def test_labels_are_written_to_a_local_disk(place: Path, segmenter: Segmenter, output: str) -> None:
    with pytest.raises(DataError, match="name a local path"):
        predict(segmenter, str(place / "scene.tif"), Output(output))
    with pytest.raises(DataError, match="name a local path"):
        segmenter.label(str(place / "scene.tif"), output)


@pytest.mark.pitfall("P37")
def test_polygons_that_an_interruption_has_cost_are_made_by_resume(
    place: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    pytest.importorskip("pyogrio")
    label(segmenter, place / "scene.tif", tmp_path / "labels.tif", polygons=".gpkg")
    (tmp_path / "labels.gpkg").unlink()
    label(segmenter, place / "scene.tif", tmp_path / "labels.tif", polygons=".gpkg", resume=True)
    assert names_in(tmp_path) == ["labels.gpkg", "labels.tif"]


@pytest.mark.pitfall("P63")
def test_resume_makes_the_polygons_of_a_finished_map_anew(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    pyogrio = pytest.importorskip("pyogrio")

    def polygons(**wanted: Any) -> int:
        (record,) = label(segmenter, place / "scene.tif", tmp_path / "labels.tif", polygons=".gpkg", **wanted)
        return int(pyogrio.read_info(record["files"]["polygons"])["features"])

    assert polygons() > 0
    before = (tmp_path / "labels.tif").stat().st_mtime_ns
    assert polygons(resume=True, min_area=1e9) == 0
    assert (tmp_path / "labels.tif").stat().st_mtime_ns == before


@pytest.mark.pitfall("F10")
def test_nobody_listens_and_the_map_is_written(place: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    label(segmenter, place / "scene.tif", tmp_path / "one.tif")
    reading, writing = os.pipe()
    os.close(reading)  # as after `2>&1 | head`
    words = command(place, place / "scene.tif", "-o", tmp_path / "two.tif", "--json")
    done = subprocess.run(words, stdout=writing, stderr=writing, timeout=200, env=ENVIRONMENT, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "two.tif").read_bytes()
