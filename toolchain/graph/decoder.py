"""Decoders: onnxruntime-genai's builder makes the fp32 graph; here its linears, embedding and head become units.

Refuses to know kernels. The builder merges q, k and v into one MatMul, so the three are one unit and share a kernel.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from toolchain.errors import InputError, UnknownArchitectureError, require
from toolchain.graph.model import Graph
from toolchain.graph.normalise import save_normalised
from toolchain.graph.quiet import quiet
from toolchain.session import LOGITS_TO_KEEP, SESSION_OPTIONS
from toolchain.spec import Unit

_LAYER = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul")


def build_decoder(folder: Path, config: dict[str, Any], source: str, fingerprint: str, out: Path) -> Graph:
    """fp32 graph of a decoder folder, written to `out`. Raises UnknownArchitectureError where the builder gives up."""
    with quiet():
        builder = require("onnxruntime_genai.models.builder")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp") as scratch:
        made = Path(scratch) / "graph"
        has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
        try:
            with quiet():
                builder.create_model("", str(folder), str(made), "fp32", "cpu", str(Path(scratch) / "cache"), hf_remote=False)
        except OSError:
            raise
        except Exception as error:
            # The tokenizer files are saved last: without a tokenizer the builder fails there, its graph complete.
            if has_tokenizer or not (made / "genai_config.json").is_file():
                raise UnknownArchitectureError(
                    f"expected a model that onnxruntime-genai's builder can export, got {source!r} ({type(error).__name__}: {error})"
                ) from error
        model = onnx.load(made / "model.onnx", load_external_data=False)
        units = _units(model)
        head_on_last_positions(model)
        save_normalised(model, made, out)
        for path in made.iterdir():
            if path.suffix in (".json", ".txt", ".jinja", ".model"):
                (out / path.name).write_bytes(path.read_bytes())
    _settle(out / "genai_config.json")
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    return Graph(
        directory=out,
        units=units,
        kind="decoder",
        architecture=config["architectures"][0],
        layers=int(config["num_hidden_layers"]),
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        hidden=hidden,
        vocabulary=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
        inputs=tuple(value.name for value in model.graph.input),
        source=source,
        fingerprint=fingerprint,
    )


def head_on_last_positions(model: onnx.ModelProto) -> None:
    """Let the head see the last `logits_to_keep` positions only: what is sampled from needs one, the others cost as much each.

    An initializer that is an input as well: 1 unless fed, so that runtimes that do not know it need not. Perplexity feeds the window's
    length. Changes the model in place; output logits [B, min(T, logits_to_keep), V].
    """
    head = next(node for node in model.graph.node if node.name == "/lm_head/MatMul")
    keep = helper.make_tensor_value_info(LOGITS_TO_KEEP, onnx.TensorProto.INT64, [1])
    model.graph.input.append(keep)
    constants = {"/lm_head/last/axis": 1, "/lm_head/last/end": np.iinfo(np.int64).max, LOGITS_TO_KEEP: 1}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([value], np.int64), name) for name, value in constants.items())
    start, last = "/lm_head/last/start", "/lm_head/last/output_0"
    nodes = [
        helper.make_node("Neg", [LOGITS_TO_KEEP], [start], name="/lm_head/last/Neg"),
        helper.make_node(
            "Slice", [head.input[0], start, "/lm_head/last/end", "/lm_head/last/axis"], [last], name="/lm_head/last/Slice"
        ),
    ]
    head.input[0] = last
    place = list(model.graph.node).index(head)
    for node in reversed(nodes):
        model.graph.node.insert(place, node)
    # Declared as it is by default: onnxruntime-genai allocates what is declared. Fed more, the runtime returns more all the same.
    logits = next(output for output in model.graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].Clear()
    logits.type.tensor_type.shape.dim[1].dim_value = 1


def _settle(path: Path) -> None:
    """Let onnxruntime-genai open what its builder wrote, and as we do.

    It refuses null for a token id that the model does not have, though its builder writes one; absent is fine.
    """
    config = json.loads(path.read_text())
    config["model"] = {key: value for key, value in config["model"].items() if value is not None}
    config["model"]["decoder"].setdefault("session_options", {}).update(SESSION_OPTIONS)
    path.write_text(json.dumps(config, indent=4) + "\n")


def _units(model: onnx.ModelProto) -> tuple[Unit, ...]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    transposed = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    units = []
    head_weight = next((node.input[1] for node in model.graph.node if node.name == "/lm_head/MatMul"), "")
    for node in model.graph.node:
        if node.op_type == "Gather" and node.name == "/model/embed_tokens/Gather":
            weight = transposed.get(node.input[0], node.input[0])
            tied = weight == head_weight
            rows, width = reversed(shapes[weight]) if tied else shapes[weight]
            units.append(
                Unit(
                    "embed_tokens", "Gather", width, rows, "embedding", ("model.embed_tokens",), node.name, weight, "lm_head" * tied
                )
            )
        elif node.op_type == "MatMul" and node.input[1] in shapes:
            K, N = shapes[node.input[1]]
            if node.name == "/lm_head/MatMul":
                tied_to = "embed_tokens" if any(unit.weight == head_weight for unit in units) else ""
                units.append(Unit("lm_head", "MatMul", K, N, "head", ("lm_head",), node.name, head_weight, tied_to))
                continue
            match = _LAYER.fullmatch(node.name)
            if match is None:
                raise InputError(f"expected the builder's layer names, got a linear layer named {node.name!r}")
            layer, block, name = match.groups()
            path = f"model.layers.{layer}." + ("self_attn" if block == "attn" else "mlp")
            parts = ("q_proj", "k_proj", "v_proj") if name == "qkv_proj" else (name,)
            modules = tuple(f"{path}.{part}" for part in parts)
            units.append(Unit(f"layers.{layer}.{block}.{name}", "MatMul", K, N, "linear", modules, node.name, node.input[1]))
    return tuple(units)
