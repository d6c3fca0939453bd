"""The masked autoencoder of transformers and ours: the same weights and masks give the same loss and gradients.

A Dinov2 whose scales of layers are 1 computes what the encoder of a ViTMAE computes, so its weights are renamed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_models import Encoder, encoder_of
from masked_models import batch_of, loss_of
from torch import Tensor

from vfmseg.encoders.backbone import Backbone, BaseRecord
from vfmseg.encoders.dinov2 import DINOV2
from vfmseg.training.objectives.mae import MaskedAutoencoder


def upstream_mae(**changes: Any) -> Any:
    """A tiny ViTMAEForPreTraining, every tensor random but the positions, which are fixed there."""
    from transformers.models.vit_mae import ViTMAEConfig, ViTMAEForPreTraining

    settings: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 56, "patch_size": 14, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 96, "layer_norm_eps": 1e-6, "mask_ratio": 0.75,
    }  # fmt: skip
    model = ViTMAEForPreTraining(ViTMAEConfig(**settings | changes))
    # a fresh one of transformers 5.24 has positions of zero, as it clears them after filling; published files hold some
    model.decoder.initialize_weights(model.vit.embeddings.patch_embeddings.num_patches)
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.15 * torch.randn(parameter.shape)
                parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model


def same_encoder(mae: Any) -> Encoder:
    """The encoder of `mae` as a Dinov2 whose scales of layers are 1: there both compute the same."""
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    of = mae.config
    config = Dinov2Config(
        hidden_size=of.hidden_size, num_hidden_layers=of.num_hidden_layers, layer_norm_eps=of.layer_norm_eps,
        num_attention_heads=of.num_attention_heads, mlp_ratio=of.intermediate_size // of.hidden_size,
        image_size=of.image_size, patch_size=of.patch_size, layerscale_value=1.0,
    )  # fmt: skip
    network = Dinov2Model(config)
    renamed = {encoder_name(name): tensor for name, tensor in mae.vit.state_dict().items()}
    left = network.load_state_dict(renamed, strict=False)
    assert left.unexpected_keys == []
    assert all("layer_scale" in name or "mask_token" in name for name in left.missing_keys)
    backbone = Backbone(DINOV2, network, [of.num_hidden_layers], False, BaseRecord("mae", None, ""))
    encoder = encoder_of(backbone, 3, [100.0, 110.0, 120.0], [50.0, 60.0, 40.0])
    backbone.network.requires_grad_(True)
    return encoder


def encoder_name(name: str) -> str:
    name = name.replace("layers.", "encoder.layer.")
    return name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")


def decoder_tensors(mae: Any, gradients: bool) -> dict[str, Tensor]:
    """{name of ours: tensor} of the decoder of `mae`, or its gradients; q, k and v are one layer here."""
    theirs = {n: p.grad if gradients else p.detach() for n, p in mae.decoder.named_parameters() if p.requires_grad}
    found = {
        "embed.weight": theirs["decoder_embed.weight"], "embed.bias": theirs["decoder_embed.bias"],
        "mask_token": theirs["mask_token"],
        "norm.weight": theirs["decoder_norm.weight"], "norm.bias": theirs["decoder_norm.bias"],
        "heads.of_image.weight": theirs["decoder_pred.weight"], "heads.of_image.bias": theirs["decoder_pred.bias"],
    }  # fmt: skip
    parts = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "out": "attention.o_proj", "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }  # fmt: skip
    for i in range(len(mae.decoder.decoder_layers)):
        of = f"decoder_layers.{i}."
        for kind in ("weight", "bias"):
            found |= {f"blocks.{i}.{ours}.{kind}": theirs[f"{of}{part}.{kind}"] for ours, part in parts.items()}
            three = [theirs[f"{of}attention.{one}_proj.{kind}"] for one in "qkv"]
            found[f"blocks.{i}.qkv.{kind}"] = torch.cat(three)
    return found


def same_objective(mae: Any, encoder: Encoder, normalise: Any) -> MaskedAutoencoder:
    of = mae.config
    objective = MaskedAutoencoder(
        encoder,  # type: ignore[arg-type]
        of.decoder_hidden_size, of.decoder_num_hidden_layers, of.decoder_num_attention_heads, normalise,
    )  # fmt: skip
    objective.decoder.load_state_dict(decoder_tensors(mae, gradients=False))
    return objective


@pytest.mark.parametrize("normalise", ["patch", None])
def test_loss_and_gradients_are_those_of_transformers(normalise: Any) -> None:
    mae = upstream_mae(norm_pix_loss=normalise == "patch")
    encoder = same_encoder(mae)
    objective = same_objective(mae, encoder, normalise)
    images = 255 * torch.rand(3, 3, 56, 56)
    noise = torch.rand(3, 16)
    stem = encoder.image_stem
    upstream = mae((images - stem.mean[:, None, None]) / stem.std[:, None, None], noise=noise)
    upstream.loss.backward()
    batch = batch_of(images, upstream.mask.bool().unflatten(1, (4, 4)))
    loss = loss_of(objective, encoder, batch)
    loss.backward()
    assert abs(loss.item() / upstream.loss.item() - 1) < 1e-5
    theirs = {encoder_name(n): p.grad for n, p in mae.vit.named_parameters() if p.requires_grad}
    mine = {name: encoder.backbone.network.get_parameter(name).grad for name in theirs}
    ofs = decoder_tensors(mae, gradients=True)
    mine |= {name: objective.decoder.get_parameter(name).grad for name in ofs}
    theirs |= ofs
    errors = {name: float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}
    # what a key's bias adds to a query's scores is the same for all keys, so its true gradient is zero
    zero = [name for name in theirs if name.endswith("k_proj.bias")]
    assert all(theirs[name].norm() < 1e-5 and mine[name].norm() < 1e-5 for name in zero)
    assert len(errors) == 5 + 3 * 16 + 7 + 2 * 12
    worst = max(error for name, error in errors.items() if name not in zero)
    assert worst < 1e-5
