"""Turn a vision foundation model into a segmentation model for overhead imagery and label scenes of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vfmseg.inference.output import Output
    from vfmseg.recipe import Recipe, load_recipe
    from vfmseg.segmenter import Segmenter

__all__ = ["Output", "Recipe", "Segmenter", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Load torch only when the Segmenter is asked for: `vfmseg --help` and recipe checks stay instant."""
    if name == "Segmenter":
        from vfmseg.segmenter import Segmenter

        return Segmenter
    if name == "Output":
        from vfmseg.inference.output import Output

        return Output
    if name in ("Recipe", "load_recipe"):
        from vfmseg import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module 'vfmseg' has no attribute '{name}'")
