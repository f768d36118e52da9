"""Checkpoints that would read outside their folder, run code, or leave a weight to chance: refused before anything is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import copied
from onnx import TensorProto
from refusals import external

pytest.importorskip("random_models")

from numerics import relative_error, run_graph, run_torch, tokens
from random_models import random_model

from toolchain.errors import DamagedFileError, InputError, UnsafeModelError
from toolchain.graph.build import build, resolve
from toolchain.graph.external import load_array

# ---- external data


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "inner/../../secret", "link"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 4096)
    (folder / "link").symlink_to(tmp_path / "secret")
    tensor = external([16, 16], location=location)
    with pytest.raises(InputError, match="inside"):
        load_array(tensor, folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "data", "offset": "0"},
        {"location": "data", "offset": "-8"},
        {"offset": "0"},
        {"location": "data", "offset": "x"},
    ],
)
def test_external_data_that_cannot_be_is_a_damaged_file(tmp_path: Path, entries: dict[str, str]) -> None:
    (tmp_path / "data").write_bytes(b"\0" * 1000)
    tensor = TensorProto(name="w", dims=[16, 16], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(DamagedFileError):
        load_array(tensor, tmp_path)


def test_a_location_that_is_no_text_is_a_damaged_file(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="@@@@")
    damaged = TensorProto.FromString(tensor.SerializeToString().replace(b"@@@@", b"\xff\xfe\xff\xfe"))
    with pytest.raises(DamagedFileError):
        load_array(damaged, tmp_path)


# ---- pickles, adapters and code


def test_a_pickle_beside_a_decoy_is_not_opened(models: Any, tmp_path: Path) -> None:
    """transformers looks for model.safetensors or its index, and falls back to the pickle beside any other .safetensors file."""
    folder = copied(models("llama"), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UnsafeModelError, match="safetensors"):
        build(str(folder), out)


def test_an_index_that_names_a_pickle_is_refused(models: Any, tmp_path: Path) -> None:
    folder = copied(models("llama"), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}})
    )
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UnsafeModelError):
        build(str(folder), out)


def test_an_adapter_is_not_followed_to_the_model_it_names(models: Any, tmp_path: Path) -> None:
    folder = copied(models("llama"), tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "elsewhere")}))
    with pytest.raises(UnsafeModelError, match="adapter"):
        resolve(str(folder))


def test_code_that_a_tokenizer_brings_is_not_run(models: Any, tmp_path: Path) -> None:
    folder = copied(models("llama"), tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"})
    )
    (folder / "vocab.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError):
        build(str(folder), out)
    assert not (tmp_path / "ran").exists()


# ---- weights and configs


def _without(folder: Path, *names: str) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if key not in names}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "architecture", "weight"),
    [
        ("llama", "", "model.layers.2.mlp.up_proj.weight"),
        ("llama", "", "lm_head.weight"),
        ("bert", "", "encoder.layer.1.output.dense.weight"),
        ("bert", "BertForSequenceClassification", "classifier.weight"),
    ],
)
def test_a_checkpoint_that_lacks_a_layer_is_refused(models: Any, tmp_path: Path, name: str, architecture: str, weight: str) -> None:
    """transformers would fill the layer with random numbers and only warn."""
    folder = copied(models(name, architecture), tmp_path / "model")
    _without(folder, weight)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=weight.removesuffix(".weight")):
        build(str(folder), tmp_path / "out")


def test_a_checkpoint_of_the_model_inside_is_enough(models: Any, tmp_path: Path) -> None:
    """Hub checkpoints of encoders are often saved from the task's model, and loaded without its head."""
    folder = copied(models("bert", "BertForMaskedLM"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    (tmp_path / "out").mkdir()
    ids = tokens(1, 8)
    expected = run_torch(random_model("bert", "BertForMaskedLM").bert, ids)
    assert relative_error(run_graph(build(str(folder), tmp_path / "out").directory, ids), expected) < 1e-5


def test_weights_that_are_not_numbers_are_refused(models: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = copied(models("llama"), tmp_path / "model")
    tensors = {key: value.copy() for key, value in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"finite.*layers\.1\.mlp\.up_proj"):
        build(str(folder), tmp_path / "out")


@pytest.mark.parametrize("change", [{"architectures": [3]}, {"architectures": "Llama"}, {"max_position_embeddings": ...}])
def test_a_config_that_lacks_something_is_an_input_error(models: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = copied(models("llama"), tmp_path / "model")
    config = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=next(iter(change))):
        build(str(folder), tmp_path / "out")
