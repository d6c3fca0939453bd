"""Encoders as transformers saves them: a folder or a hub id with config.json and safetensors, read strictly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vfmseg.catalog import FAMILIES
from vfmseg.disk.jsonfile import read_json
from vfmseg.disk.paths import require_file
from vfmseg.encoders.backbone import BaseRecord, Family, sha256_of
from vfmseg.encoders.formats.format import Format
from vfmseg.encoders.formats.settings import MOST_PARAMETERS, plain_settings
from vfmseg.encoders.formats.strangers import stranger
from vfmseg.errors import CheckpointError, show


def load_published(family: Family, checkpoint: str, revision: str | None) -> tuple[nn.Module, BaseRecord]:
    """The whole image encoder, in float32, with the record of what was read.

    Raises CheckpointError if the checkpoint is not there, is of another family, holds code instead of tensors, or
    lacks or adds a tensor of the image encoder.
    """
    folder = _folder_of(checkpoint)
    source = str(folder) if folder else checkpoint
    if folder:
        revision = None  # a revision names a state of a hub repository
    with quick_imports():
        config = _config_of(source, checkpoint, revision)
        cls = family.model_class(check_model_type(family, config, checkpoint))
    if folder:
        _require_own_files(folder)
    settings = plain_settings(
        cls.config_class, config, f"{checkpoint}: config.json", _bytes_of(folder) if folder else MOST_PARAMETERS
    )
    model, loading = _read(cls, settings, source, checkpoint, revision)
    _check_complete(family, checkpoint, loading)
    commit = None if folder or not isinstance(config.get("_commit_hash"), str) else config["_commit_hash"]
    return model, BaseRecord(checkpoint, revision or commit, sha256_of(model.state_dict()))


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pause garbage collection: while modules are imported it finds nothing and takes about a seventh of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def check_model_type(family: Family, config: dict[str, Any], checkpoint: str) -> str:
    """`model_type` of a config, if the family reads it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES[family.name].model_types:
        raise CheckpointError(
            f"{checkpoint}: config.json says model_type = {show(model_type)}, but the encoder {family.name} reads "
            f"{' or '.join(FAMILIES[family.name].model_types)}; choose the encoder that fits the checkpoint, or a "
            "checkpoint that vfmseg reads (checkpoints.md)"
        )
    return model_type


def _folder_of(checkpoint: str) -> Path | None:
    """The local folder that `checkpoint` names, or None for a hub id."""
    path = Path(checkpoint).expanduser()
    if path.is_file() or path.is_dir():
        for file in path.iterdir() if path.is_dir() else ():
            require_file(file)
        other = stranger(path)
        if other is not None:
            raise CheckpointError(f"{checkpoint}: {other}")
        return path
    if path.is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") != 1:
        raise CheckpointError(
            f"{checkpoint}: no such folder, and not a hub id (OWNER/NAME); give the folder that holds config.json"
        )
    return None


def _config_of(source: str, checkpoint: str, revision: str | None) -> dict[str, Any]:
    """The content of config.json."""
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        adapter = find_adapter_config_file(source, revision=revision)
    except MemoryError:
        raise
    except Exception as error:  # not there, no JSON, no mapping, nested without end: each its own class
        raise CheckpointError(_not_found(checkpoint, error)) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{checkpoint}: its config.json holds no settings but a list or a value; copy it again")
    if adapter is not None:  # transformers would load it as well, or another model that it names
        raise CheckpointError(
            f"{checkpoint}: holds an adapter (adapter_config.json) that is not merged; expected an encoder alone: "
            "merge it (merge_and_unload of peft) and save the model anew"
        )
    return config


def _require_own_files(folder: Path) -> None:
    """CheckpointError for an index of weights that names anything but files of this folder."""
    for file in sorted(folder.glob("*.index.json")):
        try:
            named = set(read_json(file)["weight_map"].values())
            outside = sorted(name for name in named if Path(name).name != name)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(
                f"{file}: is no index of weights ({type(error).__name__}: {error}); copy the folder again"
            ) from None
        if outside:
            raise CheckpointError(f"{file}: names {outside[0]!r}; expected files of its own folder; copy it again")


def _bytes_of(folder: Path) -> float:
    """Size of the weights in a folder: they hold no more parameters than that."""
    return float(sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)))


def _not_found(checkpoint: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{checkpoint}: its config.json cannot be read ({reason}); expected a folder written by save_pretrained of "
        "transformers, or a hub id that can be reached or is in the cache already"
    )


def _read(
    cls: Any, settings: Any, source: str, checkpoint: str, revision: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    with _quiet():
        try:
            # float32 whatever the file holds: training and the hash start from one type
            return cls.from_pretrained(
                source, config=settings, revision=revision, dtype=torch.float32, output_loading_info=True
            )
        except MemoryError:
            raise
        except Exception as error:  # safetensors', pickle's, transformers' own and whatever these run into
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{checkpoint}: its weights cannot be read as tensors ({reason}); expected model.safetensors as "
                "save_pretrained of transformers writes it"
            ) from None


def _check_complete(family: Family, checkpoint: str, loading: dict[str, Any]) -> None:
    missing = sorted(loading["missing_keys"])
    extra = sorted(name for name in loading["unexpected_keys"] if not name.startswith(family.other_parts))
    shapes = sorted(str(entry[0]) for entry in loading["mismatched_keys"])
    parts = [("missing", missing), ("not expected", extra), ("of another shape", shapes)]
    found = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in parts if names]
    if found:
        unmerged = any(".lora_" in name or ".base_layer." in name for name in extra)
        remedy = (
            "an adapter is not merged into them: merge it (merge_and_unload of peft), then save_pretrained"
            if unmerged
            else "copy or download the checkpoint again"
        )
        raise CheckpointError(
            f"{checkpoint}: tensors of the image encoder do not fit its config.json: {'; '.join(found)}; {remedy}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers meanwhile: vfmseg checks and reports for itself."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _reads(checkpoint: str) -> bool:
    """Whether it is a folder with config.json, or may be a hub id."""
    path = Path(checkpoint).expanduser()
    return (path / "config.json").is_file() or not path.exists()


def _config(network: nn.Module) -> dict[str, Any]:
    upstream: Any = network
    values: dict[str, Any] = upstream.config.to_diff_dict()
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def _random(
    family: Family, config: dict[str, Any], seed: int, place: str, most: float, blocks: int | None
) -> nn.Module:
    with quick_imports():
        cls = family.model_class(check_model_type(family, config, place))
    settings = plain_settings(cls.config_class, config, place, most, blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = cls(settings)
    return network


TRANSFORMERS = Format(_reads, load_published, _config, _random)
