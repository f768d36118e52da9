"""The first layers of a model, with its embedding and head: a smaller model that costs as much per layer as the whole one.

requires: a graph whose node names carry the layer's number (`.../layers.3/...`, `.../layer.3/...`), as both builders write them
ensures:  what read the last layer reads the last one kept; units, cache inputs and outputs of the others are gone
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx

from toolchain.errors import InputError
from toolchain.spec import Unit

_UNIT = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
_NODE = re.compile(r"(/layers?\.)(\d+)(?=/)")
_CACHE = re.compile(r"^(?:past_key_values|present)\.(\d+)\.")


def layer_of(unit: Unit) -> int | None:
    """Number of the layer a unit is in; None for embedding, head and whatever else stands outside."""
    match = _UNIT.search(unit.name)
    return int(match[1]) if match else None


def units_within(units: Sequence[Unit], layers: int) -> tuple[Unit, ...]:
    """Those of the first `layers` layers and those outside of all layers."""
    return tuple(unit for unit in units if (layer := layer_of(unit)) is None or layer < layers)


def keep_layers(model: onnx.ModelProto, layers: int, kept: int) -> None:
    """Cut a model of `layers` layers down to the first `kept`, in place. InputError where a name gives a layer no counterpart."""
    if kept == layers:
        return
    graph = model.graph
    nodes = {node.name: node for node in graph.node}
    # The final norm of a decoder is numbered as one layer more: it stays, and reads the last layer that is kept.
    gone = [node for node in graph.node if (number := _number(node.name)) is not None and kept <= number < layers]
    replaced = {}
    for node in gone:
        if _number(node.name) != layers - 1:
            continue
        counterpart = nodes.get(_NODE.sub(rf"\g<1>{kept - 1}", node.name, count=1))
        for place, output in enumerate(node.output):
            if output and counterpart is not None and place < len(counterpart.output) and counterpart.output[place]:
                replaced[output] = counterpart.output[place]
    missing = {output for node in gone for output in node.output} - set(replaced) - {""}
    names = {node.name for node in gone}
    remaining = [node for node in graph.node if node.name not in names]
    for node in remaining:
        if lost := missing.intersection(node.input):
            raise InputError(f"expected layer {kept - 1} to have what layer {layers - 1} has, found nothing for {lost.pop()!r}")
        node.input[:] = [replaced.get(name, name) for name in node.input]
    _rename_outputs(graph, remaining, replaced)
    del graph.node[:]
    graph.node.extend(remaining)
    for values in (graph.input, graph.output):
        alive = [value for value in values if not (match := _CACHE.match(value.name)) or int(match[1]) < kept]
        del values[:]
        values.extend(alive)


def _rename_outputs(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], replaced: dict[str, str]) -> None:
    """A graph output that the last layer made is now made by its counterpart, under the output's own name."""
    wanted = {
        replaced[output.name]: output.name for output in graph.output if output.name in replaced and "present" not in output.name
    }
    for node in nodes:
        node.input[:] = [wanted.get(name, name) for name in node.input]
        node.output[:] = [wanted.get(name, name) for name in node.output]


def _number(name: str) -> int | None:
    match = _NODE.search(name)
    return int(match[2]) if match else None
