"""Train a first segmenter on two small scenes made here, measure it, and label an array.

python examples/first_segmenter.py [FOLDER]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vfmseg import Segmenter, load_recipe
from vfmseg.finetune import finetune

RECIPE = """
name: discs
data:
  classes: {0: ground, 1: disc}
  modalities: {rgb: {bands: [1, 2, 3]}}
  train: {rgb: "train/images/*.png", labels: "train/labels/*.png"}
  val: {rgb: "val/images/*.png", labels: "val/labels/*.png"}
  tile: 64
  samples_per_epoch: 32
model: {encoder: {name: builtin}, adapter: {name: lora}, decoder: {name: linear}}
train: {epochs: 3, batch_size: 4, optimizer: {lr: 1.0e-3}}
output_dir: run
"""


def write_scene(folder: Path, name: str, seed: int) -> np.ndarray:
    """A bright disc on dark ground and its labels, as PNG files with one name in two folders."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:128, :160]
    disc = (y - random.integers(40, 90)) ** 2 + (x - random.integers(40, 120)) ** 2 < 35**2
    image = (np.where(disc, 170, 70)[..., None] + random.normal(0, 20, (128, 160, 3))).clip(0, 255).astype(np.uint8)
    for kind, picture in (("images", image), ("labels", disc.astype(np.uint8))):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / kind / f"{name}.png")
    return image


def main(folder: Path) -> float:
    write_scene(folder / "train", "one", 1)
    write_scene(folder / "train", "two", 2)
    image = write_scene(folder / "val", "three", 3)
    (folder / "recipe.yaml").write_text(RECIPE)
    result = finetune(load_recipe(folder / "recipe.yaml"), overwrite=True)
    segmenter = Segmenter.from_pretrained(folder / "run" / "best")
    labels = segmenter.predict(image.transpose(2, 0, 1))  # (bands, height, width) -> (height, width) of class ids
    print(
        f"validation mIoU {result['validation']['miou']:.3f}; {100 * (labels == 1).mean():.0f} % of the scene is disc"
    )
    return float(result["validation"]["miou"])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("first_segmenter"))
