"""Test-time augmentation: what the model sees is turned, and what it answers is turned back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from makers import apart, tiles_of
from torch import Tensor
from torch.nn import functional as F

from vfmseg.data.given import open_scene
from vfmseg.geo.bands import Bands
from vfmseg.geo.grid import Window
from vfmseg.inference.contracts import Model, Tiles
from vfmseg.inference.engine import label_run
from vfmseg.inference.job import Arrays
from vfmseg.inference.plan import Plan
from vfmseg.inference.products import Products
from vfmseg.inference.reading import Stored
from vfmseg.inference.views import VIEWS, averaged
from vfmseg.inference.votes import filled_up


def pointwise(tiles: Tiles) -> Tensor:
    """A model that looks at one pixel, of both modalities, at a time; it hides what is invalid."""
    images, valid = apart(tiles)
    x, y = images["x"], images["y"]
    votes = torch.cat([x, y.sum(dim=1, keepdim=True), x - y[:, :1]], dim=1)
    return votes.softmax(dim=1) * valid["x"][:, None] + 0.5 * valid["y"][:, None]


def directed(tiles: Tiles) -> Tensor:
    """A model that looks to the right and a little up, and answers by place as well."""
    images, valid = apart(tiles)
    x = images["x"] * valid["x"][:, None]
    shifted = x.roll(-1, dims=-1) + 0.3 * x.roll(2, dims=-2)
    height, width = x.shape[-2:]
    place = torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 2, width) ** 2
    return torch.cat([shifted, x * place], dim=1)


def drawn(side: int = 12, count: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    images = {"x": torch.rand(count, 1, side, side), "y": torch.rand(count, 2, side, side)}
    return images, {name: torch.rand(count, side, side) > 0.2 for name in images}


@pytest.mark.parametrize("views", ["flips", "d4"])
def test_views_of_a_model_without_direction_change_nothing(views: str) -> None:
    images, valid = drawn()
    plain = pointwise(tiles_of(images, valid))
    torch.testing.assert_close(averaged(pointwise, views, (1.0,))(tiles_of(images, valid)), plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("views", "count"), [("flips", 4), ("d4", 8)])
def test_votes_are_the_mean_over_the_orbit(views: str, count: int) -> None:
    """Against all symmetries of the square written as index arithmetic."""
    images, valid = drawn()
    side = 12
    i, j = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    last = side - 1
    orbit = [(i, j), (last - i, j), (i, last - j), (last - i, last - j)]  # mirrored up-down, left-right, both
    if views == "d4":
        orbit += [(b, a) for a, b in orbit]
    assert len(orbit) == count == len(VIEWS[views]) == len(set(VIEWS[views]))
    total = torch.zeros(3, 2, side, side)
    for rows, cols in orbit:
        seen = {name: image[:, :, rows, cols] for name, image in images.items()}
        masks = {name: mask[:, rows, cols] for name, mask in valid.items()}
        answer = directed(tiles_of(seen, masks))
        back = torch.empty_like(answer)
        back[:, :, rows, cols] = answer
        total += back
    torch.testing.assert_close(
        averaged(directed, views, (1.0,))(tiles_of(images, valid)), total / count, atol=1e-6, rtol=0
    )
    assert (directed(tiles_of(images, valid)) - total / count).abs().max() > 0.1


@pytest.mark.parametrize("views", ["flips", "d4"])
@pytest.mark.pitfall("P26")
def test_masks_move_with_the_pixels(views: str) -> None:
    """In no view does a valid pixel hold the mark of an invalid one, or the other way round."""
    images, valid = drawn()
    for name, mask in valid.items():
        images[name] = torch.where(mask[:, None], 1.0, -1.0).expand_as(images[name]).clone()
    seen = 0

    def spy(tiles: Tiles) -> Tensor:
        turned, masks = apart(tiles)
        nonlocal seen
        seen += 1
        for name, mask in masks.items():
            assert mask.dtype == torch.bool
            assert torch.equal(turned[name][:, 0] > 0, mask)
        return turned["x"]

    averaged(spy, views, (1.0,))(tiles_of(images, valid))
    assert seen == len(VIEWS[views])


def test_no_views_give_the_predictor_itself() -> None:
    assert averaged(pointwise, "none", (1.0,)) is pointwise
    assert averaged(pointwise, "none", (0.5,)) is not pointwise
    assert averaged(pointwise, "flips", (1.0,)) is not pointwise


# --- scales -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", ["none", "d4"])
def test_scales_of_an_even_image_change_nothing(views: str) -> None:
    images, valid = drawn(count=1)
    images = {name: torch.full_like(image, 0.3) for name, image in images.items()}
    valid = {name: torch.ones_like(mask) for name, mask in valid.items()}
    shapes: list[tuple[int, ...]] = []

    def spy(tiles: Tiles) -> Tensor:
        seen, masks = apart(tiles)
        shapes.append((*seen["x"].shape[2:], *masks["x"].shape[1:]))
        assert all(mask.all() for mask in masks.values())
        return pointwise(tiles)

    answer = averaged(spy, views, (0.5, 1.0, 1.5))(tiles_of(images, valid))
    torch.testing.assert_close(answer, pointwise(tiles_of(images, valid)), atol=1e-6, rtol=0)
    assert set(shapes) == {(6,) * 4, (12,) * 4, (18,) * 4}


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.pitfall("P34")
def test_scales_do_not_move_the_answer(scale: float) -> None:
    """A slope stays where it is; a shift by half a pixel would be off by 0.5."""
    slope = torch.arange(24.0).expand(24, 24) + 3 * torch.arange(24.0)[:, None]
    images = {"x": slope[None, None]}
    valid = {"x": torch.ones(1, 24, 24, dtype=torch.bool)}
    answer = averaged(lambda tiles: tiles.images["x"].pixels, "none", (scale,))(tiles_of(images, valid))
    torch.testing.assert_close(answer[0, 0, 4:-4, 4:-4], slope[4:-4, 4:-4], atol=1e-4, rtol=0)


def test_votes_are_the_mean_over_views_and_scales() -> None:
    images, valid = drawn()
    valid = {name: torch.ones_like(mask) for name, mask in valid.items()}
    small = {name: F.interpolate(image, size=6, mode="bilinear", antialias=True) for name, image in images.items()}
    whole = {name: torch.ones(3, 6, 6, dtype=torch.bool) for name in images}
    one = averaged(directed, "d4", (1.0,))(tiles_of(images, valid))
    half = F.interpolate(averaged(directed, "d4", (1.0,))(tiles_of(small, whole)), size=12, mode="bilinear")
    torch.testing.assert_close(averaged(directed, "d4", (1.0, 0.5))(tiles_of(images, valid)), (one + half) / 2)


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0])
@pytest.mark.parametrize("fill", [1e6, float("nan"), float("inf")])
@pytest.mark.pitfall("P26")
def test_a_resized_pixel_holds_nothing_of_a_hole(scale: float, fill: float) -> None:
    """Pixels are 1, the hole is anything: whoever is marked as valid is 1, and others hold no number of the hole's."""
    valid = {"x": torch.ones(1, 16, 16, dtype=torch.bool)}
    valid["x"][0, 5:9, 9:12] = False
    images = {"x": torch.where(valid["x"][:, None], 1.0, fill)}

    def spy(tiles: Tiles) -> Tensor:
        seen, masks = apart(tiles)
        assert 0 < int((~masks["x"]).sum()) < masks["x"].numel() / 10
        torch.testing.assert_close(seen["x"], masks["x"][:, None].float())
        return seen["x"]

    averaged(spy, "none", (scale,))(tiles_of(images, valid))


@pytest.mark.parametrize("scale", [0.25, 0.5, 2.0])
@pytest.mark.pitfall("P26")
def test_stripes_of_nodata_leave_a_reduced_tile_to_look_at(scale: float) -> None:
    """With every fourth row missing, most of the ground is there at every scale."""
    valid = {"x": torch.ones(2, 32, 32, dtype=torch.bool)}
    valid["x"][:, ::4] = False
    images = {"x": torch.where(valid["x"][:, None], 7.0, 0.0)}
    share = []

    def spy(tiles: Tiles) -> Tensor:
        seen, masks = apart(tiles)
        share.append(masks["x"].float().mean().item())
        assert torch.equal(seen["x"][:, 0] > 6.9, masks["x"])
        return seen["x"]

    averaged(spy, "none", (scale,))(tiles_of(images, valid))
    assert min(share) > 0.7


@pytest.mark.pitfall("P26")
def test_a_view_that_shows_nothing_has_no_vote_beside_others() -> None:
    """One pixel of four in a row: half the size shows none of them. The other sample of the batch keeps both views."""
    valid = {name: torch.ones(2, 8, 8, dtype=torch.bool) for name in ("x", "y")}
    for mask in valid.values():
        mask[0] = False
        mask[0, ::4, ::4] = True
    images = {name: torch.ones(2, 1, 8, 8) for name in valid}

    def by_size(tiles: Tiles) -> Tensor:
        seen, _ = apart(tiles)
        return torch.full_like(seen["x"], float(seen["x"].shape[-1]))

    def mean(scales: tuple[float, ...]) -> list[float]:
        answer = averaged(by_size, "flips", scales)(tiles_of(images, valid))
        torch.testing.assert_close(answer, answer[:, :, :1, :1].expand_as(answer))
        return answer[:, 0, 0, 0].tolist()

    assert mean((1.0, 0.5)) == pytest.approx([8, 6], abs=1e-4)
    assert mean((0.5, 0.25)) == pytest.approx([3, 3], abs=1e-4)  # no view shows any of the first: all have a vote
    valid["y"][0] = True
    assert mean((1.0, 0.5)) == pytest.approx([6, 6], abs=1e-4)  # one modality is enough to see


def test_the_engine_labels_through_views() -> None:
    """Labels of a whole scene with d4 equal those without, for a model without direction."""
    array = np.random.default_rng(0).uniform(0, 1, (1, 50, 70)).astype(np.float32)
    array[0, 10:20, 30:40] = np.nan

    def vote(tiles: Tiles) -> Tensor:
        images, _ = apart(tiles)
        return torch.cat([images["x"], 1 - images["x"]], dim=1)

    labels = []
    for views in ("none", "d4"):
        sink, plan = Arrays(50, 70), Plan(50, 70, 16, 0.25, True, 2)
        scene = open_scene({"x": array}, {"x": Bands()})
        for run in plan.runs(plan.shards):
            model = Model(averaged(vote, views, (1.0,)), 2)
            label_run([scene], Stored((16, 16)), plan, run, model, "hann", Products((0, 1)), sink)
        labels.append(sink.kept["labels"][0])
    clear = np.abs(np.nan_to_num(array[0]) - 0.5) > 1e-5
    np.testing.assert_array_equal(labels[0][clear], labels[1][clear])
    hole = Window(10, 30, 10, 10)
    assert (labels[1][hole.rows, hole.cols] == 255).all()


def test_a_compiled_model_sees_one_batch_size() -> None:
    seen: list[tuple[int, int]] = []

    def spy(tiles: Tiles) -> Tensor:
        images, valid = apart(tiles)
        seen.append((len(images["x"]), int(valid["y"].flatten(1).any(dim=1).sum())))
        return pointwise(tiles)

    short, full = drawn(count=3), drawn(count=5)
    torch.testing.assert_close(filled_up(spy, 5)(tiles_of(*short)), pointwise(tiles_of(*short)), atol=0, rtol=0)
    torch.testing.assert_close(filled_up(spy, 5)(tiles_of(*full)), pointwise(tiles_of(*full)), atol=0, rtol=0)
    assert seen == [(5, 3), (5, 5)]
