"""One unit under one kernel → its ONNX node and tensors. What the numbers mean is `quantize/affine.py`; the layout is the runtime's.

MatMulNBits            B uint8 [N, G, g·bits/8], scales [N, G], zero points packed [N, ceil(G·bits/8)], accuracy_level 4 or 0
GatherBlockQuantized   the same bytes as [N, K·bits/8]: a tied head and embedding of one kernel share them in the data file
DynamicQuantizeMatMul  B int8 [K, N], one scale per column, zero point 0
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from toolchain.kernels import node_op
from toolchain.quantize.affine import SYMMETRIC_ZERO, Quantized
from toolchain.quantize.packing import pack
from toolchain.spec import Kernel, Unit

Tensors = list[tuple[str, np.ndarray]]


ONE_TOKEN = "one_token"
"""Name of the boolean that says whether one token is in flight; `one_token_nodes` computes it."""


def one_token_nodes(data: str, axis: int) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and initializers for ONE_TOKEN, from the length of `data` along `axis`."""
    shape, length = f"{ONE_TOKEN}/shape", f"{ONE_TOKEN}/length"
    constants = {f"{ONE_TOKEN}/axis": axis, f"{ONE_TOKEN}/one": 1}
    nodes = [
        helper.make_node("Shape", [data], [shape], name=shape),
        helper.make_node("Gather", [shape, f"{ONE_TOKEN}/axis"], [length], name=length),
        helper.make_node("Equal", [length, f"{ONE_TOKEN}/one"], [ONE_TOKEN], name=ONE_TOKEN),
    ]
    return nodes, [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()]


def either(one: NodeProto, many: NodeProto, output: str, name: str) -> NodeProto:
    """An If node: `one` while ONE_TOKEN holds, else `many`. Weights stay outside, so that the runtime prepacks them as any others."""
    branches = []
    for node in (one, many):
        value = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
        branches.append(helper.make_graph([node], node.name, [], [value]))
    return helper.make_node("If", [ONE_TOKEN], [output], name=name, then_branch=branches[0], else_branch=branches[1])


def inputs_of(node: NodeProto) -> list[str]:
    """Everything a node reads, what its branches read from outside included."""
    inner = [name for attribute in node.attribute for inside in attribute.g.node for name in inputs_of(inside)]
    return [*node.input, *inner]


def quantised_node(unit: Unit, kernel: Kernel, weights: Quantized, data: str, output: str, name: str) -> tuple[NodeProto, Tensors]:
    """Node `name` computing `output` from `data` (activations, or token ids of a Gather), and the tensors it reads."""
    op = node_op(unit.op, kernel)
    if op == "DynamicQuantizeMatMul":
        codes = (weights.codes[:, 0].astype(np.int16) - SYMMETRIC_ZERO).astype(np.int8)
        tensors: Tensors = [(f"{name}.weight_int8", codes.T), (f"{name}.scales", weights.scales[:, 0])]
        inputs = [data, *(tensor for tensor, _ in tensors)]
        return helper.make_node(op, inputs, [output], name=name, domain="com.microsoft"), tensors
    bits = kernel.container_bits
    packed = pack(weights.codes, bits)
    zero_points = pack(weights.zero_points, bits)
    names = [f"{name}.weight_q{bits}", f"{name}.scales", f"{name}.zero_points"]
    if op == "GatherBlockQuantized":
        packed = packed.reshape(unit.N, -1)
        attributes = {"bits": bits, "block_size": kernel.group_size, "gather_axis": 0, "quantize_axis": 1}
        inputs = [names[0], data, *names[1:]]
    else:
        level = 4 if kernel.activation == "int8_group" else 0
        attributes = {"K": unit.K, "N": unit.N, "bits": bits, "block_size": kernel.group_size, "accuracy_level": level}
        inputs = [data, *names]
    node = helper.make_node(op, inputs, [output], name=name, domain="com.microsoft", **attributes)
    return node, list(zip(names, (packed, weights.scales.astype(kernel.float_type), zero_points), strict=True))
