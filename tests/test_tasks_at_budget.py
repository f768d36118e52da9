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

from toolchain.costs.from_table import cost_model
from toolchain.costs.table import open_table
from toolchain.policy import budgets
from toolchain.profiler.profile import default_workload
from toolchain.spec import Budget

random_models = pytest.importorskip("random_models")

pytestmark = pytest.mark.slow

BUDGETS = ("tight", "low", "medium", "high")
OF_EVERY_BUDGET = {
    *(f"PTQ, {way}{more}" for way in ("min-max", "MSE") for more in ("", ", and γ")),
    *("GPTQ", "closed form", "solver", "QAT, solver", "QA-LoRA", "Q-BERT", "MetaQuantLLM", "LLM-QFA", "uniform OFA"),
    *(f"MetaQuantLLM, {variant}" for variant in ("MSE", "uniform sampling", "fixed policy", "solver")),
}


def planned(folder: Path, graph: Any) -> dict[str, Any]:
    """What a policy must be predicted to keep, by budget; the tight one by its definition."""
    costs = cost_model(graph, open_table(folder / "profiles" / "local" / "table.jsonl"), default_workload(graph))
    plans = {name: budgets.planned(budget, costs) for name, budget in budgets.derive(costs).items()}
    low, high = (plans[name].peak_memory_bytes for name in ("low", "high"))
    assert low
    assert high
    room = (high - low) / (budgets.FRACTIONS["high"] - budgets.FRACTIONS["low"])
    return {"tight": Budget(peak_memory_bytes=low + (0.05 - budgets.FRACTIONS["low"]) * room + 1), **plans}


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
    where = ["--graph", graph.directory, "--device", "local", "--profiles", tmp_path / "profiles"]

    def run(act: str, *more: object, out: str = "out") -> str:
        words = [*(where if act != "restore" else []), "--out", tmp_path / out, *more]
        command = [sys.executable, ROOT / "benchmarks" / "tasks_at_budget.py", act, *words]
        done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    training = ["--models", tmp_path / "models", "--data", tmp_path / "data", "--tasks", "sst2", "--seeds", 1]
    quick = ["--steps", 2, "--batch", 4, "--on", "cpu"]
    run("run", *training, *quick)
    path = tmp_path / "out" / "sst2-0.json"
    first, kept = path.stat().st_mtime_ns, json.loads(path.read_text())["cells"]
    run("run", *training, *quick)
    assert path.stat().st_mtime_ns == first  # what is kept is not done again
    assert {method for method, row in kept.items() if set(row) == set(BUDGETS)} >= OF_EVERY_BUDGET
    for method, row in kept.items():
        for cell in row.values():
            assert 0 <= cell["headline"] <= 1
            assert method == "fp32" or 2 <= cell["mean_bits"] <= 8
    plans = planned(tmp_path, graph)
    for cell in (row[name] | {"plan": plans[name]} for method, row in kept.items() if method != "fp32" for name in row):
        assert cell["predicted"]["peak_memory_bytes"] <= cell["plan"].peak_memory_bytes * (1 + 1e-9)
        assert cell["predicted"]["latency_ms"] <= (cell["plan"].latency_ms or math.inf) * (1 + 1e-9)
    costs = [kept["solver"][name]["predicted"]["peak_memory_bytes"] for name in BUDGETS]
    assert costs == sorted(costs)
    run("measure", "--most-seconds", 1, "--packages", 2)
    said = run("report", "--results", tmp_path / "results")
    found = json.loads((tmp_path / "results" / "tasks_at_budget.json").read_text())
    assert len(found["measured"]) == 2
    assert len(found["cells"]) == sum(len(row) for method, row in kept.items() if method != "fp32")
    assert "MetaQuantLLM, solver" in said
    assert "fraction of fp32" in said
    run("restore", "--results", tmp_path / "results", "--measured", out="again")
    assert run("report", "--results", tmp_path / "anew", out="again") == said
    assert json.loads((tmp_path / "anew" / "tasks_at_budget.json").read_text()) == found
    run("restore", "--results", tmp_path / "results", out="unmeasured")
    run("measure", "--most-seconds", 1, "--packages", 1, out="unmeasured")
    assert len([*(tmp_path / "unmeasured").glob("measured-*.jsonl")]) == 1

    short = tmp_path / "unmeasured" / "sst2-0.json"
    job = json.loads(short.read_text())
    (tmp_path / "unmeasured" / "sst2-1.json").write_text(json.dumps({**job, "seed": 1}))
    del job["cells"]["QA-LoRA"]
    short.write_text(json.dumps(job))
    assert "not run: QA-LoRA for sst2-0" in run("report", "--results", tmp_path / "short", out="unmeasured")
    part = tmp_path / "unmeasured" / "sst2-0.cut-off.part.json"  # a run that went on from what was restored, and was killed
    part.write_text((tmp_path / "out" / "sst2-0.json").read_text())
    assert "not run" not in run("report", "--results", tmp_path / "short", out="unmeasured")
    part.unlink()
    run("run", *training, *quick, out="unmeasured")  # adds what is missing, and nothing else is done again
    again = json.loads(short.read_text())["cells"]
    assert set(again.pop("QA-LoRA")) == set(BUDGETS)
    assert again == job["cells"]
