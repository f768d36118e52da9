"""The other half of `tasks_at_budget.py`: every policy's package measured on its device."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import training_jobs as jobs
from post_training import made_by
from task_kinds import FULL, NAMES

from toolchain import hardware
from toolchain.commands.acceptance import check_package
from toolchain.commands.deciding import Patience
from toolchain.commands.workflow import Choice, Source, cut, find_costs
from toolchain.costs.model import CostModel
from toolchain.files import scratch, write_atomic
from toolchain.graph.assemble import round_to_nearest
from toolchain.graph.model import Graph
from toolchain.kernels import uniform
from toolchain.policy import budgets
from toolchain.progress import track
from toolchain.spec import Budget, Policy

TIGHT = 0.05
EVERY = 24
"""Packages between two measurements of fp32, whose middle all others are a fraction of."""
NO_PACKAGE = "QA-LoRA"
"""Its zero points are fractions: no integer codes hold them, so there is nothing to measure."""
PART = ".part.json"
"""Ends the name of what a job keeps while it runs."""
RESOURCES = ("peak_memory_bytes", "latency_ms")
HOW = ("steps", "batch", "precision", "lr", "examples")
"""What a report says of a job's set-up."""
SETUP = (*HOW, "device")
"""What it keeps of it."""
PLACE = ("method", "budget", "task", "seed", "measured")


def columns(costs: CostModel) -> dict[str, Budget]:
    """The device's derived budgets, and before them a tight one: TIGHT of the memory range, however slow."""
    derived = budgets.derive(costs)
    kernels = {unit: tuple(filter(budgets.ordinary, names)) or names for unit, names in costs.kernels.items()}
    least, most = replace(costs, kernels=kernels).bounds("peak_memory_bytes")
    planned = budgets.planned(Budget(peak_memory_bytes=1.0), costs).peak_memory_bytes
    assert planned is not None
    return {"tight": Budget(peak_memory_bytes=round((least + TIGHT * (most - least)) / planned), name="tight"), **derived}


def measure(arguments: argparse.Namespace) -> None:
    """OUT/measured-PART.jsonl: a line for each budget and distinct policy that some method has for it, fp32 among them again and again."""
    device = hardware.load(arguments.device)
    graph = Graph.open(arguments.graph)
    costs = find_costs(graph, device, [arguments.profiles], None)
    limits = columns(costs.model)
    part, _, parts = arguments.part.partition("/")
    path = arguments.out / f"measured-{int(part)}.jsonl"
    kept = measured_of(arguments.out)
    done = {
        (row["budget"], key(row["policy"]), row.get("turn", 0)) for row in kept if row["limit"] == limits[row["budget"]].to_json()
    }
    commit = made_by(torch.device("cpu"))["commit"]
    full = dict(uniform(FULL, graph.units).items())
    packages = {
        (budget, key(cell["policy"])): (cell["policy"], method)
        for method, budget, cell in cells_of(arguments.out)
        if method != NO_PACKAGE
    }
    wanted = {}
    for place, (one, what) in enumerate(packages.items()):
        if place % EVERY == 0:
            wanted["high", key(full), place // EVERY] = (full, FULL)
        wanted[*one, 0] = what
    left = [one for one in [*wanted][int(part) - 1 :: int(parts)] if one not in done][: arguments.packages or None]
    for budget, name, turn in track(left, len(left), "packages"):
        policy, method = wanted[budget, name, turn]
        with scratch() as folder:
            package = folder / "package"
            choice = Choice(Policy.of(policy), method, None)
            cut(Source(graph, round_to_nearest(graph), None), choice, package, device, limits[budget], costs, costs.model.workload)
            said = check_package(package, device, {}, Patience(0, arguments.most_seconds)).to_json()
        row = {
            "budget": budget,
            "turn": turn,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "part": arguments.part,
            "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
            "commit": commit,
            "limit": limits[budget].to_json(),
            "policy": policy,
            "verdict": said["verdict"],
            "limits": said["limits"],
            "machine": said["machine"],
        }
        row |= {resource: said["measured"][resource]["value"] for resource in RESOURCES} | {"slowness": said["slowness"]}
        write_atomic(path, "".join(json.dumps(one) + "\n" for one in [*rows_of(path), row]))


def restore(arguments: argparse.Namespace) -> None:
    """OUT's jobs as --results holds them, and with --measured its measurements: packages can be measured where nobody trained."""
    kept = json.loads((arguments.results / f"{arguments.name}.json").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    if found := next(arguments.out.iterdir(), None):
        raise SystemExit(f"expected an empty folder, got {found} in it; type: --out ANOTHER")
    for job in kept["fp32"]:
        ours = [cell for cell in kept["cells"] if (cell["task"], cell["seed"]) == (job["task"], job["seed"])]
        cells: dict[str, dict[str, Any]] = {FULL: {"": {"headline": job["fp32"]}}} | {name: {} for name in job.get("methods", ())}
        for cell in ours:
            row = {name: value for name, value in cell.items() if name not in PLACE} | {"policy": kept["policies"][cell["policy"]]}
            cells.setdefault(cell["method"], {})[cell["budget"]] = row
        write_atomic(arguments.out / f"{job['task']}-{job['seed']}.json", json.dumps({**job, "cells": cells}, indent=1) + "\n")
    if arguments.measured:
        measured = [{**row, "policy": kept["policies"][row["policy"]]} for row in kept["measured"]]
        write_atomic(arguments.out / "measured-0.jsonl", "".join(json.dumps(row) + "\n" for row in measured))


def brought_back(arguments: argparse.Namespace, job: str) -> dict[str, dict[str, Any]]:
    """The cells that `restore` put into OUT for a job, as far as they are of this run's set-up; {} where there are none."""
    path = jobs.place(arguments.out, job)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    ours = {name: str(vars(arguments)[name]) for name in SETUP}
    return dict(kept["cells"]) if kept.get("setup") == ours else {}


def key(policy: dict[str, str]) -> str:
    return json.dumps(policy, sort_keys=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def measured_of(out: Path) -> list[dict[str, Any]]:
    """What all parts have measured."""
    return [row for path in sorted(out.glob("measured-*.jsonl")) for row in rows_of(path)]


def jobs_of(out: Path) -> list[dict[str, Any]]:
    """The jobs, by seed, then by task; of one that is not done what it has come to, be it more than what was restored."""
    read = [json.loads(path.read_text()) for pattern in (f"*{PART}", "*-[0-9].json") for path in sorted(out.glob(pattern))]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for job in sorted((job for job in read if "cells" in job), key=lambda job: len(job["cells"])):
        found[job["task"], job["seed"]] = job
    return sorted(found.values(), key=lambda job: (job["seed"], NAMES.index(job["task"])))


def cells_of(out: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, budget, cell with its task and seed)."""
    for job in jobs_of(out):
        for method, row in ((name, row) for name, row in job["cells"].items() if name != FULL):
            for budget, cell in row.items():
                yield method, budget, {**cell, "task": job["task"], "seed": job["seed"]}
