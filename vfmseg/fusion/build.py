"""Fusions by the name in the recipe.

`stack` is none of them: it puts the bands of all modalities into one stream, so that there is nothing to join.
`decision` joins answers instead of features, and needs a decoder for each stream (`decision.py`).
"""

from __future__ import annotations

from vfmseg.fusion.alignment import Alignment
from vfmseg.fusion.attention import Attention
from vfmseg.fusion.contract import Fusion
from vfmseg.fusion.gated import Gated
from vfmseg.fusion.linear import Linear
from vfmseg.fusion.reconstruction import Reconstruction
from vfmseg.fusion.se import Se

FUSIONS: dict[str, type[Fusion]] = {
    "linear": Linear,
    "attention": Attention,
    "se": Se,
    "gated": Gated,
    "reconstruction": Reconstruction,
    "alignment": Alignment,
}
"""Called as FUSIONS[name](streams, channels, **options of the recipe's section)."""
