"""The steps that `pretraining.py` measures, and the process in which one kind of them waits for its turns.

Ours are those of `vfmseg pretrain` and `vfmseg finetune`: parts from a recipe, in the one loop. Theirs are what
somebody would write by hand, with the same batch, mask ratio, AdamW, clipping of gradients and reading of the loss.
Images lie in memory; ours are stacked to a batch in each step, as the loop does it, theirs are cut from one tensor.
This process says "ready" after some steps that warm up; of each line that it is told it does one step and answers with
its seconds, by the clock and of the processor; where nothing more comes it ends with its memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 224
WARM = 3
CLASSES = 5
LAYERS = (3, 6, 9, 12)
"""Blocks whose tokens the decoder takes, of both."""
STORED = 64
"""Images in memory; steps go round them."""
ENDLESS = 10**6
"""Samples of an epoch, more than are ever asked for."""

SIZES: dict[str, dict[str, int]] = {
    "small": {"patch": 14, "width": 256, "depth": 8, "heads": 4, "d_width": 192, "d_depth": 2, "d_heads": 3,
              "batch": 32},
    "base": {"patch": 16, "width": 768, "depth": 12, "heads": 12, "d_width": 512, "d_depth": 8, "d_heads": 16,
             "batch": 4},
}  # fmt: skip
"""small: the recipe of docs/pretrain.md. base: ViT-B/16 and the decoder of He et al. 2022."""
LORA_BATCH = 8


class Turns:
    """Called at the end of each step: waits until the next one is asked for."""

    def __init__(self) -> None:
        self.done = 0
        self.before = resident("VmRSS")

    def __call__(self) -> None:
        """Answer what the step took, and wait. Ends the process where nothing more is asked for."""
        self.done += 1
        if self.done > WARM:
            took = {"clock": time.perf_counter() - self.clock, "cpu": time.process_time() - self.cpu}
            print(json.dumps(took), flush=True)
        elif self.done == WARM:
            print(json.dumps("ready"), flush=True)
        if self.done >= WARM and not sys.stdin.readline():
            print(json.dumps({"peak": resident("VmHWM"), "before": self.before}), flush=True)
            raise SystemExit
        self.clock, self.cpu = time.perf_counter(), time.process_time()


def resident(key: str) -> float:
    """MiB of memory of this process: `VmRSS` now, `VmHWM` at most since it started.

    Not `ru_maxrss`, which a process inherits from the one that starts it.
    """
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


# --------------------------------------------------------------------------------------------------------------- ours


class InMemory:
    """A stream of samples that lie in memory; `mask` draws one for each, as the windows of a run do."""

    def __init__(self, samples: list[Any], mask: Any = None) -> None:
        self.samples, self.mask = samples, mask

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, draw: Any) -> Any:
        import numpy as np

        sample = self.samples[draw.index % len(self.samples)]
        return sample if self.mask is None else self.mask(sample, np.random.default_rng(draw.index))

    def kind(self, draw: Any) -> Hashable:
        """All are of one kind."""
        return ()


class Waits:
    """The watcher of our loop."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def step(self, report: Any) -> None:
        """A step is done."""
        self.turns()

    def epoch(self, state: Any, improved: bool) -> None:
        """Never comes."""


def images(bands: int) -> Tensor:
    """(STORED, bands, SIDE, SIDE), 0 to 255."""
    return 255 * torch.rand(STORED, bands, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def labels() -> Tensor:
    """int64 (STORED, SIDE, SIDE) of CLASSES classes, the same number over squares of 16 pixels."""
    coarse = torch.randint(0, CLASSES, (STORED, SIDE // 16, SIDE // 16), generator=torch.Generator().manual_seed(1))
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)


def input_of(bands: int) -> Any:
    """What a model takes of one modality."""
    from vfmseg.data.inputs import Input
    from vfmseg.geo.bands import Bands

    return Input("image", Bands(), bands, "uint8", "dataset", (127.5,) * bands, (73.6,) * bands)


def samples_of(bands: int, labelled: Tensor | None = None) -> list[Any]:
    from vfmseg.data.image import Image
    from vfmseg.data.sample import Sample

    valid = torch.ones(SIDE, SIDE, dtype=torch.bool)
    return [
        Sample({"image": Image(one, valid)}, None if labelled is None else labelled[i])
        for i, one in enumerate(images(bands))
    ]


def pretrain_recipe(of: Mapping[str, Any]) -> Any:
    """The recipe of a pretraining; `of` as in `Kind` of pretraining.py."""
    from vfmseg.recipe import PretrainRecipe

    size = SIZES[of["size"]]
    modality: dict[str, Any] = {"groups": of["groups"]} if of.get("groups") else {}
    decoder = {name: size[f"d_{name}"] for name in ("width", "depth", "heads")}
    return PretrainRecipe.model_validate(
        {
            "name": "step",
            "data": {"modalities": {"image": modality}, "scenes": {"image": "none.tif"}, "tile": SIDE},
            "model": {"encoder": {"name": "new", **{key: size[key] for key in ("patch", "width", "depth", "heads")}}},
            "objectives": {"mae": {"ratio": of.get("ratio", 0.75), "decoder": decoder}},
            "train": {"epochs": 1, "batch_size": size["batch"], "precision": of["precision"]},
            "output_dir": "run",
        }
    )


def in_the_loop(recipe: Any, model: Any, objectives: Any, sources: dict[str, Any]) -> None:
    """Our loop, as both verbs start it."""
    from vfmseg.build.training import schedule_of
    from vfmseg.training.loop import Loop, Score
    from vfmseg.training.processes import connect
    from vfmseg.training.step import Step

    loop = Loop(
        connect(recipe.train.precision),
        Step(model, objectives),
        sources,
        schedule_of(recipe),
        lambda _: Score(None, {}),
    )
    loop.run(Waits(Turns()))


def our_mae(of: Mapping[str, Any]) -> None:
    """Steps of `vfmseg pretrain`."""
    from vfmseg.build.pretraining import build_encoder, masking_of, objectives_of

    recipe, bands = pretrain_recipe(of), of.get("bands", 3)
    inputs = (input_of(bands),)
    model = build_encoder(recipe, inputs)
    masking = masking_of(recipe.objectives.mae, model, SIDE, inputs)
    source = InMemory(samples_of(bands), masking)
    in_the_loop(recipe, model, objectives_of(recipe, inputs, model), {"unlabelled": source})


def our_lora(of: Mapping[str, Any]) -> None:
    """Steps of `vfmseg finetune`."""
    from vfmseg.build.model import build_model
    from vfmseg.build.training import objectives_of
    from vfmseg.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "name": "step",
            "data": {
                "classes": {number: f"class {number}" for number in range(CLASSES)},
                "modalities": {"image": {}}, "train": {"image": "none.tif", "labels": "none.tif"}, "tile": SIDE,
            },
            "model": {
                "encoder": {"name": "dinov2", "checkpoint": of["vit"], "layers": list(LAYERS)},
                "adapter": {"name": "lora", "rank": 8, "alpha": 16.0, "targets": ["q", "v"]},
                "decoder": {"name": "fpn"},
            },
            "train": {"epochs": 1, "batch_size": LORA_BATCH, "precision": of["precision"]},
            "output_dir": "run",
        }
    )  # fmt: skip
    inputs = (input_of(3),)
    model = build_model(recipe, inputs)
    in_the_loop(recipe, model, objectives_of(recipe, inputs, model), {"train": InMemory(samples_of(3, labels()))})


def our_forward(of: Mapping[str, Any]) -> None:
    """Maps of an encoder, without gradients."""
    from vfmseg.build.pretraining import build_encoder
    from vfmseg.data.sample import collate

    recipe, bands, batch = pretrain_recipe(of), of.get("bands", 3), SIZES[of["size"]]["batch"]
    model = build_encoder(recipe, (input_of(bands),)).eval()
    whole = collate(samples_of(bands)[:batch])
    turns = Turns()
    with torch.no_grad():
        while True:
            model.encode(whole.images)
            turns()


# ------------------------------------------------------------------------------------------------------------- theirs


def by_hand(model: nn.Module, loss: Callable[[Tensor, slice], Tensor], batch: int, precision: str) -> None:
    """A plain loop: `loss` of normalised images, and of the numbers of these among all."""
    learning = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=3e-4, weight_decay=0.05)
    pixels = images(3)
    model.train()
    turns = Turns()
    for rows in rounds(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss((pixels[rows] - 127.5) / 73.6, rows)
        value.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value.item()
        turns()


def rounds(batch: int) -> Iterator[slice]:
    """Batches of the images in memory, again and again."""
    while True:
        for first in range(0, STORED, batch):
            yield slice(first, first + batch)


def their_mae(of: Mapping[str, Any]) -> None:
    """transformers' ViTMAEForPreTraining."""
    from transformers.models.vit_mae import ViTMAEConfig, ViTMAEForPreTraining

    size = SIZES[of["size"]]
    config = ViTMAEConfig(
        hidden_size=size["width"], num_hidden_layers=size["depth"], num_attention_heads=size["heads"],
        intermediate_size=4 * size["width"], image_size=SIDE, patch_size=size["patch"],
        decoder_hidden_size=size["d_width"], decoder_num_hidden_layers=size["d_depth"],
        decoder_num_attention_heads=size["d_heads"], decoder_intermediate_size=4 * size["d_width"],
        mask_ratio=of.get("ratio", 0.75), norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    by_hand(model, lambda pixels, _: model(pixels).loss, size["batch"], of["precision"])


def their_lora(of: Mapping[str, Any]) -> None:
    """transformers' Dinov2Model in peft, with the decoder class and the loss functions of vfmseg."""
    from peft import LoraConfig, get_peft_model
    from transformers import Dinov2Model

    from vfmseg.decoders.build import build_decoder
    from vfmseg.encoders.tokens import Features
    from vfmseg.training.losses import cross_entropy, dice

    base = Dinov2Model.from_pretrained(of["vit"])
    leaves = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    targets = ["q_proj", "v_proj"] if "q_proj" in leaves else ["query", "value"]
    width, patch = base.config.hidden_size, base.config.patch_size
    parts = nn.ModuleDict(
        {
            "encoder": get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets)),
            "decoder": build_decoder("fpn", (width,) * len(LAYERS), (float(patch),) * len(LAYERS), CLASSES),
        }
    )
    known, grid = labels(), (SIDE // patch, SIDE // patch)

    def loss(pixels: Tensor, rows: slice) -> Tensor:
        states = parts["encoder"](pixels, output_hidden_states=True).hidden_states
        maps = tuple(base.layernorm(states[i])[:, 1:].transpose(1, 2).unflatten(2, grid) for i in LAYERS)
        seen = torch.ones(len(pixels), *grid)
        logits = parts["decoder"](Features(maps, (seen,) * len(LAYERS), (float(patch),) * len(LAYERS)))
        logits = F.interpolate(logits, (SIDE, SIDE), mode="bilinear").float()
        count = known[rows].numel()
        return cross_entropy(logits, known[rows]) / count + dice(logits, known[rows]) / len(pixels)

    by_hand(parts, loss, LORA_BATCH, of["precision"])


STEPS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "our mae": our_mae, "their mae": their_mae, "our lora": our_lora, "their lora": their_lora, "forward": our_forward,
}  # fmt: skip


def main() -> None:
    """Do the steps that the first argument names, as JSON, until nothing more is asked for."""
    from vfmseg.heap import keep_freed

    keep_freed()  # as the commands of vfmseg do, and theirs too, so that the heap makes no difference
    torch.set_num_threads(1)
    torch.manual_seed(0)
    of = json.loads(sys.argv[1])
    STEPS[of["step"]](of)


if __name__ == "__main__":
    main()
