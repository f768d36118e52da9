"""The other half of `tasks_at_budget.py`: every policy's package measured on its device, and the tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from post_training import spread
from task_kinds import FULL, NAMES, SQUAD

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
from toolchain.report import table
from toolchain.spec import Budget, Policy

TIGHT = 0.05
EVERY = 24
"""Packages between two measurements of fp32, whose middle all others are a fraction of."""
NO_PACKAGE = "QA-LoRA"
"""Its zero points are fractions: no integer codes hold them, so there is nothing to measure."""
RESOURCES = ("peak_memory_bytes", "latency_ms")
HOW = ("steps", "batch", "precision", "lr", "examples")
"""What a report says of a job's set-up."""
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
            "limit": limits[budget].to_json(),
            "policy": policy,
            "verdict": said["verdict"],
            "limits": said["limits"],
            "machine": said["machine"],
        }
        row |= {resource: said["measured"][resource]["value"] for resource in RESOURCES} | {"slowness": said["slowness"]}
        write_atomic(path, "".join(json.dumps(one) + "\n" for one in [*rows_of(path), row]))


def restore(arguments: argparse.Namespace) -> None:
    """OUT's jobs and measurements as --results holds them: packages can then be measured where nobody trained."""
    kept = json.loads((arguments.results / f"{arguments.name}.json").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    for job in kept["fp32"]:
        ours = [cell for cell in kept["cells"] if (cell["task"], cell["seed"]) == (job["task"], job["seed"])]
        cells: dict[str, dict[str, Any]] = {FULL: {"": {"headline": job["fp32"]}}}
        for cell in ours:
            row = {name: value for name, value in cell.items() if name not in PLACE} | {"policy": kept["policies"][cell["policy"]]}
            cells.setdefault(cell["method"], {})[cell["budget"]] = row
        write_atomic(arguments.out / f"{job['task']}-{job['seed']}.json", json.dumps({**job, "cells": cells}, indent=1) + "\n")
    if measured := [{**row, "policy": kept["policies"][row["policy"]]} for row in kept["measured"]]:
        write_atomic(arguments.out / "measured-0.jsonl", "".join(json.dumps(row) + "\n" for row in measured))


def key(policy: dict[str, str]) -> str:
    return json.dumps(policy, sort_keys=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def measured_of(out: Path) -> list[dict[str, Any]]:
    """What all parts have measured."""
    return [row for path in sorted(out.glob("measured-*.jsonl")) for row in rows_of(path)]


def jobs_of(out: Path) -> list[dict[str, Any]]:
    """The jobs that are done: by seed, then by task."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*-[0-9].json"))]
    return sorted((job for job in found if "cells" in job), key=lambda job: (job["seed"], NAMES.index(job["task"])))


def cells_of(out: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, budget, cell with its task and seed)."""
    for job in jobs_of(out):
        for method, row in ((name, row) for name, row in job["cells"].items() if name != FULL):
            for budget, cell in row.items():
                yield method, budget, {**cell, "task": job["task"], "seed": job["seed"]}


def report(arguments: argparse.Namespace) -> None:
    """NAME.md and NAME.json in --results."""
    device = hardware.load(arguments.device)
    costs = find_costs(Graph.open(arguments.graph), device, [arguments.profiles], None).model
    cells, jobs, measured = [*cells_of(arguments.out)], jobs_of(arguments.out), measured_of(arguments.out)
    if not cells:
        raise SystemExit(
            f"expected results of a job in {arguments.out}, found none; type: python benchmarks/tasks_at_budget.py run ..."
        )
    seen = {(row["budget"], key(row["policy"])): row for row in measured}
    for method, budget, cell in cells:
        found = seen.get((budget, key(cell["policy"])), {}) if method != NO_PACKAGE else {}
        cell["measured"] = {name: found.get(name) for name in (*RESOURCES, "slowness", "verdict")}
    text = "\n".join(head(costs, jobs, cells, measured)) + "\n\n"
    for title, rows in tables(costs, jobs, cells, measured):
        text += f"{title}\n\n{table(rows, list(rows[0]), markdown=True)}\n\n"
    arguments.results.mkdir(exist_ok=True)
    write_atomic(arguments.results / f"{arguments.name}.md", text)
    short = [{"method": method, "budget": budget, **{**cell, "policy": key(cell["policy"])}} for method, budget, cell in cells]
    kept = [{**row, "policy": key(row["policy"])} for row in measured]
    policies = {name: place for place, name in enumerate(dict.fromkeys(row["policy"] for row in (*short, *kept)))}
    for row in (*short, *kept):
        row["policy"] = policies[row["policy"]]
    setups = [{name: str(job["setup"][name]) for name in HOW} for job in jobs]
    data: dict[str, Any] = {
        "fp32": [
            {name: job[name] for name in ("task", "seed", "fp32")} | {"setup": how} for job, how in zip(jobs, setups, strict=True)
        ]
    }
    data["cells"] = short
    data |= {"policies": [json.loads(name) for name in policies], "measured": kept}
    write_atomic(arguments.results / f"{arguments.name}.json", json.dumps(data, indent=1) + "\n")
    print(text)


def head(costs: CostModel, jobs: Sequence[Any], cells: Sequence[Any], measured: Sequence[Any]) -> Iterator[str]:
    """What the tables rest on."""
    limits = {
        name: f"{(budget.peak_memory_bytes or 0) / 1e6:.1f} MB" + (f", {budget.latency_ms:.2f} ms" if budget.latency_ms else "")
        for name, budget in columns(costs).items()
    }
    said = "; ".join(f"{name} {limit}" for name, limit in limits.items())
    yield f"{costs.device}, {costs.workload}; {said} (tight: a limit of ours, {TIGHT:.0%} of the way from least to most memory)"
    took = ""
    if full := [row for row in measured if set(row["policy"].values()) == {FULL}]:
        memory, times = ([at_table_speed(row, resource) for row in full] for resource in RESOURCES)
        took = f", {median(memory) / 1e6:.1f} MB, {min(times):.2f} to {max(times):.2f} ms at the table's speed, measured {len(full)} times"
    how = {name: ", ".join(sorted({str(job["setup"][name]) for job in jobs})) for name in HOW}
    most = "all" if how["examples"] == "0" else f"at most {how['examples']}"
    yield (
        f"S = {how['steps']} policy-steps of {how['batch']} sentences, {how['precision']}, learning rate {how['lr']}; "
        f"{most} examples of each task's evaluation file"
    )
    scores = {task: spread([100 * job["fp32"] for job in jobs if job["task"] == task], 1) for task in dict.fromkeys(_tasks(jobs))}
    mean_of = f"; mean {_over_tasks(jobs, 'fp32')}" if len(scores) > 1 else ""
    yield f"fp32: {', '.join(f'{task} {score}' for task, score in scores.items())}{mean_of}{took}"
    yield "; ".join(sorted({f"{cell['device']}, commit {cell['commit']}" for _, _, cell in cells}))
    if packages := {(budget, key(cell["policy"])): cell for _, budget, cell in cells if (cell["measured"]["verdict"])}:
        ratios = (
            [at_table_speed(cell["measured"], name) / cell["predicted"][name] for cell in packages.values()] for name in RESOURCES
        )
        memory, latency = (f"{low:.2f} to {high:.2f}" for low, *_, high in (quantiles(row, n=20) for row in ratios))
        machine = measured[0]["machine"]
        yield (
            f"{len(packages)} distinct packages measured on {machine['cpu']}, {machine['runtime']}, {machine['threads']} threads; "
            f"over their predictions, nine of ten: memory {memory}, latency at the table's speed {latency}"
        )


def tables(
    costs: CostModel, jobs: Sequence[Any], cells: Sequence[Any], measured: Sequence[Any]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(title, rows): means over tasks, each task, and what the packages cost."""
    methods, names = dict.fromkeys(method for method, _, _ in cells), tuple(columns(costs))
    of = {(m, b): [cell for method, budget, cell in cells if (method, budget) == (m, b)] for m in methods for b in names}

    def beside(method: str) -> dict[str, str]:
        """What a method's scores took, and how many of its packages were measured."""
        mine = [cell for name in names for cell in of[method, name]]
        checked = [cell["measured"]["verdict"] for cell in mine if cell["measured"]["verdict"]]
        found = {"within, of measured": f"{checked.count('within')} of {len(checked)}"} if measured else {}
        return found | {f"{what} s": f"{mean(cell[what] for cell in mine):.0f}" for what in ("training", "choosing")}

    if glue := [task for task in dict.fromkeys(_tasks(jobs)) if task != SQUAD]:
        title = "Mean over GLUE's tasks (each the mean of its metrics, in hundredths), the seeds ± half their range"
        scored = {m: {name: _over_tasks(of[m, name], "headline", jobs) for name in names} for m in methods}
        yield title, [{"method": m, **scored[m], **beside(m)} for m in methods]
    if SQUAD in _tasks(jobs):
        asked = {key: [cell for cell in row if cell["task"] == SQUAD] for key, row in of.items()}
        scored = {m: {name: f1_em(asked[m, name]) for name in names} for m in methods}
        title = "SQuAD, F1 / exact match (in hundredths), the seeds ± half their range"
        yield title, [{"method": m, **scored[m], **beside(m)} for m in methods]
        bits = {m: {name: spread([cell["mean_bits"] for cell in asked[m, name]]) for name in names} for m in methods}
        yield "SQuAD, mean bits", [{"method": m, **bits[m]} for m in methods]
    for name in names if glue else ():
        yield (
            f"{name}, by task",
            [
                {"method": method}
                | {task: spread([100 * cell["headline"] for cell in of[method, name] if cell["task"] == task], 1) for task in glue}
                | {"mean bits": spread([cell["mean_bits"] for cell in of[method, name]])}
                for method in methods
                if of[method, name]
            ],
        )
    if not (full := [row for row in measured if set(row["policy"].values()) == {FULL}]):
        return
    whole = {resource: median(at_table_speed(row, resource) for row in full) for resource in RESOURCES}
    costing = []
    for method in methods:
        row = {"method": method}
        for name in names:
            known = [cell["measured"] for cell in of[method, name] if cell["measured"]["verdict"]]
            parts = [[at_table_speed(seen, resource) / whole[resource] for seen in known] for resource in RESOURCES]
            row[name] = ", ".join(f"{mean(part):.2f}" for part in parts) if known else "–"
        costing.append(row)
    yield "Measured memory, latency at the table's speed, of the packages as a fraction of fp32's", costing


def at_table_speed(row: dict[str, Any], resource: str) -> float:
    """What was measured, over how slow the machine's reference was then."""
    return float(row[resource]) / float((row["slowness"] or {}).get(resource, 1.0))


def f1_em(cells: Sequence[Any]) -> str:
    """ "F1 / exact match", each with its spread; – of nothing."""
    return " / ".join(spread([100 * cell["scores"][name] for cell in cells], 1) for name in ("f1", "exact_match")) if cells else "–"


def _tasks(jobs: Sequence[Any]) -> list[str]:
    return [job["task"] for job in jobs]


def _over_tasks(rows: Sequence[Any], figure: str, jobs: Sequence[Any] = ()) -> str:
    """Mean over GLUE's tasks of each seed, in hundredths, over the seeds ± half their range; – unless all tasks are there."""
    wanted = len({*_tasks(jobs or rows)} - {SQUAD})
    by_seed: dict[int, list[float]] = {}
    for row in (row for row in rows if row["task"] != SQUAD):
        by_seed.setdefault(row["seed"], []).append(100 * row[figure])
    return spread([mean(values) for values in by_seed.values() if len(values) == wanted], 1)
