"""Encoder-decoders (T5): optimum exports three fp32 graphs; here they become one model with one set of units.

    encoder_model.onnx             source tokens → hidden states, and the keys and values that every layer's cross-attention reads
    decoder_with_past_model.onnx   one token and its cache → logits; started with an empty cache it makes the first token too
    decoder_model.onnx             the first step as optimum runs it; we never load it, ORTModelForSeq2SeqLM does

The keys and values move into the encoder because they depend on the source alone: our runtime then needs two sessions instead of three,
and no weight of the decoder is in memory twice (a model of 8.4M parameters, loaded: 45 MB instead of 71 in fp32, 21 instead of 29 in
w4g32). A unit's node and weight have the same names in every file, and all files share one data file, which holds equal tensors once.
T5 names its sublayers `layer.0`, `layer.1`; units leave that out, it says nothing.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from toolchain.errors import InputError
from toolchain.graph.external import DATA_NAME, DataWriter, load_array, read_model
from toolchain.graph.model import Graph
from toolchain.graph.normalise import normalise
from toolchain.graph.optimum_export import copy_companions, export
from toolchain.session import ENCODER, ENCODER_DECODER_CONTEXT, FIRST_STEP, MODEL_FILES, STEP
from toolchain.spec import Unit

EMBEDDING, HEAD = "shared", "lm_head"

_CROSS = re.compile(r"decoder\.block\.(\d+)\.layer\.1\.EncDecAttention\.([kv])")
_Models = Mapping[str, onnx.ModelProto]


def build_encoder_decoder(folder: Path, config: dict[str, Any], source: str, fingerprint: str, out: Path) -> Graph:
    """fp32 graphs of a T5 folder, written to `out`. Raises UnknownArchitectureError where optimum gives up, InputError."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp") as scratch:
        made = Path(scratch)
        export(folder, made, "text2text-generation-with-past", source)
        models = {name: read_model(made, name) for name in MODEL_FILES["encoder-decoder"]}
        for node in models[ENCODER].graph.node:
            node.name = f"/encoder{node.name}"
        units = _units(models, made)
        heads, width = int(config["num_heads"]), int(config["d_kv"])
        _cross_attention_into_encoder(models, units, heads, width)
        with DataWriter(out / DATA_NAME) as writer:
            for name, model in models.items():
                normalise(model, made, writer)
                onnx.save(model, out / name)
        copy_companions(made, out)
    return Graph(
        directory=out,
        units=units,
        kind="encoder-decoder",
        architecture=config["architectures"][0],
        layers=int(config.get("num_decoder_layers") or config["num_layers"]),
        encoder_layers=int(config["num_layers"]),
        kv_heads=heads,
        head_dim=width,
        hidden=int(config["d_model"]),
        vocabulary=int(config["vocab_size"]),
        context=int(config.get("n_positions") or ENCODER_DECODER_CONTEXT),
        inputs=tuple(value.name for value in models[STEP].graph.input),
        source=source,
        fingerprint=fingerprint,
    )


def _units(models: _Models, folder: Path) -> tuple[Unit, ...]:
    """The units of all files, each with its node and its weight renamed to the unit's. Changes the models in place."""
    units: dict[str, Unit] = {}
    digests: dict[str, bytes] = {}
    pair: dict[str, np.ndarray] = {}
    for model in models.values():
        arrays = {tensor.name: tensor for tensor in model.graph.initializer}
        for node, module in _linears(model, arrays):
            array = load_array(arrays[node.input[0 if node.op_type == "Gather" else 1]], folder)
            unit = units[module] = _unit(node.op_type, module, array.shape)
            digest = hashlib.blake2b(np.ascontiguousarray(array).data).digest()
            if digests.setdefault(module, digest) != digest:
                raise InputError(
                    f"expected one weight of {module!r} for encoder and decoder, found two",
                    "this version has no unit that is two embeddings",
                )
            if module in (EMBEDDING, HEAD):
                pair[module] = array
            _rename(model, node, unit)
    if np.array_equal(pair[EMBEDDING], pair[HEAD].T):
        weight = units[EMBEDDING].weight
        for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
            units[name] = replace(units[name], weight=weight, tied_to=other)
        for name in (FIRST_STEP, STEP):
            _head_reads_embedding(models[name], weight)
    return tuple(units.values())


def _linears(model: onnx.ModelProto, arrays: Mapping[str, onnx.TensorProto]) -> Iterator[tuple[onnx.NodeProto, str]]:
    """(node, module inside the checkpoint) of every linear and of the word embedding. Relative position biases stay as they are."""
    for node in model.graph.node:
        path = re.sub(r"/(MatMul|Gather)$", "", node.name).strip("/").replace("/", ".")
        if node.op_type == "Gather" and path in ("encoder.embed_tokens", "decoder.shared", "decoder.embed_tokens"):
            yield node, EMBEDDING
        elif node.op_type == "MatMul" and node.input[1] in arrays and len(arrays[node.input[1]].dims) == 2:
            yield node, path


def _unit(op: str, module: str, shape: tuple[int, ...]) -> Unit:
    name = re.sub(r"\.layer\.\d+", "", module)
    node = f"/{name.replace('.', '/')}/{op}"
    if op == "Gather":
        rows, width = shape
        return Unit(name, op, width, rows, "embedding", (module,), node, f"{name}.weight")
    K, N = shape
    if module == HEAD:
        return Unit(name, op, K, N, "head", (module,), node, f"{name}.weight", side="target")
    side = "source" if module.startswith("encoder.") or _CROSS.fullmatch(module) else "target"
    return Unit(name, op, K, N, "linear", (module,), node, f"{name}.weight", side=side)


def _rename(model: onnx.ModelProto, node: onnx.NodeProto, unit: Unit) -> None:
    """Give the node and its weight the unit's names. The old initializer stays for others that read it (the exporter merges equal ones)."""
    place = 0 if unit.op == "Gather" else 1
    old = node.input[place]
    node.name, node.input[place] = unit.node, unit.weight
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == old)
    if not any(old in other.input for other in model.graph.node):
        tensor.name = unit.weight
        return
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = unit.weight
    model.graph.initializer.append(copy)


def _head_reads_embedding(model: onnx.ModelProto, weight: str) -> None:
    """A tied head multiplies by the embedding transposed, so that fp32 stores the two once. Rows are looked up as they lie."""
    place, head = next((place, node) for place, node in enumerate(model.graph.node) if node.name == f"/{HEAD}/MatMul")
    own = next(tensor for tensor in model.graph.initializer if tensor.name == head.input[1])
    model.graph.initializer.remove(own)
    turned = helper.make_node("Transpose", [weight], [f"{HEAD}.weight"], name=f"/{HEAD}/Transpose", perm=[1, 0])
    model.graph.node.insert(place, turned)


def _cross_attention_into_encoder(models: _Models, units: tuple[Unit, ...], heads: int, width: int) -> None:
    """Let the encoder also put out present.{layer}.encoder.key and .value, float32 [B, heads, T, width], as the first step does."""
    encoder, first = models[ENCODER].graph, models[FIRST_STEP].graph
    tensors = {tensor.name: tensor for tensor in first.initializer}
    shape = f"/{EMBEDDING}/heads"
    encoder.initializer.append(numpy_helper.from_array(np.array([0, 0, heads, width], np.int64), shape))
    outputs = {output.name: output for output in first.output}
    for unit in units:
        match = _CROSS.fullmatch(unit.modules[0])
        if match is None:
            continue
        present = f"present.{match[1]}.encoder.{'key' if match[2] == 'k' else 'value'}"
        product, split = f"{unit.node}_output_0", f"{unit.node}_heads"
        encoder.node.extend(
            [
                helper.make_node("MatMul", ["last_hidden_state", unit.weight], [product], name=unit.node),
                helper.make_node("Reshape", [product, shape], [split], name=f"{unit.node}/Reshape"),
                helper.make_node("Transpose", [split], [present], name=f"{unit.node}/Transpose", perm=[0, 2, 1, 3]),
            ]
        )
        encoder.initializer.append(tensors[unit.weight])
        encoder.output.append(outputs[present])
