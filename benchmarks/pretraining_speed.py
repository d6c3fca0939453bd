"""One training step of ours beside one that somebody would write by hand: the tables of docs/pretrain.md, `Speed`.

    python benchmarks/pretraining_speed.py run VIT_FOLDER [--rounds 5] [--steps 8]
    python benchmarks/pretraining_speed.py write

MAE: the loop of `vfmseg pretrain` against `ViTMAEForPreTraining` of transformers in a plain loop: a ViT-S of patch 16,
224 px, batches of 16, a decoder of 4 blocks of width 256, AdamW. LoRA: the loop of `vfmseg finetune` against a plain
loop of transformers, peft and the same decoder and loss: the ViT-S/14 of VIT_FOLDER, 224 px, batches of 8, rank 8 on q
and v. Batches lie in memory. Each measurement is a process of its own, on one thread and with the same heap settings;
ours and theirs take turns, and what is printed is the median of the rounds, the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if __name__ == "__main__" and __package__ is None:  # started as a script, from anywhere
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "pretraining_speed.json"
PAGE = ROOT / "docs" / "pretrain.md"
BELOW = "<!-- tables: python benchmarks/pretraining_speed.py write -->"
SIDE = 224
MAE_BATCH, LORA_BATCH = 16, 8
WIDTH, DEPTH, HEADS, PATCH = 384, 12, 6, 16
DECODER = (256, 4, 8)
CLASSES = 5
LAYERS = (3, 6, 9, 12)
MEAN, STD = [123.7, 116.3, 103.5], [58.4, 57.1, 57.4]

CASES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "MAE, float32": (("mae-ours", "no 0.75"), ("mae-theirs", "no 0.75")),
    "MAE, bf16": (("mae-ours", "bf16 0.75"), ("mae-theirs", "bf16 0.75")),
    "LoRA, float32": (("lora-ours", "no"), ("lora-theirs", "no")),
    "LoRA, bf16": (("lora-ours", "bf16"), ("lora-theirs", "bf16")),
    "MAE, a quarter of the patches visible, against nearly all": (
        ("mae-ours", "no 0.75"),
        ("mae-ours", "no 0.005"),
    ),
    "MAE, three groups of bands against one": (("mae-groups", "no 0.75"), ("mae-ours", "no 0.75")),
}
"""{row: (what is measured, beside what)}; each is a measurement below with its arguments."""


@dataclass
class Memory:
    """A stream whose samples lie in memory."""

    samples: list[Any]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Any) -> Any:
        return self.samples[draw.index]

    def kind(self, draw: Any) -> Hashable:
        """All are of one kind."""
        return ()


def images(count: int, bands: int = 3) -> Tensor:
    """float32 (count, bands, SIDE, SIDE), 0 to 255."""
    return 255 * torch.rand(count, bands, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def seconds_of_steps(run: Callable[[Callable[[], None]], None], warm: int) -> list[float]:
    """Seconds between the ends of steps, after the first `warm`; `run` calls what it is given at the end of each."""
    ends: list[float] = []
    run(lambda: ends.append(time.perf_counter()))
    return [after - before for before, after in zip(ends[warm:], ends[warm + 1 :], strict=False)]


def by_the_loop(step: Any, sources: dict[str, Any], batch: int, precision: str, warm: int) -> list[float]:
    """Seconds of the steps of our loop."""
    from accelerate import Accelerator

    from vfmseg.training.loop import Loop, Score
    from vfmseg.training.schedule import Schedule

    def run(end: Callable[[], None]) -> None:
        class Watch:
            def step(self, report: Any) -> None:
                end()

            def epoch(self, state: Any, improved: bool) -> None:
                pass

        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        Loop(accelerator, step, sources, Schedule(1, batch), lambda _: Score(None, {})).run(Watch())

    return seconds_of_steps(run, warm)


def mae_ours(steps: int, precision: str, ratio: str, groups: int = 1) -> list[float]:
    """The step of `vfmseg pretrain`."""
    from vfmseg.adapters.attach import ADAPTERS
    from vfmseg.data.image import Image
    from vfmseg.data.masks import Masking
    from vfmseg.data.sample import Sample
    from vfmseg.encoders.build import build_new_backbone, build_stem
    from vfmseg.model import Encoder
    from vfmseg.training.objectives.mae import MaskedAutoencoder
    from vfmseg.training.step import Step

    backbone = build_new_backbone(PATCH, WIDTH, DEPTH, HEADS, SIDE, None, 0)
    bands = 3 * groups
    parts = [[3 * group + band for band in (1, 2, 3)] for group in range(groups)] if groups > 1 else None
    stem = build_stem(backbone, {"rgb": bands}, MEAN * groups, STD * groups, **({"groups": parts} if parts else {}))
    model = Encoder(backbone, {"rgb": stem}, ADAPTERS["full"].attach(backbone, ("rgb",)))
    objective = MaskedAutoencoder(model, *DECODER)
    masking = Masking("random", float(ratio), PATCH, groups=groups if groups > 1 else None)
    import numpy as np

    samples = [
        masking(Sample({"rgb": Image(one, torch.ones(SIDE, SIDE, dtype=torch.bool))}, None), np.random.default_rng(i))
        for i, one in enumerate(images(MAE_BATCH * steps, bands))
    ]
    return by_the_loop(Step(model, {"mae": objective}), {"unlabelled": Memory(samples)}, MAE_BATCH, precision, 2)


def mae_groups(steps: int, precision: str, ratio: str) -> list[float]:
    """The same with three groups of three bands."""
    return mae_ours(steps, precision, ratio, 3)


def by_hand(
    model: nn.Module, loss: Callable[[Tensor, int], Tensor], batch: int, steps: int, precision: str
) -> list[float]:
    """Seconds of the steps of a plain loop over batches in memory."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=3e-4, weight_decay=0.05)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = images(batch * steps).split(batch)
    model.train()

    def run(end: Callable[[], None]) -> None:
        for number, batch_ in enumerate(pixels):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                value = loss((batch_ - mean) / std, number)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            value.item()
            end()

    return seconds_of_steps(run, 2)


def mae_theirs(steps: int, precision: str, ratio: str) -> list[float]:
    """transformers' own, in a plain loop."""
    from transformers.models.vit_mae import ViTMAEConfig, ViTMAEForPreTraining

    width, depth, heads = DECODER
    config = ViTMAEConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        image_size=SIDE, patch_size=PATCH, decoder_hidden_size=width, decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads, decoder_intermediate_size=4 * width, mask_ratio=float(ratio),
        norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    return by_hand(model, lambda pixels, _: model(pixels).loss, MAE_BATCH, steps, precision)


def labels_of(steps: int) -> Tensor:
    """int64 (N, SIDE, SIDE) of CLASSES classes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, CLASSES, (LORA_BATCH * steps, SIDE, SIDE), generator=generator)


def lora_ours(steps: int, precision: str, vit: str) -> list[float]:
    """The step of `vfmseg finetune`."""
    from vfmseg.adapters.attach import ADAPTERS
    from vfmseg.data.image import Image
    from vfmseg.data.sample import Sample
    from vfmseg.decoders.build import build_decoder
    from vfmseg.encoders.build import build_backbone, build_stem
    from vfmseg.model import Network
    from vfmseg.training.losses import LOSSES
    from vfmseg.training.objectives.segmentation import Segmentation
    from vfmseg.training.step import Step

    backbone = build_backbone("dinov2", vit, LAYERS)
    stem = build_stem(backbone, {"rgb": 3}, MEAN, STD)
    attached = ADAPTERS["lora"].attach(backbone, ("rgb",), rank=8, alpha=16.0, dropout=0.0, targets=("q", "v"))
    decoder = build_decoder("fpn", backbone.channels, (14.0,) * len(LAYERS), CLASSES)
    model = Network(backbone, {"rgb": stem}, attached, None, decoder, CLASSES)
    objective = Segmentation(
        {"cross_entropy": LOSSES["cross_entropy"](class_weights=None)}, {"cross_entropy": 1.0}, "all"
    )
    valid = torch.ones(SIDE, SIDE, dtype=torch.bool)
    samples = [
        Sample({"rgb": Image(one, valid)}, label)
        for one, label in zip(images(LORA_BATCH * steps), labels_of(steps), strict=True)
    ]
    return by_the_loop(Step(model, {"segmentation": objective}), {"train": Memory(samples)}, LORA_BATCH, precision, 2)


def lora_theirs(steps: int, precision: str, vit: str) -> list[float]:
    """A plain loop of transformers and peft, with the same decoder and loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import Dinov2Model

    from vfmseg.decoders.build import build_decoder
    from vfmseg.encoders.tokens import Features

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = Dinov2Model.from_pretrained(vit)
            names = sorted({name.rsplit(".", 1)[-1] for name, _ in base.named_modules()})
            targets = ["q_proj", "v_proj"] if "q_proj" in names else ["query", "value"]
            self.encoder = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
            self.decoder = build_decoder("fpn", (384,) * len(LAYERS), (14.0,) * len(LAYERS), CLASSES)

        def forward(self, pixels: Tensor) -> Tensor:
            states = self.encoder(pixels, output_hidden_states=True).hidden_states
            side = SIDE // 14
            norm = self.encoder.base_model.model.layernorm
            maps = [norm(states[layer])[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for layer in LAYERS]
            logits = self.decoder(Features(tuple(maps), torch.ones(len(pixels), side, side), (14.0,) * len(LAYERS)))
            return F.interpolate(logits.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)

    model, labels = Model(), labels_of(steps).split(LORA_BATCH)
    return by_hand(
        model, lambda pixels, number: F.cross_entropy(model(pixels), labels[number]), LORA_BATCH, steps, precision
    )


MEASUREMENTS: dict[str, tuple[Callable[..., list[float]], int]] = {
    "mae-ours": (mae_ours, MAE_BATCH),
    "mae-groups": (mae_groups, MAE_BATCH),
    "mae-theirs": (mae_theirs, MAE_BATCH),
    "lora-ours": (lora_ours, LORA_BATCH),
    "lora-theirs": (lora_theirs, LORA_BATCH),
}


def child(what: str, arguments: list[str], steps: int) -> None:
    """Measure in this process, and print it as JSON."""
    from vfmseg.heap import keep_freed

    keep_freed()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure, batch = MEASUREMENTS[what]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = measure(steps, *arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"images": batch / statistics.median(seconds), "peak": peak / 1024, "before": before / 1024}))


def run(options: argparse.Namespace) -> None:
    """All rows, ours and theirs in turn."""
    rows: dict[str, Any] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    for name, pair in CASES.items():
        if options.only and not name.startswith(options.only):
            continue
        found: list[list[dict[str, float]]] = [[], []]
        for _ in range(options.rounds):
            for side, (what, words) in enumerate(pair):
                arguments = words.split() + ([options.vit] if what.startswith("lora") else [])
                command = [sys.executable, __file__, "child", what, "--steps", str(options.steps), "--with", *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
        rows[name] = [{key: [one[key] for one in side] for key in ("images", "peak")} for side in found]
        print("\n".join(lines_of_rows({name: rows[name]})), flush=True)
        told = {"machine": machine(), "torch": torch.__version__, "steps": options.steps, "rounds": options.rounds}
        RESULT.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")


def machine() -> str:
    """Of the processor, in words."""
    import os

    return f"{platform.machine()}, {os.cpu_count()} cores"


def lines_of_rows(rows: dict[str, Any]) -> Iterator[str]:
    """Table rows: images/s of both, the ratio of each pair, and MiB."""
    for name, (one, two) in rows.items():
        ratios = [a / b for a, b in zip(one["images"], two["images"], strict=True)]
        yield (
            f"| {name} | {_spread(one['images'], 1)} | {_spread(two['images'], 1)} | {_spread(ratios, 2)} | "
            f"{statistics.median(one['peak']):.0f} | {statistics.median(two['peak']):.0f} |"
        )


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def write() -> None:
    """Put the table into the page."""
    found = json.loads(RESULT.read_text())
    lines = [
        "| step | images/s | of what it is compared with | ratio | peak MiB | of that |",
        "|---|--:|--:|--:|--:|--:|",
        *lines_of_rows(found["rows"]),
        "",
        f"{found['machine']}, one thread, torch {found['torch']}; medians of {found['rounds']} rounds (lowest to "
        f"highest), each the median of {found['steps'] - 3} steps.",
    ]
    top, _, rest = PAGE.read_text(encoding="utf-8").partition(BELOW)
    _, heading, after = rest.partition("\n## ")  # what follows the table stays
    PAGE.write_text(top + BELOW + "\n\n" + "\n".join(lines) + "\n" + heading + after, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("vit", help="folder of the ViT-S/14")
    running.add_argument("--rounds", type=int, default=5)
    running.add_argument("--steps", type=int, default=8)
    running.add_argument("--only", help="rows whose names start so")
    measuring = commands.add_parser("child")
    measuring.add_argument("what", choices=MEASUREMENTS)
    measuring.add_argument("--with", dest="arguments", nargs="*", default=[])
    measuring.add_argument("--steps", type=int, default=8)
    commands.add_parser("write")
    options = parser.parse_args()
    if options.command == "child":
        child(options.what, options.arguments, options.steps)
    elif options.command == "run":
        run(options)
    else:
        write()


if __name__ == "__main__":
    main()
