"""Encoders: parity with transformers, any size, own normalisation, frozen, strict loading. Small random models."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from logging import Handler
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import (
    KINDS,
    NATIVE,
    PATCH,
    build,
    build_encoder,
    encoder_of,
    family,
    picture,
    save_all,
    upstream,
    vision_config,
    vision_part,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.catalog import FAMILIES
from vfmseg.encoders.backbone import quarter_points, sha256_of
from vfmseg.encoders.build import ENCODERS, build_backbone_from_config, config_of
from vfmseg.encoders.sam import resize_positions
from vfmseg.errors import CheckpointError, RecipeError


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("encoders"))


def normalised(images: Tensor, name: str) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in FAMILIES[name].statistics)
    return (images / 255 - mean) / std


def reference(kind: str, model: Any, pixels: Tensor, layer: int) -> Tensor:
    """The map of `layer` from transformers' own hidden states: prefix dropped, normed, (B, D, h, w)."""
    settings = {"interpolate_pos_encoding": True} if kind.startswith("clip") else {}
    with torch.no_grad():
        states = vision_part(kind, model)(pixels, output_hidden_states=True, **settings).hidden_states
        tokens = states[layer]
        if kind.startswith("sam"):
            return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6).permute(0, 3, 1, 2)
        if kind.startswith("clip"):
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        else:
            tokens = model.layernorm(tokens)
    tokens = tokens[:, 3 if kind == "registers" else 1 :]
    rows, columns = (side // PATCH[kind] for side in pixels.shape[-2:])
    return tokens.reshape(len(tokens), rows, columns, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("P20")
def test_maps_equal_hidden_states_of_transformers(folders: dict[str, Path], kind: str) -> None:
    """Wrong layer, a CLS or register token left in, another norm or normalisation: all differ by far more."""
    encoder = build(folders, kind, layers=[1, 3])
    images, valid = picture(NATIVE[kind], NATIVE[kind], batch=2)
    with torch.no_grad():
        features = encoder(images, valid)
    model = upstream(kind)
    assert features.strides == (PATCH[kind],) * 2
    for layer, found in zip([1, 3], features.maps, strict=True):
        expected = reference(kind, model, normalised(images, family(kind)), layer)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip"])
@pytest.mark.parametrize("cells", [(2, 5), (6, 3)])
@pytest.mark.pitfall("P17")
def test_other_sizes_equal_transformers(folders: dict[str, Path], kind: str, cells: tuple[int, int]) -> None:
    images, valid = picture(cells[0] * PATCH[kind], cells[1] * PATCH[kind])
    with torch.no_grad():
        found = build(folders, kind, layers=[3])(images, valid).maps[0]
    expected = reference(kind, upstream(kind), normalised(images, family(kind)), 3)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("cells", [3, 7])
@pytest.mark.pitfall("P17")
def test_sam_at_other_sizes_equals_a_sam_made_for_that_size(folders: dict[str, Path], cells: int) -> None:
    """Transformers' SAM takes its own size only: build one for the other size, its tables resized by hand."""
    side = 16 * cells
    model = upstream("sam-vision", image_size=side)
    source = upstream("sam-vision").state_dict()
    table = source["vision_encoder.pos_embed"].permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(cells, cells), mode="bicubic", antialias=True)
    source["vision_encoder.pos_embed"] = resized.permute(0, 2, 3, 1)
    for name in ("vision_encoder.layers.1.attn.rel_pos_h", "vision_encoder.layers.1.attn.rel_pos_w"):
        source[name] = F.interpolate(source[name].T[None], size=2 * cells - 1, mode="linear")[0].T
    model.load_state_dict(source)
    images, valid = picture(side, side)
    with torch.no_grad():
        found = build(folders, "sam-vision", layers=[3])(images, valid).maps[0]
    expected = reference("sam-vision", model, normalised(images, "sam"), 3)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(37, 101), (90, 33), (5, 9)])
@pytest.mark.pitfall("P17", "C37")
def test_any_height_and_width(folders: dict[str, Path], kind: str, height: int, width: int) -> None:
    encoder = build(folders, kind)
    with torch.no_grad():
        features = encoder(*picture(height, width))
    assert encoder.backbone.channels == (32,) * 3
    for found in features.maps:
        assert found.shape == (1, 32, -(-height // PATCH[kind]), -(-width // PATCH[kind]))
        assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip", "sam"])
@pytest.mark.pitfall("P18")
def test_position_tables_resize_to_the_exact_grid(folders: dict[str, Path], kind: str) -> None:
    encoder = build(folders, kind, layers=[1])
    patch = PATCH[kind]
    with torch.no_grad():
        for cells in range(1, 24):
            shape = encoder(*picture(cells * patch, (24 - cells) * patch)).maps[0].shape
            assert shape[-2:] == (cells, 24 - cells)


@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip", "sam"])
@pytest.mark.pitfall("P18")
def test_position_table_is_bit_equal_at_its_own_size(folders: dict[str, Path], kind: str) -> None:
    encoder = build(folders, kind, layers=[1])
    backbone: Any = encoder.backbone.network
    kernel: Any = backbone.get_submodule(encoder.backbone.family.patch_kernel)
    with torch.no_grad():
        kernel.weight.zero_()
        if kernel.bias is not None:
            kernel.bias.zero_()
        if kind == "clip":
            backbone.pre_layrnorm = nn.Identity()
            table = backbone.embeddings.position_embedding.weight[None, 1:]
        elif kind == "sam":
            table = backbone.vision_encoder.pos_embed.flatten(1, 2)
        else:
            table = backbone.embeddings.position_embeddings[:, 1:]
        tokens = encoder.backbone.family.embed(backbone, torch.zeros(1, 3, NATIVE[kind], NATIVE[kind]), None)
    assert torch.equal(tokens[:, encoder.backbone.prefix :], table)


@pytest.mark.pitfall("P18")
def test_table_turned_on_its_side_is_resized(folders: dict[str, Path]) -> None:
    """2 x 8 has as many cells as 4 x 4, but not the same places."""
    table = torch.randn(1, 4, 4, 8)
    assert resize_positions(table, (4, 4)) is table
    assert resize_positions(table, (2, 8)).shape == (1, 2, 8, 8)
    for kind in ("dinov2", "registers", "clip"):
        encoder = build(folders, kind, layers=[1])
        side = NATIVE[kind] // PATCH[kind]
        pixels = torch.zeros(1, 3, PATCH[kind], side * side * PATCH[kind])
        with torch.no_grad():
            long = encoder.backbone.family.embed(encoder.backbone.network, pixels, None)
            square = encoder.backbone.family.embed(
                encoder.backbone.network, torch.zeros(1, 3, NATIVE[kind], NATIVE[kind]), None
            )
        assert long.shape == square.shape
        assert not torch.allclose(long, square, atol=1e-3)


@pytest.mark.parametrize("upscale", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip", "sam"])
@pytest.mark.pitfall("P19")
def test_a_shifted_dot_stays_where_it_is(folders: dict[str, Path], kind: str, upscale: float) -> None:
    encoder = build(folders, kind, layers=[1], upscale=upscale)
    height, width = 100, 130  # multiples of neither patch
    blank, valid = torch.full((1, 3, height, width), 100.0), torch.ones(1, 3, height, width, dtype=torch.bool)
    cell = encoder.strides[0]
    assert cell == PATCH[kind] / upscale
    with torch.no_grad():
        quiet = encoder(blank, valid).maps[0]
        for row, column in [(3, 3), (47, 88), (97, 20), (20, 127), (97, 127)]:
            image = blank.clone()
            image[..., row - 1 : row + 2, column - 1 : column + 2] = 255
            change = (encoder(image, valid).maps[0] - quiet).norm(dim=1)[0]
            top, left = divmod(int(change.argmax()), change.shape[1])
            # the middle of the dot lies within the cell, give or take a pixel
            assert top * cell - 1 <= row + 0.5 <= (top + 1) * cell + 1
            assert left * cell - 1 <= column + 0.5 <= (left + 1) * cell + 1


@pytest.mark.pitfall("C19")
def test_padding_of_windows_holds_nothing_of_the_picture(folders: dict[str, Path]) -> None:
    """Beyond the picture there is the mean and nothing else, and windows do not see each other."""
    encoder = build(folders, "sam", layers=[1])  # block 1 is windowed
    small, valid = picture(40, 40)
    large = torch.full((1, 3, 48, 48), torch.nan)
    large[..., :40, :40] = small
    large_valid = F.pad(valid, (0, 8, 0, 8))
    with torch.no_grad():
        found = encoder(small, valid).maps[0]
        assert torch.equal(found, encoder(large, large_valid).maps[0])
        wide, all_valid = picture(64, 64)
        before = encoder(wide, all_valid).maps[0]
        wide[..., 48:, 48:] = 0.0  # the last cell of the last, mostly padded window
        after = encoder(wide, all_valid).maps[0]
    assert not torch.equal(after[..., 3, 3], before[..., 3, 3])
    after[..., 3, 3] = before[..., 3, 3]
    assert torch.equal(after, before)


def matrix_of(encoder: Any) -> nn.Parameter:
    """A weight of the second block."""
    _, block = encoder.backbone.blocks[1]
    return next(p for n, p in block.named_parameters() if n.endswith("weight") and p.ndim == 2)


def share(encoder: Any, height: int, width: int) -> float:
    """Of padding in the windows of a picture."""
    return encoder.backbone.padded_share(*encoder.image_stem.cells(height, width))


@pytest.mark.pitfall("C19")
def test_share_of_padding_in_windows_is_known(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = build(folders, "sam")  # windows of 3 x 3 tokens
    assert share(encoder, 64, 64) == pytest.approx(1 - 16 / 36)
    assert share(encoder, 33, 90) == pytest.approx(1 - 3 * 6 / (3 * 6))
    assert share(encoder, 16, 48) == pytest.approx(1 - 3 / 9)
    assert share(build(folders, "sam", upscale=1.5), 64, 64) == 0  # 6 x 6 tokens
    assert share(build(folders, "sam", upscale=0.01), 16, 16) == pytest.approx(1 - 1 / 9)
    assert share(build(folders, "clip"), 64, 64) == 0
    upstream("sam-vision", window_size=14, image_size=256).save_pretrained(tmp_path)
    published = build_encoder("sam", str(tmp_path), 3)
    assert share(published, 256, 256) == pytest.approx(1 - 256 / 784)
    assert share(published, 1024, 1024) == pytest.approx(1 - 64**2 / 70**2)


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.pitfall("P21", "C15")
def test_each_encoder_normalises_its_own_input(folders: dict[str, Path], name: str) -> None:
    encoder = build(folders, name) if name != "builtin" else build_encoder(name, None, 3)
    images, valid = picture(encoder.backbone.patch, encoder.backbone.patch)
    assert torch.allclose(encoder.prepare(images, valid), normalised(images, name), atol=1e-5)
    own = encoder_of(encoder.backbone, 3, mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    expected = (images - torch.tensor([1.0, 2, 3])[:, None, None]) / torch.tensor([4.0, 5, 6])[:, None, None]
    assert torch.allclose(own.prepare(images, valid), expected)
    assert {"stems.of_image.mean", "stems.of_image.std"} <= set(own.head_state())


@pytest.mark.parametrize("kind", ["dinov2", "clip", "sam"])
@pytest.mark.pitfall("P26")
def test_invalid_pixels_are_the_mean_whatever_they_hold(folders: dict[str, Path], kind: str) -> None:
    encoder = build(folders, kind, in_channels=4)
    nn.init.normal_(encoder.image_stem.mix.extra.weight)  # type: ignore[union-attr]
    images, valid = picture(40, 50, bands=4)
    valid[:, :, 10:30, 5:20] = False
    valid[:, 3] = False
    poisoned, mean = images.clone(), images.clone()
    poisoned[~valid] = torch.nan
    mean[~valid] = 100.0
    with torch.no_grad():
        expected = encoder(mean, torch.ones_like(valid)).maps[-1]
        assert torch.equal(encoder(poisoned, valid).maps[-1], expected)
        assert not torch.allclose(encoder(images, torch.ones_like(valid)).maps[-1], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dinov2", {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}),
        ("clip-vision", {"attention_dropout": 0.5}),
    ],
)
@pytest.mark.pitfall("P8")
def test_frozen_encoder_in_training_mode_is_deterministic(tmp_path: Path, kind: str, changes: dict[str, float]) -> None:
    upstream(kind, **changes).save_pretrained(tmp_path)
    encoder = build_encoder(family(kind), str(tmp_path), 3)
    assert encoder.train() is encoder  # C9
    assert encoder.training
    images, valid = picture(56, 56)
    first, second = encoder(images, valid).maps, encoder(images, valid).maps
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    encoder.backbone.network.train()  # the setting does drop something where it is on
    assert not torch.equal(encoder(images, valid).maps[-1], first[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("P10")
def test_frozen_means_no_graph_and_thawed_means_gradient(folders: dict[str, Path], kind: str) -> None:
    encoder = build(folders, kind)
    assert not any(p.requires_grad for p in encoder.parameters())
    images, valid = picture(56, 48)
    assert all(m.grad_fn is None and not m.requires_grad for m in encoder(images, valid).maps)
    weight = next(
        p for n, p in encoder.backbone.blocks[1][1].named_parameters() if n.endswith("weight") and p.ndim == 2
    )
    weight.requires_grad_(True)
    features = encoder(images, valid)
    assert not features.maps[0].requires_grad  # below the first thing that learns there is still no graph
    features.maps[-1].square().mean().backward()
    # the square of a normed map is nearly constant, so ask only that the gradient is there and finite
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["dinov2", "clip", "sam"])
@pytest.mark.pitfall("P9")
def test_checkpointing_gives_the_same_gradients(folders: dict[str, Path], kind: str) -> None:
    gradients, calls = [], []
    for asked in (False, True):
        encoder = build(folders, kind, gradient_checkpointing=asked).train()
        weight = next(
            p for n, p in encoder.backbone.blocks[1][1].named_parameters() if n.endswith("weight") and p.ndim == 2
        )
        weight.requires_grad_(True)
        count = [0]
        encoder.backbone.blocks[1][1].register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        target = torch.randn(encoder(*picture(56, 48)).maps[-1].shape, generator=torch.Generator().manual_seed(1))
        count[0] = 0
        (encoder(*picture(56, 48)).maps[-1] * target).sum().backward()
        gradients.append(weight.grad)
        calls.append(count[0])
    assert calls == [1, 2]  # computed again in the backward pass, so memory was really saved
    assert gradients[0].abs().max() > 1e-3
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip", "sam"])
@pytest.mark.pitfall("P23")
def test_more_bands_start_from_rgb_and_learn(folders: dict[str, Path], kind: str) -> None:
    images, valid = picture(40, 50, bands=5)
    wide = build(folders, kind, in_channels=5, input="widen")
    plain = build(folders, kind, mean=[100.0] * 3, std=[50.0] * 3)
    with torch.no_grad():
        expected = plain(images[:, :3], valid[:, :3]).maps
    found = wide(images, valid).maps
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert [n for n, p in wide.named_parameters() if p.requires_grad] == ["stems.of_image.mix.extra.weight"]
    found[-1][:, 0].sum().backward()
    assert wide.image_stem.mix.extra.weight.grad.abs().max() > 0  # type: ignore[union-attr]
    with torch.no_grad():  # once they have weights, the other bands count, each in its own place
        nn.init.normal_(wide.image_stem.mix.extra.weight)  # type: ignore[union-attr]
        before = wide(images, valid).maps[0]
        images[:, 4, :14, 14:28] += 200
        change = (wide(images, valid).maps[0] - before).norm(dim=1)[0]
    assert int(change.argmax()) in ((0, 1) if PATCH[kind] == 16 else (1,))


@pytest.mark.parametrize("bands", [1, 2, 5])
@pytest.mark.pitfall("P23")
def test_project_starts_as_the_first_three_bands(folders: dict[str, Path], bands: int) -> None:
    encoder = build(folders, "dinov2", in_channels=bands, input="project")
    images, valid = picture(40, 50, bands=bands)
    extended = torch.cat([images, images.mean(1, keepdim=True).expand(-1, 3, -1, -1)], 1)[:, :3]
    plain = build(folders, "dinov2", mean=[100.0] * 3, std=[50.0] * 3)
    found = encoder(images, valid).maps[-1]
    with torch.no_grad():
        expected = plain(extended, torch.ones_like(extended, dtype=torch.bool)).maps[-1]
    assert torch.allclose(found, expected, atol=1e-5)
    found[:, 0].sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is not None] == ["stems.of_image.mix.mix.weight"]
    # one and two bands need no parameters when widened, and mean the same
    if bands < 3:
        widened = build(folders, "dinov2", in_channels=bands)
        assert not list(widened.image_stem.mix.parameters())
        assert torch.allclose(widened(images, valid).maps[-1], expected, atol=1e-5)


def test_layers_are_blocks_passed_and_the_rest_is_trimmed(folders: dict[str, Path]) -> None:
    assert quarter_points(12) == (3, 6, 9, 12)
    assert quarter_points(24) == (6, 12, 18, 24)
    assert quarter_points(2) == (1, 2)
    for kind in KINDS:
        encoder = build(folders, kind, layers=[1, 2])
        names = [name for name, _ in encoder.backbone.blocks]
        assert names == [f"{ENCODERS[family(kind)].blocks}.{i}" for i in (0, 1)]
        assert all(encoder.backbone.network.get_submodule(name) is block for name, block in encoder.backbone.blocks)
        published = set(
            ENCODERS[family(kind)].model_class(vision_config(kind).model_type)(vision_config(kind)).state_dict()
        )
        assert set(encoder.backbone.network.state_dict()) < published  # upstream names, fewer of them
    for wrong in ([], [0, 1], [2, 1], [1, 1], [4]):
        with pytest.raises(RecipeError, match=r"increasing numbers from 1 to 3"):
            build(folders, "clip", layers=wrong)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("kind", [*KINDS, "builtin"])
@pytest.mark.pitfall("C8")
def test_every_parameter_left_gets_a_gradient(folders: dict[str, Path], kind: str, layers: list[int] | None) -> None:
    """Mask token, neck and norms that no map depends on would count as trainable and stall several processes."""
    built = kind == "builtin"
    encoder = build_encoder("builtin", None, 3, layers=layers) if built else build(folders, kind, layers=layers)
    encoder.backbone.network.requires_grad_(True)
    torch.stack([m.mul(torch.randn_like(m)).sum() for m in encoder(*picture(50, 70)).maps]).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.pitfall("P13")
def test_hash_is_of_the_published_tensors_alone(folders: dict[str, Path]) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    digest = sha256_of(tensors)
    assert digest == sha256_of(dict(reversed(tensors.items())))
    changed = [
        {**tensors, "b": torch.tensor([1.0, 1.0000001])},
        {**tensors, "a": torch.arange(6.0).reshape(3, 2)},
        {**tensors, "b": torch.ones(2, dtype=torch.int32)},
        {"a": tensors["a"], "c": tensors["b"]},
    ]
    assert len({digest, *(sha256_of(t) for t in changed)}) == 5
    for kind in KINDS:
        model = upstream(kind)
        whole = {"clip": "vision_model", "sam": "vision_encoder"}.get(kind)
        state = getattr(model, whole).state_dict() if whole else model.state_dict()
        if kind == "sam":
            state = {f"vision_encoder.{name}": tensor for name, tensor in state.items()}
        shallow, deep = build(folders, kind, layers=[1]), build(folders, kind)
        assert shallow.backbone.base == deep.backbone.base  # trimming does not change what it stands on
        assert shallow.backbone.base.sha256 == sha256_of(state)
        assert shallow.backbone.base.id == str(folders[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_whole_published_folders_load_without_a_word(
    folders: dict[str, Path], kind: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    records: list[Any] = []
    listener = Handler()
    listener.emit = records.append  # type: ignore[method-assign]
    logging.add_handler(listener)
    build(folders, kind)
    logging.remove_handler(listener)
    assert not records
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not recwarn.list
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


def other_folder(folders: dict[str, Path], kind: str, target: Path) -> tuple[Path, dict[str, Tensor]]:
    shutil.copytree(folders[kind], target)
    return target / "model.safetensors", load_file(target / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("P14", "C14")
def test_a_missing_or_extra_encoder_tensor_is_an_error(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    file, tensors = other_folder(folders, kind, tmp_path / "e")
    where = {"clip": "vision_model.", "sam": "vision_encoder."}.get(kind, "")
    victim = next(n for n in tensors if n.startswith(where) and "norm1.weight" in n)
    save_file({n: t for n, t in tensors.items() if n != victim}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \(.*norm1\.weight"):
        build_encoder(family(kind), str(file.parent), 3)
    save_file({**tensors, f"{where}blocks.9.stranger": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 not expected \(.*stranger"):
        build_encoder(family(kind), str(file.parent), 3)
    save_file({**tensors, victim: torch.zeros(5)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"."):
        build_encoder(family(kind), str(file.parent), 3)


def test_bad_checkpoints_are_refused_with_their_place(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(name: str, checkpoint: Path | str, words: str) -> None:
        with pytest.raises(CheckpointError, match=words) as caught:
            build_encoder(name, str(checkpoint), 3)
        assert str(checkpoint) in str(caught.value)

    refused("clip", folders["sam"], r"model_type = 'sam', but the encoder clip reads clip or clip_vision_model")
    refused("dinov2", folders["clip"], r"model_type = 'clip'")
    refused("sam", tmp_path / "nowhere", r"no such folder")
    refused("sam", "nobody/has-this-encoder", r"config\.json cannot be read")
    (tmp_path / "empty").mkdir()
    refused("sam", tmp_path / "empty", r"no config\.json")
    (tmp_path / "sam_vit_b.pth").write_bytes(b"x")
    refused("sam", tmp_path / "sam_vit_b.pth", r"is a file")
    file, _ = other_folder(folders, "dinov2", tmp_path / "cut")
    file.write_bytes(file.read_bytes()[:-100])
    refused("dinov2", file.parent, r"weights cannot be read")
    (file.parent / "config.json").write_text("{", encoding="utf-8")
    refused("dinov2", file.parent, r"config\.json cannot be read")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_pickled_code_in_weights_is_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    file, _ = other_folder(folders, "dinov2", tmp_path / "e")
    file.unlink()
    proof = tmp_path / "code-ran"
    torch.save({"embeddings.cls_token": Bomb(proof)}, file.with_name("pytorch_model.bin"), pickle_module=pickle)
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        build_encoder("dinov2", str(file.parent), 3)
    assert not proof.exists()


def test_reduced_images_are_means_not_every_second_pixel(folders: dict[str, Path]) -> None:
    """Every third pixel of a checkerboard is a checkerboard again."""
    encoder = build(folders, "dinov2", upscale=1 / 3)
    board = 200.0 * ((torch.arange(84)[:, None] + torch.arange(84)) % 2).expand(1, 3, 84, 84)
    seen = encoder.prepare(board, torch.ones(1, 3, 84, 84, dtype=torch.bool))
    grey = normalised(torch.full((1, 3, 28, 28), 100.0), "dinov2")
    assert torch.allclose(seen[..., 4:24, 4:24], grey[..., 4:24, 4:24], atol=0.05)


def test_weights_of_half_precision_become_float32_and_have_one_hash(folders: dict[str, Path], tmp_path: Path) -> None:
    file, tensors = other_folder(folders, "dinov2", tmp_path / "half")
    save_file({name: t.bfloat16() for name, t in tensors.items()}, file, {"format": "pt"})
    config = file.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    half = build_encoder("dinov2", str(file.parent), 3)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    save_file({name: t.bfloat16().float() for name, t in tensors.items()}, file, {"format": "pt"})
    assert build_encoder("dinov2", str(file.parent), 3).backbone.base.sha256 == half.backbone.base.sha256


def test_a_revision_belongs_to_a_hub_id(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.configuration_utils import PreTrainedConfig

    assert build_encoder("dinov2", str(folders["dinov2"]), 3, revision="main").backbone.base.revision is None
    asked: list[str | None] = []

    def spy(source: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append(revision)
        raise OSError("offline")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", spy)
    with pytest.raises(CheckpointError, match="offline"):
        build_encoder("dinov2", "some/where", 3, revision="v2")
    assert asked == ["v2"]


def test_settings_that_do_not_fit_together_are_refused(folders: dict[str, Path]) -> None:
    def refused(words: str, name: str = "clip", in_channels: int = 3, **of_stem: Any) -> None:
        with pytest.raises(RecipeError, match=words):
            build_encoder(name, str(folders["clip"]) if name == "clip" else None, in_channels, of_stem)

    refused(r"did you mean 'dinov2'", name="dinov3")
    refused(r"for other than 3 channels", input="widen")
    refused(r"3 means and 3 stds for 4 channels", in_channels=4, mean=[0.0] * 3, std=[1.0] * 3)
    refused(r"std above 0", mean=[0.0] * 3, std=[1.0, 0.0, 1.0])
    refused(r"did you mean 'project'", in_channels=4, mean=[0.0] * 4, std=[1.0] * 4, input="projct")
    refused(r"upscale = 0", upscale=0)
    refused(r"needs a folder or hub id", name="sam")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("P6")
def test_an_encoder_rebuilds_from_its_config_and_tensors(folders: dict[str, Path], kind: str) -> None:
    encoder = build(folders, kind, layers=[1, 2], upscale=1.5)
    config = json.loads(json.dumps(config_of(encoder.backbone)))
    assert str(folders[kind]) not in json.dumps(config)
    again = encoder_of(build_backbone_from_config(family(kind), config, layers=[1, 2]), 3, upscale=1.5)
    images, valid = picture(30, 40)
    with torch.no_grad():
        before = encoder(images, valid).maps
        assert not torch.allclose(again(images, valid).maps[1], before[1], atol=1e-3)
        again.backbone.network.load_state_dict(encoder.backbone.network.state_dict(), strict=True)
        after = again(images, valid).maps
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    other = "sam" if family(kind) != "sam" else "clip"
    with pytest.raises(CheckpointError, match="model_type"):
        build_backbone_from_config(other, config)


@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip", "sam"])
@pytest.mark.pitfall("P60")
def test_bfloat16_stays_close(folders: dict[str, Path], kind: str) -> None:
    encoder = build(folders, kind)
    images, valid = picture(40, 70)
    with torch.no_grad():
        exact = encoder(images, valid).maps[-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = encoder(images, valid).maps[-1]
        half = encoder.to(torch.bfloat16)(images, valid).maps[-1]
    for found in (mixed, half):
        assert F.cosine_similarity(found.float(), exact, dim=1).min() > 0.98
    assert half.dtype == torch.bfloat16


def test_only_the_model_class_in_use_is_imported() -> None:
    program = """
import sys
import vfmseg.encoders.build as build
assert not any(n.split(".")[0] in ("transformers", "peft", "torchvision") for n in sys.modules), "on import"
build.build_backbone("builtin", None)
loaded = {n for n in sys.modules if n.startswith("transformers.models.") and ".modeling_" in n}
print(sorted(n.rsplit(".", 1)[1] for n in loaded), "peft" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip()
    assert "modeling_dinov2" in printed
    assert not any(name in printed for name in ("modeling_sam", "modeling_clip", "registers", "True"))
