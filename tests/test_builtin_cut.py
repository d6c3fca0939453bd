"""The cut of a small ViT out of a larger one: what it takes over, and that solved weights are nearer to the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import picture
from makers import save_encoder
from torch import Tensor

from benchmarks import builtin_card, make_builtin
from benchmarks.builtin_cut import cut
from vfmseg.recipe import load_pretrain_recipe

SIDE = 70  # not the size that the teacher has positions for


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers.models.dinov2 import Dinov2Model

    network = Dinov2Model.from_pretrained(save_encoder(tmp_path_factory.mktemp("teacher") / "vit", "dinov2")).eval()
    torch.manual_seed(1)
    with torch.no_grad():  # as drawn, its blocks hardly change their tokens
        for block in network.encoder.layer:
            block.layer_scale2.lambda1.uniform_(0.5, 1.5)
            block.mlp.fc1.weight.mul_(20)
            block.mlp.fc2.weight.mul_(10)
    return network


@pytest.fixture(scope="module")
def images() -> Tensor:
    return picture(SIDE, SIDE, batch=48)[0] / 60 - 2


@torch.no_grad()
def tokens(network: Any, images: Tensor, block: int) -> Tensor:
    found: Tensor = network(images, output_hidden_states=True).hidden_states[block]
    return found


def test_with_all_neurons_it_is_the_first_blocks_of_the_teacher(teacher: Any, images: Tensor) -> None:
    student, lost = cut(teacher, 2, teacher.config.mlp_ratio, SIDE, images)
    assert student.config.num_hidden_layers == 2
    assert student.config.image_size == SIDE
    assert max(lost) < 1e-6
    for block in (0, 1, 2):  # 0: with the positions that the teacher has for images of this size
        torch.testing.assert_close(tokens(student, images, block), tokens(teacher, images, block), atol=1e-3, rtol=1e-3)


def test_solved_weights_lose_less_than_those_of_the_teacher_in_other_images_too(teacher: Any, images: Tensor) -> None:
    student, lost = cut(teacher, 2, 1, SIDE, images[:32])
    unseen = images[32:]

    def away() -> float:
        wanted = tokens(teacher, unseen, 2)
        gone = (tokens(student, unseen, 2) - wanted).square().sum()
        return float(gone / (wanted - wanted.mean(dim=(0, 1))).square().sum())

    solved = away()
    assert solved == pytest.approx(lost[-1], rel=0.5)
    with torch.no_grad():
        for mine, its in zip(student.encoder.layer, teacher.encoder.layer, strict=False):
            kept = [int((its.mlp.fc1.weight == row).all(dim=1).nonzero()) for row in mine.mlp.fc1.weight]
            assert kept == sorted(set(kept))
            mine.mlp.fc2.weight.copy_(its.mlp.fc2.weight[:, kept])
            mine.mlp.fc2.bias.copy_(its.mlp.fc2.bias)
    assert solved < 0.7 * away()


@pytest.mark.pitfall("C1")
def test_the_recipe_of_the_encoder_in_the_box_sees_no_test_place(tmp_path: Path) -> None:
    path = make_builtin.write_recipe(tmp_path / "data", tmp_path / "teacher", tmp_path)
    recipe = load_pretrain_recipe(path)
    files = [source.images["rgb"] for source in recipe.data.sources().values()]
    patterns = [str(pattern) for one in files for pattern in ([one] if isinstance(one, str) else one)]
    inside = [pattern.removeprefix(str(tmp_path)) for pattern in patterns]
    assert len(inside) == sum(len(names.split()) for names in make_builtin.SOURCES) + 1
    assert not [pattern for pattern in inside if "val" in pattern or "test" in pattern or "banepa" in pattern]
    assert recipe.probe is not None
    splits = {source.split for one in recipe.probe.sets.values() for source in one.both().values()}
    assert splits == {"train", "val"}


def test_the_card_names_whose_imagery_it_is() -> None:
    """Of each folder that the recipe reads."""
    named = {name.strip() for folders, _, _ in builtin_card.IMAGERY for name in folders.split(",")}
    read = {name for names in make_builtin.SOURCES for name in names.split()}
    assert read <= named
    assert named - read == {"oam_buildings (training images)"}
