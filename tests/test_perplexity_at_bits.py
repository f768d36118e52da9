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


def test_every_method_has_its_columns_and_keeps_to_their_bits(tmp_path: Path) -> None:
    model = random_models.save_random_model("llama", tmp_path / "model", vocab_size=4096, num_hidden_layers=2)
    pocket = ROOT / "toolchain" / "models" / "pocket-llama-6m"
    for path in pocket.glob("*token*"):
        shutil.copyfile(path, model / path.name)
    text = ROOT / "LICENSE"
    words = ["--model", model, "--text", text, "--heldout", text, "--out", tmp_path / "out", "--results", tmp_path / "results"]
    other = tmp_path / "reversed" / "valid.txt"
    other.parent.mkdir()
    name = "reversed/valid.txt"
    other.write_text(" ".join(reversed(text.read_text().split())))
    words += ["--also", other, "--steps", 2, "--batch", 1, "--windows", 1, "--seeds", 1, "--on", "cpu"]

    def run(*more: str) -> list[dict[str, Any]]:
        command = [sys.executable, ROOT / "benchmarks" / "perplexity_at_bits.py", *words, *more]
        done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "results" / "perplexity_at_bits.json").read_text())["cells"]

    cells = run("--only", "QA-LoRA", "Q8BERT", "Q-BERT", "half depth", "MetaQuantLLM", "uniform OFA")
    seen: dict[str, tuple[str, ...]] = {}
    for cell in cells:
        seen[cell["method"]] = (*seen.get(cell["method"], ()), cell["column"])
        assert math.isfinite(cell["perplexity"])
        assert cell["perplexity"] > 1
        assert cell["also"][name] > 1
        assert cell["also"][name] != cell["perplexity"]
        assert (name in cell["also_kl"]) == (cell["method"] != "half depth")
        assert cell["bits"] <= float(cell["column"]) + 1e-9
        assert cell["training"] > 0
    assert {"2", "8"} <= set(seen.pop("uniform OFA"))  # random draws may meet no mean between what a small model's units allow
    assert seen == COLUMNS
    assert run("--report") == cells
    page = (tmp_path / "results" / "perplexity_at_bits.md").read_text()
    assert f"\nperplexity on {name}\n" in page
    assert f"\nkl on {name}\n" in page
