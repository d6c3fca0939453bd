"""Ground that scenes share."""

from __future__ import annotations

import numpy as np
import pytest

from vfmseg.geo.footprints import ground_shared
from vfmseg.geo.grid import IDENTITY, Grid


def grid(x: float, y: float, side: int = 100, crs: str | None = "EPSG:32633", pixel: float = 10.0) -> Grid:
    return Grid(crs, (pixel, 0.0, x, 0.0, -pixel, y), side, side)


@pytest.mark.pitfall("P48")
def test_the_largest_share_and_whose_it_is() -> None:
    of = [grid(500000, 5000000), grid(500500, 5000000), grid(700000, 5000000)]
    nowhere, apart = Grid(None, IDENTITY, 100, 100), grid(600000, 5100000)
    by = [nowhere, grid(499100, 5000000), apart, grid(500250, 4999500)]
    shares, which = ground_shared(of, by)
    np.testing.assert_allclose(shares, [0.75 * 0.5, 0.75 * 0.5, 0.0])
    assert which.tolist() == [3, 3, -1]
    shares, which = ground_shared(by, of)
    np.testing.assert_allclose(shares, [0.0, 0.1, 0.0, 0.75 * 0.5])
    assert which.tolist()[:3] == [-1, 0, -1]


@pytest.mark.pitfall("P48")
def test_a_small_scene_inside_a_large_one_is_wholly_in_it() -> None:
    large, small = grid(500000, 5000000, 1000), grid(503000, 4996000, 50)
    assert ground_shared([small], [large])[0] == pytest.approx([1.0])
    assert ground_shared([large], [small])[0] == pytest.approx([0.0025])


@pytest.mark.pitfall("P48")
def test_another_reference_system_hides_nothing() -> None:
    here = grid(500000, 5000000)  # 15 degrees east, 45.15 north
    degrees = Grid("EPSG:4326", (1e-4, 0.0, 14.99, 0.0, -1e-4, 45.17), 300, 300)
    assert ground_shared([here], [degrees])[0] == pytest.approx([1.0], abs=1e-6)
    beyond = Grid("EPSG:4326", (1e-4, 0.0, 16.0, 0.0, -1e-4, 45.17), 300, 300)
    assert ground_shared([here], [beyond])[0].tolist() == [0.0]


def test_scenes_without_a_place_share_nothing() -> None:
    nowhere = Grid(None, IDENTITY, 100, 100)
    shares, which = ground_shared([nowhere, grid(0, 0)], [nowhere])
    assert shares.tolist() == [0, 0]
    assert which.tolist() == [-1, -1]
