"""An encoder's config.json is data of strangers: it chooses no code and no other files, and claims nothing huge."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from encoder_models import KINDS, encoder_of, family, picture, save_all

from vfmseg.encoders.build import build_backbone, build_backbone_from_config, config_of
from vfmseg.errors import CheckpointError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("encoders"))


def changed(folder: Path, target: Path, changes: dict[str, Any], inner: str | None = None) -> Path:
    """A copy of an encoder's folder with other lines in its config, or in the part `inner` of it."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (config[inner] if inner else config).update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


KEYS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
CODE = (
    "owner/kernel",
    "kernels-community/flash-attn2",
    "flash_attention_2",
    "paged|owner/kernel",
    {"": "owner/kernel"},
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.pitfall("F9")
def test_no_config_chooses_an_attention_kernel(folders: dict[str, Path], tmp_path: Path, kind: str, key: str) -> None:
    places = [None, "vision_config"] if kind in ("clip", "sam") else [None]
    for number, (value, inner) in enumerate((value, inner) for value in CODE for inner in places):
        folder = changed(folders[kind], tmp_path / str(number), {key: value}, inner)
        with pytest.raises(CheckpointError, match="asks for the attention implementation") as caught:
            build_backbone(family(kind), str(folder))
        assert str(caught.value).startswith(f"{folder}: config.json: ")
        assert "expected eager or sdpa" in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.pitfall("F9")
def test_no_stored_config_chooses_an_attention_kernel(folders: dict[str, Path], key: str) -> None:
    config = config_of(build_backbone("dinov2", str(folders["dinov2"])))
    with pytest.raises(CheckpointError, match="asks for the attention implementation 'owner/kernel'"):
        build_backbone_from_config("dinov2", {**config, key: "owner/kernel"})


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.pitfall("F9")
def test_attention_that_comes_with_torch_is_what_the_config_says(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = changed(folders["dinov2"], tmp_path / "e", {"_attn_implementation": name})
    encoder = build_backbone("dinov2", str(folder))
    assert encoder.network.config._attn_implementation == name
    plain = build_backbone("dinov2", str(folders["dinov2"]))
    found = [encoder_of(one, 3)(*picture(40, 70)).maps for one in (encoder, plain)]
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pitfall("F9")
def test_what_the_class_does_not_declare_reaches_nothing(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    strange = {
        "transformers_weights": "other.safetensors",
        "per_layer_config": {"0": {"hidden_size": 8}},
        "fusion_config": {"x": 1},
        "auto_map": {"AutoModel": "owner/code--model.Model"},
        "_experts_implementation": "owner/kernel",
        "use_kernels": True,
        "dtype": "load",
        "torch_dtype": "save",
        "to_dict": "x",
        "chunk_size_feed_forward": 3,
        "id2label": {"x": "y"},
        "problem_type": "single_label_classification",
        "num_labels": 10**9,
        "__class__": "x",
        "_commit_hash": {"a": 1},
    }
    inner = "vision_config" if kind in ("clip", "sam") else None
    folder = changed(changed(folders[kind], tmp_path / "a", strange), tmp_path / "b", strange, inner)
    encoder, plain = (build_backbone(family(kind), str(place)) for place in (folder, folders[kind]))
    assert encoder.base.sha256 == plain.base.sha256
    assert config_of(encoder) == config_of(plain)
    assert not set(strange) & set(vars(encoder.network.config)) - set(vars(plain.network.config))


@pytest.mark.pitfall("F9")
def test_quantised_weights_and_an_adapter_beside_them_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["dinov2"], tmp_path / "q", {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(CheckpointError, match="quantised"):
        build_backbone("dinov2", str(folder))
    folder = changed(folders["dinov2"], tmp_path / "a", {})
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    with pytest.raises(CheckpointError, match=r"holds an adapter .* that is not merged"):
        build_backbone("dinov2", str(folder))


HUGE = {
    "num_hidden_layers": 10**9,
    "hidden_size": 2**40,
    "intermediate_size": 10**12,
    "mlp_dim": 10**12,
    "mlp_ratio": 10**9,
    "image_size": 10**9,
    "num_register_tokens": 10**10,
    "num_channels": 10**9,
    "num_attention_heads": 10**9,
    "window_size": 10**9,
    "output_channels": 10**9,
    "projection_dim": 10**18,
}


@pytest.mark.parametrize("kind", ["registers", "clip", "sam-vision"])
@pytest.mark.pitfall("F6")
def test_a_config_that_claims_a_huge_encoder_is_refused_before_it_is_built(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    inner = "vision_config" if kind == "clip" else None
    config = json.loads((folders[kind] / "config.json").read_text())
    own = config[inner] if inner else config
    started = time.process_time()
    for key in sorted(set(HUGE) & set(own)):
        folder = changed(folders[kind], tmp_path / key, {key: HUGE[key]}, inner)
        with pytest.raises(CheckpointError, match=rf"config\.json: {key} = 1\d+; expected"):
            build_backbone(family(kind), str(folder))
    modest = {"hidden_size": 8192, "num_hidden_layers": 200}  # each plausible by itself
    folder = changed(folders[kind], tmp_path / "both", modest, inner)
    with pytest.raises(CheckpointError, match=r"claims about .* parameters \(200 blocks of width 8192"):
        build_backbone(family(kind), str(folder))
    assert time.process_time() - started < 5


@pytest.mark.pitfall("F6")
def test_a_stored_config_that_claims_more_than_is_stored_is_refused(folders: dict[str, Path]) -> None:
    config = config_of(build_backbone("dinov2", str(folders["dinov2"])))
    huge = {**config, "hidden_size": 4096, "num_hidden_layers": 100}
    with pytest.raises(CheckpointError, match="more than its weights can hold"):
        build_backbone_from_config("dinov2", huge, most=10**6)
    small = build_backbone_from_config("dinov2", {**config, "num_hidden_layers": 50}, layers=[2], most=10**5)
    assert len(small.blocks) == 2  # later blocks are not stored, and not claimed


BROKEN: dict[str, list[Any]] = {
    "hidden_size": [0, -8, 33, "32", 32.5, None, [32], {}, True, float("nan")],
    "num_attention_heads": [0, -1, 3, "2", [2], float("inf")],
    "num_hidden_layers": [0, -3, "3", 2.5, [3], {}],
    "patch_size": [0, -1, [14, 7], [1, 2, 3], [], "14", 10**6, [[14]], {}],
    "image_size": [0, 3, [56], [], "56", -56, [56, 0]],
    "num_channels": [4, 0, "3"],
    "hidden_act": ["none", "", "../x", 3, ["gelu"], "g" * 10**5],
    "layer_norm_eps": [-1, "1e-6", float("nan"), [1]],
    "mlp_ratio": [0, -1, "2", 0.001],
    "qkv_bias": ["yes", [1], {}],
    "model_type": [None, 3, [], {}, "bert"],
    "use_swiglu_ffn": ["x", {"a": 1}],
}


@pytest.mark.parametrize("key", BROKEN)
@pytest.mark.pitfall("F11")
def test_a_broken_config_is_one_message(folders: dict[str, Path], tmp_path: Path, key: str) -> None:
    for number, value in enumerate(BROKEN[key]):
        folder = changed(folders["dinov2"], tmp_path / str(number), {key: value})
        if value is None or value == [56]:  # then the default of the class, or the same
            continue
        with pytest.raises(CheckpointError) as caught:
            build_backbone("dinov2", str(folder))
        assert str(caught.value).startswith(f"{folder}: ")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "", "{", "[" * 200_000, '{"a": ' * 200_000, "\x00", "NaN"])
@pytest.mark.pitfall("F11")
def test_a_config_that_is_no_mapping_is_one_message(folders: dict[str, Path], tmp_path: Path, text: str) -> None:
    folder = changed(folders["clip"], tmp_path / "e", {})
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build_backbone("clip", str(folder))
    for value in ([], 3, "x"):
        folder = changed(folders["clip"], tmp_path / f"v{value}", {"vision_config": value})
        with pytest.raises(CheckpointError, match=r"config\.json: vision_config = "):
            build_backbone("clip", str(folder))


@pytest.mark.parametrize(
    "index",
    [
        {"metadata": {}, "weight_map": {"embeddings.cls_token": "../secret.safetensors"}},
        {"metadata": {}, "weight_map": {"embeddings.cls_token": "/etc/passwd"}},
        {"metadata": {}, "weight_map": {"embeddings.cls_token": "a/b.safetensors"}},
        {"metadata": {}, "weight_map": {"embeddings.cls_token": "none.safetensors"}},
        {"metadata": {}, "weight_map": []},
        {"metadata": {}},
        {"weight_map": {"embeddings.cls_token": "model-1.safetensors"}},
        {"metadata": {}, "weight_map": {"embeddings.cls_token": 3}},
        [],
    ],
)
@pytest.mark.pitfall("F11")
def test_an_index_of_weights_names_files_of_its_folder_alone(
    folders: dict[str, Path], tmp_path: Path, index: Any
) -> None:
    folder = changed(folders["dinov2"], tmp_path / "e", {})
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        build_backbone("dinov2", str(folder))
    assert str(folder) in str(caught.value)
