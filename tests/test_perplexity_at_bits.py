"""benchmarks/perplexity_at_bits.py on a random model of two layers: a method of each kind stands where it belongs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment

random_models = pytest.importorskip("random_models")

pytestmark = pytest.mark.slow

ALL = ("2", "2.5", "3", "3.5", "4", "8")
COLUMNS = {
    "QA-LoRA": ("2", "3", "4", "8"),
    "Q8BERT": ("8",),
    "Q-BERT": ALL,
    "half depth": ("2", "3", "4", "8"),
    "MetaQuantLLM": ALL,
    "MetaQuantLLM, fixed policy": ALL,
    "MetaQuantLLM, solver": ALL,
}


OTHER = "reversed/valid.txt"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Words of both commands: a model, its texts, as little of them as there can be."""
    folder = tmp_path_factory.mktemp("texts")
    model = random_models.save_random_model("llama", folder / "model", vocab_size=4096, num_hidden_layers=2)
    for path in (ROOT / "toolchain" / "models" / "pocket-llama-6m").glob("*token*"):
        shutil.copyfile(path, model / path.name)
    text, other = ROOT / "LICENSE", folder / OTHER
    other.parent.mkdir()
    other.write_text(" ".join(reversed(text.read_text().split())))
    words = ["--model", model, "--text", text, "--heldout", text, "--also", other]
    return [*words, "--windows", 1, "--seeds", 1, "--on", "cpu"]


def ran(name: str, *words: Any) -> None:
    command = [sys.executable, ROOT / "benchmarks" / name, *words]
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def reported(folder: Path, words: list[Any], *more: Any) -> tuple[list[dict[str, Any]], str]:
    """(cells, page) of perplexity_at_bits.py."""
    trained = ("--out", folder / "out", "--results", folder / "results", "--steps", 2, "--batch", 1)
    ran("perplexity_at_bits.py", *words, *trained, *more)
    made = folder / "results" / "perplexity_at_bits"
    return json.loads(made.with_suffix(".json").read_text())["cells"], made.with_suffix(".md").read_text()


def test_every_method_has_its_columns_and_keeps_to_their_bits(texts: list[Any], tmp_path: Path) -> None:
    methods = ("QA-LoRA", "Q8BERT", "Q-BERT", "half depth", "MetaQuantLLM", "uniform OFA")
    cells, page = reported(tmp_path, texts, "--only", *methods)
    seen: dict[str, tuple[str, ...]] = {}
    for cell in cells:
        seen[cell["method"]] = (*seen.get(cell["method"], ()), cell["column"])
        assert math.isfinite(cell["perplexity"])
        assert cell["perplexity"] > 1
        assert cell["also"][OTHER] > 1
        assert cell["also"][OTHER] != cell["perplexity"]
        assert (OTHER in cell["also_kl"]) == (cell["method"] != "half depth")
        assert cell["bits"] <= float(cell["column"]) + 1e-9
        assert cell["training"] > 0
    assert {"2", "8"} <= set(seen.pop("uniform OFA"))  # random draws may meet no mean between what a small model's units allow
    assert seen == COLUMNS
    assert f"\nperplexity on {OTHER}\n" in page
    assert f"\nkl on {OTHER}\n" in page
    assert reported(tmp_path, texts, "--report") == (cells, page)


def test_what_nobody_trained_stands_in_the_same_tables(texts: list[Any], tmp_path: Path) -> None:
    ran("post_training.py", "run", *texts, "--out", tmp_path / "cells")
    cells, page = reported(tmp_path, texts, "--report", "--post-training", tmp_path / "cells" / "cells.json")
    assert {cell["column"] for cell in cells if cell["method"] == "solver"} == set(ALL)
    assert {cell["column"] for cell in cells if cell["method"] == "PTQ, min-max, and γ"} == {"2", "3", "4", "8"}
    for cell in cells:
        assert cell["also"][OTHER] not in (cell["perplexity"], 0)
        assert (cell["also_kl"][OTHER] > 0) == (cell["method"] != "fp32")
    assert f"\nkl on {OTHER}\n" in page
