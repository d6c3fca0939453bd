"""AdaptFormer (Chen et al. 2022): a small MLP beside each block's MLP, y = MLP(x) + scale * up(relu(down(x))).

x is what the MLP gets, normed tokens; where a block scales its MLP (DINOv2), it scales the sum.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vfmseg.adapters.attached import Attached
from vfmseg.disk.tensors import require_tensors
from vfmseg.encoders.backbone import Backbone
from vfmseg.errors import AdapterError, CheckpointError

FILE = "adapter.safetensors"


class ParallelMlp(nn.Module):
    """A frozen MLP with its adapter; `up` starts at zero, so at first nothing changes."""

    def __init__(self, mlp: nn.Module, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.mlp = mlp
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.mlp(x) + self.scale * self.up(F.relu(self.down(x)))


def attach(backbone: Backbone, hidden: int, scale: float) -> Attached:
    """Put a small MLP beside the MLP of every block; all else of the backbone is frozen."""
    backbone.network.requires_grad_(False)
    placed: dict[str, ParallelMlp] = {}
    for prefix, block in backbone.blocks:
        children = dict(block.named_children())
        if "mlp" not in children:
            raise AdapterError(
                f"model.adapter: block {prefix} has no part called mlp, but {', '.join(children)}; "
                "choose lora for this encoder"
            )
        adapter = ParallelMlp(children["mlp"], backbone.width, hidden, scale)
        device = next(block.parameters()).device
        block.add_module("mlp", adapter.to(device))
        placed[f"{prefix}.mlp"] = adapter
    return Attached(
        "adapter",
        sites=tuple(placed),
        added=tuple(parameter for parameter in backbone.network.parameters() if parameter.requires_grad),
        save=partial(_save, placed),
        load=partial(_load, placed),
    )


def tensors_of(placed: dict[str, ParallelMlp]) -> dict[str, Tensor]:
    """The adapter's own tensors by dotted name."""
    return {
        f"{name}.{part}.{kind}": tensor
        for name, adapter in placed.items()
        for part, layer in (("down", adapter.down), ("up", adapter.up))
        for kind, tensor in (("weight", layer.weight), ("bias", layer.bias))
    }


def _save(placed: dict[str, ParallelMlp], folder: Path) -> None:
    """Write the adapters' tensors and their scale."""
    folder.mkdir(parents=True)
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors_of(placed).items()}
    save_file(tensors, folder / FILE, {"scale": repr(_scale(placed))})


def _load(placed: dict[str, ParallelMlp], folder: Path) -> None:
    """Fill the adapters, strictly: CheckpointError for a missing, extra or misshapen tensor, or another scale."""
    file = folder / FILE
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; the checkpoint is incomplete, copy it again")
    try:
        with safe_open(file, "pt") as stored:
            scale = (stored.metadata() or {}).get("scale")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); copy it again") from None
    require_tensors(file, tensors, {n: tuple(t.shape) for n, t in tensors_of(placed).items()})
    if scale != repr(_scale(placed)):
        raise CheckpointError(
            f"{file}: adapters of scale {scale}, but recipe.yaml says {_scale(placed)}; the folder mixes two "
            "checkpoints"
        )
    with torch.no_grad():
        for name, tensor in tensors_of(placed).items():
            tensor.copy_(tensors[name])


def _scale(placed: dict[str, ParallelMlp]) -> float:
    return float(next(iter(placed.values())).scale)
