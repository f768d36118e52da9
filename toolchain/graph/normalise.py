"""Bring a builder's graph to the one form the rest of the code knows: Gemm as MatMul + Add, every large tensor external.

requires: an fp32 ONNX model and the folder its external data is in
ensures:  each linear layer is a MatMul whose second input is an initializer [K, N]; tensors of 1 KiB and more are in model.onnx.data
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from toolchain.errors import InputError
from toolchain.graph.external import DATA_NAME, MODEL_NAME, DataWriter, load_array


def save_normalised(model: onnx.ModelProto, folder: Path, out: Path) -> None:
    """Write the normalised model to `out` (model.onnx + model.onnx.data). `model` is changed in place. InputError for NaN or infinity."""
    with DataWriter(out / DATA_NAME) as writer:
        normalise(model, folder, writer)
    onnx.save(model, out / MODEL_NAME)


def normalise(model: onnx.ModelProto, folder: Path, writer: DataWriter) -> None:
    """Change `model`, whose external data is in `folder`, in place; its tensors go to `writer`. InputError for NaN or infinity."""
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    transposed = _gemm_to_matmul(model, set(arrays))
    del model.graph.initializer[:]
    del model.graph.value_info[:]
    for name, tensor in arrays.items():
        array = load_array(tensor, folder)
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise InputError(
                f"expected finite weights, got NaN or infinity in {name!r}", "the checkpoint is damaged: save it again"
            )
        if name in transposed:
            array = np.ascontiguousarray(array.T)
        model.graph.initializer.append(writer.tensor(name, array))


def _gemm_to_matmul(model: onnx.ModelProto, initializers: set[str]) -> set[str]:
    """Replace each `Gemm(x, W, b)` with alpha = beta = 1; returns the weights that must be stored transposed."""
    transposed: set[str] = set()
    nodes = []
    for node in model.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in initializers:
            nodes.append(node)
            continue
        if attributes.get("transB", 0):
            transposed.add(node.input[1])
        bias = len(node.input) > 2 and node.input[2]
        product = f"{node.output[0]}_product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", node.input[:2], [product], name=node.name))
        if bias:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{node.name}/Add"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return transposed
