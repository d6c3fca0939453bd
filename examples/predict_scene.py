"""Label a scene of any size with a trained segmenter and count the pixels of each class.

python examples/predict_scene.py runs/oam_buildings/best scene.tif labels.tif
"""

import sys

import rasterio

from vfmseg import Segmenter


def main(checkpoint: str, scene: str, output: str) -> dict[str, int]:
    segmenter = Segmenter.from_pretrained(checkpoint)
    segmenter.predict(scene, output=output, overlap=0.25)  # streams: memory does not grow with the height
    counts = dict.fromkeys(segmenter.classes.values(), 0)
    with rasterio.open(output) as labels:
        for _, window in labels.block_windows(1):
            block = labels.read(1, window=window)
            for class_id, name in segmenter.classes.items():
                counts[name] += int((block == class_id).sum())
    for name, pixels in counts.items():
        print(f"{name}: {pixels:,} pixels")
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:4])
