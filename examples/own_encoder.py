"""Use an encoder from a folder that transformers wrote: look at what it returns, put LoRA on it, see what learns.

python examples/own_encoder.py ENCODER_FOLDER [sam|dinov2|clip]
"""

import sys

import torch

from vfmseg.adapters.attach import attach_lora, parameter_table
from vfmseg.decoders.build import build_decoder
from vfmseg.encoders.build import build_encoder


def main(folder: str, family: str = "dinov2") -> tuple[str, ...]:
    encoder = build_encoder(family, folder, in_channels=3, upscale=1.5)
    images = torch.rand(1, 3, 200, 300) * 255  # any height and width, in the units of 8-bit files
    features = encoder(images, torch.ones_like(images, dtype=torch.bool))
    for layer, feature_map, stride in zip(encoder.layers, features.maps, features.strides):
        print(f"block {layer}: {tuple(feature_map.shape)}, one cell every {stride:.1f} pixels")
    attached = attach_lora(encoder, rank=8, alpha=16.0, dropout=0.0, targets=("q", "v"))
    decoder = build_decoder("fpn", encoder.channels, encoder.strides, classes=2)
    for part, trainable, total in parameter_table(encoder, attached, decoder):
        print(f"{part}: {trainable:,} of {total:,} parameters learn")
    print(f"LoRA sits on {len(attached.sites)} layers, the first is {attached.sites[0]}")
    return attached.sites


if __name__ == "__main__":
    main(*sys.argv[1:3])
