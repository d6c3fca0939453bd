"""Several streams over one backbone: the contract that fusions of features and adapters with hooks stand on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import MODELS, family, save_all
from torch import Tensor, nn

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.adapters.attached import Attached
from vfmseg.data.image import Image
from vfmseg.decoders.build import build_decoder
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.build import build_backbone, build_stem
from vfmseg.encoders.tokens import Features, StreamRows, Tokens
from vfmseg.errors import DataError
from vfmseg.fusion.contract import Fusion
from vfmseg.model import Network, joined


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("streams"))


class Mean(Fusion):
    """The mean of what the streams have seen, cell by cell: a fusion as somebody may write one."""

    def forward(self, found: Mapping[str, Features]) -> Features:
        first = next(iter(found.values()))
        maps = []
        for level in range(len(first.maps)):
            weights = torch.stack([features.seen[level] for features in found.values()])  # (S, B, h, w)
            stacked = torch.stack([features.maps[level] for features in found.values()])  # (S, B, D, h, w)
            kept = torch.where(weights[:, :, None] > 0, stacked, 0.0) * weights[:, :, None]
            maps.append(kept.sum(dim=0) / weights.sum(dim=0).clamp(min=1e-6)[:, None])
        seen = tuple(torch.stack([f.seen[level] for f in found.values()]).amax(dim=0) for level in range(len(maps)))
        return Features(tuple(maps), seen, first.strides)


def network(folders: dict[str, Path], kind: str, attached: Any = "none", **options: Any) -> Network:
    """Optical (3 bands) and dem (1 band) as two streams of one backbone."""
    backbone = build_backbone(family(kind), str(folders[kind]))
    stems = {
        "optical": build_stem(backbone, {"optical": 3}, [100.0] * 3, [50.0] * 3),
        "dem": build_stem(backbone, {"dem": 1}, [300.0], [40.0]),
    }
    put = (
        ADAPTERS[attached].attach(backbone, tuple(stems), **options)
        if isinstance(attached, str)
        else attached(backbone)
    )
    torch.manual_seed(0)
    strides = (float(backbone.patch),) * len(backbone.layers)
    mean = Mean(tuple(stems), backbone.channels)
    return Network(backbone, stems, put, mean, build_decoder("linear", backbone.channels, strides, 2), 2)


def images(batch: int = 2) -> dict[str, Image]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 50, 70)
    optical, dem = (torch.rand(batch, bands, 50, 70, generator=generator) for bands in (3, 1))
    valid = torch.ones(shape, dtype=torch.bool)
    return {"optical": Image(255 * optical, valid), "dem": Image(300 + 80 * dem, valid.clone())}


@pytest.mark.parametrize("kind", MODELS)
def test_streams_in_one_batch_are_what_each_is_alone(folders: dict[str, Path], kind: str) -> None:
    """Rows of one stream hold nothing of another, whatever the order and the size of the batch."""
    model, given = network(folders, kind), images()
    calls: list[int] = []
    model.backbone.blocks[0][1].register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    with torch.no_grad():
        together = model.encode(given)
        assert calls == [4]  # a block is run once, for both
        for name, features in together.items():
            alone = model.encode({name: given[name]})
            assert list(alone) == [name]
            for both, one in zip(features.maps, alone[name].maps, strict=True):
                torch.testing.assert_close(both, one, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together["optical"].maps[-1], together["dem"].maps[-1], atol=1e-2)


@pytest.mark.pitfall("P26", "C43")
def test_what_a_stream_has_not_seen_changes_nothing(folders: dict[str, Path]) -> None:
    """An all-invalid modality full of NaN is as good as one that is missing; half of one counts where it is valid."""
    model, given = network(folders, "dinov2"), images()
    nothing = Image(torch.full_like(given["dem"].pixels, torch.nan), torch.zeros_like(given["dem"].valid))
    with torch.no_grad():
        missing = model({"optical": given["optical"]})
        torch.testing.assert_close(model({**given, "dem": nothing}), missing)
        assert not torch.allclose(model(given), missing, atol=1e-3)
    assert missing.shape == (2, 2, 50, 70)


def test_seen_is_the_valid_share_of_each_patch(folders: dict[str, Path]) -> None:
    model, given = network(folders, "clip"), images(1)  # patches of 16 px: 4 x 5 of them over 50 x 70 px
    valid = given["dem"].valid
    valid[:, :8] = False
    valid[:, :, 16:32] = False
    with torch.no_grad():
        (seen, *_), *_ = (features.seen for name, features in model.encode(given).items() if name == "dem")
    expected = torch.ones(4, 5)
    expected[0] = 0.5
    expected[:, 1] = 0.0
    expected[3] *= 2 / 16  # rows 48 and 49 of 48 to 63
    expected[:, 4] *= 6 / 16  # columns 64 to 69 of 64 to 79
    torch.testing.assert_close(seen[0], expected)


def test_the_fusion_says_where_there_is_an_answer(folders: dict[str, Path]) -> None:
    assert network(folders, "clip").known == "any"
    backbone = build_backbone("clip", str(folders["clip"]))
    stem = build_stem(backbone, {"optical": 3}, [100.0] * 3, [50.0] * 3)
    attached = ADAPTERS["none"].attach(backbone, ("optical",))
    assert Network(backbone, {"optical": stem}, attached, None, nn.Identity(), 2).known == "all"
    with pytest.raises(ValueError, match="1 streams"):
        Network(backbone, {"optical": stem}, attached, Mean(("optical",), (8,)), nn.Identity(), 2)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.pitfall("C8", "P10")
def test_everything_that_learns_in_several_streams_gets_a_gradient(folders: dict[str, Path], kind: str) -> None:
    model = network(folders, kind, "lora", rank=2, alpha=4.0, dropout=0.0, targets=("q", "v"))
    model.train()
    model(images()).square().sum().backward()
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lost == []
    parts = model.parts()
    assert {part for part, found in parts.items() if found} == {"encoder", "adapter", "stem", "decoder"} - (
        set() if parts["stem"] else {"stem"}
    )
    assert not any(p.requires_grad for p in parts["encoder"].values())
    assert sum(len(found) for found in parts.values()) == len(list(model.parameters()))


class Prompts(nn.Module):
    """Prompt tokens before each block, taken out after it: an adapter of hooks, with parameters of its own."""

    def __init__(self, blocks: int, number: int, width: int) -> None:
        super().__init__()
        self.number = number
        self.prompts = nn.Parameter(torch.randn(blocks, number, width))

    def put(self, depth: int, tokens: Tokens, rows: StreamRows) -> Tokens:
        assert sum(mine.stop - mine.start for mine in rows.values()) == len(tokens.values)
        more = self.prompts[depth - 1].expand(len(tokens.values), -1, -1)
        values = torch.cat([tokens.values[:, : tokens.prefix], more, tokens.values[:, tokens.prefix :]], dim=1)
        return replace(tokens, values=values, prefix=tokens.prefix + self.number)

    def take(self, depth: int, tokens: Tokens, rows: StreamRows) -> Tokens:
        start = tokens.prefix - self.number
        values = torch.cat([tokens.values[:, :start], tokens.values[:, tokens.prefix :]], dim=1)
        return replace(tokens, values=values, prefix=start)


def prompts(backbone: Backbone, number: int = 3) -> Attached:
    beside = Prompts(len(backbone.blocks), number, backbone.width)
    return Attached("prompts", added=(beside.prompts,), beside=beside, before=(beside.put,), after=(beside.take,))


@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip"])
def test_an_adapter_of_hooks_learns_beside_the_frozen_backbone(folders: dict[str, Path], kind: str) -> None:
    model, given = network(folders, kind, prompts), images()
    with torch.no_grad():
        assert not torch.allclose(model(given), network(folders, kind)(given), atol=1e-3)
    model.train()
    model(given).square().sum().backward()
    (learned,) = model.parts()["adapter"].values()
    assert learned.grad is not None
    assert (learned.grad[: model.backbone.layers[-1]].flatten(1).norm(dim=1) > 0).all()
    assert not any(name.startswith("adapter") for name in model.head_state())  # the adapter has files of its own


def test_a_copy_of_a_network_has_hooks_of_its_own(folders: dict[str, Path]) -> None:
    """As a teacher is, whose weights are averages of the learner's."""
    model, given = network(folders, "dinov2", prompts), images()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        assert torch.equal(twin(given), model(given))
        twin.adapter.prompts.neg_()
        assert not torch.allclose(twin(given), model(given), atol=1e-3)
    twin(given).square().sum().backward()
    assert twin.adapter.prompts.grad is not None
    assert model.adapter.prompts.grad is None


class PerStream(nn.Module):
    """A layer whose answer is scaled by a factor of the stream of each row; a hook tells it the rows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.rows: StreamRows = {}
        self.factors = nn.ParameterDict({"optical": nn.Parameter(torch.ones(())), "dem": nn.Parameter(torch.ones(()))})

    def tell(self, depth: int, tokens: Tokens, rows: StreamRows) -> Tokens:
        self.rows = rows
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        return torch.cat([found[mine] * self.factors[name] for name, mine in self.rows.items()])


def per_stream(backbone: Backbone) -> Attached:
    backbone.network.requires_grad_(False)
    placed = [PerStream(block.get_submodule("mlp")) for _, block in backbone.blocks]
    for (_, block), layer in zip(backbone.blocks, placed, strict=True):
        block.add_module("mlp", layer)
    added = tuple(parameter for layer in placed for parameter in layer.factors.values())
    return Attached("per_stream", added=added, before=tuple(layer.tell for layer in placed))


def test_layers_that_are_run_again_know_whose_rows_they_have(folders: dict[str, Path]) -> None:
    """Two objectives run the model on other streams, and their blocks are run again only after both."""
    given, found = images(), []
    for asked in (False, True):
        model = network(folders, "dinov2", per_stream).train()
        model.backbone.gradient_checkpointing = asked
        (model(given).square().sum() + model({"dem": given["dem"]}).square().sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in found[0].values())
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


def test_images_of_no_stream_are_told(folders: dict[str, Path]) -> None:
    model, given = network(folders, "dinov2"), images()
    for wrong in ({}, {"radar": given["dem"]}):
        with pytest.raises(DataError, match="expected those of optical or dem"):
            model(wrong)


def test_streams_of_other_grids_are_no_batch() -> None:
    def tokens(rows: int, columns: int) -> Tokens:
        values: Tensor = torch.zeros(1, rows * columns, 4)
        return Tokens(values, torch.ones(1, rows * columns), (rows, columns), 0)

    batch, rows = joined({"a": tokens(2, 3), "b": tokens(2, 3)})
    assert batch.values.shape == (2, 6, 4)
    assert rows == {"a": slice(0, 1), "b": slice(1, 2)}
    with pytest.raises(ValueError, match="expected one grid"):
        joined({"a": tokens(2, 3), "b": tokens(3, 2)})
