"""Which scenes are labelled, and where their labels go: nothing is left out or written over in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vfmseg.errors import DataError
from vfmseg.inference.worklist import IMAGES, scenes_of, targets_for


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(found: list[str] | None, folder: Path) -> list[str]:
    assert found is not None
    return [Path(path).relative_to(folder).as_posix() for path in found]


# --- one scene, folder, pattern -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    ["/vsicurl/http://127.0.0.1/a*.tif", "https://x.org/a.tif?sig=*", "s3://b/[a].tif", "none.tif", "a", "x.SAFE"],
)
def test_one_scene_is_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a", "x.SAFE/manifest.safe")
    assert scenes_of(given) is None


def test_a_file_whose_name_looks_like_a_pattern_is_one_scene(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].tif", "a1.tif")
    assert scenes_of(str(tmp_path / "a[1].tif")) is None


def test_a_folder_gives_its_images_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.TIF", "a.tif", "c.jp2", "d.png", "e.vrt", "notes.md", "a.tif.aux.xml", "sub/f.tif", "._a.tif")
    assert names(scenes_of(str(tmp_path)), tmp_path) == ["a.tif", "b.TIF", "c.jp2", "d.png", "e.vrt"]


def test_a_pattern_gives_what_matches_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "q/b_1.tif", "q/a_1.tif", "q/a_2.tif", "q/deep/c_1.tif")
    assert names(scenes_of(str(tmp_path / "q" / "*_1.tif")), tmp_path) == ["q/a_1.tif", "q/b_1.tif"]
    assert names(scenes_of(str(tmp_path / "q" / "**" / "*_1.tif")), tmp_path) == [
        "q/a_1.tif",
        "q/b_1.tif",
        "q/deep/c_1.tif",
    ]
    assert names(scenes_of(str(tmp_path / "q" / "a_[2-9].tif")), tmp_path) == ["q/a_2.tif"]
    monkeypatch.chdir(tmp_path)
    assert scenes_of("q/a_?.tif") == ["q/a_1.tif", "q/a_2.tif"]


# --- text -----------------------------------------------------------------------------------------------------


def test_a_text_list_is_read_from_its_own_folder(tmp_path: Path) -> None:
    text = (
        "# of Monday\r\n\r\na.tif\r\n  sub/Fluß.tif  \r\n/abs/c.tif\r\n/vsicurl/http://x/d.tif\r\nhttps://x/e.tif\r\n"
    )
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "monday.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    folder = tmp_path / "lists"
    assert scenes_of(str(folder / "monday.txt")) == [
        str(folder / "a.tif"),
        str(folder / "sub" / "Fluß.tif"),
        "/abs/c.tif",
        "/vsicurl/http://x/d.tif",
        "https://x/e.tif",
    ]


def test_a_first_line_after_a_byte_order_mark_is_a_path_or_a_comment(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbf# comment\nb.tif\n")
    assert scenes_of(str(tmp_path / "l.txt")) == [str(tmp_path / "b.tif")]


# --- STAC -----------------------------------------------------------------------------------------------------


def item(name: str, **assets: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": None, "assets": assets}


TIFF = "image/tiff; application=geotiff; profile=cloud-optimized"


def stac(folder: Path, content: Any, name: str = "items.json", bom: bytes = b"") -> str:
    (folder / name).write_bytes(bom + json.dumps(content).encode())
    return str(folder / name)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("name", ["item.json", "item.geojson"])
def test_a_stac_item_gives_the_asset_with_the_role_data(tmp_path: Path, name: str, bom: bytes) -> None:
    content = item(
        "one",
        thumbnail={"href": "./t.png", "type": "image/png", "roles": ["thumbnail"]},
        overview={"href": "./o.tif", "type": TIFF, "roles": ["overview", "data"]},
        metadata={"href": "./m.xml", "type": "application/xml", "roles": ["data"]},
        mask={"href": "./mask.tif", "type": TIFF},
        visual={"href": "./img/v.tif", "type": TIFF, "roles": ["data", "visual"]},
    )
    assert names(scenes_of(stac(tmp_path, content, name, bom)), tmp_path) == ["img/v.tif"]


def test_a_stac_collection_gives_one_image_of_each_item(tmp_path: Path) -> None:
    far = "https://x.org/b.tif?sig=a%2Fb"
    content = {
        "type": "FeatureCollection",
        "features": [
            item(
                "a", meta={"href": "m.json"}, thumb={"href": "t.jpg", "roles": ["thumbnail"]}, image={"href": "a.tif"}
            ),
            item("b", image={"href": far, "type": TIFF, "roles": None}),
            item("c", image={"href": "/abs/c.jp2", "type": "image/jp2"}, second={"href": "d.tif", "type": TIFF}),
        ],
    }
    assert scenes_of(stac(tmp_path, content)) == [str(tmp_path / "a.tif"), far, "/abs/c.jp2"]


@pytest.mark.pitfall("P62")
def test_an_item_without_an_image_is_named_never_left_out(tmp_path: Path) -> None:
    content = {
        "type": "FeatureCollection",
        "features": [item("a", i={"href": "a.tif"}), item("b", m={"href": "m.xml"})],
    }
    with pytest.raises(DataError, match=r"items\.json: item 'b' .*\['m'\].*leave the item out"):
        scenes_of(stac(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [
        [],
        "x",
        {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": None}]},
        {"type": "FeatureCollection", "features": 3},
        {"type": "Feature", "assets": ["a.tif"]},
        {"type": "Feature", "assets": {"a": "a.tif"}},
        {"assets": {}},
    ],
    ids=["list", "text", "polygons", "number", "assets a list", "asset a text", "no type"],
)
def test_json_that_is_no_stac_is_named(tmp_path: Path, content: Any) -> None:
    with pytest.raises(DataError, match=r"items\.json: .*STAC item.*\.txt"):
        scenes_of(stac(tmp_path, content))


# --- nothing --------------------------------------------------------------------------------------------------


@pytest.mark.pitfall("P62")
def test_empty_lists_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "empty/readme.md")
    (tmp_path / "none.txt").write_text("# nothing\n\n")
    (tmp_path / "latin.txt").write_bytes("Fluß.tif".encode("utf-16"))
    (tmp_path / "half.json").write_text('{"type": "Feat')
    for given, message in {
        str(tmp_path / "empty"): r"empty: .*no image \(\.tif",
        str(tmp_path / "none.txt"): r"none\.txt: .*one path a line",
        str(tmp_path / "latin.txt"): r"latin\.txt: .*one path a line, in UTF-8",
        str(tmp_path / "gone.txt"): r"gone\.txt: .*No such file",
        str(tmp_path / "*.jp2"): r"\*\.jp2: .*check the pattern",
        stac(tmp_path, {"type": "FeatureCollection", "features": []}): r"items\.json: .*no item .*image",
        str(tmp_path / "half.json"): r"half\.json: .*STAC item.*check the file",
        str(tmp_path / "gone.json"): r"gone\.json: .*No such file",
    }.items():
        with pytest.raises(DataError, match=message):
            scenes_of(given)
    assert ".tif" in IMAGES


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "in/a.tif", "~nobody-here.tif")
    assert names(scenes_of("~/in"), tmp_path) == names(scenes_of("~/in/*.tif"), tmp_path) == ["in/a.tif"]
    (tmp_path / "list.txt").write_text("~/in/a.tif\nin/a.tif\n")
    assert names(scenes_of(str(tmp_path / "list.txt")), tmp_path) == ["in/a.tif"] * 2
    monkeypatch.chdir(tmp_path)
    assert scenes_of("~nobody-here.tif") is None


# --- targets --------------------------------------------------------------------------------------------------


def test_targets_are_named_after_their_scenes(tmp_path: Path) -> None:
    scenes = ["q/a.tif", "/x/b.v2.jp2", "https://x.org/c.tif?sig=a/b.d", "/vsizip/z.zip/inside/e.png"]
    assert [t.name for t in targets_for(scenes, tmp_path)] == ["a.tif", "b.v2.tif", "c.tif", "e.tif"]
    assert {t.parent for t in targets_for(scenes, tmp_path)} == {tmp_path}


@pytest.mark.pitfall("P63")
def test_a_list_is_not_written_into_a_folder_called_like_a_file(tmp_path: Path) -> None:
    for name in ("lab.tif", "lab.TIFF"):
        with pytest.raises(DataError, match=rf"{name}: 2 scenes .*folder; name one"):
            targets_for(["q/a.tif", "q/b.tif"], tmp_path / name)
    (tmp_path / "lab.tif").mkdir()
    assert targets_for(["q/a.tif"], tmp_path / "lab.tif") == [tmp_path / "lab.tif" / "a.tif"]


@pytest.mark.pitfall("P63")
def test_two_scenes_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q/a\.tif and r/a\.jp2 .*/a\.tif; .*two folders"):
        targets_for(["q/a.tif", "q/b.tif", "r/a.jp2"], tmp_path)


@pytest.mark.pitfall("P63")
def test_labels_never_replace_their_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "q/a.tif")
    (tmp_path / "link").symlink_to("q")
    for scene, folder in (("q/a.tif", "q"), ("q/../q/a.tif", "q"), (str(tmp_path / "q" / "a.tif"), "link")):
        with pytest.raises(DataError, match=r"a\.tif: .*another output folder"):
            targets_for([scene], Path(folder))
    assert targets_for(["q/a.png"], Path("q")) == [Path("q/a.tif")]


@pytest.mark.pitfall("P63")
def test_labels_and_products_of_two_scenes_never_share_a_file(tmp_path: Path) -> None:
    scenes = ["in/a.tif", "in/a_confidence.tif"]
    assert len(targets_for(scenes, tmp_path)) == 2
    with pytest.raises(DataError, match=r"in/a\.tif and in/a_confidence\.tif .*/a_confidence\.tif; .*two folders"):
        targets_for(scenes, tmp_path, ["confidence"])
