"""Encoders (BERT, RoBERTa, DistilBERT): optimum exports the fp32 graph; its linears and the word embedding become units.

Position and token-type tables stay fp32: together they are small, and their rows are added, not multiplied.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from toolchain.errors import UnknownArchitectureError
from toolchain.graph.model import Graph
from toolchain.graph.normalise import save_normalised
from toolchain.graph.optimum_export import copy_companions, export
from toolchain.spec import Unit

_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "Model": "feature-extraction",
}


def build_encoder(folder: Path, config: dict[str, Any], source: str, fingerprint: str, out: Path) -> Graph:
    """fp32 graph of an encoder folder, written to `out`. Raises UnknownArchitectureError for heads that have no export task."""
    architecture = config["architectures"][0]
    task = next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), None)
    if task is None:
        raise UnknownArchitectureError(f"expected an encoder ending in {', '.join(_TASKS)}, got architecture {architecture}")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp") as scratch:
        made = Path(scratch)
        export(folder, made, task, source)
        model = onnx.load(made / "model.onnx", load_external_data=False)
        save_normalised(model, made, out)
        copy_companions(made, out)
    # DistilBERT's config has names of its own for the same numbers.
    heads = int(config.get("num_attention_heads") or config["n_heads"])
    hidden = int(config.get("hidden_size") or config["dim"])
    return Graph(
        directory=out,
        units=tuple(replace(unit, side="source") for unit in _units(model)),
        kind="encoder",
        architecture=architecture,
        layers=int(config.get("num_hidden_layers") or config["n_layers"]),
        kv_heads=heads,
        head_dim=hidden // heads,
        hidden=hidden,
        vocabulary=int(config["vocab_size"]),
        # RoBERTa keeps the first pad_token_id + 1 positions for itself.
        context=int(config["max_position_embeddings"]) - (2 if "oberta" in architecture else 0),
        inputs=tuple(value.name for value in model.graph.input),
        source=source,
        fingerprint=fingerprint,
    )


def _units(model: onnx.ModelProto) -> tuple[Unit, ...]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    units = []
    for node in model.graph.node:
        path = re.sub(r"/(MatMul|Gemm|Gather)(_\d+)?$", "", node.name).strip("/").replace("/", ".")
        if node.op_type == "Gather" and path.endswith("word_embeddings") and node.input[0] in shapes:
            rows, width = shapes[node.input[0]]
            units.append(Unit(path, "Gather", width, rows, "embedding", (path,), node.name, node.input[0]))
        elif node.op_type == "MatMul" and node.input[1] in shapes and len(shapes[node.input[1]]) == 2:
            K, N = shapes[node.input[1]]
            role = "head" if path.endswith(("vocab_projector", "decoder")) else "linear"
            units.append(Unit(path, "MatMul", K, N, role, (path,), node.name, node.input[1]))
    return tuple(units)
