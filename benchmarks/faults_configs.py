"""Trials: configurations and checkpoints that are broken, or mean harm.

Held: the file is refused with exit code 2 or 3 and one message, within 10 s and 2 GiB; or what is broken means nothing
and the map says what the sound one says. Nothing in a file is ever run: each trial that offers code looks for its mark.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from faults_bits import OUT, answer, label, refused_or_same, stopped_run
from faults_lab import Trial, recipe, run

# a segmenter, a file of it (or of its encoder), and the entries in it that decide something
FILES: list[tuple[str, str, tuple[str, ...]]] = [
    ("lora", "best/adapters/rgb/adapter_config.json", ()),
    ("lora", "best/segmenter.json", ("format", "encoder", "input")),
    ("full", "best/segmenter.json", ("encoder",)),
    ("lora", "encoder/config.json", ()),
]
HARMLESS = ("transformers_version", "peft_version", "architectures", "revision", "initializer_range", "dtype", "id")

WRONG: dict[type, list[Any]] = {
    bool: [None, [], "x", 2],
    int: [None, [], "x", 0, -1, 1.5, 10**9, math.nan],
    float: [None, [], "x", -1.0, math.nan, math.inf],
    str: [None, [], {}, 0, "x", "x" * 100_000],
    list: [None, {}, "x", 0, [None], [[]]],
    dict: [None, [], "x", 0],
    type(None): [[], {}, "x", 0],
}

TEXTS = {
    "empty": "", "null": "null", "a list": "[]", "a number": "NaN", "cut short": '{"a": ', "bytes": "\ufffd\0",
    "lists 200,000 deep": "[" * 200_000, "mappings 200,000 deep": '{"a":' * 200_000,
    "closed lists 5,000 deep": "[" * 5_000 + "]" * 5_000, "a number of 10,000 digits": "9" * 10_000,
}  # fmt: skip

_DOUBLED = "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 31))
BOMBS = {
    "aliases under name": "name: [&a0 x, " + ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 31)) + "]\n",
    "aliases as keys": f"a0: &a0 x\n{_DOUBLED}\n",
    "aliases as the top list": "- &a0 [x]\n" + "".join(f"- &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 31)),
    "merged mappings": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 31)),
    "an alias of itself": "&a [*a]",
    "a Python object": "name: !!python/object/apply:os.system ['touch ran']\n",
    "lists 200,000 deep": "name: " + "[" * 200_000,
    "mappings 5,000 deep": "{a: " * 5_000 + "}" * 5_000,
    "a number of 10,000 digits": "seed: " + "9" * 10_000,
    "a huge exponent": "seed: 1e999999999\n",
    "a list": "[1, 2]", "a word": "x", "bytes": "name: \x07\n", "two documents": "name: a\n---\nname: b\n",
}  # fmt: skip


def configs(lab: Path) -> Iterator[Trial]:
    """Wrong values in JSON, texts that are none, recipes, code where a name is expected, tensors of other kinds."""
    for name, file, keys in FILES:
        content = json.loads((_origin(lab, name, file)).read_text(encoding="utf-8"))
        for path, value in _leaves(content, ()):
            if (keys and path[0] not in keys) or path[-1] in HARMLESS:
                continue
            for wrong in WRONG[type(value)]:
                title = f"{name}/{file}: {'.'.join(map(str, path))} = {json.dumps(wrong)[:40]}"
                yield Trial(title, _changed(lab, name, file, _with(content, path, wrong)))
        for title, text in TEXTS.items():
            yield Trial(f"{name}/{file}: {title}", _changed(lab, name, file, text))
    yield from _recipes(lab)
    yield from _code(lab)
    yield from _tensors(lab)


def _origin(lab: Path, name: str, file: str) -> Path:
    return lab / file if file.startswith("encoder/") else lab / name / "run" / file


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of everything in a JSON value, inner mappings and lists too."""
    if path:
        yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _leaves(item, (*path, key))


def _with(content: Any, path: tuple[Any, ...], value: Any) -> str:
    changed = json.loads(json.dumps(content))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(changed)


def _changed(lab: Path, name: str, file: str, text: str) -> Callable[[Path], str]:
    return _tried(lab, name, lambda here: (here / file).write_text(text, encoding="utf-8", errors="replace"))


def _tried(lab: Path, name: str, change: Callable[[Path], Any]) -> Callable[[Path], str]:
    """Copies of a segmenter (best/) and its encoder (encoder/) are changed, and label the scene."""

    sound = answer(lab, name)

    def act(here: Path) -> str:
        shutil.copytree(lab / name / "run" / "best", here / "best")
        shutil.copytree(lab / "encoder", here / "encoder")
        change(here)
        own = () if name == "full" else ("--encoder", str(here / "encoder"))
        ended = run(label(here / "best", lab, *own), here)
        if (here / "ran").exists():
            return f"code in a file was run; exit code {ended.code}"
        return refused_or_same(ended, "", here / OUT / "m.tif", sound) or ended.dear()

    return act


def _recipes(lab: Path) -> Iterator[Trial]:
    for title, text in BOMBS.items():

        def trained(here: Path, text: str = text) -> str:
            (here / "r.yaml").write_text(text, encoding="utf-8")
            ended = run(["finetune", "r.yaml"], here)
            return "code in a recipe was run" if (here / "ran").exists() else ended.refusal()

        yield Trial(f"finetune with a recipe of {title}", trained)
        yield Trial(f"lora/best/recipe.yaml: {title}", _changed(lab, "lora", "best/recipe.yaml", text))
    content = recipe(lab, "lora")
    for path, value in _leaves(content, ()):
        if path[0] in ("output_dir", "name") or len(path) > 3:
            continue
        for wrong in WRONG[type(value)]:
            text = _with(content, path, wrong)
            yield Trial(f"finetune with {'.'.join(map(str, path))} = {json.dumps(wrong)[:40]}", _finetune(text))


def _finetune(text: str) -> Callable[[Path], str]:
    """A wrong value may happen to be a right one: then the training ends well."""

    def act(here: Path) -> str:
        (here / "r.yaml").write_text(yaml.safe_dump(json.loads(text)), encoding="utf-8")
        ended = run(["finetune", "r.yaml"], here)
        return ended.dear() if ended.code == 0 else ended.refusal()

    return act


class _Marks:
    """Pickled, it leaves a mark where it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("ran", "w")


def _code(lab: Path) -> Iterator[Trial]:
    kernels = ("owner/kernel", "owner/kernel@v1:forward", "paged|owner/kernel", "flash_attention_2", "x", ["a/b"])
    for name, file in (("lora", "encoder/config.json"), ("full", "best/segmenter.json")):
        content = json.loads(_origin(lab, name, file).read_text(encoding="utf-8"))
        path = ("encoder", "config") if name == "full" else ()
        for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
            for value in kernels:
                text = _with(content, (*path, key), value)
                yield Trial(f"{name}/{file}: {key} = {json.dumps(value)}", _changed(lab, name, file, text))
        for key, value in {
            "auto_map": {"AutoModel": "code.Model", "AutoConfig": "code.Config"},
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "trust_remote_code": True,
            "custom_pipelines": {"x": {"impl": "code.Model"}},
        }.items():
            text = _with(content, (*path, key), value)
            yield Trial(f"{name}/{file}: {key} = {json.dumps(value)}", _with_code(lab, name, file, text))
    for name, file, gone in [
        ("lora", "best/head.bin", "best/head.safetensors"),
        ("lora", "best/head.safetensors", ""),
        ("lora", "best/adapters/rgb/adapter_model.bin", "best/adapters/rgb/adapter_model.safetensors"),
        ("lora", "encoder/pytorch_model.bin", "encoder/model.safetensors"),
        ("full", "best/encoder.safetensors", ""),
    ]:
        yield Trial(f"{name}/{file}: a pickle that runs code", _tried(lab, name, _pickled(file, gone)))
    stopped, _ = stopped_run(lab)

    def resumed(here: Path) -> str:
        shutil.copytree(stopped, here, dirs_exist_ok=True)
        (here / OUT / "state.pt").write_bytes(pickle.dumps(_Marks()))
        ended = run(["finetune", "r.yaml", "--resume"], here)
        return "code in a state was run" if (here / "ran").exists() else ended.refusal()

    yield Trial("state.pt: a pickle that runs code", resumed)


def _with_code(lab: Path, name: str, file: str, text: str) -> Callable[[Path], str]:
    def change(here: Path) -> None:
        (here / file).write_text(text, encoding="utf-8")
        for folder in ("best", "encoder"):
            (here / folder / "code.py").write_text("open('ran', 'w')\n", encoding="utf-8")

    return _tried(lab, name, change)


def _pickled(file: str, gone: str) -> Callable[[Path], None]:
    def change(here: Path) -> None:
        (here / file).write_bytes(pickle.dumps(_Marks()))
        if gone:
            (here / gone).unlink()

    return change


def _tensors(lab: Path) -> Iterator[Trial]:
    """Tensors of types, values and places that no training writes."""
    head, encoder = "best/head.safetensors", "encoder/model.safetensors"
    for kind in ("I8", "F8_E4M3", "BOOL", "I64", "C64"):
        yield Trial(f"lora/{head}: tensors of {kind}", _tried(lab, "lora", _retyped(head, kind)))
        yield Trial(f"lora/{encoder}: tensors of {kind}", _tried(lab, "lora", _retyped(encoder, kind)))
    for title, header in {
        "a header of 2^62 bytes": (2**62).to_bytes(8, "little"),
        "a tensor of 2^40 numbers": _header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "a negative shape": _header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        "nothing": b"",
    }.items():
        for file in (head, encoder):
            yield Trial(
                f"lora/{file}: {title}", _tried(lab, "lora", lambda here, f=file, b=header: (here / f).write_bytes(b))
            )
    for where in ("../outside.safetensors", "/etc/outside.safetensors"):
        yield Trial(f"an encoder whose index names {where}", _tried(lab, "lora", _index(where)))


def _header(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


def _retyped(file: str, kind: str) -> Callable[[Path], None]:
    """The same numbers of tensors, all zero, of another type."""
    sizes = {"I8": 1, "F8_E4M3": 1, "BOOL": 1, "I64": 8, "C64": 8}

    def change(here: Path) -> None:
        data = (here / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries, at = json.loads(data[8 : 8 + length]), 0
        for name, entry in entries.items():
            if name != "__metadata__":
                size = math.prod(entry["shape"]) * sizes[kind]
                entry |= {"dtype": kind, "data_offsets": [at, at + size]}
                at += size
        (here / file).write_bytes(_header(entries) + bytes(at))

    return change


def _index(where: str) -> Callable[[Path], None]:
    def change(here: Path) -> None:
        data = (here / "encoder" / "model.safetensors").read_bytes()
        names = [n for n in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if n != "__metadata__"]
        (here / "encoder" / "model.safetensors").rename(here / "outside.safetensors")
        index = {"metadata": {"total_size": len(data)}, "weight_map": dict.fromkeys(names, where)}
        (here / "encoder" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return change
