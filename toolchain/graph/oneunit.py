"""One-unit graphs: C copies of a unit under a kernel, one input, C outputs. What the profiler times and the probe checks.

Every copy has weights of its own, so that a run streams C times the unit's bytes as a whole model would; copies sit in one graph
so that the cost of `session.run` is shared by all.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from toolchain.graph.external import DATA_NAME, MODEL_NAME, DataWriter
from toolchain.graph.nodes import either, one_token_nodes, quantised_node
from toolchain.kernels import parts
from toolchain.quantize.affine import SYMMETRIC_MAX, SYMMETRIC_ZERO, Quantized, groups
from toolchain.spec import Kernel, Unit

Weights = tuple[Quantized, ...] | np.ndarray
"""Codes for each part of a quantised kernel, or float32 [N, K] for one without codes."""


def write_one_unit(unit: Unit, kernel: Kernel, weights: Weights, copies: int, out: Path) -> None:
    """Write the graph into the existing folder `out`.

    Input "x": [M, K] of a linear, int64 [M] token ids of an embedding. Outputs y0..y{C-1}: [M, N] or [M, K]. Floats are of the kernel's
    float type.
    """
    gather = unit.op == "Gather"
    floats = helper.np_dtype_to_tensor_dtype(np.dtype(kernel.float_type))
    shape = ["M"] if gather else ["M", unit.K]
    value = helper.make_tensor_value_info("x", TensorProto.INT64 if gather else floats, shape)
    outputs = [helper.make_tensor_value_info(f"y{copy}", floats, ["M", unit.K if gather else unit.N]) for copy in range(copies)]
    nodes, initializers = one_token_nodes("x", 0) if kernel.prefill else ([], [])
    with DataWriter(out / DATA_NAME, sync=False) as writer:
        for copy in range(copies):
            if isinstance(weights, np.ndarray):
                array = np.roll(weights, copy, 0).astype(kernel.float_type)
                initializers.append(writer.tensor(f"unit{copy}.weight", array if gather else array.T))
                inputs = [f"unit{copy}.weight", "x"] if gather else ["x", f"unit{copy}.weight"]
                nodes.append(helper.make_node(unit.op, inputs, [f"y{copy}"], name=f"unit{copy}"))
                continue
            made = []
            for part, codes in zip(parts(kernel), weights, strict=True):
                name = f"unit{copy}/{part.name}"
                output = f"{name}/output_0" if kernel.prefill else f"y{copy}"
                node, tensors = quantised_node(unit, part, _turned(codes, copy), "x", output, name)
                made.append(node)
                initializers += [writer.tensor(tensor, array) for tensor, array in tensors]
            nodes.append(either(made[0], made[1], f"y{copy}", f"unit{copy}") if kernel.prefill else made[0])
    graph = helper.make_graph(nodes, "unit", [value], outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="bittailor"), out / MODEL_NAME)


def _turned(codes: Quantized, copy: int) -> Quantized:
    """A rotation of the rows makes each copy's bytes its own: equal tensors would be stored, and cached, once."""
    return Quantized(np.roll(codes.codes, copy, 0), np.roll(codes.scales, copy, 0), np.roll(codes.zero_points, copy, 0), codes.K)


def random_weights(unit: Unit, kernel: Kernel) -> Weights:
    """Weights for timing and probing only: their values do not change these kernels' time, but all zeros could."""
    if kernel.quantised:
        return tuple(drawn(unit, part) for part in parts(kernel))
    return np.random.default_rng(0).random((unit.N, unit.K), np.float32) * np.float32(0.04)


def drawn(unit: Unit, kernel: Kernel) -> Quantized:
    """Random codes of the size of a weight with standard deviation 0.02: as good as real ones for timing, and quick to make.

    Equal where real ones would be, as in a tied pair, and only there: equal tensors are stored once.
    """
    rng = np.random.default_rng(zlib.crc32(f"{unit.weight} {kernel.name}".encode()))
    G, width = groups(unit.K, kernel)
    low, high = (SYMMETRIC_ZERO - SYMMETRIC_MAX, SYMMETRIC_ZERO + SYMMETRIC_MAX) if kernel.symmetric else (0, kernel.levels - 1)
    codes = rng.integers(low, high + 1, (unit.N, G, width), np.uint8)
    scales = rng.uniform(0.9, 1.1, (unit.N, G)).astype(np.float32) * np.float32(0.02 * 12**0.5 / (high - low))
    scales = scales.astype(kernel.float_type).astype(np.float32)  # as the graph keeps them
    middle = (low + high + 1) // 2
    zero_points = (
        np.full((unit.N, G), middle, np.uint8) if kernel.symmetric else rng.integers(middle - 1, middle + 1, (unit.N, G), np.uint8)
    )
    return Quantized(codes, scales, zero_points, unit.K)
