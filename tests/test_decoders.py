from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.decoders.build import DECODERS, WITH_WIDTH, build_decoder
from vfmseg.decoders.pyramid import LEVELS, add_downwards, enlarge, group_norm, halve, maps_of_level, on_one_grid
from vfmseg.decoders.upernet import PooledContext
from vfmseg.encoders.tokens import Features as EncoderFeatures
from vfmseg.errors import RecipeError
from vfmseg.metrics import Confusion
from vfmseg.training.losses import cross_entropy, dice

EVERY = sorted(DECODERS)
FINER = {"linear": 1, "fpn": 4, "upernet": 4}  # cells of the logits along one cell of the features


def make_decoder(name: str, maps: int = 3, depth: int = 12, classes: int = 3) -> nn.Module:
    return build_decoder(name, (depth,) * maps, (14.0,) * maps, classes, 16 if name in WITH_WIDTH else None)


def Features(maps: tuple[torch.Tensor, ...], strides: tuple[float, ...]) -> EncoderFeatures:
    """Maps of which every cell was seen."""
    return EncoderFeatures(maps, tuple(torch.ones_like(one[:, 0]) for one in maps), strides)


def make_features(size: tuple[int, int], maps: int = 3, depth: int = 12, batch: int = 2) -> Features:
    return Features(tuple(torch.randn(batch, depth, *size) for _ in range(maps)), (14.0,) * maps)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (8, 8), (9, 14)])
@pytest.mark.pitfall("C37")
def test_any_token_grid_is_answered_on_the_ground_it_covers(name: str, size: tuple[int, int]) -> None:
    decoder = make_decoder(name)
    logits = decoder(make_features(size))
    assert logits.shape == (2, 3, size[0] * FINER[name], size[1] * FINER[name])
    assert torch.isfinite(logits).all()
    assert decoder.stride == 14.0 / FINER[name]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("maps", [1, 2, 3, 4, 5, 7])
@pytest.mark.pitfall("C8")
def test_every_parameter_and_every_map_is_used(name: str, maps: int) -> None:
    decoder = make_decoder(name, maps)
    features = Features(tuple(x.requires_grad_() for x in make_features((5, 6), maps).maps), (14.0,) * maps)
    decoder(features).square().sum().backward()
    unused = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in features.maps)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P7")
def test_no_running_statistics_and_no_buffers(name: str) -> None:
    decoder = make_decoder(name)
    assert not [m for m in decoder.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert list(decoder.buffers()) == []
    before = copy.deepcopy(decoder.state_dict())
    decoder.train()(make_features((6, 6)))
    assert all(torch.equal(before[n], t) for n, t in decoder.state_dict().items())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P8")
def test_training_mode_changes_no_answer(name: str) -> None:
    decoder, features = make_decoder(name), make_features((6, 7))
    assert torch.equal(decoder.train()(features), decoder.eval()(features))
    assert decoder.train() is decoder


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("C35", "P58")
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    decoder, features = make_decoder(name), make_features((6, 7), batch=3)
    whole = decoder(features)
    for i in range(3):
        one = decoder(Features(tuple(x[i : i + 1] for x in features.maps), features.strides))
        torch.testing.assert_close(one, whole[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P60")
def test_half_precision_gives_nearly_the_same_map(name: str) -> None:
    decoder, features = make_decoder(name), make_features((8, 8))
    full = decoder(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = decoder(features).float()
    assert torch.isfinite(half).all()
    assert (half - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.pitfall("P6")
def test_a_saved_decoder_answers_alike_and_loads_strictly(name: str) -> None:
    decoder, other, features = make_decoder(name), make_decoder(name), make_features((5, 5))
    assert not torch.equal(decoder(features), other(features))
    other.load_state_dict(decoder.state_dict(), strict=True)
    assert torch.equal(decoder(features), other(features))


def test_linear_looks_at_one_cell_alone() -> None:
    decoder, features = make_decoder("linear"), make_features((6, 7))
    changed = Features(tuple(x.clone() for x in features.maps), features.strides)
    changed.maps[1][:, :, 2, 3] += 1
    moved = (decoder(features) != decoder(changed)).any(dim=1)
    assert moved[:, 2, 3].all()
    assert moved.sum() == len(moved)


def test_maps_of_other_sizes_are_brought_to_the_first_grid() -> None:
    ramp = torch.linspace(0, 1, 8).reshape(1, 1, 1, 8).expand(1, 1, 8, 8)
    coarse = F.avg_pool2d(ramp, 2)
    first, second = on_one_grid([ramp, coarse])
    assert first is ramp
    assert (first - second).abs()[..., 1:-1].max() < 1e-6
    for name in EVERY:
        features = Features((torch.randn(2, 12, 8, 8), torch.randn(2, 12, 4, 4)), (14.0, 28.0))
        assert make_decoder(name, 2)(features).shape[-2:] == (8 * FINER[name], 8 * FINER[name])


@pytest.mark.parametrize("size", [7, 8, 13])
@pytest.mark.pitfall("P19")
def test_halving_and_enlarging_keeps_every_cell_in_its_place(size: int) -> None:
    """Going to the coarse level and back must not stretch an odd map: a slope comes back as the same slope."""
    ramp = torch.arange(size, dtype=torch.float64).reshape(1, 1, 1, size).expand(1, 1, size, size)
    half = halve(ramp)
    back = enlarge(half, ramp.shape[-2:])
    assert back.shape == ramp.shape
    inner = slice(1, size - 2)  # the borders are flat, as bilinear enlarging leaves them
    assert (back - ramp)[..., inner].abs().max() < 1e-9


@pytest.mark.pitfall("P45")
def test_halving_takes_nothing_from_beyond_the_edge() -> None:
    for size in ((7, 8), (1, 1), (5, 3)):
        assert torch.equal(halve(torch.ones(1, 2, *size)), torch.ones(1, 2, -(-size[0] // 2), -(-size[1] // 2)))


@pytest.mark.pitfall("P7")
def test_groups_hold_at_least_eight_channels_and_not_many_more() -> None:
    """A channel alone on a small grid would be normalised to next to nothing; a single group would mix them all."""
    for channels in range(1, 300):
        norm = group_norm(channels)
        x = torch.randn(1, channels, 1, 3)
        # a group is what changes with its first channel
        changed = x.clone()
        changed[:, 0] += 5 * torch.randn(1, 3)
        moved = int((norm(changed) != norm(x)).any(dim=-1).sum())
        assert moved == channels if channels < 16 else moved >= 8
        if channels % 8 == 0:
            assert moved <= max(8, channels // 8)
            assert moved == 8 or channels > 128


@pytest.mark.parametrize("name", sorted(WITH_WIDTH))
@pytest.mark.pitfall("P19")
def test_a_decoder_that_mirrors_its_input_mirrors_its_answer(name: str) -> None:
    """Every step treats left and right alike, so the place of an answer cannot drift to one side.

    The transposed convolutions are made symmetric first: learned, they may prefer a side.
    """
    decoder, features = make_decoder(name), make_features((6, 8))
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data = (module.weight.data + module.weight.data.flip(-1)) / 2
    mirrored = Features(tuple(x.flip(-1) for x in features.maps), features.strides)
    torch.testing.assert_close(decoder(mirrored), decoder(features).flip(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("maps", range(1, 10))
def test_levels_take_shallow_maps_for_fine_and_deep_ones_for_coarse(maps: int) -> None:
    chosen = [maps_of_level(maps, level) for level in range(LEVELS)]
    assert sorted({i for level in chosen for i in level}) == list(range(maps))
    assert all(max(fine) <= min(coarse) for fine, coarse in itertools.pairwise(chosen))


def test_the_top_down_path_adds_every_coarser_level() -> None:
    levels = [torch.full((1, 1, s, s), v) for s, v in ((14, 1.0), (7, 10.0), (4, 100.0))]
    assert [float(x.min()) for x in add_downwards(levels)] == [111.0, 110.0, 100.0]
    assert [float(x.max()) for x in add_downwards(levels)] == [111.0, 110.0, 100.0]


def test_the_context_of_a_tile_is_the_mean_of_its_cells() -> None:
    """Read off the grid of a single cell alone, a difference that leaves the mean does not show."""
    context = PooledContext(16)
    kernel = context.join[0].weight  # (16, 16 + 4 * 4, 3, 3): the map itself, then the grids of 1, 2, 3 and 6 cells
    with torch.no_grad():
        kernel[:, :16] = 0
        kernel[:, 20:] = 0
    x = torch.randn(1, 16, 6, 7)
    balanced = torch.randn_like(x)
    balanced -= balanced.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(context(x + balanced), context(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(context(x + torch.randn(1, 16, 1, 1)), context(x), atol=1e-3)


@pytest.mark.parametrize("name", sorted(WITH_WIDTH))
def test_the_finest_level_hears_of_the_deepest_map_through_the_top_down_path(name: str) -> None:
    decoder = make_decoder(name, maps=4)
    last = decoder.classify if name == "fpn" else decoder.join
    for coarser in list(last)[1:]:  # type: ignore[arg-type]
        nn.init.zeros_(coarser.weight)  # the answer is read off the finest level alone, which the first map feeds
    features = Features(tuple(x.requires_grad_() for x in make_features((6, 7), 4).maps), (14.0,) * 4)
    decoder(features).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in features.maps)


def textured_tiles(cell: int) -> tuple[Tensor, Tensor]:
    """Four tiles of 64 px: images (4, 3, 64, 64) of three noisy stripe patterns, labels on cells of `cell` px.

    The three classes share mean colour, so only their texture tells them apart.
    """
    rng = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 3, (4, 8, 8), generator=rng).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels = blocks.roll((cell, 2 * cell), dims=(1, 2))  # edges on cells of the answer, not on tokens
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    patterns = torch.stack([(y // 2 % 2), (x // 2 % 2), ((x + y) // 2 % 2)]).float()  # (3, 64, 64)
    texture = patterns[:, None].expand(3, 4, 64, 64).gather(0, labels[None])[0]
    return texture[:, None] + 0.1 * torch.randn(4, 3, 64, 64, generator=rng), labels


@pytest.mark.parametrize("name", EVERY)
def test_every_decoder_overfits_four_textured_tiles(name: str) -> None:
    patch = 8
    cell = patch // FINER[name]
    images, labels = textured_tiles(cell)
    truth = labels[:, ::cell, ::cell]  # on the grid that the decoder answers on
    # a stand-in encoder that loses nothing: each token holds the pixels of its patch, differently mixed in each map
    tokens = F.pixel_unshuffle(images, patch)  # (4, 192, 8, 8)
    mixes = [nn.init.orthogonal_(torch.empty(192, 192)) for _ in range(3)]
    features = Features(tuple(torch.einsum("bchw,dc->bdhw", tokens, m) for m in mixes), (float(patch),) * 3)
    decoder = build_decoder(name, (192,) * 3, features.strides, 3, 32 if name in WITH_WIDTH else None)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        logits = decoder(features)
        loss = cross_entropy(logits, truth) / truth.numel() + dice(logits, truth) / len(truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    confusion = Confusion(3)
    confusion.update(decoder(features).argmax(1), truth)
    assert confusion.scores(("a", "b", "c"))["miou"] > 0.98


def test_width_is_what_the_recipe_says_and_128_otherwise() -> None:
    narrow, standard = (build_decoder("fpn", (12,), (16.0,), 2, width) for width in (16, None))
    assert narrow.classify[0].in_channels == 16
    assert standard.classify[0].in_channels == 128


def test_bad_arguments_are_refused_with_a_remedy() -> None:
    with pytest.raises(RecipeError, match=r"model\.decoder\.name = upnet .*'upernet'"):
        build_decoder("upnet", (12,), (16.0,), 2)
    with pytest.raises(RecipeError, match=r"model\.decoder\.channels = 64 .*linear; leave it out"):
        build_decoder("linear", (12,), (16.0,), 2, 64)
    with pytest.raises(RecipeError, match=r"model\.decoder\.channels = 4; .*at least 8; try 128"):
        build_decoder("fpn", (12,), (16.0,), 2, 4)
    with pytest.raises(ValueError, match="2 channels and 1 strides"):
        build_decoder("linear", (12, 12), (16.0,), 2)
