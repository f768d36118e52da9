"""One-unit graphs: C copies of a unit under a kernel, one input, C outputs. What the profiler times and the probe checks.

Every copy has weights of its own, so that a run streams C times the unit's bytes as a whole model would; copies sit in one graph
so that the cost of `session.run` is shared by all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from toolchain.graph.external import DATA_NAME, MODEL_NAME, DataWriter
from toolchain.graph.nodes import quantised_node
from toolchain.quantize.affine import Quantized, quantize
from toolchain.spec import Kernel, Unit


def write_one_unit(unit: Unit, kernel: Kernel, weights: Quantized | np.ndarray, copies: int, out: Path) -> None:
    """Write the graph into the existing folder `out`. `weights`: codes, or float32 [N, K] for the fp32 kernel.

    Input "x": float32 [M, K] of a linear, int64 [M] token ids of an embedding. Outputs y0..y{C-1}: float32 [M, N] or [M, K].
    """
    gather = unit.op == "Gather"
    shape = ["M"] if gather else ["M", unit.K]
    value = helper.make_tensor_value_info("x", TensorProto.INT64 if gather else TensorProto.FLOAT, shape)
    outputs = [
        helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, ["M", unit.K if gather else unit.N]) for copy in range(copies)
    ]
    nodes, initializers = [], []
    with DataWriter(out / DATA_NAME) as writer:
        for copy in range(copies):
            if isinstance(weights, Quantized):
                # A rotation of the rows makes each copy's bytes its own: equal tensors would be stored, and cached, once.
                turned = Quantized(
                    np.roll(weights.codes, copy, 0),
                    np.roll(weights.scales, copy, 0),
                    np.roll(weights.zero_points, copy, 0),
                    weights.K,
                )
                node, tensors = quantised_node(unit, kernel, turned, "x", f"y{copy}", f"unit{copy}")
            else:
                array = np.roll(weights, copy, 0)
                tensors = [(f"unit{copy}.weight", array if gather else array.T)]
                inputs = [tensors[0][0], "x"] if gather else ["x", tensors[0][0]]
                node = helper.make_node(unit.op, inputs, [f"y{copy}"], name=f"unit{copy}")
            nodes.append(node)
            initializers += [writer.tensor(name, array) for name, array in tensors]
    graph = helper.make_graph(nodes, "unit", [value], outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="bittailor"), out / MODEL_NAME)


def random_weights(unit: Unit, kernel: Kernel) -> Quantized | np.ndarray:
    """Weights for timing and probing only: their values do not change these kernels' time, but all zeros could."""
    weight = np.random.default_rng(0).standard_normal((unit.N, unit.K), dtype=np.float32) * np.float32(0.02)
    return quantize(weight, kernel) if kernel.quantised else weight
