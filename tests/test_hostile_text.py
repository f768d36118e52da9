"""YAML and JSON from strangers that would fill the memory, never end or say two things: refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("random_models")

from refusals import refused

from toolchain import hardware
from toolchain.commands import workflow
from toolchain.costs.table import open_table
from toolchain.errors import BittailorError
from toolchain.graph.assemble import round_to_nearest
from toolchain.graph.build import read_config
from toolchain.graph.model import Graph
from toolchain.package.generate import _settings
from toolchain.package.integrity import YAML_TAIL
from toolchain.package.manifest import open_package
from toolchain.policy import proposal
from toolchain.profiler.transports import replies
from toolchain.spec import Device
from toolchain.supernet.store import SupernetFolder
from toolchain.text import load_tokenizer, separator_id

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
