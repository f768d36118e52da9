"""MODEL → `Graph`: checks that nothing untrusted would run, picks the builder for the architecture, marks the units.

A decoder's graph is made by onnxruntime-genai's builder (fused attention: the fastest CPU decoder graph we measured), an encoder's
and an encoder-decoder's by optimum. Both are only asked for an fp32 graph; quantisation is ours. Nothing here keeps a pickle or
remote code in reach.
"""

from __future__ import annotations

import hashlib
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

from toolchain.errors import InputError, UnknownArchitectureError, UnsafeModelError, reason_of, require
from toolchain.files import inside, sha256
from toolchain.graph.model import Graph
from toolchain.reading import read_json

EMBEDDED = "pocket-llama-6m"
DECODERS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
ENCODERS = ("Bert", "Roberta", "DistilBert", "XLMRoberta")
ENCODER_DECODERS = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BASE = re.compile(r"^(model|bert|roberta|distilbert)\.")  # a checkpoint may be of the model inside: without its task's head
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers"), 1024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_heads", "num_heads"), 1 << 14),
    **dict.fromkeys(("hidden_size", "intermediate_size", "dim", "hidden_dim", "d_model", "d_ff", "head_dim", "d_kv"), 1 << 20),
    "vocab_size": 1 << 24,
}
"""What config.json may say, ten times what any model does: a layer is a dozen Python objects before its first weight is read."""
_MOST_LACKING = 4
"""Tied tensors are stored once; and a checkpoint may lack its task's head."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


def resolve(source: str) -> Path:
    """Local folder of MODEL (a folder, a hub id, or the embedded model's name), checked by `_check`. Raises InputError."""
    folder = Path(source)
    if not folder.exists() and source == EMBEDDED:
        folder = Path(str(resources.files("toolchain") / "models" / EMBEDDED))
    if not folder.exists() and _HUB_ID.fullmatch(source):
        folder = _download(source)
    if not folder.is_dir():
        raise InputError(
            f"expected a model folder, a hub id or {EMBEDDED!r}, got {source!r}, which does not exist",
            f"type for example: bittailor units {EMBEDDED}",
        )
    _check(folder)
    return folder


def _download(hub_id: str) -> Path:
    hub = require("huggingface_hub")
    try:
        return Path(hub.snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the hub client raises many types; offline, unknown and forbidden are all input errors here
        raise InputError(
            f"expected a hub id that can be fetched, got {hub_id!r} ({type(error).__name__})", "name a local folder"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict. Raises InputError."""
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise InputError(f"expected config.json in {folder}, found none", "name a folder saved by save_pretrained") from None
    except (OSError, ValueError) as error:
        raise InputError(f"expected JSON in {folder / 'config.json'}, got {error}") from error
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(f'expected "architectures" in {folder / "config.json"}, found none', "save the model with save_pretrained")
    for name, most in _SIZES.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= most):
            raise InputError(f"expected {name} in {folder / 'config.json'} to be a number from 1 to {most}, got {value!r}")
    return config


def check_size(folder: Path, config: dict[str, Any]) -> None:
    """Raise InputError where a config describes a model many times as large as the weights beside it: what they lack would be allocated
    and filled in at random. Nothing is allocated to find out."""
    safetensors, torch, transformers = require("safetensors"), require("torch"), require("transformers")
    try:
        stored = 0
        for path in _weight_files(folder):
            with safetensors.safe_open(path, "np") as tensors:
                stored += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 - not a dict
        with torch.device("meta"):
            model = getattr(transformers, config["architectures"][0])
            described = sum(value.numel() for value in model(model.config_class.from_pretrained(folder)).parameters())
    except Exception as error:  # what transformers and torch make of a strange config: types of many kinds
        raise InputError(f"expected a model that transformers loads in {folder}, got: {reason_of(error)}") from error
    if described > _MOST_LACKING * stored:
        raise InputError(
            f"expected weights of the model that {folder / 'config.json'} describes, of {described} parameters, got {stored} of them",
            "save the whole model again",
        )


def _check(folder: Path) -> None:
    """Refuse what could only be loaded by running or unpickling it, and architectures that no builder knows."""
    config = read_config(folder)
    if "auto_map" in config:
        raise UnsafeModelError(f"expected a model that transformers loads itself, got one that brings its own code ({folder})")
    if (folder / "adapter_config.json").exists():  # transformers would load the model that it names, from anywhere
        raise UnsafeModelError(f"expected a whole model, got an adapter ({folder})", "merge it into its model and save that")
    if not _weight_files(folder):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        got = f"only {pickles[0]}, which may run code when it is opened" if pickles else "no weights"
        raise UnsafeModelError(
            f"expected safetensors weights (model.safetensors, or its index and parts) in {folder}, got {got}",
            "load it where you trust it and type: model.save_pretrained(FOLDER, safe_serialization=True)",
        )
    kind_of(config["architectures"][0])


def _weight_files(folder: Path) -> list[Path]:
    """The files transformers will load: model.safetensors, else the parts its index names, all inside the folder; [] if neither.

    Any other .safetensors file does not keep transformers from falling back to a pickle beside it.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        parts = sorted({inside(folder, name) for name in read_json(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"expected an index of weights in {index}, got {type(error).__name__}: {error}") from error
    return parts if parts and all(path.suffix == ".safetensors" and path.is_file() for path in parts) else []


def kind_of(architecture: str) -> str:
    """ "decoder", "encoder" or "encoder-decoder". Raises UnknownArchitectureError."""
    if architecture in DECODERS:
        return "decoder"
    if architecture in ENCODER_DECODERS:
        return "encoder-decoder"
    if architecture.startswith(ENCODERS) and not architecture.endswith("LMHeadModel"):
        return "encoder"
    raise UnknownArchitectureError(
        f"expected one of {', '.join((*DECODERS, *ENCODER_DECODERS))} or a {'/'.join(ENCODERS)} encoder, "
        f"got architecture {architecture}",
    )


def build(source: str, out: Path) -> Graph:
    """Write MODEL's fp32 graph into the existing empty folder `out` and return it. Raises InputError and its kin."""
    folder = resolve(source)
    config = read_config(folder)
    architecture = config["architectures"][0]
    check_size(folder, config)
    match kind_of(architecture):
        case "decoder":
            from toolchain.graph.decoder import build_decoder as builder
        case "encoder":
            from toolchain.graph.encoder import build_encoder as builder
        case _:
            from toolchain.graph.seq2seq import build_encoder_decoder as builder
    try:
        graph = builder(folder, config, source, fingerprint(folder), out)
    except KeyError as error:
        raise InputError(
            f"expected {error} in {folder / 'config.json'}, found none", "save the model with save_pretrained"
        ) from error
    _check_complete(folder, graph)
    graph.save()
    return graph


def _check_complete(folder: Path, graph: Graph) -> None:
    """Refuse a checkpoint that lacks a unit's weights: transformers would fill them in at random, and only warn."""
    safetensors = require("safetensors")
    stored: set[str] = set()
    for path in _weight_files(folder):
        with safetensors.safe_open(path, "np") as tensors:
            stored.update(_BASE.sub("", key) for key in tensors.keys())  # noqa: SIM118 - not a dict
    for unit in graph.units:
        if unit.role == "head" and (unit.tied_to or graph.kind == "encoder"):
            continue  # it is the embedding's tensor, which is stored once
        for module in unit.modules:
            if _BASE.sub("", f"{module}.weight") not in stored:
                raise InputError(
                    f"expected weights of every layer in {folder}, found none of {module!r}", "save the whole model again"
                )


def fingerprint(folder: Path) -> str:
    """sha256 over config.json and the weight files: which model a table, supernet or package speaks of."""
    digest = hashlib.sha256()
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        digest.update(f"{path.name}:{sha256(path)}\n".encode())
    return digest.hexdigest()
