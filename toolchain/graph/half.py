"""A graph in fp16: what kernels with fp16 activations need around them.

requires: an fp32 decoder's or encoder's graph, whose tensors the caller stores as fp16 (`in_half`)
ensures:  every float between its nodes, its cache included, is fp16; its other float outputs (logits, hidden states) are fp32 by one
          Cast each, on the device: numpy is slow with fp16, and what reads them need not know
One float type for the whole graph, because a Cast between units costs as much as a small unit does. Norms and attention keep their sums
in fp32 inside the runtime's kernels, whatever they are fed.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_LARGEST = float(np.finfo(np.float16).max)


def in_half(array: np.ndarray) -> np.ndarray:
    """float32 as fp16; other types as they are. What is beyond fp16 becomes its largest number: attention masks add the least float32."""
    return np.clip(array, -_LARGEST, _LARGEST).astype(np.float16) if array.dtype == np.float32 else array


def to_half(model: onnx.ModelProto) -> None:
    """Change the types of nodes, inputs and outputs in place; initializers are the caller's."""
    graph = model.graph
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(numpy_helper.from_array(in_half(numpy_helper.to_array(attribute.t)), attribute.t.name))
    for value in (*graph.input, *(output for output in graph.output if output.name.startswith("present."))):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for output in graph.output:
        if output.type.tensor_type.elem_type == TensorProto.FLOAT:
            _cast_back(graph, output.name)


def _cast_back(graph: onnx.GraphProto, name: str) -> None:
    """Let the output `name` be the fp32 of what made it."""
    inner = f"{name}/fp16"
    for node in graph.node:
        node.input[:] = [inner if read == name else read for read in node.input]
        node.output[:] = [inner if made == name else made for made in node.output]
    graph.node.append(helper.make_node("Cast", [inner], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
