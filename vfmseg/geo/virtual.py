"""Every name in a virtual raster (VRT) that GDAL would open or run, read from its XML without opening anything.

GDAL reads XML in its own way: case does not count, an attribute is as good as an element, and of several pieces of text
one is the value. Where it might read other names than are found here, the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from xml.etree import ElementTree

MARK = re.compile(rb"<\s*VRTDataset", re.IGNORECASE)
"""What tells a virtual raster by its first bytes."""

# <SourceFilename>, <SourceDataset>, <MDI key="X_DATASET">, options such as RPC_DEM; but not <VRTDataset> itself
_OPENED = re.compile(r"filename|^(?!vrt).*dataset|rpc_dem|dempath|cutlineds|^pixelfunctionlanguage$")
"""Elements and keys whose text is opened, or run."""

_KEYS = ("key", "name")
"""What says in <MDI key="X_DATASET"> and <Argument name="gain_dataset_filename_1"> that their text is opened."""

# of metadata these alone are opened: other keys, such as "dataset_name", are words of whoever made the file
_METADATA = ("x_dataset", "y_dataset", "overview_file")

_UNCLEAR = re.compile(
    r"<!DOCTYPE|<!ENTITY|<[^<>]*(?:filename|dataset|overview_file)[^<>]*>[^<]*<!\[CDATA", re.IGNORECASE
)


@dataclass(frozen=True)
class Named:
    """One name in a virtual raster: of a raster, of a file whose bytes are pixels (raw), or of a language (code)."""

    text: str
    raw: bool = False
    code: bool = False


def names_in(content: bytes) -> set[Named]:
    """Every name in the XML of a virtual raster, each once; ValueError if it is not clear what GDAL would open."""
    text = content.decode("utf-8-sig")
    if "<!" in text and _UNCLEAR.search(text):
        raise ValueError("it defines entities, or breaks up names")
    try:
        builder = ElementTree.TreeBuilder(insert_comments=True, insert_pis=True)
        root = ElementTree.fromstring(text.strip(), ElementTree.XMLParser(target=builder))
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from None
    found = set()
    for parent in root.iter():
        for element in parent:
            for name, value, band in _opened_by(element, parent):
                if value and value.strip():
                    raw = name == "sourcefilename" and _plain(band.tag) == "vrtrasterband"
                    found.add(Named(value.strip(), raw, code=name == "pixelfunctionlanguage"))
    return found


def _opened_by(
    element: ElementTree.Element, parent: ElementTree.Element
) -> Iterator[tuple[str, str | None, ElementTree.Element]]:
    """(name, text, what it belongs to) of what an element or one of its attributes opens."""
    opened = _opened(element.tag)
    for key, value in element.attrib.items():
        if _opened(key):
            yield _plain(key), value, element
        elif _plain(key) in _KEYS:  # most metadata are words that nobody opens
            opened = opened or (value.lower() in _METADATA if _plain(element.tag) == "mdi" else _opened(value))
    if opened:
        yield from ((_plain(element.tag), text, parent) for text in _texts(element))
    elif _plain(element.tag) in _KEYS and _opened(element.text):
        yield from ((_plain(parent.tag), text, parent) for text in _texts(parent))


def _texts(element: ElementTree.Element) -> tuple[str | None, ...]:
    return element.text, *(child.tail for child in element)


@lru_cache
def _opened(name: object) -> bool:
    return _OPENED.search(_plain(name)) is not None


@lru_cache
def _plain(name: object) -> str:
    """A name in small letters without its namespace; nothing for a comment, which is named by a function."""
    return name.rpartition("}")[2].lower() if isinstance(name, str) else ""
