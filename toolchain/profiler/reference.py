"""The two small graphs the agent carries (`graphs/`): the reference kernel and the bare runtime. Written here; devices only read.

reference   4 fp32 matrix-vector products of 256 × 256 (1 MiB: stays in private caches). Its time says how fast the cores are now; a larger
            one would tell as much of what else was in the shared cache, its neighbours in the rotation included.
bare        one product of 8 × 8: what a process with a runtime and nothing in it weighs.
The weights are ConstantOfShape nodes that the runtime folds when it loads, so the files are a few hundred bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def products(width: int, copies: int) -> onnx.ModelProto:
    """Input "x" [M, width]; outputs y0..: x times a constant matrix of its own each."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", width])
    outputs = [helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, ["M", width]) for copy in range(copies)]
    nodes = []
    for copy in range(copies):
        value = numpy_helper.from_array(np.array([0.01 * (copy + 1)], np.float32))
        nodes += [
            helper.make_node("ConstantOfShape", ["shape"], [f"w{copy}"], value=value),
            helper.make_node("MatMul", ["x", f"w{copy}"], [f"y{copy}"]),
        ]
    shape = numpy_helper.from_array(np.array([width, width], np.int64), "shape")
    graph = helper.make_graph(nodes, "products", [x], outputs, [shape])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="bittailor")


def write(folder: Path) -> None:
    """Write reference/model.onnx and bare/model.onnx below `folder`."""
    for name, width, copies in (("reference", 256, 4), ("bare", 8, 1)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        onnx.save(products(width, copies), folder / name / "model.onnx")


if __name__ == "__main__":
    write(Path(__file__).with_name("graphs"))
