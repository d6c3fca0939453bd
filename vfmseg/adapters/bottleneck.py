"""AdaptFormer (Chen et al. 2022): a small MLP beside each block's MLP, y = MLP(x) + scale * up(relu(down(x))).

x is what the MLP gets, normed tokens; where a block scales its MLP (DINOv2), it scales the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.adapters.attached import Attached
from vfmseg.adapters.tensorfile import load_tensors, save_tensors
from vfmseg.encoders.backbone import Backbone
from vfmseg.errors import AdapterError


class ParallelMlp(nn.Module):
    """A frozen MLP with its adapter; `up` starts at zero, so at first nothing changes."""

    def __init__(self, mlp: nn.Module, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.mlp = mlp
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.scale = scale
        start_at_zero(self.down, self.up)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.mlp(x) + self.scale * self.up(F.relu(self.down(x)))


def start_at_zero(down: nn.Linear, up: nn.Linear) -> None:
    """Fill the layers of a bottleneck: `down` at random and `up` with zeros, so that it answers zero at first."""
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(down.bias)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)


def mlps(backbone: Backbone) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(dotted name of the MLP inside the upstream module, its block, the MLP) of each block.

    AdapterError for a block without a part called mlp.
    """
    for prefix, block in backbone.blocks:
        children = dict(block.named_children())
        if "mlp" not in children:
            raise AdapterError(
                f"model.adapter: block {prefix} has no part called mlp, but {', '.join(children)}; "
                "choose lora for this encoder"
            )
        yield f"{prefix}.mlp", block, children["mlp"]


def attach(backbone: Backbone, streams: tuple[str, ...], hidden: int, scale: float) -> Attached:
    """Put a small MLP beside the MLP of every block, for all streams; all else of the backbone is frozen."""
    backbone.network.requires_grad_(False)
    placed: dict[str, ParallelMlp] = {}
    for name, block, mlp in mlps(backbone):
        adapter = ParallelMlp(mlp, backbone.width, hidden, scale)
        device = next(block.parameters()).device
        block.add_module("mlp", adapter.to(device))
        placed[name] = adapter
    tensors, settings = tensors_of(placed), {"scale": float(scale)}
    return Attached(
        "adapter",
        sites=tuple(placed),
        added=tuple(parameter for parameter in backbone.network.parameters() if parameter.requires_grad),
        save=partial(save_tensors, tensors, settings),
        load=partial(load_tensors, tensors, settings),
    )


def tensors_of(placed: dict[str, ParallelMlp]) -> dict[str, Tensor]:
    """The adapter's own tensors by dotted name."""
    return {
        f"{name}.{part}.{kind}": tensor
        for name, adapter in placed.items()
        for part, layer in (("down", adapter.down), ("up", adapter.up))
        for kind, tensor in (("weight", layer.weight), ("bias", layer.bias))
    }
