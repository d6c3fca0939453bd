"""The encoder of all streams, and the network that makes labels of its features. Parts come in finished; no recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.adapters.adapted import run_blocks
from vfmseg.adapters.attached import Attached
from vfmseg.adapters.own import OwnEncoder
from vfmseg.data.image import Images, Known, known
from vfmseg.encoders.backbone import Backbone
from vfmseg.encoders.side import SideEncoder
from vfmseg.encoders.stem import Stem
from vfmseg.encoders.tokens import Features, StreamRows, Tokens
from vfmseg.errors import DataError
from vfmseg.fusion.contract import Fusion
from vfmseg.fusion.coregister import Coregister
from vfmseg.fusion.decision import Decision, DecoderPerStream


class Encoder(nn.Module):
    """Images in, features of each stream out.

    A *stream* is what goes through the backbone: one modality, or several that are stacked as channels; each has a stem
    of its own. All streams go through the frozen blocks as one batch. Frozen parts stay in evaluation mode whatever
    `train()` is asked for.
    """

    homes: Mapping[str, str] = {"adapter": "adapter", "stems": "stem"}
    """{child: part of `parts` that its parameters belong to}, of all children but the backbone."""

    def __init__(
        self, backbone: Backbone, stems: Mapping[str, Stem | SideEncoder | OwnEncoder], attached: Attached
    ) -> None:
        """`stems` {stream: its stem, or an encoder of its own}; at least one is a stem and leads into the backbone.

        `attached`: the adapter in the backbone.
        """
        super().__init__()
        self.backbone = backbone
        self.adapter = attached.beside  # parameters that are no part of the backbone, such as prompts
        # "of_": a modality may be called like something that every module has, such as `float`
        self.stems = nn.ModuleDict({f"of_{name}": stem for name, stem in stems.items()})
        self.attached = attached
        self.streams = tuple(stems)
        if len(self.reference.groups) > 1:
            backbone.freeze_kernel()
        self.train(False)

    def stem(self, stream: str) -> Stem | SideEncoder | OwnEncoder:
        """The stem of a stream, or the encoder that it has instead of one."""
        return cast("Stem | SideEncoder | OwnEncoder", self.stems[f"of_{stream}"])

    @property
    def own_encoders(self) -> dict[str, OwnEncoder]:
        """{stream: its published encoder}, of those that have one of their own."""
        stems = {name: self.stem(name) for name in self.streams}
        return {name: stem for name, stem in stems.items() if isinstance(stem, OwnEncoder)}

    @property
    def base_hash(self) -> str:
        """SHA-256 of the published tensors; with encoders of single modalities several in a row, joined by +."""
        return "+".join(one.base.sha256 for one in (self.backbone, *(o.backbone for o in self.own_encoders.values())))

    @property
    def reference(self) -> Stem:
        """The first stem that leads into the backbone: its cells are those of all features."""
        return next(stem for stem in map(self.stem, self.streams) if isinstance(stem, Stem))

    @property
    def strides(self) -> tuple[float, ...]:
        """Pixels of the images per cell of each map of a stream."""
        return (self.backbone.patch / self.reference.upscale,) * len(self.backbone.layers)

    def encode(self, images: Images) -> dict[str, Features]:
        """{stream: its feature maps}, for the streams whose modalities are all among the images."""
        present = [name for name in self.streams if set(self.stem(name).modalities) <= set(images)]
        if not present:
            needed = " or ".join(" + ".join(self.stem(name).modalities) for name in self.streams)
            raise DataError(f"the images are of {', '.join(images) or 'nothing'}; expected those of {needed}")
        stems = {name: self.stem(name) for name in present}
        found = self._through_backbone({name: s(images) for name, s in stems.items() if isinstance(s, Stem)})
        cells = self.reference.cells(*next(iter(images.values())).valid.shape[-2:])
        found |= {name: s(images, cells, self.strides) for name, s in stems.items() if not isinstance(s, Stem)}
        return {name: found[name] for name in present}

    def _through_backbone(self, stemmed: Mapping[str, tuple[Tensor, Tensor | None, Tensor]]) -> dict[str, Features]:
        """{stream: what its stem made} -> its features; the streams are one batch for the blocks."""
        if not stemmed:
            return {}
        tokens, rows = joined({name: self.backbone.embed(*made) for name, made in stemmed.items()})
        maps, seen = run_blocks(self.backbone, self.attached, tokens, rows, self.training)
        return {
            name: Features(tuple(map_[mine] for map_ in maps), (seen[mine],) * len(maps), self.strides)
            for name, mine in rows.items()
        }

    def train(self, mode: bool = True) -> Encoder:
        """Switch the parts that learn; everything frozen keeps its evaluation mode (dropout, statistics)."""
        super().train(mode)
        self.backbone.network.train(False)
        for module in self.attached.moving:
            module.train(mode)
        return self

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """{part: {name of a parameter: it}}; parts: encoder (as published), adapter, stem, and those of `homes`.

        It decides learning rates and what the table of parameters counts; every parameter is in one part.
        """
        added = {id(parameter) for parameter in self.attached.added}
        found: dict[str, dict[str, nn.Parameter]] = {part: {} for part in ("encoder", *self.homes.values())}
        for child, module in self.named_children():
            for name, parameter in module.named_parameters():
                part = self.homes.get(child) or ("adapter" if id(parameter) in added else "encoder")
                found[part][f"{child}.{name}"] = parameter
        for stream, own in self.own_encoders.items():
            for name, parameter in own.named_parameters():
                place = f"stems.of_{stream}.{name}"
                found[own.part_of(name, parameter)][place] = found["stem"].pop(place)
        return found

    def trainable(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class Network(Encoder):
    """Images in, one logit per class and pixel out. With one stream there is nothing to fuse."""

    homes: Mapping[str, str] = {**Encoder.homes, "coregister": "fusion", "fuse": "fusion", "decoder": "decoder"}

    def __init__(
        self,
        backbone: Backbone,
        stems: Mapping[str, Stem | SideEncoder | OwnEncoder],
        attached: Attached,
        fuse: Fusion | Decision | None,
        decoder: nn.Module,
        classes: int,
        coregister: Coregister | None = None,
    ) -> None:
        """The first three as in `Encoder`. `fuse`: None for a single stream.

        A `Decision` comes with a `DecoderPerStream`. `coregister` moves images before they enter.
        """
        if (fuse is None) != (len(stems) == 1):
            raise ValueError(
                f"{len(stems)} streams and {'no' if fuse is None else 'a'} fusion; expected one for several"
            )
        if isinstance(fuse, Decision) != isinstance(decoder, DecoderPerStream):
            raise ValueError("a fusion of decisions needs a decoder for each stream, and no other fusion does")
        super().__init__(backbone, stems, attached)
        self.coregister = coregister
        self.fuse = fuse
        self.decoder = decoder
        self.classes = classes
        self.known: Known = "all" if fuse is None else fuse.known
        self.train(False)

    def forward(self, images: Images, frames: Tensor | None = None) -> Tensor:
        """{modality: image of (B, C, H, W) pixels in image units} -> logits (B, K, H, W); `frames` as in `answer`."""
        return self.answer(images, frames)[0]

    def answer(self, images: Images, frames: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, K, H, W), and what the fusion adds to a training loss: {name: (B,), one number an image}.

        The second is empty outside training, and for fusions that add nothing. `frames` (B, 2, 2): how each image was
        turned (`Batch.frames`), for what depends on directions.
        """
        if self.coregister is not None:
            images = self.coregister(images, frames)
        found = self.encode(images)
        size = next(iter(images.values())).valid.shape[-2:]
        if isinstance(self.fuse, Decision):
            return self._decided(self.fuse, found, images), {}
        features = next(iter(found.values())) if self.fuse is None else self.fuse(found)
        terms = self.fuse.terms(found, features) if self.training and self.fuse is not None else {}
        return _enlarged(self.decoder(features), features, size), terms

    def _decided(self, decision: Decision, found: Mapping[str, Features], images: Images) -> Tensor:
        """Logits (B, K, H, W): those of each stream, joined pixel by pixel."""
        assert isinstance(self.decoder, DecoderPerStream)
        valid = {name: known({m: images[m] for m in self.stem(name).modalities}, "all") for name in found}
        size = next(iter(valid.values())).shape[-2:]
        logits = {name: _enlarged(self.decoder.of(name)(one), one, size) for name, one in found.items()}
        guide = decision.refine.guide if decision.refine is not None else None
        guides = {guide: self.stem(guide).normalised(images)} if guide is not None and guide in found else {}
        return decision(logits, valid, guides)

    def head_state(self) -> dict[str, Tensor]:
        """Trained tensors outside backbones, by name, with the buffers of those parts (normalisation too).

        Without what only training uses.
        """
        elsewhere = {
            f"of_{stream}.{name}" for stream, own in self.own_encoders.items() for name in own.state_elsewhere()
        }
        heads = {name: child for name, child in self.named_children() if child not in (self.backbone, self.adapter)}
        return {
            f"{name}.{key}": tensor
            for name, child in heads.items()
            for key, tensor in child.state_dict().items()
            if not (name == "fuse" and key.startswith("auxiliary.")) and not (name == "stems" and key in elsewhere)
        }

    def without_auxiliary(self) -> Network:
        """The same network without what only training uses."""
        if isinstance(self.fuse, Fusion):
            self.fuse.auxiliary = None
        return self


def _enlarged(logits: Tensor, features: Features, size: Sequence[int]) -> Tensor:
    """Logits (B, K, h, w) of these features as (B, K, H, W) for an image of this size.

    The grid of patches may reach beyond the image (padding up to a whole patch). Logits are enlarged to the ground that
    the grid really covers and cut, so that every pixel keeps its place.
    """
    height, width = size
    rows, cols = features.maps[0].shape[-2:]
    stride = features.strides[0]
    # where rounding an image made smaller lost less than half a pixel of it, the grid does cover all of it
    covered = (max(height, round(rows * stride)), max(width, round(cols * stride)))
    logits = F.interpolate(logits, size=covered, mode="bilinear", align_corners=False)
    return logits[..., :height, :width]


def joined(born: Mapping[str, Tokens]) -> tuple[Tokens, StreamRows]:
    """The tokens of several streams as one batch, and which rows of it are whose.

    For streams rgb and dem of batches of 4: rows 0 to 3 are rgb's and 4 to 7 dem's. A block is so run once for all.
    """
    rows: dict[str, slice] = {}
    first = 0
    for name, tokens in born.items():
        rows[name] = slice(first, first + len(tokens.values))
        first = rows[name].stop
    (one, *others) = born.values()
    if not others:
        return one, rows
    grids = [(tokens.groups, *tokens.grid) for tokens in born.values()]
    if len(set(grids)) > 1:
        raise ValueError(f"streams on (groups, rows, columns) {grids} of patches; expected one grid of all")
    values = torch.cat([tokens.values for tokens in born.values()])
    seen = torch.cat([tokens.seen for tokens in born.values()])
    return Tokens(values, seen, one.grid, one.prefix, groups=one.groups), rows


def parameter_table(model: Encoder) -> list[tuple[str, int, int]]:
    """(part, trainable, total) for each part that has parameters, and their sum."""
    rows = [
        (part, sum(p.numel() for p in found.values() if p.requires_grad), sum(p.numel() for p in found.values()))
        for part, found in model.parts().items()
        if found
    ]
    return [*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]


def parameter_lines(model: Encoder) -> str:
    """The same as lines of text, with what adapters sit on."""
    rows = parameter_table(model)
    lines = [f"{'part':<10}{'trainable':>14}{'total':>14}"]
    lines += [f"{part:<10}{trainable:>14,}{total:>14,}" for part, trainable, total in rows]
    for of, one in (("", model.attached), *((f" of {name}", own.attached) for name, own in model.own_encoders.items())):
        if one.sites:
            lines.append(f"adapter{of} {one.name} on {len(one.sites)} layers: {one.sites[0]} ... {one.sites[-1]}")
    return "\n".join(lines)
