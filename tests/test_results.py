"""Tables of results/ that are made from other results or a cost table are just that: nobody typed a figure."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("torch")


def tables(*devices: str) -> list[str]:
    return ["--table", *(str(ROOT / "profiles" / device / "table.jsonl") for device in devices)]


def graph(folder: Path) -> list[str]:
    """The embedded model's: what the radar counts the bytes of packages with."""
    from toolchain.graph.build import build

    (folder / "graph").mkdir()
    build("pocket-llama-6m", folder / "graph")
    return ["--graph", str(folder / "graph")]


MADE: dict[str, Callable[[Path], list[str]]] = {
    "ablation": lambda _: [],
    "energy": lambda _: [*tables("h200"), "--model", "4842ffe6"],
    "radar": lambda folder: [*tables("epyc-zen5-2", "epyc-avx512-2", "epyc-avx2-2", "xeon-amx-16"), *graph(folder)],
}
"""Page → what `from_results.py` is asked for it."""


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", MADE)
def test_a_table_is_made_from_what_was_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (ROOT / "results").glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    monkeypatch.setattr(sys, "argv", ["from_results.py", name, *MADE[name](tmp_path), "--results", str(tmp_path)])
    importlib.import_module("from_results").main()
    assert (tmp_path / f"{name}.md").read_text() == (ROOT / "results" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", ["dense", "summaries"])
def test_a_page_shows_the_measurements_beside_it(name: str) -> None:
    found = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert importlib.import_module(name).page(found) == (ROOT / "results" / f"{name}.md").read_text()
