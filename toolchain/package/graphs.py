"""What is in a package's ONNX graphs, held against its manifest: tensors' data inside the package, units and kernels as it says.

    unit      every one has its node(s), once in a graph, of the op, attributes and stored shapes that its kernel in the policy means
    kernels   a quantised node that belongs to no unit is refused: it was neither chosen nor counted
    data      external data lies in a file that the manifest names, within its length; as many bytes as the tensor's shape needs

Blind to what a node does not tell: w3g32 looks as w4g32 does (3-bit codes in a 4-bit container), and whether the codes are those that were
trained is the files' sha256 to say. Read through protobuf, which onnxruntime brings, with the few messages of onnx.proto that are needed:
a device has no `onnx`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from toolchain.errors import DamagedFileError
from toolchain.kernels import CATALOGUE, node_op, parts
from toolchain.package.integrity import REMEDY
from toolchain.quantize.affine import groups
from toolchain.spec import Kernel, Unit

_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    # field → (number, type): "*" repeats, a capital letter is a message. Source: onnx/onnx.proto, IR version 10.
    "Model": {"graph": (7, "Graph"), "training_info": (20, "*Training"), "functions": (25, "*Function")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {"attribute_proto": (11, "*Attribute"), "node": (7, "*Node")},
    "Graph": {"node": (1, "*Node"), "initializer": (5, "*Tensor"), "sparse_initializer": (15, "*Sparse")},
    "Node": {"input": (1, "*string"), "output": (2, "*string"), "name": (3, "string"), "op_type": (4, "string")}
    | {"attribute": (5, "*Attribute"), "domain": (7, "string")},
    "Attribute": {"name": (1, "string"), "i": (3, "int64"), "t": (5, "Tensor"), "g": (6, "Graph"), "tensors": (10, "*Tensor")}
    | {"graphs": (11, "*Graph"), "sparse_tensor": (22, "Sparse"), "sparse_tensors": (23, "*Sparse")},
    "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {"dims": (1, "*int64"), "data_type": (2, "int32"), "name": (8, "string"), "raw_data": (9, "bytes")}
    | {"external_data": (13, "*Entry"), "data_location": (14, "int32")},
    "Entry": {"key": (1, "string"), "value": (2, "string")},
}
_EXTERNAL = 1
_FLOATS = {"float32": 1, "float16": 10}
_UINT8, _INT8 = 2, 3
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""TensorProto.DataType → bytes of an element, of the types that our graphs store."""
_QUANTISED = re.compile(r"MatMul.+|Q(Linear|Gemm|Attention|Embed|MoE|Ordered).*|.*[Qq]uantize.*|ConvInteger|GemmFloat8")
"""Ops with weights in fewer bits, or that make tensors of fewer bits or of them, by the names that onnxruntime 1.32 has."""


def check_graphs(
    directory: Path, graphs: tuple[str, ...], files: Mapping[str, str], units: Mapping[str, Unit], policy: Any
) -> None:
    """Hold the package's graphs against name → unit and the policy. files: those that the manifest names.

    Raises DamagedFileError naming the graph's file and the unit, node or tensor that is not as the manifest says.
    """
    sizes = {name: (directory / name).stat().st_size for name in files}
    left = dict(units)
    for file in graphs:
        try:
            for name in _checked(_parse(directory / file), sizes, units, policy):
                left.pop(name, None)
        except ValueError as error:
            raise DamagedFileError(
                f"expected {file} in {directory} to be the graph of its manifest, got {error}", REMEDY
            ) from error
    if left:
        unit = next(iter(left.values()))
        raise DamagedFileError(
            f"expected a node {unit.node!r} for unit {unit.name!r} in {', '.join(graphs)} of {directory}, found none", REMEDY
        )


def _parse(path: Path) -> Any:
    """The ModelProto. Raises ValueError."""
    from google.protobuf.message import DecodeError

    try:
        return _model_class().FromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"no ONNX model ({error})") from None


@cache
def _model_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="bittailor.proto", package="bittailor", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for label, (number, type_) in fields.items():
            kind = type_.removeprefix("*")
            added = message.field.add(name=label, number=number)
            added.label = field.LABEL_REPEATED if type_[0] == "*" else field.LABEL_OPTIONAL
            if kind in _MESSAGES:
                added.type, added.type_name = field.TYPE_MESSAGE, f".bittailor.{kind}"
            else:
                added.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()  # its own: what else is loaded here may know the same names
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("bittailor.Model"))


def _checked(model: Any, sizes: Mapping[str, int], units: Mapping[str, Unit], policy: Mapping[str, str]) -> Iterator[str]:
    """Names of the units that this graph has, as they should be. Raises ValueError."""
    nodes: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    times: Counter[str] = Counter()
    made: dict[str, Any] = {}
    kernels: list[Any] = []
    ours: set[str] = set()
    for message in _inner(model):
        kind = message.DESCRIPTOR.name
        if kind == "Tensor":
            _check_data(message, sizes)
            tensors[message.name] = message
        elif kind == "Node":
            nodes[message.name] = message
            times[message.name] += 1
            if not isinstance(message.op_type, str):  # protobuf gives bytes for what is no UTF-8
                raise ValueError(f"an op {message.op_type!r:.80}")
            if _QUANTISED.fullmatch(message.op_type):
                kernels.append(message)
            elif message.op_type in ("Transpose", "Constant"):
                made |= dict.fromkeys(message.output, message)
        elif kind in ("Function", "Training"):
            raise ValueError(f"a {kind.lower()}, of which the runtime would make other nodes")
    for unit in units.values():
        kernel = CATALOGUE[policy[unit.name]]
        if unit.node not in nodes:
            continue
        names = [f"{unit.node}/{part.name}" for part in parts(kernel)] if kernel.prefill else [unit.node]
        for name, part in zip(names, parts(kernel), strict=True):
            if times[name] != 1:
                raise ValueError(f"{times[name]} nodes {name!r} for unit {unit.name!r}, which has {kernel.name}")
            _check_node(nodes[name], unit, part, made, tensors)
            ours.add(name)
        yield unit.name
    for node in kernels:
        if node.name not in ours:
            raise ValueError(f"a {node.op_type} {node.name!r} that is no unit's")


def _inner(root: Any) -> Iterator[Any]:
    """Every message inside, whatever it hangs on: attributes of nodes hold tensors and graphs of their own."""
    left = [root]
    while left:
        message = left.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                left += [value] if hasattr(value, "ListFields") else value


def _check_data(tensor: Any, sizes: Mapping[str, int]) -> None:
    """Raise ValueError for a tensor whose data is elsewhere, or not as long as its shape says."""
    name = tensor.name
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"a tensor {name!r} of shape {list(tensor.dims)}")
    item = _ITEM_BYTES.get(tensor.data_type)
    needed = prod(tensor.dims) * item if item else None
    if tensor.data_location != _EXTERNAL:
        if tensor.raw_data and needed not in (None, len(tensor.raw_data)):
            raise ValueError(f"a tensor {name!r} of {len(tensor.raw_data)} bytes, its shape needs {needed}")
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if location not in sizes:
        raise ValueError(f"a tensor {name!r} with its data in {location!r}, which is no file that the manifest names")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else sizes[location] - offset
    except ValueError:
        raise ValueError(f"a tensor {name!r} with its data at {entries}") from None
    if offset < 0 or length < 0 or offset + length > sizes[location]:
        raise ValueError(f"a tensor {name!r} with bytes {offset} to {offset + length} of {location}, which has {sizes[location]}")
    if needed is None or needed > length:
        raise ValueError(f"a tensor {name!r} of {length} bytes, its shape and type need {needed or 'another type'}")


def _check_node(node: Any, unit: Unit, kernel: Kernel, made: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise ValueError where a node is not what executes the unit with the kernel (`graph/nodes.py` writes it)."""
    op = node_op(unit.op, kernel)
    domain = "com.microsoft" if kernel.quantised else ""
    seen = f"{node.domain}{'.' if node.domain else ''}{node.op_type} {node.name!r}"
    if (node.op_type, node.domain.replace("ai.onnx", "")) != (op, domain):
        raise ValueError(f"{seen} for unit {unit.name!r}, whose {kernel.name} is a {op}")
    wanted, shapes = _meaning(unit, kernel, op)
    given = {attribute.name: attribute.i for attribute in node.attribute}
    for name, value in wanted.items():
        if given.get(name, 0) != value:
            raise ValueError(f"{seen} with {name} {given.get(name, 0)} for unit {unit.name!r}, whose {kernel.name} has {value}")
    for place, (kind, *allowed) in shapes.items():
        stored = _stored(node.input[place] if place < len(node.input) else "", made, tensors)
        if stored is None or stored.data_type != kind or tuple(stored.dims) not in allowed:
            got = "no stored tensor" if stored is None else f"{list(stored.dims)} of type {stored.data_type}"
            raise ValueError(f"{seen} with {got} as input {place}, expected {list(allowed[0])} of type {kind} for {kernel.name}")


def _meaning(unit: Unit, kernel: Kernel, op: str) -> tuple[dict[str, int], dict[int, tuple[Any, ...]]]:
    """(attributes, input → (element type, shapes it may have)) of the unit's node with this kernel."""
    K, N, bits, real = unit.K, unit.N, kernel.container_bits, _FLOATS[kernel.float_type]
    G, width = groups(K, kernel)
    row = -(-width * bits // 8)
    if not kernel.quantised:  # of a tied pair either is stored as the other reads it
        return {}, {int(unit.op == "MatMul"): (real, (K, N), (N, K)) if unit.op == "MatMul" else (real, (N, K), (K, N))}
    if op == "DynamicQuantizeMatMul":
        return {}, {1: (_INT8, (K, N)), 2: (real, (N,))}
    if op == "GatherBlockQuantized":
        shape = {"bits": bits, "block_size": kernel.group_size, "gather_axis": 0, "quantize_axis": 1}
        return shape, {0: (_UINT8, (N, G * row)), 2: (real, (N, G))}
    level = 4 if kernel.activation == "int8_group" else 0
    shape = {"K": K, "N": N, "bits": bits, "block_size": kernel.group_size, "accuracy_level": level}
    return shape, {1: (_UINT8, (N, G, row)), 2: (real, (N, G))}


def _stored(name: str, made: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """The tensor that an input names, also a Constant's, through a Transpose where a tied one is read as the other stores it; None where
    there is none. made: output → the Transpose or Constant that makes it."""
    for _ in range(3):
        if name in tensors or name not in made:
            break
        node = made[name]
        if node.op_type == "Constant":
            return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        name = node.input[0] if node.input else ""
    return tensors.get(name)
