"""Files from strangers that would fill the memory, never end, leave their folder or say two things: refused in one line."""

from __future__ import annotations

import json
import lzma
import re
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import copied

pytest.importorskip("random_models")

import onnx
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper

from toolchain import hardware
from toolchain.commands import workflow
from toolchain.costs.table import open_table
from toolchain.errors import BittailorError, DamagedFileError, InputError
from toolchain.evaluate.spans import read_squad
from toolchain.files import inside, sha256
from toolchain.graph.assemble import round_to_nearest
from toolchain.graph.build import build, read_config
from toolchain.graph.external import load_array, read_model
from toolchain.graph.model import Graph
from toolchain.package.generate import _settings
from toolchain.package.integrity import YAML_TAIL
from toolchain.package.manifest import manifest_text, open_package
from toolchain.policy import proposal
from toolchain.profiler import agent, meters
from toolchain.profiler.meters import hwmon, rapl
from toolchain.profiler.transports import replies
from toolchain.session import open_session
from toolchain.spec import Device, Workload
from toolchain.supernet.loading import load_model
from toolchain.supernet.store import SupernetFolder
from toolchain.text import documents, load_tokenizer, separator_id
from toolchain.train import checkpoint

MOST_BYTES = 200 << 20
"""By which a refusal may raise this process's peak."""


@contextmanager
def refused(word: str = "", kind: type[BittailorError] = InputError) -> Iterator[None]:
    """The block raises an error of one short line, with `word` (a pattern) in it, and little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(kind, match=word or None) as caught:
        yield
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000
    assert peak < MOST_BYTES


# ---- YAML

_NINE = ", ".join(["*{0}"] * 9)
BOMB = (
    "a: &a ["
    + ", ".join(["lol"] * 9)
    + "]\n"
    + "".join(f"{b}: &{b} [{_NINE.format(a)}]\n" for a, b in zip("abcde", "bcdef", strict=True))
)
YAML = {
    "a bomb": (BOMB, "aliases"),
    "a value inside itself": ("a: &a {b: *a}\n", "levels inside each other"),
    "lists inside each other": ("a: " + "[" * 5000 + "]" * 5000 + "\n", "levels inside each other"),
    "blocks inside each other": ("".join(f"{' ' * depth}a:\n" for depth in range(500)), "levels inside each other"),
    "a key that stands twice": ("a: 1\na: 2\n", "twice"),
    "a number of 5000 digits": ("a: " + "9" * 5000 + "\n", "expected"),
    "a tag that its text does not fit": ("a: !!timestamp x\n", "expected"),
    "a tag that knows its words": ("a: !!bool perhaps\n", "expected"),
    "half a surrogate pair": ('a: "\\ud800"\n', "expected"),
    "megabytes": ("a: [" + "x, " * 1_000_000 + "]\n", "expected|more than"),
}


def _device(folder: Path, text: str) -> object:
    path = folder / "board.yaml"
    path.write_text(f"name: board\n{text}")
    return hardware.load(str(path))


def _budget(folder: Path, text: str) -> object:
    path = folder / "budget.yaml"
    path.write_text(f"latency_ms: 5\n{text}")
    return hardware.read_budget(path)


def _manifest(folder: Path, text: str) -> object:
    path = folder / "package" / "manifest.yaml"
    path.write_bytes(YAML_TAIL.append(path.read_bytes().rpartition(b"digest:")[0] + text.encode()))
    return open_package(folder / "package")


def _supernet(folder: Path, text: str) -> object:
    path = folder / "supernet" / "supernet.yaml"
    path.write_text(path.read_text() + text)
    return SupernetFolder.open(folder / "supernet")


def _policy(folder: Path, text: str) -> object:
    path = folder / "policy.yaml"
    path.write_text(text)
    graph = Graph.open(folder / "graph")
    return workflow.read_policy(str(path), workflow.Source(graph, round_to_nearest(graph), None), Device("no", transport="ssh"), [])


@pytest.fixture
def place(strangers: Path, tmp_path: Path) -> Path:
    """Folders of `strangers` that a test may damage."""
    return copied(strangers, tmp_path / "place")


@pytest.mark.parametrize("reader", [_device, _budget, _manifest, _supernet, _policy], ids=lambda one: one.__name__[1:])
@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_too_much(place: Path, reader: Callable[[Path, str], object], name: str) -> None:
    text, word = YAML[name]
    with refused(word):
        reader(place, text)


def test_a_bomb_in_a_value_is_not_printed(tmp_path: Path) -> None:
    """A title that is a list is an error that shows the list."""
    flow = (
        "[&a [x, x, x], &b [" + ", ".join(["*a"] * 9) + "], &c [" + ", ".join(["*b"] * 9) + "], [" + ", ".join(["*c"] * 40) + "]]"
    )
    with refused("title"):
        _device(tmp_path, f"title: {flow}\n")


# ---- JSON

JSON = {
    "100,000 levels": "[" * 100_000 + "]" * 100_000,
    "objects inside each other": '{"a":' * 900 + "1" + "}" * 900,
    "infinity": "1e400",
    "no number": "NaN",
    "a number of 5000 digits": "9" * 5000,
    "a number that is no float": "9" * 400,
    "half a surrogate pair": '"\\ud800"',
    "a key that stands twice": '{"a": 1, "a": 2}',
}


def _graph(folder: Path, value: str) -> object:
    path = folder / "graph" / "graph.json"
    path.write_text(path.read_text().replace('"source": ', f'"source": {value}, "unread": ', 1))
    return Graph.open(folder / "graph")


def _table(folder: Path, value: str) -> object:
    path = folder / "tables" / "local" / "table.jsonl"
    path.write_text(path.read_text().replace('"spread_ms": ', f'"spread_ms": {value}, "unread": ', 1))
    return open_table(path)


def _genai(folder: Path, value: str) -> object:
    path = folder / "package" / "genai_config.json"
    path.write_text(f'{{"unread": {value}, "model": {{"context_length": {value}}}}}')
    return _settings(folder / "package")


def _config(folder: Path, value: str) -> object:
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().replace("{", f'{{"unread": {value}, ', 1))
    return read_config(folder / "model")


def _meta_network(folder: Path, value: str) -> object:
    header = json.dumps({"__metadata__": {"candidates": f'{{"u": {value}}}'}}).encode()
    (folder / "net").write_bytes(len(header).to_bytes(8, "little") + header)
    return proposal.read(folder / "net")


@pytest.mark.parametrize("reader", [_graph, _table, _genai, _config, _meta_network], ids=lambda one: one.__name__[1:])
@pytest.mark.parametrize("name", JSON)
def test_json_that_is_too_much(place: Path, reader: Callable[[Path, str], object], name: str) -> None:
    with refused():
        reader(place, JSON[name])


@pytest.mark.parametrize("name", JSON)
def test_an_answer_that_is_too_much(name: str) -> None:
    with refused("phone", BittailorError):
        replies.answer_of(f'{{"peak_bytes": 1, "running_bytes": 2, "more": {JSON[name]}}}', "peak", Device("phone"))


def test_a_tokenizer_that_makes_its_library_panic(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is no Exception that comes out of it, and it writes lines of its own."""
    path = place / "package" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["continuing_subword_prefix"] = "longer"
    path.write_text(json.dumps(data))
    with refused("expected a tokenizer"):
        load_tokenizer(path.parent)
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_may_say_that_its_model_has_no_longest_text(place: Path) -> None:
    """transformers writes int(1e30) for that."""
    path = place / "package" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": int(1e30)}))
    assert separator_id(place / "package") is not None


# ---- sizes that are not there


@pytest.mark.parametrize("line", ["first", "second"])
def test_a_table_of_a_gigabyte(place: Path, line: str) -> None:
    path = place / "tables" / "local" / "table.jsonl"
    if line == "first":
        path.write_bytes(b"")
    with path.open("r+b") as stream:
        stream.truncate(1 << 30)  # zeros without a newline, and without room on the disk
    with refused("MiB"):
        open_table(path)


def _header(name: str, shape: list[int], end: int) -> bytes:
    made = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return len(made).to_bytes(8, "little") + made


@pytest.mark.parametrize("shape", [[2_500_000_000], [1 << 32, 1 << 32], [50_000, 50_000]])
@pytest.mark.parametrize("name", ["meta_network", "heldout", "quantised/w4g32", "adapters/w4g32/adapter_model"])
def test_ten_gigabytes_in_a_kilobyte_of_safetensors(place: Path, name: str, shape: list[int]) -> None:
    path = place / "supernet" / f"{name}.safetensors"
    path.write_bytes(_header("tokens", shape, min(4 * shape[0] * shape[-1], 10**10)))
    supernet = SupernetFolder(place / "supernet", yaml.safe_load((place / "supernet" / "supernet.yaml").read_text()))
    unit = next(unit for unit in Graph.open(place / "graph").units if unit.op == "MatMul")
    with refused():
        supernet.heldout()
        supernet.trained()
        supernet.quantized(unit, workflow.CATALOGUE["w4g32"])
        proposal.read(path)


def _external(dims: list[int], **entries: object) -> TensorProto:
    tensor = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "data", **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


TENSORS = {
    "inline, 10 GB": TensorProto(name="w", dims=[2_500_000_000], data_type=TensorProto.FLOAT, raw_data=b"\0" * 64),
    "inline, numbers": TensorProto(name="w", dims=[2_500_000_000], data_type=TensorProto.FLOAT, float_data=[1.0]),
    "inline, below nothing": TensorProto(name="w", dims=[-1, -16], data_type=TensorProto.FLOAT, raw_data=b"\0" * 64),
    "inline, no type": TensorProto(name="w", dims=[16], data_type=99, raw_data=b"\0" * 64),
    "inline, text": TensorProto(name="w", dims=[200], data_type=TensorProto.STRING, string_data=[b"a"] * 200),
    "external, 10 GB": _external([2_500_000_000]),
    "external, a product that wraps to nothing": _external([1 << 32, 1 << 32]),
    "external, below nothing": _external([-16]),
    "external, an offset beyond the end": _external([16], offset=1 << 40),
    "external, an offset below nothing": _external([16], offset=-8),
    "external, an offset of 5000 digits": _external([16], offset="9" * 5000),
    "external, a name of 5000 letters": _external([16], location="a" * 5000),
    "external, a name with a zero": _external([16], location="da\0ta"),
    "external, no name": _external([16], location=""),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").write_bytes(b"\0" * 64)
    with refused():
        load_array(TENSORS[name], tmp_path)


def test_ten_gigabytes_in_a_header_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the agent is asked to compute on."""
    shutil.copytree(agent.BARE, tmp_path / "unit")
    np.save(tmp_path / "unit" / "x.npy", np.ones((1, 8), np.float32))
    data = (tmp_path / "unit" / "x.npy").read_bytes()
    (tmp_path / "unit" / "x.npy").write_bytes(data.replace(b"(1, 8), }          ", b"(2500000000,), }   "))
    request = {"action": "outputs", "subjects": [{"name": "x", "folder": "unit", "inputs": ["x.npy"]}]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    monkeypatch.setattr("sys.stdout.write", said.append)
    assert agent.main(["request.json"]) == 2
    assert "expected" in json.loads("".join(said))["error"]


def test_an_xz_that_unpacks_to_what_no_text_is(tmp_path: Path) -> None:
    packer = lzma.LZMACompressor(preset=0)
    zeros = bytes(1 << 20)
    (tmp_path / "text.xz").write_bytes(b"".join(packer.compress(zeros) for _ in range(80)) + packer.flush())
    with refused("become more than"):
        documents([tmp_path / "text.xz"])


def test_an_xz_of_more_streams_than_anybody_writes(tmp_path: Path) -> None:
    """What is behind a stream is copied for each: 64 MiB of empty ones would take days."""
    (tmp_path / "text.xz").write_bytes(lzma.compress(b"") * 30_000)
    with refused("streams"):
        documents([tmp_path / "text.xz"])


@pytest.mark.parametrize("form", [lzma.FORMAT_XZ, lzma.FORMAT_ALONE])
def test_an_xz_that_asks_for_a_gigabyte_to_be_unpacked(tmp_path: Path, form: int) -> None:
    data = bytearray(lzma.compress(b"text\n", form))
    if form == lzma.FORMAT_XZ:  # a block's header: its size, flags, LZMA2, one byte of properties, which is the dictionary's size
        data[16] = 36
        data[20:24] = zlib.crc32(data[12:20]).to_bytes(4, "little")
    else:
        data[1:5] = (1 << 30).to_bytes(4, "little")
    (tmp_path / "text.xz").write_bytes(data)
    with refused("xz data"):
        documents([tmp_path / "text.xz"])
    with refused("LZMAError"):
        read_squad(tmp_path / "text.xz")


def test_an_xz_of_several_streams_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "text.xz").write_bytes(lzma.compress(b"one\n") + b"\0" * 4 + lzma.compress(b"two\n"))
    assert documents([tmp_path / "text.xz"]) == ["one\ntwo"]


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**6}, {"vocab_size": 10**6}, {"hidden_size": 1 << 30}, {"intermediate_size": 1 << 20}]
)
def test_a_config_of_a_larger_model_than_the_weights(place: Path, change: dict[str, int]) -> None:
    """What the weights lack, transformers allocates."""
    path = place / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (place / "out").mkdir()
    for read in (lambda: build(str(place / "model"), place / "out"), lambda: load_model(place / "model")):
        with refused():
            read()


@pytest.mark.parametrize(
    "text", ["generate:99999999999+1", "encode:9999999x9999999", "generate:" + "9" * 5000 + "+1", "encode:\u0661x1"]
)
def test_a_workload_that_nobody_allocates(text: str) -> None:
    with refused("workload"):
        Workload.parse(text)


def test_a_unit_that_is_larger_than_its_weights(place: Path) -> None:
    """graph.json says how much is allocated for a package's bytes."""
    path = place / "graph" / "graph.json"
    data = json.loads(path.read_text())
    data["units"][1]["K"] = 1 << 32
    path.write_text(json.dumps(data))
    graph = Graph.open(place / "graph")
    with refused("4294967296"):
        graph.weight(graph.units[1])


# ---- what leaves the folder


@pytest.mark.parametrize("name", ["", ".", "a/..", "da\0ta", "a" * 300, "loop", "../x", "/x", "up/x"])
def test_names_that_are_none_inside(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "loop").symlink_to("loop")
    (tmp_path / "folder" / "up").symlink_to(tmp_path)
    with refused("inside"):
        inside(tmp_path / "folder", name)


def test_a_companion_that_is_a_link_is_not_published(place: Path, tmp_path: Path) -> None:
    """What lies beside a graph goes into every package cut from it."""
    (tmp_path / "private_key").write_text("secret")
    (place / "graph" / "merges.txt").symlink_to(tmp_path / "private_key")
    with refused("inside"):
        Graph.open(place / "graph").companions()


def test_what_happens_to_lie_beside_a_graph_is_not_published(place: Path) -> None:
    before = Graph.open(place / "graph").companions()
    for name in ("ready", ".DS_Store", "id_ed25519", "model.onnx.data.swp", "credentials.json", "notes.md"):
        (place / "graph" / name).write_text("secret")
    (place / "graph" / "merges.txt").write_text("a b")
    assert Graph.open(place / "graph").companions() == sorted([*before, place / "graph" / "merges.txt"])


def test_a_graph_that_is_a_link_out_of_its_folder(place: Path, tmp_path: Path) -> None:
    (place / "graph" / "model.onnx").rename(tmp_path / "model.onnx")
    (place / "graph" / "model.onnx").symlink_to(tmp_path / "model.onnx")
    graph = Graph.open(place / "graph")
    with refused("inside"):
        graph.weight(graph.units[0])


# ---- graphs that are programs


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
    tensor = _external([16], location=location.format(absolute=tmp_path / "secret"), length=64, offset=0)
    with refused("load"):
        open_session(_write(folder, [helper.make_node("Add", ["x", "w"], ["y"])], tensors=[tensor]), threads=1)


# ---- values of another kind


def _rehashed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "supernet" / "supernet.yaml"
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data))


SUPERNETS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a sensitivity of words": lambda data: data["sensitivity"].update(lm_head="much"),
    "a sensitivity that is a list": lambda data: data["sensitivity"]["lm_head"].update(w4g32=[1]),
    "kernels that are a number": lambda data: data["kernels"].update(lm_head=4),
    "a kernel nobody knows": lambda data: data["kernels"]["lm_head"].append("w5g7"),
    "no training": lambda data: data.pop("training"),
    "a workload of words": lambda data: data["training"].update(workload="all of it"),
    "a rank below zero": lambda data: data.update(rank=-1),
    "a file with a long name": lambda data: data["files"].update({"a" * 5000: "0"}),
    "a date": lambda data: data["training"].update(text=__import__("datetime").date(2026, 1, 1)),
}


@pytest.mark.parametrize("name", SUPERNETS)
def test_supernets_that_say_something_else(place: Path, name: str) -> None:
    _rehashed(place, SUPERNETS[name])
    with refused():
        SupernetFolder.open(place / "supernet")


def test_an_adapter_that_is_none(place: Path) -> None:
    path = place / "supernet" / "adapters" / "w4g32" / "bounds.safetensors"
    path.write_bytes(b"not this")
    before = yaml.safe_load((place / "supernet" / "supernet.yaml").read_text())["files"]["adapters/w4g32/bounds.safetensors"]
    text = (place / "supernet" / "supernet.yaml").read_text()
    (place / "supernet" / "supernet.yaml").write_text(text.replace(before, sha256(path)))
    with refused("adapters"):
        SupernetFolder.open(place / "supernet").trained()


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "an infinite vocabulary": lambda data: data["model"].update(vocabulary=float("inf")),
    "a vocabulary of words": lambda data: data["model"].update(vocabulary="many"),
    "no context": lambda data: data["model"].pop("context"),
    "a kernel nobody knows": lambda data: data["policy"].update(lm_head="w5g7"),
    "a kernel that is a list": lambda data: data["policy"].update(lm_head=["w4g32"]),
    "a workload that nobody allocates": lambda data: data.update(workload="generate:99999999999+1"),
    "a prediction that is a number": lambda data: data["predicted"].update(compute_flop=5),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_say_something_else(place: Path, name: str) -> None:
    path = place / "package" / "manifest.yaml"
    data = yaml.safe_load(path.read_text())
    MANIFESTS[name](data)
    path.write_bytes(manifest_text(data))
    with refused():
        open_package(place / "package")


def test_a_checkpoint_that_lacks_a_moment_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    path = place / "checkpoint" / checkpoint.FILE
    tensors = load_file(path)
    del tensors["exp_avg_sq:b"]
    save_file(tensors, path, {"identity": "id", "state": '{"step": 3, "extra": {}}'})
    values = {"a": torch.nn.Parameter(torch.full((4, 4), 7.0)), "b": torch.nn.Parameter(torch.full((4,), 7.0))}
    optimiser = torch.optim.AdamW(values.values())
    assert checkpoint.load(place / "checkpoint", "id", values, [optimiser]) is None
    assert "starting over" in capsys.readouterr().err
    assert all(bool((value == 7).all()) for value in values.values())
    assert not optimiser.state


def test_a_table_whose_model_rows_lack_a_unit(place: Path) -> None:
    from toolchain.costs.from_table import cost_model

    path = place / "tables" / "local" / "table.jsonl"
    table, graph = open_table(path), Graph.open(place / "graph")
    for row in table.rows.values():
        if row.key[0] in ("model", "model memory"):
            row.units.pop(next(iter(row.units)))  # type: ignore[union-attr]
    with refused("kernel"):
        cost_model(graph, table, Workload.parse("generate:8+4"))


@pytest.mark.parametrize("said", ["\u00b2", "9" * 5000, "1e9", ""])
def test_sensors_that_say_something_else(strangers: Path, tmp_path: Path, said: str) -> None:
    sys_ = copied(strangers / "sys", tmp_path / "sys")
    (sys_ / "class/hwmon/hwmon0/update_interval").write_text(said)
    assert hwmon.Hwmon(sys_, threaded=False).step_s > 0
    (sys_ / "class/powercap/intel-rapl:0/max_energy_range_uj").write_text(said)
    with refused(kind=BittailorError):
        rapl.Rapl(sys_)
    assert re.search("answer", meters.states(sys_)["rapl"])


def test_an_error_is_one_line_however_long_and_strange_its_cause() -> None:
    line = str(DamagedFileError(f"expected text, got {'x' * 10**6} \x1b[31m", "type: bittailor --help"))
    assert len(line) < 1200
    assert line.endswith("type: bittailor --help")
    assert str(InputError("red \x1b[31m\n text")) == "red \ufffd[31m text"


_PHASE = {
    "energy_mj": [1.0],
    "above_idle_mj": [0.5],
    "run_ms": [1.0],
    "reference_ns": {"token": [1.0]},
    "error": 0.0,
    "valid": True,
}
_ENERGY = {"reason": "", "meter": "rapl: x", "step_s": 0.1, "window_s": 5.0, "idle_mw": 1.0}


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        ("energy", {"reason": ""}),
        ("energy", {**_ENERGY, "measured": {"m": {"run": {**_PHASE, "reason": "", "energy_mj": "much"}}}}),
        ("energy", {**_ENERGY, "measured": {"m": {"run": {"reason": ""}}}}),
        ("time", {"trials": {"m": [{"x_ns": 1}]}, "reference_ns": {"token": [1]}, "dropped": 0, "valid": True, "quantiles": 5}),
    ],
)
def test_half_an_answer_is_none(action: str, answer: dict[str, object]) -> None:
    with pytest.raises(BittailorError, match=r"expected an answer with '.*' from 'phone', got"):
        replies.answer_of(json.dumps(answer), action, Device("phone"))
    whole = {**_ENERGY, "measured": {"m": {"run": {**_PHASE, "reason": ""}}}}
    assert replies.answer_of(json.dumps(whole), "energy", Device("phone")) == whole


def test_a_kernel_that_makes_no_numbers_there_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    """NaN is no JSON: the answer as a whole would be refused."""
    import onnx
    from onnx import TensorProto, helper

    for name, op in (("well", "Identity"), ("ill", "Log")):
        (tmp_path / name).mkdir()
        ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["M"]) for end in ("x", "y")]
        graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "one", ends[:1], ends[1:])
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / name / "model.onnx"
        )
        np.save(tmp_path / name / "x.npy", np.array([-1.0, 2.0], np.float32))
    subjects = [
        {"name": name, "folder": str(tmp_path / name), "inputs": ["x.npy"], "provider": "CPUExecutionProvider"}
        for name in ("well", "ill")
    ]
    made = agent.outputs({"subjects": subjects})
    assert replies.answer_of(json.dumps(made), "outputs", Device("phone"))["outputs"] == {"well": [[-1.0, 2.0]], "ill": None}
