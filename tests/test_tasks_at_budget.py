"""benchmarks/tasks_at_budget.py on a random BERT and a table by formula: every method has a package that keeps its budget and a score."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from small_tables import complete_table

random_models = pytest.importorskip("random_models")

pytestmark = pytest.mark.slow

BUDGETS = ("tight", "low", "medium", "high")
OF_EVERY_BUDGET = {
    *(f"PTQ, {way}{more}" for way in ("min-max", "MSE") for more in ("", ", and γ")),
    *("GPTQ", "closed form", "solver", "QAT, solver", "QA-LoRA", "Q-BERT", "MetaQuantLLM", "LLM-QFA", "uniform OFA"),
    *(f"MetaQuantLLM, {variant}" for variant in ("MSE", "uniform sampling", "fixed policy", "solver")),
}


def test_every_method_keeps_every_budget_and_is_scored(
    tmp_path: Path, graphs: Callable[..., Any], models: Callable[..., Path]
) -> None:
    of = ("bert", "BertForSequenceClassification")
    graph = graphs(*of, num_labels=2)
    complete_table(graph).save(tmp_path / "profiles" / "local" / "table.jsonl")
    model, data = tmp_path / "models" / "sst2-0", tmp_path / "data" / "sst2"
    for folder in (model, data):
        folder.mkdir(parents=True)
    for path in models(*of, num_labels=2).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    random_models.save_word_tokenizer(model)
    (model / "scores.json").write_text(json.dumps({"scores": {"accuracy": 0.5}}))
    for name, count in (("train.tsv", 96), ("dev.tsv", 8)):
        (data / name).write_text(
            "".join(f"{' '.join('abcdefg'[place % 7 : place % 3 + 5])}\t{place % 2}\n" for place in range(count))
        )
    words = ["--graph", graph.directory, "--device", "local", "--profiles", tmp_path / "profiles", "--out", tmp_path / "out"]

    def run(act: str, *more: object) -> str:
        command = [sys.executable, ROOT / "benchmarks" / "tasks_at_budget.py", act, *words, *more]
        done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    training = ["--models", tmp_path / "models", "--data", tmp_path / "data", "--tasks", "sst2", "--seeds", 1]
    run("run", *training, "--steps", 2, "--batch", 4, "--on", "cpu")
    kept = json.loads((tmp_path / "out" / "sst2-0.json").read_text())["cells"]
    assert {method for method, row in kept.items() if set(row) == set(BUDGETS)} >= OF_EVERY_BUDGET
    for row in kept.values():
        for cell in row.values():
            assert 0 <= cell["headline"] <= 1
            assert 2 <= cell["mean_bits"] <= 8
    costs = [kept["solver"][name]["predicted"]["peak_memory_bytes"] for name in BUDGETS]
    assert costs == sorted(costs)
    assert all(math.isclose(kept["GPTQ"][name]["mean_bits"], kept["QA-LoRA"][name]["mean_bits"]) for name in BUDGETS)
    run("measure", "--most-seconds", 1, "--packages", 2)
    said = run("report", "--results", tmp_path / "results")
    found = json.loads((tmp_path / "results" / "tasks_at_budget.json").read_text())
    assert len(found["measured"]) == 2
    assert len(found["cells"]) == sum(len(row) for row in kept.values())
    assert "MetaQuantLLM, solver" in said
    assert "fraction of fp32" in said
