"""Augmentation: one geometry for everything, labels never mixed, nodata never spread, no global randomness."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vfmseg.data.augment import Augment, Radiometry
from vfmseg.data.image import Image
from vfmseg.data.sample import Sample
from vfmseg.errors import DataError
from vfmseg.geo.classes import IGNORE

SIZE = 64
GEOMETRIES = {
    "flip": Augment(flip=True, rotate90=False),
    "rotate90": Augment(flip=False, rotate90=True),
    "both": Augment(),
    "scale": Augment(flip=False, rotate90=False, scale=(0.6, 1.7)),
    "rotate": Augment(flip=False, rotate90=False, rotate=45.0),
    "all": Augment(scale=(0.6, 1.7), rotate=45.0),
}


def board(height: int = SIZE, width: int = SIZE, cell: int = 12) -> torch.Tensor:
    """Classes 1 and 3 in a pattern without any symmetry."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    black = ((y // cell + x // cell) % 2 == 0) ^ ((y < height // 3) & (x < width // 4))
    return torch.where(black, 3, 1)


def sample(height: int = SIZE, width: int = SIZE) -> Sample:
    """Both modalities show the labels: optical as 100 times the class in three bands, dem as the class itself."""
    labels = board(height, width)
    images = {
        "optical": Image(labels.expand(3, -1, -1) * 80.0, torch.ones(height, width, dtype=torch.bool)),
        "dem": Image(labels[None].float(), torch.ones(height, width, dtype=torch.bool)),
    }
    return Sample(images, labels)


def repaint(one: Sample, name: str, pixels: torch.Tensor, valid: torch.Tensor | None = None) -> None:
    """Give a modality other pixels, and another mask if one is given."""
    one.images[name] = Image(pixels, one.images[name].valid if valid is None else valid)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.pitfall("C43")
def test_checkerboards_stay_registered_with_the_labels(name: str) -> None:
    changed = 0
    for seed in range(12):
        out = GEOMETRIES[name](sample(), seed)
        changed += not torch.equal(out.labels, sample().labels)
        for image, unit in ((out.images["optical"].pixels, 80.0), (out.images["dem"].pixels, 1.0)):
            shown = image[0] / unit
            valid = out.images["dem"].valid & (out.labels != IGNORE)
            assert valid.float().mean() > 0.3
            # wherever a pixel was not mixed from two cells, it shows its label
            pure = valid & (((shown - 1).abs() < 1e-3) | ((shown - 3).abs() < 1e-3))
            assert pure.sum() > 0.6 * valid.sum()
            assert (shown.round()[pure] == out.labels[pure]).all()
        assert torch.equal(out.images["optical"].valid, out.images["dem"].valid)
    assert changed >= 4


@pytest.mark.pitfall("C43")
def test_pixels_mixed_by_resampling_follow_the_label_within_a_pixel() -> None:
    # a shift of half a pixel between image and labels would make far more than the cell borders disagree
    for seed in range(6):
        out = Augment(scale=(0.8, 1.4), rotate=30.0)(sample(), seed)
        valid = out.images["dem"].valid & (out.labels != IGNORE)
        agree = (out.images["dem"].pixels[0] > 2) == (out.labels == 3)
        assert agree[valid].float().mean() > 0.985


def test_flips_and_quarter_turns_reach_all_eight_orientations() -> None:
    labels = board()
    turned = [torch.rot90(mirrored, k) for mirrored in (labels, labels.flip(-1)) for k in range(4)]
    seen = {next(i for i, t in enumerate(turned) if torch.equal(t, Augment()(sample(), s).labels)) for s in range(80)}
    assert seen == set(range(8))


def test_without_quarter_turns_only_mirrors_and_tiles_that_are_not_square_keep_their_shape() -> None:
    labels = board(40, 64)
    allowed = [labels, labels.flip(0), labels.flip(1), labels.flip(0, 1)]
    for augment in (GEOMETRIES["flip"], GEOMETRIES["both"]):
        seen = set()
        for seed in range(40):
            out = augment(sample(40, 64), seed)
            seen.add(next(i for i, one in enumerate(allowed) if torch.equal(one, out.labels)))
            assert out.images["optical"].pixels.shape == (3, 40, 64)
        assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.pitfall("P27")
def test_no_label_appears_that_was_not_there(name: str) -> None:
    for seed in range(20):
        out = GEOMETRIES[name](sample(), seed)
        assert set(out.labels.unique().tolist()) <= {1, 3, IGNORE}
        assert out.labels.dtype == torch.int64


@pytest.mark.pitfall("P28")
def test_corners_become_ignore_and_invalid_never_class_0() -> None:
    whole = sample()
    whole.labels = torch.zeros(SIZE, SIZE, dtype=torch.int64)  # class 0 everywhere: a fill of 0 would not show
    whole.labels[:] = 1
    filled = 0
    for seed in range(10):
        out = Augment(flip=False, rotate90=False, scale=(0.5, 0.9), rotate=45.0)(whole, seed)
        assert set(out.labels.unique().tolist()) == {1, IGNORE}
        outside = out.labels == IGNORE
        filled += int(outside.sum())
        # validity is resampled too, so that at most the rim of one pixel differs
        assert (out.images["dem"].valid != ~outside).float().mean() < 0.02
        assert (out.images["optical"].pixels[:, ~out.images["optical"].valid] == 0).all()
        assert outside[0, 0]
    assert filled > 1000


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.pitfall("P26")
def test_nodata_never_mixes_into_a_valid_pixel(name: str) -> None:
    one = sample()
    hole = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.3
    repaint(one, "dem", torch.where(hole, 0.0, 500.0)[None].clone(), ~hole)
    for seed in range(10):
        out = GEOMETRIES[name](one, seed)
        valid = out.images["dem"].valid
        assert valid.any()
        assert (~valid).any()
        assert torch.allclose(
            out.images["dem"].pixels[0][valid], torch.tensor(500.0)
        )  # not darkened by the zeros beside it
        assert (out.images["dem"].pixels[0][~valid] == 0).all()
        assert out.images["optical"].pixels.sum() > 0


def test_radiometry_changes_only_its_modality() -> None:
    before = sample()
    augment = Augment(
        flip=False, rotate90=False, radiometry={"optical": Radiometry(0.3, 0.3)}, value_range={"optical": 255.0}
    )
    after = augment(before, 3)
    assert torch.equal(after.images["dem"].pixels, before.images["dem"].pixels)
    assert torch.equal(after.labels, before.labels)
    assert not torch.equal(after.images["optical"].pixels, before.images["optical"].pixels)
    assert torch.equal(
        before.images["optical"].pixels, sample().images["optical"].pixels
    )  # the sample given is not written to


def test_radiometry_of_8_bit_images_stays_in_0_to_255() -> None:
    one = sample()
    repaint(one, "optical", torch.linspace(0, 255, SIZE * SIZE * 3).reshape(3, SIZE, SIZE))
    augment = Augment(radiometry={"optical": Radiometry(0.9, 0.9, 0.9, 0.5)}, value_range={"optical": 255.0})
    highest = 0.0
    for seed in range(20):
        image = augment(one, seed).images["optical"].pixels
        assert image.min() >= 0
        assert image.max() <= 255
        highest = max(highest, float(image.max()))
    assert highest == 255
    # where the range is not known, nothing is clipped: 16-bit values and decibels keep their size
    repaint(one, "optical", one.images["optical"].pixels * 100 - 3000)
    free = (
        Augment(flip=False, rotate90=False, radiometry={"optical": Radiometry(0.0, 0.5)})(one, 0)
        .images["optical"]
        .pixels
    )
    assert free.max() > 10000
    assert free.min() < -1000


@pytest.mark.pitfall("P26")
def test_radiometry_measures_valid_pixels_only_and_leaves_the_others_0() -> None:
    one = sample()
    one.images["optical"].valid[:, :48] = False
    one.images["optical"].pixels[:, :, :48] = 0
    one.images["optical"].pixels[:, :, 48:] = 200.0
    augment = Augment(flip=False, rotate90=False, radiometry={"optical": Radiometry(contrast=0.9)})
    for seed in range(5):
        image = augment(one, seed).images["optical"].pixels
        assert (image[:, :, :48] == 0).all()
        # all valid pixels are alike: contrast about *their* mean changes nothing
        assert torch.allclose(image[:, :, 48:], torch.tensor(200.0))


def test_colour_changes_do_what_their_names_say() -> None:
    one = sample()
    repaint(one, "optical", torch.stack([torch.full((SIZE, SIZE), v) for v in (200.0, 100.0, 50.0)]))
    still = {"flip": False, "rotate90": False}

    def change(changes: Radiometry, seed: int = 1, top: float = 255.0) -> torch.Tensor:
        augment = Augment(**still, radiometry={"optical": changes}, value_range={"optical": top})
        return augment(one, seed).images["optical"].pixels[:, 0, 0]

    base = one.images["optical"].pixels[:, 0, 0]
    brighter = change(Radiometry(brightness=0.2))
    assert torch.allclose(brighter / base, (brighter / base)[0].expand(3))
    assert not torch.allclose(brighter, base)
    grey = torch.tensor([0.2989, 0.587, 0.114]) @ base
    saturated = change(Radiometry(saturation=0.5))
    share = (saturated - grey) / (base - grey)
    assert torch.allclose(share, share[0].expand(3), atol=1e-3)
    hue = change(Radiometry(hue=0.5))
    assert hue.max() == pytest.approx(200, abs=0.1)
    assert hue.min() == pytest.approx(50, abs=0.1)
    assert not torch.allclose(hue, base, atol=5)
    # the same turn of the colours in other units
    repaint(one, "optical", one.images["optical"].pixels / 255.0)
    assert torch.allclose(change(Radiometry(hue=0.5), top=0.0) * 255.0, hue, atol=0.05)


def test_saturation_of_other_than_three_bands_is_refused() -> None:
    with pytest.raises(DataError, match=r"dem: .*3 bands .* 1 are read; remove .*train\.augment\.radiometry\.dem"):
        Augment(radiometry={"dem": Radiometry(saturation=0.1)})(sample(), 0)


@pytest.mark.pitfall("P57")
def test_the_seed_alone_decides_and_global_states_are_left_alone() -> None:
    augment = Augment(scale=(0.7, 1.4), rotate=20.0, radiometry={"optical": Radiometry(0.2, 0.2, 0.2, 0.1)})
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    first = augment(sample(), 5)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate()
    torch.rand(7), np.random.rand(7), random.random()
    again, other = augment(sample(), 5), augment(sample(), 6)
    assert torch.equal(first.images["optical"].pixels, again.images["optical"].pixels)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)


def test_switching_one_change_on_leaves_the_others_as_they_were() -> None:
    plain = Augment()
    coloured = Augment(radiometry={"optical": Radiometry(brightness=0.2)})
    assert all(torch.equal(plain(sample(), s).labels, coloured(sample(), s).labels) for s in range(8))


def test_nothing_is_resampled_while_scale_and_rotate_are_off() -> None:
    """Each pixel keeps its bits and goes where its label goes; numbers and size are such that resampling would show."""
    size, large = 61, 2**25  # float32 holds no odd number beyond 2**24
    rough = torch.randn(1, size, size, generator=torch.Generator().manual_seed(5))
    one = sample(size, size)
    repaint(one, "dem", rough)
    one.labels = torch.arange(large, large + size * size).reshape(size, size)
    seen = set()
    for seed in range(16):
        out = Augment()(one, seed)
        assert out.labels is not None
        places = out.labels.flatten() - large
        assert sorted(places.tolist()) == list(range(size * size))
        assert torch.equal(out.images["dem"].pixels.flatten(), rough.flatten()[places])
        seen.add(int(places[0]))
    assert len(seen) == 4
    turned = Augment(flip=False, rotate90=False, rotate=5.0)(one, 0)
    assert not torch.isin(turned.images["dem"].pixels[turned.images["dem"].valid[None]], rough).all()
