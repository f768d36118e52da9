"""Graphs that are programs, are no graphs, or want data from elsewhere: refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("random_models")

import onnx
from onnx import TensorProto, helper, numpy_helper
from refusals import external, refused

from toolchain.graph.external import read_model
from toolchain.session import open_session


def _write(folder: Path, nodes: list[onnx.NodeProto], domain: str = "evil", functions: Any = (), tensors: Any = ()) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], list(tensors))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def _loop(folder: Path) -> Path:
    """Doubles a number 2^62 times."""
    typed = {"i": (TensorProto.INT64, []), "c": (TensorProto.BOOL, []), "v": (TensorProto.FLOAT, [1])}
    given = [helper.make_tensor_value_info(name, *kind) for name, kind in typed.items()]
    made = [helper.make_tensor_value_info(f"{name}o", *typed[name]) for name in "cv"]
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["co"]), helper.make_node("Add", ["v", "v"], ["vo"])], "b", given, made
    )
    often, always = numpy_helper.from_array(np.array(1 << 62), "n"), numpy_helper.from_array(np.array(True), "t")
    return _write(folder, [helper.make_node("Loop", ["n", "t", "x"], ["y"], body=body)], tensors=[often, always])


def _branch(op: str, domain: str = "") -> list[onnx.NodeProto]:
    made = [helper.make_tensor_value_info("o", TensorProto.FLOAT, [1])]
    inner = helper.make_graph([helper.make_node(op, ["x"], ["o"], domain=domain)], "b", [], made)
    return [helper.make_node("If", ["t"], ["y"], then_branch=inner, else_branch=inner)]


def _function(folder: Path, op: str) -> Path:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("evil", 1)]
    made = helper.make_function(
        "evil", "F", ["a"], ["b"], [helper.make_node(op, ["a"], ["b"], domain="evil" * (op == "F"))], opsets
    )
    return _write(folder, [helper.make_node("F", ["x"], ["y"], domain="evil")], functions=[made])


_TRUE = [numpy_helper.from_array(np.array(True), "t")]
PROGRAMS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a loop": (_loop, "'Loop'"),
    "a function": (lambda folder: _function(folder, "Identity"), "'evil'|a function"),
    "a function that calls itself": (lambda folder: _function(folder, "F"), "'evil'|a function"),
    "somebody's op": (lambda folder: _write(folder, [helper.make_node("Run", ["x"], ["y"], domain="evil")]), "'evil'"),
    "somebody's op in a branch": (lambda folder: _write(folder, _branch("Run", "evil"), tensors=_TRUE), "'evil'"),
    "an op of ai.onnx.ml": (
        lambda folder: _write(folder, [helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml")], "ai.onnx.ml"),
        "'ai.onnx.ml'",
    ),
    "a cycle": (
        lambda folder: _write(folder, [helper.make_node("Add", ["x", "y"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])]),
        "load",
    ),
    "no graph": (lambda folder: (folder / "model.onnx").write_bytes(b"\x3a\xff\xff\x03") and folder, "ONNX graph"),
    "nothing": (lambda folder: (folder / "model.onnx").touch() or folder, "ONNX graph"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_graphs_that_are_no_models(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    make, word = PROGRAMS[name]
    folder = make(tmp_path)
    with refused(word):
        open_session(folder, threads=1)
    assert capfd.readouterr() == ("", "")  # what onnxruntime prints would be more than one line


TEXTS: dict[str, Callable[[onnx.ModelProto], object]] = {
    "a node's input": lambda model: model.graph.node[0].MergeFromString(b"\x0a\x01\xe4"),
    "a tensor's name": lambda model: model.graph.initializer.add().MergeFromString(b"\x42\x01\xe4"),
    "an input in a branch": lambda model: model.graph.node[0].attribute.add().g.node.add().MergeFromString(b"\x0a\x01\xe4"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_names_that_are_no_text(tmp_path: Path, name: str) -> None:
    """In a graph that is made anew from this one protobuf would refuse them, with an error of its own."""
    folder = _write(tmp_path, [helper.make_node("Neg", ["x"], ["y"])])
    model = onnx.load(folder / "model.onnx")
    TEXTS[name](model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with refused("no UTF-8"):
        read_model(folder)


def test_a_branch_is_run(tmp_path: Path) -> None:
    session = open_session(_write(tmp_path, _branch("Neg"), tensors=_TRUE), threads=1)
    assert session.run(None, {"x": np.ones(1, np.float32)})[0] == -1


@pytest.mark.parametrize("location", ["../secret", "link", "{absolute}", "short"])
def test_onnxruntime_reads_no_data_from_elsewhere(tmp_path: Path, location: str) -> None:
    """It is onnxruntime that opens a package's data: that it stays inside is its doing, from the oldest version that we take on."""
    folder = tmp_path / "package"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 4096)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "short").write_bytes(b"\0" * 8)
    tensor = external([16], location=location.format(absolute=tmp_path / "secret"), length=64, offset=0)
    with refused("load"):
        open_session(_write(folder, [helper.make_node("Add", ["x", "w"], ["y"])], tensors=[tensor]), threads=1)
