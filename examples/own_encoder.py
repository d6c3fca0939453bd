"""Use an encoder from a folder that transformers wrote: look at what it returns, put LoRA on it, see what learns.

python examples/own_encoder.py ENCODER_FOLDER [sam|dinov2|clip]
"""

import sys

import torch

from vfmseg.adapters.attach import ADAPTERS
from vfmseg.catalog import FAMILIES
from vfmseg.data.image import Image
from vfmseg.decoders.build import build_decoder
from vfmseg.encoders.build import build_backbone, build_stem
from vfmseg.model import Network, parameter_table


def main(folder: str, family: str = "dinov2") -> tuple[str, ...]:
    backbone = build_backbone(family, folder)
    mean, std = ([255 * value for value in values] for values in FAMILIES[family].statistics)  # of 8-bit files
    stem = build_stem(backbone, {"rgb": 3}, mean, std, upscale=1.5)
    attached = ADAPTERS["lora"].attach(backbone, ("rgb",), rank=8, alpha=16.0, dropout=0.0, targets=("q", "v"))
    strides = (backbone.patch / stem.upscale,) * len(backbone.layers)
    decoder = build_decoder("fpn", backbone.channels, strides, classes=2)
    network = Network(backbone, {"rgb": stem}, attached, None, decoder, classes=2)

    # any height and width, in the units of 8-bit files
    image = Image(torch.rand(1, 3, 200, 300) * 255, torch.ones(1, 200, 300, dtype=torch.bool))
    features = network.encode({"rgb": image})["rgb"]
    for layer, feature_map, stride in zip(backbone.layers, features.maps, features.strides):
        print(f"block {layer}: {tuple(feature_map.shape)}, one cell every {stride:.1f} pixels")
    print(f"logits: {tuple(network({'rgb': image}).shape)}")
    for part, trainable, total in parameter_table(network):
        print(f"{part}: {trainable:,} of {total:,} parameters learn")
    print(f"LoRA sits on {len(attached.sites)} layers, the first is {attached.sites[0]}")
    return attached.sites


if __name__ == "__main__":
    main(*sys.argv[1:3])
