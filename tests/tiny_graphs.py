"""ONNX graphs small enough to compute by hand, for tests of what runs on onnxruntime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

POCKET = Path(__file__).parent.parent / "toolchain" / "models" / "pocket-llama-6m"
HEADS, WIDTH, HIDDEN = 2, 16, 16


def _save(directory: Path, nodes: list, inputs: list, outputs: list, tensors: dict[str, np.ndarray]) -> Path:
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), directory / "model.onnx")
    return directory


def _ids(name: str, length: str = "T") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["B", length])


def _floats(name: str, shape: list) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def bigram(directory: Path, table: np.ndarray) -> Path:
    """A decoder without memory: logits after token i are table[i] (table float32 [V, V]). It has no cache."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits"])]
    outputs = [_floats("logits", ["B", "T", table.shape[1]])]
    return _save(directory, nodes, [_ids("input_ids"), _ids("attention_mask", "A")], outputs, {"table": table})


def encoder(directory: Path, table: np.ndarray, extra_input: str = "token_type_ids") -> Path:
    """Hidden state of token i is table[i] + 0·extra_input."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["looked_up"]),
        helper.make_node("Cast", [extra_input], ["extra"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["extra", "last"], ["wide"]),
        helper.make_node("Add", ["looked_up", "wide"], ["last_hidden_state"]),
    ]
    inputs = [_ids("input_ids"), _ids("attention_mask", "A"), _ids(extra_input)]
    outputs = [_floats("last_hidden_state", ["B", "T", table.shape[1]])]
    return _save(directory, nodes, inputs, outputs, {"table": table, "last": np.array([-1], np.int64)})


def classifier(directory: Path, table: np.ndarray) -> Path:
    """Logits [B, C] of a sequence: the mean of table[i] over its tokens."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["looked_up"]),
        helper.make_node("ReduceMean", ["looked_up", "axis"], ["logits"], keepdims=0),
    ]
    outputs = [_floats("logits", ["B", table.shape[1]])]
    return _save(directory, nodes, [_ids("input_ids")], outputs, {"table": table, "axis": np.array([1], np.int64)})


def attention(directory: Path, vocabulary: int = 4096, context: int = 48, eos: int | list[int] = 0, seed: int = 0) -> Path:
    """A random one-layer decoder with GroupQueryAttention and rotary positions, the pocket model's tokenizer and a genai_config.json."""
    rng = np.random.default_rng(seed)
    angles = np.arange(context)[:, None] / 100.0 ** (np.arange(WIDTH // 2) / (WIDTH // 2))
    tensors = {
        "embedding": rng.standard_normal((vocabulary, HIDDEN)).astype(np.float32),
        "w_head": rng.standard_normal((HEADS * WIDTH, vocabulary)).astype(np.float32),
        **{f"w_{name}": rng.standard_normal((HIDDEN, HEADS * WIDTH)).astype(np.float32) for name in "qkv"},
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "one": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["x"]),
        *(helper.make_node("MatMul", ["x", f"w_{name}"], [name]) for name in "qkv"),
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["count"], keepdims=0),
        helper.make_node("Sub", ["count", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["total64"], start=1, end=2),
        helper.make_node("Squeeze", ["total64"], ["total0"]),
        helper.make_node("Cast", ["total0"], ["total"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "seqlens", "total", "cos", "sin"],
            ["y", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=HEADS,
            do_rotary=1,
        ),
        helper.make_node("MatMul", ["y", "w_head"], ["logits"]),
    ]
    inputs = [_ids("input_ids"), _ids("attention_mask", "A")]
    inputs += [_floats(f"past_key_values.0.{kind}", ["B", HEADS, "P", WIDTH]) for kind in ("key", "value")]
    outputs = [_floats("logits", ["B", "T", vocabulary])]
    outputs += [_floats(f"present.0.{kind}", ["B", HEADS, "A", WIDTH]) for kind in ("key", "value")]
    _save(directory, nodes, inputs, outputs, tensors)
    shutil.copy(POCKET / "tokenizer.json", directory)
    (directory / "genai_config.json").write_text(json.dumps({"model": {"context_length": context, "eos_token_id": eos}}))
    return directory
