"""What files from strangers cannot do: each promise of docs/security.md."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from makers import write_raster

from vfmseg.errors import DamagedError, DataError, VfmsegError
from vfmseg.geo import trust
from vfmseg.geo.classes import LabelMap
from vfmseg.geo.grid import IDENTITY, Grid, Window
from vfmseg.geo.labels import LabelRaster
from vfmseg.geo.rasterfile import RasterFile
from vfmseg.geo.trust import PLAIN
from vfmseg.vector.area import read_area

SIZE = 64
WHOLE = Window(0, 0, SIZE, SIZE)
PIXELS = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that are made all the same are given up soon."""
    monkeypatch.setattr(trust, "_asked_servers", False)
    for name in ("GDAL_HTTP_TIMEOUT", "GDAL_HTTP_CONNECTTIMEOUT", "GDAL_HTTP_LOW_SPEED_TIME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "0")
    monkeypatch.setenv("NO_PROXY", "nobody")
    monkeypatch.delenv("VFMSEG_TRUST", raising=False)


@pytest.fixture
def server() -> Iterator[tuple[str, Callable[[], bool]]]:
    """An address on this machine, and whether anybody has called there."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)

        def called() -> bool:
            try:
                listening.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        yield f"http://127.0.0.1:{listening.getsockname()[1]}", called


def picture(path: Path) -> Path:
    return write_raster(path, PIXELS)


def use(path: Path | str) -> np.ndarray:
    """All that is done with a scene: told, read, and what its masks hide."""
    file = RasterFile(path)
    try:
        read = file.read(range(1, file.info.count + 1), WHOLE)
        file.read_hidden([1], WHOLE)
    finally:
        file.close()
    return read[0]


def wms(address: str) -> str:
    corners = "<UpperLeftX>0</UpperLeftX><UpperLeftY>64</UpperLeftY><LowerRightX>64</LowerRightX><LowerRightY>0"
    return (
        f'<GDAL_WMS><Service name="TMS"><ServerUrl>{address}/${{z}}/${{x}}/${{y}}.png</ServerUrl></Service><DataWindow>'
        f"{corners}</LowerRightY><TileLevel>0</TileLevel><SizeX>{SIZE}</SizeX><SizeY>{SIZE}</SizeY></DataWindow>"
        f"<BlockSizeX>{SIZE}</BlockSizeX><BlockSizeY>{SIZE}</BlockSizeY><BandsCount>1</BandsCount></GDAL_WMS>"
    )


def vrt(source: str, relative: int = 1, size: int = SIZE, more: str = "", kind: str = "SimpleSource") -> str:
    rect = 'xOff="0" yOff="0" xSize="{0}" ySize="{0}"'
    return (
        f'<VRTDataset rasterXSize="{size}" rasterYSize="{size}"><VRTRasterBand dataType="UInt16" band="1"><{kind}>'
        f'<SourceFilename relativeToVRT="{relative}">{source}</SourceFilename><SourceBand>1</SourceBand>'
        f"<SrcRect {rect.format(SIZE)}/><DstRect {rect.format(size)}/></{kind}>{more}</VRTRasterBand></VRTDataset>"
    )


def raw(name: str, relative: int = 1) -> str:
    return (
        f'<VRTDataset rasterXSize="{SIZE}" rasterYSize="{SIZE}"><VRTRasterBand dataType="UInt16" band="1" '
        f'subClass="VRTRawRasterBand"><SourceFilename relativeToVRT="{relative}">{name}</SourceFilename>'
        f"<ByteOrder>LSB</ByteOrder></VRTRasterBand></VRTDataset>"
    )


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def overviews(name: str) -> str:
    return f'<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{name}</MDI></Metadata></PAMDataset>'


WARPED = (
    '<VRTDataset rasterXSize="64" rasterYSize="64" subClass="VRTWarpedDataset"><VRTRasterBand dataType="UInt16" '
    'band="1" subClass="VRTWarpedRasterBand"/><GDALWarpOptions><SourceDataset relativeToVRT="0">{0}</SourceDataset>'
    "</GDALWarpOptions></VRTDataset>"
)

HOSTILE: dict[str, Callable[[str], dict[str, str]]] = {
    "WMS": lambda at: {"scene.tif": wms(at)},
    "WMTS": lambda at: {"scene.tif": f"<GDAL_WMTS><GetCapabilitiesUrl>{at}/w.xml</GetCapabilitiesUrl></GDAL_WMTS>"},
    "WCS": lambda at: {"scene.tif": f"<WCS_GDAL><ServiceURL>{at}</ServiceURL></WCS_GDAL>"},
    "STAC": lambda at: {"scene.tif": f'{{"type": "FeatureCollection", "stac_version": "1.0.0", "features": ["{at}"]}}'},
    "source": lambda at: {"scene.tif": vrt(f"/vsicurl/{at}/a.tif", 0)},
    "address": lambda at: {"scene.tif": vrt(f"{at}/a.tif", 0)},
    "stream": lambda at: {"scene.tif": vrt(f"/vsicurl_streaming/{at}/a.tif", 0)},
    "archive": lambda at: {"scene.tif": vrt(f"/vsizip//vsicurl/{at}/a.zip/a.tif", 0)},
    "driver": lambda at: {"scene.tif": vrt(f"WMS:{at}/wms?LAYERS=a&amp;SRS=EPSG:4326&amp;BBOX=0,0,1,1", 0)},
    "inline": lambda at: {"scene.tif": vrt(escaped(wms(at)), 0)},
    "inline VRT": lambda at: {"scene.tif": vrt(escaped(vrt(f"/vsicurl/{at}/a.tif", 0)), 0)},
    "vrt://": lambda at: {"scene.tif": vrt(f"vrt:///vsicurl/{at}/a.tif?bands=1", 0)},
    "capitals": lambda at: {"scene.tif": vrt(f"/vsicurl/{at}/a.tif", 0).replace("SourceFilename", "SOURCEFILENAME")},
    "attribute": lambda at: {
        "scene.tif": vrt("", 0).replace("<SimpleSource>", f'<SimpleSource SourceFilename="/vsicurl/{at}/a.tif">')
    },
    "comment": lambda at: {"scene.tif": vrt(f"<!-- a.tif -->/vsicurl/{at}/a.tif<!-- -->", 0)},
    "entity": lambda at: {"scene.tif": '<!DOCTYPE a [<!ENTITY b "a.tif">]>' + vrt(f"/vsicurl/{at}/a.tif", 0)},
    "character data": lambda at: {"scene.tif": vrt(f"<![CDATA[/vsicurl/{at}/a.tif]]>", 0)},
    "no clean XML": lambda at: {"scene.tif": "junk " + vrt(f"/vsicurl/{at}/a.tif", 0)},
    "warped": lambda at: {"scene.tif": WARPED.format(f"/vsicurl/{at}/a.tif")},
    "nested": lambda at: {"scene.tif": vrt("b.tif"), "b.tif": vrt("c.tif"), "c.tif": vrt(f"/vsicurl/{at}/a.tif", 0)},
    "WMS as tile": lambda at: {"scene.tif": vrt("b.tif"), "b.tif": wms(at)},
    "VRT's overview": lambda at: {
        "scene.tif": vrt("plain.tif", more=f"<Overview><SourceFilename>/vsicurl/{at}/a.tif</SourceFilename></Overview>")
    },
    "mask": lambda at: {"plain.tif.msk": wms(at)},
    "overviews": lambda at: {"plain.tif.ovr": wms(at)},
    "named overviews": lambda at: {"plain.tif.aux.xml": overviews(f"/vsicurl/{at}/a.tif")},
    "overviews of a service": lambda at: {"plain.tif.aux.xml": overviews(f"WMS:{at}/wms?")},
    "tile's mask": lambda at: {"scene.tif": vrt("plain.tif"), "plain.tif.msk": wms(at)},
    "tile's overviews": lambda at: {"scene.tif": vrt("plain.tif", size=16), "plain.tif.ovr": wms(at)},
    "tile's named overviews": lambda at: {
        "scene.tif": vrt("plain.tif", size=16),
        "plain.tif.aux.xml": overviews(f"/vsicurl/{at}/a.tif"),
    },
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.pitfall("F7")
def test_a_file_sends_nobody_to_a_server(tmp_path: Path, server: tuple[str, Callable[[], bool]], kind: str) -> None:
    address, called = server
    picture(tmp_path / "plain.tif")
    for name, content in HOSTILE[kind](address).items():
        (tmp_path / name).write_text(content)
    scene = tmp_path / "scene.tif"
    with pytest.raises(DataError, match="VFMSEG_TRUST=1") as caught:
        use(scene if scene.exists() else tmp_path / "plain.tif")
    assert "\n" not in str(caught.value)
    assert not called()


@pytest.mark.pitfall("F7")
def test_nor_does_a_tag_in_a_geotiff(tmp_path: Path, server: tuple[str, Callable[[], bool]]) -> None:
    address, called = server
    scene = picture(tmp_path / "scene.tif")
    with rasterio.open(scene, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=f"/vsicurl/{address}/a.tif")
    with pytest.raises(DataError, match="lies behind a server"):
        use(scene)
    # of a tile that is not the first GDAL itself follows the tag, and gets nowhere
    picture(tmp_path / "plain.tif")
    one, other = (vrt(name, size=16) for name in ("plain.tif", "scene.tif"))
    other = other[other.index("<SimpleSource>") : other.index("</VRTRasterBand>")]
    (tmp_path / "mosaic.vrt").write_text(one.replace("</VRTRasterBand>", f"{other}</VRTRasterBand>"))
    file = RasterFile(tmp_path / "mosaic.vrt")
    file.read([1], Window(0, 0, 16, 16))
    file.close()
    assert not called()


@pytest.mark.pitfall("F7")
def test_trust_is_one_setting(
    tmp_path: Path, server: tuple[str, Callable[[], bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, called = server
    scene = tmp_path / "scene.tif"
    scene.write_text(wms(address))
    for word in ("0", "no", "false", "off"):
        monkeypatch.setenv("VFMSEG_TRUST", word)
        with pytest.raises(DataError):
            use(scene)
        assert not called()
    monkeypatch.setenv("VFMSEG_TRUST", "1")
    with pytest.raises(DamagedError):  # as nobody answers
        use(scene)
    assert called()


@pytest.mark.pitfall("F7")
def test_a_name_with_a_server_is_the_users_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust.closed_network("a.tif")
    for name in ("zip://a.zip!a.tif", "VRT://a.tif?bands=1", "vrt://vrt://a.tif"):
        assert trust.closed_network(name)
    assert not trust.closed_network("s3://bucket/a.tif")
    assert not trust.closed_network("a.tif")  # read beside the other one: GDAL's settings are those of a process
    monkeypatch.setattr(trust, "_asked_servers", False)
    monkeypatch.setenv("VFMSEG_TRUST", "1")
    assert not trust.closed_network("a.tif")


@pytest.mark.parametrize("before", ["PNG JPEG", "PNG,JPEG"])
@pytest.mark.pitfall("F7")
def test_drivers_that_a_user_skips_stay_skipped(monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    monkeypatch.setenv("GDAL_SKIP", before)
    trust.close_services()
    assert os.environ["GDAL_SKIP"].startswith("PNG,JPEG,WMS,")


@pytest.mark.pitfall("F7")
def test_commands_have_no_drivers_of_services() -> None:
    code = (
        "from vfmseg.geo.trust import close_services; close_services(); import rasterio\n"
        "import pyogrio; pyogrio.list_drivers()\n"
        "with rasterio.Env() as env: print(*sorted({'WMS', 'HTTP', 'WCS', 'GIF', 'GTiff'} & set(env.drivers())))"
    )
    for settings, left in (({}, "GIF GTiff"), ({"GDAL_SKIP": "GIF"}, "GTiff"), ({"VFMSEG_TRUST": "1"}, None)):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == (left or "GIF GTiff HTTP WCS WMS")
        assert "GDAL_SKIP" in settings or done.stderr == ""


@pytest.mark.parametrize("how", ["absolute", "above", "link", "nested", "device"])
@pytest.mark.pitfall("F7")
def test_bytes_of_files_elsewhere_are_no_pixels(tmp_path: Path, how: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(256)) * 32)
    scene = tmp_path / "place" / "scene.tif"
    scene.parent.mkdir()
    (scene.parent / "link").symlink_to(secret)
    names = {"absolute": str(secret), "above": "../secret", "link": "link", "device": "/dev/zero"}
    if how == "nested":
        (scene.parent / "inner.tif").write_text(raw("../secret"))
        scene.write_text(vrt("inner.tif"))
    else:
        scene.write_text(raw(names[how], relative=0 if how in ("absolute", "device") else 1))
    with pytest.raises(DataError, match="is a device" if how == "device" else "outside of its folder.*VFMSEG_TRUST=1"):
        use(scene)


BESIDE = ("scene.tif.MSK", "Scene.tif.msk", "of a tile", "archive", "tile in an archive", "DIMAP")


@pytest.mark.parametrize("how", BESIDE)
@pytest.mark.pitfall("F7")
def test_nor_by_files_that_are_found_beside_a_scene(tmp_path: Path, how: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(256)) * 32)
    scene = picture(tmp_path / "place" / "scene.tif")
    flag = '<Metadata><MDI key="INTERNAL_MASK_FLAGS_1">2</MDI></Metadata><VRTRasterBand'
    mask = "<!-- -->" + raw(str(secret), 0).replace("UInt16", "Byte").replace("<VRTRasterBand", flag, 1)
    if "archive" in how:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(scene, "a.tif")
            archive.writestr("a.tif.msk", mask)
        inside = f"/vsizip/{tmp_path}/a.zip/a.tif"
        scene.write_text(vrt(inside, 0))
        name = inside if how == "archive" else str(scene)
    elif how == "DIMAP":
        (scene.parent / "pixels.tif").write_text("<!-- -->" + raw("../secret"))
        scene.write_text(
            '<Dimap_Document name="a"><Metadata_Id><METADATA_FORMAT version="1.1">DIMAP</METADATA_FORMAT></Metadata_Id>'
            f"<Raster_Dimensions><NCOLS>{SIZE}</NCOLS><NROWS>{SIZE}</NROWS><NBANDS>1</NBANDS></Raster_Dimensions>"
            "<Data_Access><DATA_FILE_FORMAT>GEOTIFF</DATA_FILE_FORMAT><Data_File><DATA_FILE_PATH href='pixels.tif'/>"
            "</Data_File></Data_Access></Dimap_Document>"
        )
        name = str(scene)
    else:
        (scene.parent / ("scene.tif.Msk" if how == "of a tile" else how)).write_text(mask)
        name = str(scene)
        if how == "of a tile":
            name = str(tmp_path / "mosaic.vrt")
            (tmp_path / "mosaic.vrt").write_text(vrt("place/scene.tif"))
    with pytest.raises(DataError, match="VFMSEG_TRUST=1"):
        use(name)


@pytest.mark.pitfall("F7")
def test_raw_bands_beside_their_vrt_are_read(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.raw").write_bytes(PIXELS.tobytes())
    (tmp_path / "scene.vrt").write_text(raw("below/a.raw"))
    np.testing.assert_array_equal(use(tmp_path / "scene.vrt"), PIXELS)


@pytest.mark.parametrize("trusting", ["0", "1"])
@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.pitfall("F7")
def test_no_python_in_files_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: str, aside: bool) -> None:
    monkeypatch.setenv("GDAL_VRT_ENABLE_PYTHON", "YES")
    monkeypatch.setenv("VFMSEG_TRUST", trusting)
    picture(tmp_path / "a.tif")
    code = f"def f(i, o, *a, **k):\n    open({str(tmp_path / 'ran')!r}, 'w').close()\n    o[:] = i[0]\n"
    derived = (
        '<VRTRasterBand dataType="UInt16" band="1" subClass="VRTDerivedRasterBand"><PixelFunctionType>f'
        f"</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionCode><![CDATA[{code}]]>"
        "</PixelFunctionCode>"
    )
    plain = '<VRTRasterBand dataType="UInt16" band="1">'
    (tmp_path / "scene.vrt").write_text(vrt("a.tif").replace(plain, derived))
    errors: list[Exception] = []

    def work() -> None:
        try:
            use(tmp_path / "scene.vrt")
        except DataError as error:
            errors.append(error)

    if aside:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    assert not (tmp_path / "ran").exists()
    assert len(errors) == 1
    assert trusting == "1" or "Python code, which is never run" in str(errors[0])


PIPED: dict[str, Callable[[Path, Path], object]] = {
    "scene": lambda pipe, _: use(pipe),
    "labels": lambda pipe, _: LabelRaster(pipe, LabelMap((0, 1), 255)).grid,
    "mask": lambda pipe, home: use(pipe.rename(home / "plain.tif.msk").with_name("plain.tif")),
    "tile": lambda pipe, home: use(written(home / "m.vrt", vrt(pipe.name))),
    "raw band": lambda pipe, home: use(written(home / "m.vrt", raw(pipe.name))),
    "inside": lambda pipe, _: use(f'NETCDF:"{pipe}":band'),
    "area": lambda pipe, _: read_area(pipe, Grid(None, IDENTITY, 10, 10)),
    "recipe": lambda pipe, _: load(pipe),
    "list": lambda pipe, home: scenes(pipe.rename(home / "a.txt")),
    "STAC": lambda pipe, home: scenes(pipe.rename(home / "a.json")),
    "table": lambda pipe, _: table(pipe),
    "pattern": lambda pipe, _: find_files(str(pipe)),
    "segmenter": lambda pipe, home: segmenter(home, pipe.rename(home / "recipe.yaml")),
    "encoder": lambda pipe, home: encoder(home, pipe.rename(home / "model.safetensors")),
}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def load(path: Path) -> object:
    from vfmseg.recipe import load_recipe

    return load_recipe(path)


def scenes(path: Path) -> object:
    from vfmseg.inference.worklist import scenes_of

    return scenes_of(str(path))


def table(path: Path) -> object:
    from vfmseg.data.from_table import scenes_from_table

    return scenes_from_table(path, "train", "split", {"rgb": "image"}, "label", {}, LabelMap((0, 1), 255))


def find_files(entry: str) -> object:
    from vfmseg.data.pairing import find

    return find(entry, "data.train.rgb")


def segmenter(folder: Path, _: Path) -> object:
    from vfmseg.checkpoint.reading import load_segmenter

    (folder / "segmenter.json").write_text('{"format": 1}')
    return load_segmenter(folder)


def encoder(folder: Path, _: Path) -> object:
    from vfmseg.encoders.dinov2 import DINOV2
    from vfmseg.encoders.formats.transformers import load_published

    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    return load_published(DINOV2, str(folder), None)


@pytest.mark.parametrize("what", PIPED)
@pytest.mark.timeout(20)
@pytest.mark.pitfall("F7")
def test_a_pipe_is_refused_at_once(tmp_path: Path, what: str) -> None:
    picture(tmp_path / "plain.tif")
    os.mkfifo(tmp_path / "pipe.tif")
    with pytest.raises(VfmsegError, match="is a pipe, no regular file"):
        PIPED[what](tmp_path / "pipe.tif", tmp_path)


@pytest.mark.pitfall("F7")
def test_so_are_devices_and_sockets_whoever_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFMSEG_TRUST", "1")
    with pytest.raises(DataError, match="/dev/zero: is a device, no regular file"):
        use("/dev/zero")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.tif")
        with pytest.raises(DataError, match=r"s\.tif: is a socket"):
            use("s.tif")


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.pitfall("F7")
def test_other_formats_are_a_matter_of_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those whose headers name the file with the pixels: it could be any file."""
    profile = {"width": SIZE, "height": SIZE, "count": 1, "dtype": "uint16"}
    with rasterio.open(tmp_path / "scene.pix", "w", driver="PCIDSK", **profile) as file:
        file.write(PIXELS, 1)
    with pytest.raises(DataError, match=r"plain GDAL format; other formats.*VFMSEG_TRUST=1"):
        use(tmp_path / "scene.pix")
    monkeypatch.setenv("VFMSEG_TRUST", "1")
    np.testing.assert_array_equal(use(tmp_path / "scene.pix"), PIXELS)


@pytest.mark.parametrize(
    ("driver", "end"),
    [("PNG", "png"), ("JP2OpenJPEG", "jp2"), ("HFA", "img"), ("ENVI", "dat"), ("EHdr", "bil"), ("NITF", "ntf"),
     ("netCDF", "nc"), ("SAGA", "sdat"), ("GRIB", "grb2"), ("AAIGrid", "asc"), ("XYZ", "xyz"),
     ("COG", "tif"), ("VRT", "vrt")],
)  # fmt: skip
@pytest.mark.pitfall("F7")
def test_plain_formats_open_as_before(tmp_path: Path, driver: str, end: str) -> None:
    assert driver in PLAIN
    rasterio.shutil.copy(picture(tmp_path / "a.tif"), tmp_path / f"scene.{end}", driver=driver)
    with rasterio.open(tmp_path / f"scene.{end}") as file:
        expected = file.read(1)
    read = use(tmp_path / f"scene.{end}")
    np.testing.assert_array_equal(read, expected)
    (tmp_path / "m.vrt").write_text(vrt(f"scene.{end}"))
    np.testing.assert_array_equal(use(tmp_path / "m.vrt"), expected)


@pytest.mark.pitfall("F7")
def test_mosaics_of_files_anywhere_on_the_disk_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = picture(tmp_path / "far" / "a.tif")
    with zipfile.ZipFile(tmp_path / "far" / "a.zip", "w") as archive:
        archive.write(far, "in.tif")
    home = tmp_path / "home"
    home.mkdir()
    rasterio.shutil.copy(far, home / "a.nc", driver="netCDF")
    (home / "absolute.vrt").write_text(vrt(str(far), 0))
    (home / "above.vrt").write_text(vrt("../far/a.tif"))
    (home / "nested.vrt").write_text(vrt("above.vrt", kind="ComplexSource"))
    (home / "zipped.vrt").write_text(vrt(f"/vsizip/{tmp_path}/far/a.zip/in.tif", 0))
    (home / "inside.vrt").write_text(vrt(f"NETCDF:{home}/a.nc:Band1", 0))
    (home / "nested.vrt.aux.xml").write_text(overviews("above.vrt"))
    (tmp_path / "link.vrt").symlink_to(home / "nested.vrt")
    url = "<Metadata><MDI key='source_dataset'>https://x.org</MDI></Metadata><VRTRasterBand"
    (home / "described.vrt").write_text(vrt("../far/a.tif").replace("<VRTRasterBand", url, 1))
    for path in (*home.glob("*.vrt"), tmp_path / "link.vrt"):
        np.testing.assert_array_equal(use(path), PIXELS)
    for name in (
        f"vrt://{far}?bands=1",
        vrt(str(far), 0),
        f"NETCDF:{home}/a.nc:Band1",
        f"zip://{tmp_path}/far/a.zip!in.tif",
    ):
        np.testing.assert_array_equal(use(name), PIXELS)
    monkeypatch.chdir(home)
    np.testing.assert_array_equal(use("above.vrt"), PIXELS)


@pytest.mark.pitfall("F7")
def test_a_virtual_raster_in_an_archive_is_unpacked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.tif")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b.vrt", vrt(str(tmp_path / "a.tif"), 0))
    inside = f"/vsizip/{tmp_path}/a.zip/b.vrt"
    (tmp_path / "m.vrt").write_text(vrt(inside, 0))
    for name in (inside, f"zip://{tmp_path}/a.zip!b.vrt", str(tmp_path / "m.vrt")):
        with pytest.raises(DataError, match="VFMSEG_TRUST=1"):
            use(name)
    monkeypatch.setenv("VFMSEG_TRUST", "1")
    np.testing.assert_array_equal(use(inside), PIXELS)


KML = (
    '<?xml version="1.0"?><kml xmlns="http://www.opengis.net/kml/2.2"><Document><Placemark><Polygon><outerBoundaryIs>'
    "<LinearRing><coordinates>0,0 5,0 5,5 0,5 0,0</coordinates></LinearRing></outerBoundaryIs></Polygon></Placemark>"
    "</Document></kml>"
)


@pytest.mark.parametrize("name", ["area.vrt", "area.gpkg", "area.zip"])
@pytest.mark.pitfall("F7")
def test_areas_lead_to_no_other_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyogrio")
    (tmp_path / "secret.kml").write_text(KML)
    lead = (
        f'<OGRVRTDataSource><OGRVRTLayer name="a"><SrcDataSource>{tmp_path}/secret.kml</SrcDataSource>'
        "<SrcSQL>SELECT * FROM secret</SrcSQL></OGRVRTLayer></OGRVRTDataSource>"
    )
    if name.endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("area.kml", "<!-- " + lead + " -->" + lead)
    else:
        (tmp_path / name).write_text(lead)
    grid = Grid("OGC:CRS84", (1.0, 0.0, 0.0, 0.0, -1.0, 10.0), 10, 10)
    with pytest.raises(DataError, match=r"no plain vector file.*VFMSEG_TRUST=1"):
        read_area(tmp_path / name, grid)
    assert read_area(tmp_path / "secret.kml", grid).mask(Window(0, 0, 10, 10)).sum() == 25


@pytest.mark.pitfall("F7")
def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    command = [sys.executable, "-m", "vfmseg.cli", "finetune", str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"vfmseg: {tmp_path}/r.yaml: is a pipe, no regular file; copy what it gives to a file\n"


@pytest.mark.parametrize(
    "opens",
    [
        '<Metadata domain="GEOLOCATION"><MDI key="X_DATASET">{}</MDI></Metadata>',
        '<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{}</MDI></Metadata>',
        '<GDALWarpOptions><Transformer><Option key="RPC_DEM">{}</Option></Transformer></GDALWarpOptions>',
        '<ProcessingSteps><Step><Argument name="gain_dataset_filename_1">{}</Argument></Step></ProcessingSteps>',
        "<ProcessingSteps><Step><Argument><name>gain_dataset_filename_1</name>{}</Argument></Step></ProcessingSteps>",
        "<Input><SourceFilename>{}</SourceFilename></Input>",
        "<PansharpeningOptions><PanchroBand><SourceFilename>{}</SourceFilename></PanchroBand></PansharpeningOptions>",
        '<Group name="/"><Array name="a"><Source><SourceFilename>{}</SourceFilename></Source></Array></Group>',
    ],
)
@pytest.mark.pitfall("F7")
def test_every_name_in_a_virtual_raster_is_found(tmp_path: Path, opens: str) -> None:
    scene = tmp_path / "scene.vrt"
    scene.write_text(vrt("a.tif").replace("</VRTDataset>", opens.format("/vsis3/bucket/a.tif") + "</VRTDataset>"))
    with pytest.raises(DataError, match=r"names /vsis3/bucket/a\.tif, which lies behind a server"):
        use(scene)


@pytest.mark.pitfall("F7")
def test_a_chain_of_virtual_rasters_ends_in_one_message(tmp_path: Path) -> None:
    write_raster(tmp_path / "0.vrt", np.ones((4, 4), dtype=np.uint8))
    for number in range(1, 1500):
        (tmp_path / f"{number}.vrt").write_text(vrt(f"{number - 1}.vrt"))
    with pytest.raises(DataError, match="over a virtual raster, and so on without end"):
        use(tmp_path / "1499.vrt")


@pytest.mark.pitfall("F6")
def test_a_header_that_claims_huge_blocks_is_not_believed(tmp_path: Path) -> None:
    """A TIFF of 200 bytes whose only tile is of 2^31 px: GDAL would ask for 2 GiB at the first pixel."""
    entries = [(256, 4, 96), (257, 4, 96), (258, 3, 8), (259, 3, 1), (262, 3, 1), (277, 3, 1), (322, 4, 2**16),
               (323, 4, 2**15), (324, 4, 8), (325, 4, 100)]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    content = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + b"\0" * 4
    (tmp_path / "a.tif").write_bytes(content.ljust(200, b"\0"))
    with pytest.raises(DataError, match="claims blocks of 32768 x 65536 px in a file of 200 bytes"):
        use(tmp_path / "a.tif")
