"""Masks of hidden patches: exact in number, new at each draw, the same for the same draw, of the form they name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from vfmseg.data.image import Image
from vfmseg.data.masks import Masking, MaskKind, block_mask, hidden_count, incomplete_mask, random_mask
from vfmseg.data.sample import Sample, collate
from vfmseg.data.windows import Purpose, rng
from vfmseg.errors import DataError, RecipeError

KINDS: tuple[MaskKind, ...] = ("random", "block", "incomplete")


def sample_of(height: int, width: int) -> Sample:
    return Sample({"rgb": Image(torch.zeros(3, height, width), torch.ones(height, width, dtype=torch.bool))}, None)


def drawn(kind: MaskKind, epoch: int, index: int, ratio: float = 0.6, seed: int = 1, side: int = 112) -> Sample:
    return Masking(kind, ratio, 8)(sample_of(side, side - 16), rng(Purpose.MASK, seed, epoch, index))


@pytest.mark.pitfall("K1")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99])
def test_every_mask_hides_exactly_the_same_number(kind: MaskKind, ratio: float) -> None:
    for index in range(20):
        mask = drawn(kind, 0, index, ratio).mask
        assert mask is not None
        assert mask.shape == (14, 12)
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == round(ratio * 14 * 12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("C26", "P57", "K1")
def test_each_draw_has_a_mask_of_its_own_and_the_same_when_drawn_again(kind: MaskKind) -> None:
    draws = [(seed, epoch, index) for seed in (1, 2) for epoch in (0, 1) for index in range(5)]
    one, two = ([drawn(kind, epoch, index, seed=seed) for seed, epoch, index in draws] for _ in range(2))
    for field in ("mask", "pixel_mask") if kind == "incomplete" else ("mask",):
        first, again = ([getattr(sample, field) for sample in samples] for samples in (one, two))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert len({mask.numpy().tobytes() for mask in first}) == len(draws)


@pytest.mark.parametrize("kind", ["random", "incomplete"])
@pytest.mark.pitfall("K10")
def test_each_patch_is_hidden_as_often_and_no_pair_goes_together(kind: MaskKind) -> None:
    """Of 4000 draws as a run makes them, one after the other: any shortcut of a pattern or a generator would show."""
    rows, columns, patches = 4, 4, 16
    masks = np.stack(
        [Masking(kind, 0.75, 4)(sample_of(16, 16), rng(Purpose.MASK, 1, i // 1000, i % 1000)).mask for i in range(4000)]
    ).reshape(-1, rows * columns)
    count = 12
    share = count / patches
    assert np.abs(masks.mean(axis=0) - share).max() < 4 * math.sqrt(share * (1 - share) / len(masks))
    both = (masks[:, :, None] & masks[:, None]).mean(axis=0)[~np.eye(patches, dtype=bool)]
    pair = share * (count - 1) / (patches - 1)
    assert np.abs(both - pair).max() < 4.5 * math.sqrt(pair * (1 - pair) / len(masks))  # 120 pairs
    # nor does a draw tell of the next one, whatever they share: seeds in a row, epochs in a row
    after = (masks[1:, :, None] & masks[:-1, None]).mean(axis=0)
    assert np.abs(after - share**2).max() < 4.8 * math.sqrt(share**2 * (1 - share**2) / len(masks))  # 256 pairs


@pytest.mark.pitfall("K10", "K12")
def test_each_pixel_of_a_hidden_patch_is_hidden_as_often_and_no_pair_goes_together() -> None:
    draws, every = np.random.default_rng(0), np.ones((1, 1), dtype=bool)
    pixels = np.stack([incomplete_mask(every, 4, 0.6, draws).ravel() for _ in range(4000)])
    share, pair = 10 / 16, 10 / 16 * 9 / 15
    assert np.abs(pixels.mean(axis=0) - share).max() < 4 * math.sqrt(share * (1 - share) / len(pixels))
    both = (pixels[:, :, None] & pixels[:, None]).mean(axis=0)[~np.eye(16, dtype=bool)]
    assert np.abs(both - pair).max() < 4.5 * math.sqrt(pair * (1 - pair) / len(pixels))


def alike(mask: np.ndarray) -> float:
    """Share of the neighbouring pairs of patches of which both or none is hidden."""
    pairs = [mask[1:] == mask[:-1], mask[:, 1:] == mask[:, :-1]]
    return float(np.concatenate([pair.ravel() for pair in pairs]).mean())


@pytest.mark.pitfall("K11")
def test_hidden_patches_of_blocks_lie_together() -> None:
    draws = np.random.default_rng(0)
    blocks, single = (
        [alike(Masking(kind, 0.5, 8)(sample_of(112, 112), draws).mask.numpy()) for _ in range(50)]
        for kind in ("block", "random")
    )
    assert min(blocks) > max(single)
    assert np.mean(blocks) > 0.75


@pytest.mark.pitfall("K11")
def test_the_pieces_of_blocks_are_larger_than_those_of_single_patches() -> None:
    """The largest connected piece holds two thirds of what blocks hide, and a sixth of what is drawn one by one."""
    draws = np.random.default_rng(0)
    largest = {
        kind: np.mean(
            [largest_piece(Masking(kind, 0.3, 8)(sample_of(112, 112), draws).mask.numpy()) for _ in range(50)]
        )  # type: ignore[union-attr]
        for kind in ("block", "random")
    }
    assert largest["block"] > 2 * largest["random"]


def largest_piece(mask: np.ndarray) -> float:
    """Share of the hidden patches that lies in the largest connected piece."""
    numbers, count = label(mask)
    return float(np.bincount(numbers[mask], minlength=count + 1).max() / mask.sum())


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (1, 9), (9, 1), (2, 2), (3, 7)])
def test_blocks_of_small_grids_are_exact_too(rows: int, columns: int) -> None:
    draws = np.random.default_rng(0)
    for count in range(1, rows * columns):
        assert block_mask(rows, columns, count, draws).sum() == count


@pytest.mark.pitfall("K11", "K10")
def test_blocks_hide_every_patch_as_often() -> None:
    draws = np.random.default_rng(0)
    often = np.mean([block_mask(8, 8, 32, draws) for _ in range(1000)], axis=0)
    assert np.abs(often - 0.5).max() < 4 * math.sqrt(0.25 / 1000)


@pytest.mark.pitfall("K12")
@pytest.mark.parametrize(("patch", "inside"), [(14, 0.6), (32, 0.6), (16, 1.0), (8, 0.01)])
def test_an_incomplete_mask_hides_so_many_pixels_of_each_hidden_patch(patch: int, inside: float) -> None:
    draws = np.random.default_rng(0)
    mask = random_mask(4, 5, 12, draws)
    pixels = incomplete_mask(mask, patch, inside, draws)
    each = pixels.reshape(4, patch, 5, patch).sum(axis=(1, 3))
    assert (each == np.where(mask, math.ceil(inside * patch * patch), 0)).all()
    if inside == 0.6:
        cut = [pixels[r * patch :, c * patch :][:patch, :patch].tobytes() for r, c in np.argwhere(mask)]
        assert len(set(cut)) == 12


@pytest.mark.pitfall("K12")
def test_a_small_object_vanishes_below_whole_patches_and_not_below_incomplete_ones() -> None:
    """8 x 8 pixels inside one patch of 32: it loses all its pixels in 60 % of the masks, or in 0.6 * 0.6^64 of them."""
    draws = np.random.default_rng(0)
    whole = incomplete = 0
    for _ in range(300):
        mask = random_mask(4, 4, 10, draws)
        whole += mask[1, 2]
        incomplete += incomplete_mask(mask, 32, 0.6, draws)[40:48, 72:80].all()
    assert abs(whole / 300 - 10 / 16) < 4 * math.sqrt(10 / 16 * 6 / 16 / 300)
    assert incomplete == 0


def test_patches_reach_beyond_sides_that_are_no_multiple_of_them() -> None:
    sample = Masking("incomplete", 0.5, 14)(sample_of(50, 70), np.random.default_rng(0))
    assert sample.mask is not None
    assert sample.pixel_mask is not None
    assert sample.mask.shape == (4, 5)
    assert sample.pixel_mask.shape == (50, 70)
    covered = sample.mask.repeat_interleave(14, 0).repeat_interleave(14, 1)[:50, :70]
    assert not (sample.pixel_mask & ~covered).any()


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99, 0.01, -0.5, 1.5, math.nan, math.inf])
def test_a_ratio_that_hides_or_leaves_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(RecipeError, match=r"mask ratio = .* hides \d+ of the 16 patches; .*try 0.75"):
        hidden_count(ratio, 16, "patches")


@pytest.mark.pitfall("F19")
def test_the_ratio_that_is_advised_hides_some_and_leaves_some() -> None:
    for total in range(2, 20):
        with pytest.raises(RecipeError) as caught:
            hidden_count(0.999, total, "patches")
        assert 0 < hidden_count(float(str(caught.value).rpartition("try ")[2]), total, "patches") < total
    with pytest.raises(RecipeError, match=r"hides 1 of the 1 bands of dem; .*takes two or more"):
        hidden_count(0.999, 1, "bands of dem")


@pytest.mark.parametrize("inside", [0.0, -1.0, 1.1])
def test_a_share_inside_that_is_none_is_refused(inside: float) -> None:
    with pytest.raises(RecipeError, match="inside"):
        Masking("incomplete", 0.5, 8, inside)(sample_of(32, 32), np.random.default_rng(0))


def test_masks_are_stacked_moved_and_asked_of_every_sample() -> None:
    samples = [drawn("incomplete", 0, index) for index in range(3)]
    batch = collate(samples)
    assert batch.mask is not None
    assert batch.pixel_mask is not None
    assert torch.equal(batch.mask, torch.stack([sample.mask for sample in samples if sample.mask is not None]))
    moved = batch.to("meta")
    assert moved.mask is not None
    assert moved.pixel_mask is not None
    assert (moved.mask.device.type, moved.pixel_mask.shape) == ("meta", (3, 112, 96))
    assert collate([sample_of(112, 96)]).mask is None
    with pytest.raises(DataError, match="1 of 2 samples of one batch have a mask"):
        collate([samples[0], sample_of(112, 96)])
    odd = Masking("random", 0.5, 16)(sample_of(112, 96), np.random.default_rng(0))
    with pytest.raises(DataError, match="all of one size"):
        collate([drawn("random", 0, 0), odd])


@pytest.mark.pitfall("C26")
def test_a_spectral_mask_hides_whole_bands_of_each_modality_and_no_patches() -> None:
    valid = torch.ones(16, 16, dtype=torch.bool)
    cube = Sample({n: Image(torch.zeros(c, 16, 16), valid) for n, c in (("cube", 40), ("rgb", 3))}, None)
    drawn = [Masking("spectral", 0.7, 8)(cube, rng(Purpose.MASK, 1, 0, index)) for index in range(20)]
    again = Masking("spectral", 0.7, 8)(cube, rng(Purpose.MASK, 1, 0, 3))
    assert all(sample.mask is None and sample.pixel_mask is None for sample in drawn)
    assert {(int(s.band_mask["cube"].sum()), int(s.band_mask["rgb"].sum())) for s in drawn} == {(28, 2)}
    assert len({sample.band_mask["cube"].numpy().tobytes() for sample in drawn}) == 20
    assert torch.equal(again.band_mask["cube"], drawn[3].band_mask["cube"])
    batch = collate(drawn).to("meta")
    assert {name: (tuple(m.shape), m.device.type) for name, m in batch.band_mask.items()} == {
        "cube": ((20, 40), "meta"),
        "rgb": ((20, 3), "meta"),
    }
    with pytest.raises(DataError, match="19 of 20 samples"):
        collate([*drawn[:19], cube])
    with pytest.raises(RecipeError, match="hides 0 of the 3 bands of rgb"):
        Masking("spectral", 0.1, 8)(cube, np.random.default_rng(0))
