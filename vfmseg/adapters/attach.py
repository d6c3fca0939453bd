"""Adapters by name: what each adds to a backbone, what of it learns, and how that is kept in files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vfmseg.adapters import bottleneck, lora, mm_adapter, mm_lora
from vfmseg.adapters.attached import Attached
from vfmseg.encoders.backbone import Backbone


def attach_none(backbone: Backbone, streams: tuple[str, ...]) -> Attached:
    """The backbone stays frozen; only a stem for extra bands learns."""
    backbone.network.requires_grad_(False)
    return Attached("none")


def attach_full(backbone: Backbone, streams: tuple[str, ...]) -> Attached:
    """All of the backbone learns."""
    backbone.network.requires_grad_(True)
    return Attached("full", moving=(backbone.network,))


@dataclass(frozen=True)
class Adapter:
    """attach(backbone, streams, **options of the recipe): puts it into a backbone and says what that means.

    `streams` are the names of those that go through the backbone; only the adapters of several modalities ask for them.

    merge(backbone, folder, **options): adds a saved one into the frozen weights instead, so that prediction is as fast
    as without; None if it cannot. It needs nothing attached: peft, which takes seconds to import, stays out then.
    """

    attach: Callable[..., Attached]
    merge: Callable[..., None] | None = None


ADAPTERS: dict[str, Adapter] = {
    "none": Adapter(attach_none),
    "full": Adapter(attach_full),
    "lora": Adapter(lora.attach, lora.merge),
    "adapter": Adapter(bottleneck.attach),
    "mm_lora": Adapter(mm_lora.attach),
    "mm_adapter": Adapter(mm_adapter.attach),
}
