"""Policy → kernels in the graph: the fp32 graph with every unit's node replaced, streamed to the graph's files + model.onnx.data.

requires: a Graph, a policy valid for its units, a source of quantised weights
ensures:  the folder runs on stock onnxruntime; equal tensors are stored once; same inputs give the same bytes; a policy of kernels with
          fp16 activations makes the whole graph fp16 (`half.py`)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from toolchain.errors import DamagedFileError, InputError
from toolchain.graph.external import DATA_NAME, DataWriter, load_array, read_model
from toolchain.graph.half import in_half, to_half
from toolchain.graph.layers import keep_layers
from toolchain.graph.model import Graph
from toolchain.graph.nodes import either, inputs_of, one_token_nodes, quantised_node
from toolchain.kernels import CATALOGUE, float_type, parts
from toolchain.quantize.affine import Quantized, groups, quantize
from toolchain.spec import Kernel, Unit

Weights = Callable[[Unit, Kernel], Quantized]
_DATA = "<data>"
"""Stands in a replacement for the input that the file it goes into has in that place."""


def round_to_nearest(graph: Graph) -> Weights:
    """The weights of a model nobody trained: min-max round-to-nearest of the graph's own."""
    return lambda unit, kernel: quantize(graph.weight(unit), kernel)


def assemble(
    graph: Graph, policy: Mapping[str, str], weights: Weights, out: Path, layers: int | None = None, sync: bool = True
) -> None:
    """Write the graph's files and model.onnx.data for `policy` into `out`. The policy is assumed valid (`kernels.validate`).

    layers: only the first so many, with embedding and head (`layers.keep_layers`); the policy need not name the others' units.
    sync: see DataWriter.
    """
    with DataWriter(out / DATA_NAME, sync) as writer:
        models = _assembled(graph, policy, weights, writer, graph.layers if layers is None else layers)
    for name, model in models.items():
        onnx.save(model, out / name)


def package_bytes(graph: Graph, policy: Mapping[str, str]) -> int:
    """Bytes of the files that `assemble` would write for `policy`, and of the tokenizer files beside them: exact, nothing is written."""
    with DataWriter(None) as writer:
        models = _assembled(graph, policy, lambda unit, kernel: _stand_in(graph, unit, kernel), writer, graph.layers)
    return (
        sum(model.ByteSize() for model in models.values()) + writer.size + sum(path.stat().st_size for path in graph.companions())
    )


def _stand_in(graph: Graph, unit: Unit, kernel: Kernel) -> Quantized:
    """Tensors of the right sizes, equal where real ones are equal: those of units with the same weights under the same kernel."""
    G, width = groups(unit.K, kernel)
    digest = hashlib.blake2b(graph.first_row(unit).tobytes() + kernel.name.encode(), digest_size=8).digest()
    mark = np.frombuffer(digest, np.uint8)
    codes, scales = np.zeros((unit.N, G, width), np.uint8), np.zeros((unit.N, G), np.float32)
    codes[: len(mark), 0, 0] = mark[: unit.N] % 4
    scales[: len(mark), 0] = mark[: unit.N] / 256  # exact in fp16 too
    zero_points = np.zeros((unit.N, G), np.uint8)
    zero_points[: len(mark), 0] = mark[: unit.N] // 4 % 4
    return Quantized(codes, scales, zero_points, unit.K)


def check_float_type(graph: Graph, kernels: Iterable[str]) -> None:
    """Raise InputError where the kernels are in fp16 and the graph cannot be: an encoder-decoder's."""
    if graph.kind == "encoder-decoder" and float_type(kernels) == "float16":
        raise InputError(
            f"expected a decoder or an encoder for kernels in fp16, got an encoder-decoder ({graph.architecture})",
            "T5's activations leave fp16's range; choose a device with the CPU provider",
        )


def _assembled(
    graph: Graph, policy: Mapping[str, str], weights: Weights, writer: DataWriter, layers: int
) -> dict[str, onnx.ModelProto]:
    """File name → model. A unit in several files is quantised and stored once. Raises InputError for an encoder-decoder in fp16."""
    half = float_type(policy.values()) == "float16"
    check_float_type(graph, policy.values())
    replacements = _Replacements(policy, weights, writer)
    models = {name: read_model(graph.directory, name) for name in graph.files}
    for model in models.values():
        keep_layers(model, graph.layers, layers)
        _replace_units(model, graph, policy, writer, replacements, in_half if half else np.asarray)
        if half:
            to_half(model)
    return models


class _Replacements:
    """A quantised unit's node and tensors, made when first asked for; the tensors are in the writer's file from then on."""

    def __init__(self, policy: Mapping[str, str], weights: Weights, writer: DataWriter) -> None:
        self._policy, self._weights, self._writer = policy, weights, writer
        self._made: dict[str, tuple[list[onnx.NodeProto], list[onnx.TensorProto]]] = {}

    def of(self, unit: Unit, data: str, output: str) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
        """The node that computes `output` from `data` (activations or token ids), and its tensors."""
        if unit.name not in self._made:
            kernel = CATALOGUE[self._policy[unit.name]]
            made: list[onnx.NodeProto] = []
            stored: list[onnx.TensorProto] = []
            for part in parts(kernel):
                name = f"{unit.node}/{part.name}" if kernel.prefill else unit.node
                node, tensors = quantised_node(unit, part, self._weights(unit, part), _DATA, "", name)
                made.append(node)
                stored += [self._writer.tensor(name, array) for name, array in tensors]
            self._made[unit.name] = made, stored
        templates, protos = self._made[unit.name]
        nodes = []
        for template in templates:
            node = onnx.NodeProto()
            node.CopyFrom(template)
            node.input[:] = [data if name == _DATA else name for name in node.input]
            node.output[:] = [output if len(templates) == 1 else f"{node.name}/output_0"]
            nodes.append(node)
        return nodes[0] if len(nodes) == 1 else either(nodes[0], nodes[1], output, unit.node), protos


def _replace_units(
    model: onnx.ModelProto,
    graph: Graph,
    policy: Mapping[str, str],
    writer: DataWriter,
    replacements: _Replacements,
    stored: Callable[[np.ndarray], np.ndarray],
) -> None:
    """stored: what becomes of a tensor that is no unit's, or of one that its kernel does not quantise."""
    present = {node.name for node in model.graph.node}
    units = {unit.node: unit for unit in graph.units if unit.node in present}
    if short := next(
        (node.name for node in model.graph.node if node.name in units and not (len(node.input) > 1 and node.output)), ""
    ):
        raise DamagedFileError(f"expected two inputs and an output of the node {short[:80]!r} in {graph.directory}, got fewer")
    all_weights = {unit.weight for unit in graph.units}
    read = {name for node in model.graph.node for name in node.input}
    arrays = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in read}
    quantised = [unit for unit in units.values() if CATALOGUE[policy[unit.name]].quantised]
    # A tied embedding without codes reads the head's weight through a Transpose; that holds only while neither has any.
    untied = any(unit.tied_to for unit in quantised)
    own_copy = {unit.name for unit in units.values() if unit.op == "Gather" and unit.tied_to and untied}
    plain_weights = {unit.weight for unit in units.values() if unit not in quantised and unit.name not in own_copy}
    nodes = []
    initializers = [
        writer.tensor(name, stored(load_array(tensor, graph.directory)))
        for name, tensor in arrays.items()
        if name in plain_weights or name not in all_weights
    ]
    for node in model.graph.node:
        unit = units.get(node.name)
        if unit is None:
            nodes.append(node)
        elif CATALOGUE[policy[unit.name]].quantised:
            made, tensors = replacements.of(unit, node.input[1] if unit.op == "Gather" else node.input[0], node.output[0])
            nodes.append(made)
            initializers += tensors
        elif unit.name in own_copy:
            name = f"{unit.name}.weight"
            nodes.append(helper.make_node("Gather", [name, node.input[1]], node.output, name=node.name))
            initializers.append(writer.tensor(name, stored(graph.weight(unit))))
        else:
            nodes.append(node)
    if any(CATALOGUE[policy[unit.name]].prefill for unit in units.values()):
        asking, constants = one_token_nodes("input_ids", 1)
        nodes, initializers = [*asking, *nodes], [*initializers, *constants]
    _drop_dead(nodes, {output.name for output in model.graph.output})
    used = {name for node in nodes for name in inputs_of(node)}
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensor for tensor in initializers if tensor.name in used)
    if not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.producer_name, model.producer_version = "bittailor", ""


def _drop_dead(nodes: list[onnx.NodeProto], outputs: set[str]) -> None:
    """Remove, in place, nodes that nothing reads any more (the Transpose of an untied embedding)."""
    while True:
        used = outputs | {name for node in nodes for name in inputs_of(node)}
        alive = [node for node in nodes if any(name in used for name in node.output)]
        if len(alive) == len(nodes):
            return
        nodes[:] = alive
