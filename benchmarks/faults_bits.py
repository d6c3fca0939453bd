"""Trials: one bit of a file is turned over, and the file is used.

Held: the file is refused by name with exit code 2; or a piece is labelled again and the map is byte-equal to an
undisturbed one; or, of a text or a header, the bit means nothing and the map says the same.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from faults_calls import Call, Decision
from faults_lab import Ended, Trial, contents, difference, map_of, recipe, require, run, run_watched

PIECES = ("--confidence",)  # of labels and of a product whose numbers do not compress away
EACH = 10  # bits turned over in each file
OUT = "out"

# a segmenter, and a file in its folder
FILES = [
    ("lora", "head.safetensors"),
    ("lora", "adapters/rgb/adapter_model.safetensors"),
    ("lora", "adapters/rgb/adapter_config.json"),
    ("lora", "segmenter.json"),
    ("lora", "recipe.yaml"),
    ("adapter", "adapters/rgb/adapter.safetensors"),
    ("full", "encoder.safetensors"),
    ("full", "head.safetensors"),
]


def bits(lab: Path, seed: int) -> Iterator[Trial]:
    """Bits of the files of segmenters, of the encoder, of a run's state and of pieces, chosen by `seed`."""
    for name, file in FILES:
        for bit in _chosen(lab / name / "run" / "best" / file, seed):
            yield Trial(f"bit {bit} of {name}/best/{file}", _of_segmenter(lab, name, file, bit))
    for bit in _chosen(lab / "encoder" / "model.safetensors", seed):
        yield Trial(f"bit {bit} of encoder/model.safetensors", _of_encoder(lab, bit))
    stopped, finished = stopped_run(lab)
    for bit in _chosen(stopped / OUT / "state.pt", seed):
        yield Trial(f"bit {bit} of state.pt", _of_state(stopped, finished, bit))
    half = stopped_labelling(lab)
    for piece in sorted((half / OUT).rglob("*_0*.tif")):
        for bit in _chosen(piece, seed):
            yield Trial(f"bit {bit} of the piece {piece.name}", _of_piece(lab, half, piece.relative_to(half), bit))


def _chosen(file: Path, seed: int) -> list[int]:
    return sorted(random.Random(f"{seed} {file.name}").sample(range(8 * file.stat().st_size), EACH))


def flip(file: Path, bit: int) -> None:
    """Turn a bit over."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def label(checkpoint: Path, lab: Path, *options: str) -> list[str]:
    """The command that labels the scene."""
    return ["predict", str(checkpoint), f"{lab}/scene.tif", "-o", f"{OUT}/m.tif", *options]


def answer(lab: Path, name: str, *options: str) -> Path:
    """The map that a sound segmenter makes; made once."""
    here = lab / "answers" / "".join([name, *options])
    if not here.is_dir():
        here.mkdir(parents=True)
        require(run(label(lab / name / "run" / "best", lab, *options), here))
    return here / OUT / "m.tif"


def refused_or_same(ended: Ended, names: str, made: Path, sound: Path, may_pass: bool = True) -> str:
    """Empty if a file was refused by name, or (with `may_pass`) the map says what that of the sound file says."""
    if ended.code:
        return ended.refusal(names=names)
    if not may_pass:
        return "passed unnoticed"
    return "" if map_of(made) == map_of(sound) else "another map, exit code 0 and no word"


def in_header(file: Path, bit: int) -> bool:
    """Whether a bit lies before the numbers of a safetensors file, or in a text."""
    return file.suffix != ".safetensors" or bit // 8 < 8 + int.from_bytes(file.read_bytes()[:8], "little")


def _of_segmenter(lab: Path, name: str, file: str, bit: int) -> Callable[[Path], str]:
    best, sound = lab / name / "run" / "best", answer(lab, name)

    def act(here: Path) -> str:
        shutil.copytree(best, here / "best")
        flip(here / "best" / file, bit)
        ended = run(label(here / "best", lab), here)
        text = not file.endswith(".safetensors")  # what it says may not fit another file, which is named then
        names = "best" if text else "adapters/rgb" if "rgb" in file else Path(file).name
        return refused_or_same(ended, names, here / OUT / "m.tif", sound, in_header(best / file, bit))

    return act


def _of_encoder(lab: Path, bit: int) -> Callable[[Path], str]:
    sound = answer(lab, "lora")

    def act(here: Path) -> str:
        shutil.copytree(lab / "encoder", here / "encoder")
        flip(here / "encoder" / "model.safetensors", bit)
        ended = run(label(lab / "lora" / "run" / "best", lab, "--encoder", str(here / "encoder")), here)
        passes = in_header(lab / "encoder" / "model.safetensors", bit)
        return refused_or_same(ended, "encoder", here / OUT / "m.tif", sound, passes)

    return act


def _of_state(stopped: Path, finished: Path, bit: int) -> Callable[[Path], str]:
    def act(here: Path) -> str:
        shutil.copytree(stopped, here, dirs_exist_ok=True)
        flip(here / OUT / "state.pt", bit)
        ended = run(["finetune", "r.yaml", "--resume"], here)
        if ended.code:
            return ended.refusal(names="state.pt")
        return difference(contents(here / OUT), contents(finished / OUT)) or "passed unnoticed"

    return act


def _of_piece(lab: Path, half: Path, piece: Path, bit: int) -> Callable[[Path], str]:
    sound = contents(answer(lab, "lora", *PIECES).parent)

    def act(here: Path) -> str:
        shutil.copytree(half, here, dirs_exist_ok=True)
        flip(here / piece, bit)
        ended = run(label(lab / "lora" / "run" / "best", lab, *PIECES, "--resume"), here)
        return ended.refusal(names=piece.name) if ended.code else difference(contents(here / OUT), sound)

    return act


# ------------------------------------------------------------------------------------------------------ stopped halfway


def stopped_labelling(lab: Path) -> Path:
    """A labelling that was killed when it had finished two pieces; made once."""
    here = lab / "starts" / "labelling"
    pieces: list[str] = []

    def decide(number: int, call: Call) -> Decision:
        pieces.extend([call.path] * (call.name == "rename" and "labels_" in call.path))
        return "kill" if len(pieces) == 3 else "go"

    if not here.is_dir():
        here.mkdir(parents=True)
        run_watched(label(lab / "lora" / "run" / "best", lab, *PIECES), here, here / OUT, decide)
    return here


def stopped_run(lab: Path) -> tuple[Path, Path]:
    """A training that was killed early in its second epoch, and the same one undisturbed; made once."""
    both = lab / "starts" / "training", lab / "finished" / "training"
    renamed: list[str] = []

    def decide(number: int, call: Call) -> Decision:
        renamed.extend([call.path] * (call.name == "rename"))
        epoch_ends = [i for i, path in enumerate(renamed) if "metrics.jsonl" in path]
        saved = bool(epoch_ends) and any("state.pt" in path for path in renamed[epoch_ends[0] :])
        return "kill" if saved and call.path.startswith(".best") else "go"

    for here in both:
        if not here.is_dir():
            here.mkdir(parents=True)
            text = yaml.safe_dump(recipe(lab, "lora") | {"output_dir": OUT}, sort_keys=False)
            (here / "r.yaml").write_text(text, encoding="utf-8")
            if here is both[0]:
                run_watched(["finetune", "r.yaml"], here, here / OUT, decide)
            else:
                require(run(["finetune", "r.yaml"], here))
    return both
