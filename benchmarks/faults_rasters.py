"""Trials: scenes from strangers, which claim too much, reach further than their name, or are none.

Held: a scene is refused with exit code 2 or 3 and one message, within 10 s and 2 GiB. One that claims to be huge may
also be labelled, as long as that takes no memory: after 10 s it is stopped. No scene makes a request to a server, runs
code, or shows in a map what stands in another file.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from faults_bits import label
from faults_lab import QUICK, Ended, Trial, run, write_raster

BIG = 2**31 - 1
SECRET = bytes(range(33, 127)) * 32  # of a file that no scene may show

_VRT = '<VRTDataset rasterXSize="{w}" rasterYSize="{h}">{bands}</VRTDataset>'
_BAND = '<VRTRasterBand dataType="Byte" band="{n}">{inside}</VRTRasterBand>'
_SOURCE = (
    '<SimpleSource><SourceFilename relativeToVRT="{r}">{name}</SourceFilename><SourceBand>1</SourceBand>'
    '<SourceProperties RasterXSize="96" RasterYSize="96" DataType="Byte" BlockXSize="96" BlockYSize="8"/>'
    '<SrcRect xOff="0" yOff="0" xSize="96" ySize="96"/>'
    '<DstRect xOff="0" yOff="0" xSize="96" ySize="96"/></SimpleSource>'
)
_RAW = (
    '<VRTRasterBand dataType="Byte" band="{n}" subClass="VRTRawRasterBand">'
    '<SourceFilename relativetoVRT="{r}">{name}</SourceFilename><ImageOffset>0</ImageOffset>'
    "<PixelOffset>1</PixelOffset><LineOffset>32</LineOffset></VRTRasterBand>"
)
_FUNCTION = (
    '<VRTRasterBand dataType="Byte" band="{n}" subClass="VRTDerivedRasterBand"><PixelFunctionType>f</PixelFunctionType>'
    "<PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionCode><![CDATA[\n"
    "def f(in_ar, out_ar, *rest):\n    open('ran', 'w')\n    out_ar[:] = 1\n]]></PixelFunctionCode>{inside}"
    "</VRTRasterBand>"
)
_WMS = (
    '<GDAL_WMS><Service name="TMS"><ServerUrl>http://{host}/${{z}}/${{x}}/${{y}}.png</ServerUrl></Service>'
    "<DataWindow><UpperLeftX>-20037508</UpperLeftX><UpperLeftY>20037508</UpperLeftY>"
    "<LowerRightX>20037508</LowerRightX><LowerRightY>-20037508</LowerRightY><TileLevel>0</TileLevel>"
    "<TileCountX>1</TileCountX><TileCountY>1</TileCountY><YOrigin>top</YOrigin></DataWindow>"
    "<Projection>EPSG:3857</Projection><BlockSizeX>96</BlockSizeX><BlockSizeY>96</BlockSizeY>"
    "<BandsCount>3</BandsCount><Timeout>2</Timeout></GDAL_WMS>"
)
_WCS = "<WCS_GDAL><ServiceURL>http://{host}/wcs?</ServiceURL><CoverageName>x</CoverageName></WCS_GDAL>"
_STAC = (
    '{{"type": "FeatureCollection", "features": [{{"type": "Feature", "stac_version": "1.0.0", "properties": {{}}, '
    '"geometry": null, "links": [], "assets": {{"x": {{"href": "http://{host}/a.tif", '
    '"proj:epsg": 32633, "proj:shape": [96, 96], "proj:transform": [10, 0, 500000, 0, -10, 5000000]}}}}}}]}}'
)


def rasters(lab: Path) -> Iterator[Trial]:
    """Of all kinds."""
    checkpoint = lab / "lora" / "run" / "best"

    def trial(name: str, make: Callable[[Path], object], claims: bool = False, file: str = "scene.tif") -> Trial:
        return Trial(f"a scene that is {name}", _tried(lab, checkpoint, make, claims, file))

    for width, height in ((BIG, 1), (1, BIG), (BIG, 100), (BIG, BIG), (100_000, 10_000_000)):
        yield trial(f"a VRT of {width} x {height}", _text(_vrt(width, height, "")), claims=True)
    for width, height in ((BIG, 1), (1, BIG), (2_000_000, 2_000_000)):
        yield trial(f"a TIFF of {width} x {height}", _sparse(width, height), claims=True)
    yield trial("a VRT of 65,000 bands", _text(_vrt(96, 96, "", 65_000)), claims=True)
    yield trial("a TIFF with a block of 2^31 px", _huge_block)
    for name, text in {
        "a VRT over a server": _vrt(96, 96, _SOURCE.format(r=0, name="/vsicurl/http://{host}/a.tif")),
        "a VRT over a server, as streamed": _vrt(
            96, 96, _SOURCE.format(r=0, name="/vsicurl_streaming/http://{host}/a")
        ),
        "a VRT over an address": _vrt(96, 96, _SOURCE.format(r=0, name="http://{host}/a.tif")),
        "a VRT over a zip on a server": _vrt(
            96, 96, _SOURCE.format(r=0, name="/vsizip//vsicurl/http://{host}/a.zip/a")
        ),
        "a VRT over a WMS": _vrt(96, 96, _SOURCE.format(r=0, name="WMS:http://{host}/?")),
        "a raw band on a server": _vrt(
            32, 32, "", band=_RAW.replace("{r}", "0").replace("{name}", "/vsicurl/http://{host}/a")
        ),
        "a description of a WMS": _WMS,
        "a description of a WCS": _WCS,
        "a STAC collection": _STAC,
    }.items():
        yield Trial(f"a scene that is {name}", _asking(lab, checkpoint, text))
        inner = _vrt(96, 96, _SOURCE.format(r=1, name="inner.tif"))
        yield Trial(f"a VRT over a scene that is {name}", _asking(lab, checkpoint, text, inner))
    for suffix in (".msk", ".ovr", ".aux.xml"):
        text = _vrt(96, 96, _SOURCE.format(r=0, name="/vsicurl/http://{host}/a.tif"))
        yield Trial(f"a scene with a VRT over a server as its {suffix}", _asking(lab, checkpoint, text, suffix=suffix))
    for name in ("../secret.bin", "{here}/secret.bin", "link.bin", "/vsisubfile/0_3000,../secret.bin"):
        yield Trial(f"a raw band over {name}", _reading(lab, checkpoint, name))
    yield trial("a VRT with a function in Python", _function)
    yield trial("a VRT over itself", _text(_vrt(96, 96, _SOURCE.format(r=1, name="scene.tif"))))
    yield trial("a VRT over another over the first", _loop)
    yield trial("a chain of 2,000 VRTs", _chain)
    yield trial("a pipe", lambda here: os.mkfifo(here / "scene.tif"))
    yield trial("a VRT over a pipe", _over_pipe)
    yield trial("a socket", _socket)
    yield trial("a link to itself", lambda here: (here / "scene.tif").symlink_to(here / "scene.tif"))
    yield trial("an endless device", lambda here: (here / "scene.tif").symlink_to("/dev/zero"))
    yield trial("empty", _text(""))
    whole = (lab / "scene.tif").read_bytes()
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        yield trial(f"cut off after {share:.0%}", _bytes(whole[: int(share * len(whole))]))


def _tried(
    lab: Path, checkpoint: Path, make: Callable[[Path], object], claims: bool, file: str
) -> Callable[[Path], str]:
    def act(here: Path) -> str:
        make(here)
        ended = run(_label(checkpoint, here / file), here, patience=QUICK + 5)
        if (here / "ran").exists():
            return "code in a scene was run"
        return bounded(ended) if claims else ended.refusal()

    return act


def bounded(ended: Ended) -> str:
    """Empty if a command was refused, or was still at work, in little memory."""
    if ended.code in (0, -9):
        return ended.dear(seconds=math.inf)
    return ended.refusal()


def _label(checkpoint: Path, scene: Path) -> list[str]:
    command = label(checkpoint, scene.parent)
    return [command[0], command[1], str(scene), *command[3:]]


def _vrt(width: int, height: int, inside: str, bands: int = 3, band: str = _BAND) -> str:
    made = (band.replace("{n}", str(n)).replace("{inside}", inside) for n in range(1, bands + 1))
    return _VRT.format(w=width, h=height, bands="".join(made))


def _text(text: str) -> Callable[[Path], object]:
    return lambda here: (here / "scene.tif").write_text(text, encoding="utf-8")


def _bytes(data: bytes) -> Callable[[Path], object]:
    return lambda here: (here / "scene.tif").write_bytes(data)


def _sparse(width: int, height: int) -> Callable[[Path], object]:
    """A TIFF in some hundred bytes, whose only strip is as high as it and is not there."""

    def make(here: Path) -> None:
        # RowsPerStrip, StripOffsets, StripByteCounts
        _tiff(here / "scene.tif", width, height, [(278, 4, 1, height), (273, 4, 1, 0), (279, 4, 1, 0)])

    return make


def _huge_block(here: Path) -> None:
    # TileWidth, TileLength, TileOffsets, TileByteCounts
    _tiff(here / "scene.tif", 96, 96, [(322, 4, 1, 2**16), (323, 4, 1, 2**15), (324, 4, 1, 8), (325, 4, 1, 100)])


def _tiff(path: Path, width: int, height: int, layout: list[tuple[int, int, int, int]]) -> None:
    """A header that says RGB of 8 bits, and nothing after it. Entries are (tag, type, count, value), 3 is short."""
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, 3),
        (284, 3, 1, 1), *layout,
    ]  # fmt: skip
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    path.write_bytes((head + body).ljust(200, b"\0") + struct.pack("<3H", 8, 8, 8))


def _asking(lab: Path, checkpoint: Path, text: str, outer: str = "", suffix: str = "") -> Callable[[Path], str]:
    """A scene that would ask a server of this machine, which waits for somebody to come.

    outer: the scene, if `text` is what it stands on; suffix: of a file beside a plain scene that holds `text`.
    """

    def act(here: Path) -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:
            host = f"127.0.0.1:{server.getsockname()[1]}"
            inner = text.replace("{host}", host).replace("{{", "{").replace("}}", "}")
            (here / ("inner.tif" if outer else f"scene.tif{suffix}")).write_text(inner, encoding="utf-8")
            if suffix:
                shutil.copy(lab / "scene.tif", here / "scene.tif")
            if outer:
                (here / "scene.tif").write_text(outer, encoding="utf-8")
            ended = run(_label(checkpoint, here / "scene.tif"), here, patience=QUICK + 5)
            server.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                server.accept()[0].close()
                return f"it asked a server; then: {ended.tail}"
        return ended.dear() if suffix and ended.code == 0 else ended.refusal()

    return act


def _reading(lab: Path, checkpoint: Path, name: str) -> Callable[[Path], str]:
    """A scene whose bands are the bytes of a file outside of its folder; what the model makes of them tells too."""

    def act(here: Path) -> str:
        inside = here / "scenes"
        inside.mkdir()
        (here / "secret.bin").write_bytes(SECRET)
        (inside / "link.bin").symlink_to(here / "secret.bin")
        relative = "0" if name.startswith("{") else "1"
        raw = _RAW.replace("{r}", relative).replace("{name}", name.replace("{here}", str(here)))
        (inside / "scene.tif").write_text(_vrt(32, 32, "", band=raw), encoding="utf-8")
        return run(_label(checkpoint, inside / "scene.tif"), here).refusal()

    return act


def _function(here: Path) -> None:
    write_raster(here / "inner.tif", np.ones((1, 96, 96), np.uint8))
    source = _SOURCE.format(r=1, name="inner.tif")
    (here / "scene.tif").write_text(_vrt(96, 96, source, band=_FUNCTION), encoding="utf-8")


def _loop(here: Path) -> None:
    (here / "scene.tif").write_text(_vrt(96, 96, _SOURCE.format(r=1, name="other.vrt")), encoding="utf-8")
    (here / "other.vrt").write_text(_vrt(96, 96, _SOURCE.format(r=1, name="scene.tif")), encoding="utf-8")


def _chain(here: Path) -> None:
    for i in range(2_000):
        name = "scene.tif" if i == 0 else f"{i}.vrt"
        text = _vrt(96, 96, _SOURCE.format(r=1, name=f"{i + 1}.vrt"))
        (here / name).write_text(text, encoding="utf-8")


def _over_pipe(here: Path) -> None:
    os.mkfifo(here / "inner.tif")
    (here / "scene.tif").write_text(_vrt(96, 96, _SOURCE.format(r=1, name="inner.tif")), encoding="utf-8")


def _socket(here: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(here)  # the name of a socket may not be long
        made.bind("scene.tif")
        os.chdir(before)
