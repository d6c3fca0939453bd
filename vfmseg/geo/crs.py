"""Coordinate reference systems as text: whether two mean the same ground, and what one is called."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rasterio.crs import CRS


def same_ground(one: str, two: str) -> bool:
    """Whether x and y mean the same place in both systems; what they say of heights is not looked at."""
    return one == two or bool(_horizontal(one) == _horizontal(two))


def short_name(crs: str | None) -> str:
    """A system for messages: its code, or the name in its WKT, which may fill a page."""
    if crs is None:
        return "no CRS"
    named = re.match(r'\s*\w+\s*\[\s*"([^"]+)"', crs)
    return named[1] if named else crs


@lru_cache
def _horizontal(crs: str) -> CRS:
    """The system without its heights: of a compound one its first part, of a system of three axes the first two."""
    from rasterio.crs import CRS  # only for the rare case of one system written in two ways
    from rasterio.errors import CRSError

    system = CRS.from_user_input(crs)
    try:
        facts = system.to_dict(projjson=True)
        if facts.get("type") == "CompoundCRS":
            return CRS.from_user_input(json.dumps(facts["components"][0]))
        axes = facts.get("coordinate_system", {}).get("axis", [])
        if len(axes) != 3 or facts["type"] != "GeographicCRS":
            return system
        facts["coordinate_system"]["axis"] = axes[:2]
        facts.pop("id", None)
        return CRS.from_user_input(json.dumps(facts))
    except CRSError:  # a system of a building site has no such form
        return system
