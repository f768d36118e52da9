"""The tables of `tasks_at_budget.py`: what each method's packages reached at each budget, and what they took there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from statistics import mean, median
from typing import Any

from post_training import spread
from task_kinds import FULL, SQUAD
from tasks_measured import HOW, NO_PACKAGE, RESOURCES, SETUP, TIGHT, cells_of, columns, jobs_of, key, measured_of

from toolchain import hardware
from toolchain.commands.workflow import Costs, find_costs
from toolchain.costs.model import CostModel
from toolchain.costs.rows import ModelRow
from toolchain.files import write_atomic
from toolchain.graph.model import Graph
from toolchain.report import table


def report(arguments: argparse.Namespace) -> None:
    """NAME.md and NAME.json in --results."""
    device = hardware.load(arguments.device)
    graph = Graph.open(arguments.graph)
    found = find_costs(graph, device, [arguments.profiles], None)
    costs, full = found.model, full_precision(graph, found)
    cells, jobs, measured = [*cells_of(arguments.out)], jobs_of(arguments.out), measured_of(arguments.out)
    if not cells:
        raise SystemExit(
            f"expected results of a job in {arguments.out}, found none; type: python benchmarks/tasks_at_budget.py run ..."
        )
    seen = {(row["budget"], key(row["policy"])): row for row in measured}
    for method, budget, cell in cells:
        found = seen.get((budget, key(cell["policy"])), {}) if method != NO_PACKAGE else {}
        cell["measured"] = {name: found.get(name) for name in (*RESOURCES, "slowness", "verdict")}
    text = "\n".join(head(costs, full, jobs, cells, measured)) + "\n\n"
    for title, rows in tables(costs, full, jobs, cells, measured):
        text += f"{title}\n\n{table(rows, list(rows[0]), markdown=True)}\n\n"
    arguments.results.mkdir(exist_ok=True)
    write_atomic(arguments.results / f"{arguments.name}.md", text)
    short = [{"method": method, "budget": budget, **{**cell, "policy": key(cell["policy"])}} for method, budget, cell in cells]
    kept = [{**row, "policy": key(row["policy"])} for row in measured]
    policies = {name: place for place, name in enumerate(dict.fromkeys(row["policy"] for row in (*short, *kept)))}
    for row in (*short, *kept):
        row["policy"] = policies[row["policy"]]
    setups = [{name: str(job["setup"][name]) for name in SETUP if name in job["setup"]} for job in jobs]
    named = [{name: job[name] for name in ("task", "seed", "fp32")} for job in jobs]
    about = [{**name, "setup": how, "methods": ran(job)} for name, how, job in zip(named, setups, jobs, strict=True)]
    data: dict[str, Any] = {"fp32": about}
    data["cells"] = short
    data |= {"policies": [json.loads(name) for name in policies], "measured": kept}
    write_atomic(arguments.results / f"{arguments.name}.json", json.dumps(data, indent=1) + "\n")
    print(text)


def full_precision(graph: Graph, costs: Costs) -> ModelRow:
    """The whole model in full precision as the table has it: timed in rotation with the others, at the table's speed."""
    (phase,) = costs.model.workload.phases
    wanted = (graph.fingerprint, graph.layers, phase.name, phase.tokens, FULL)
    return next(row for row in costs.table.of(ModelRow) if (row.model, row.layers, row.phase, row.tokens, row.policy) == wanted)


def head(costs: CostModel, full: ModelRow, jobs: Sequence[Any], cells: Sequence[Any], measured: Sequence[Any]) -> Iterator[str]:
    """What the tables rest on."""
    limits = {
        name: f"{(budget.peak_memory_bytes or 0) / 1e6:.1f} MB" + (f", {budget.latency_ms:.2f} ms" if budget.latency_ms else "")
        for name, budget in columns(costs).items()
    }
    said = "; ".join(f"{name} {limit}" for name, limit in limits.items())
    yield f"{costs.device}, {costs.workload}; {said} (tight: a limit of ours, {TIGHT:.0%} of the way from least to most memory)"
    took = f", {full.latency_ms:.2f} ± {full.spread_ms:.2f} ms in the table"
    if again := [row for row in measured if set(row["policy"].values()) == {FULL}]:
        memory, times = ([at_table_speed(row, resource) for row in again] for resource in RESOURCES)
        shown = f"{median(memory) / 1e6:.1f} MB, {min(times):.2f} to {max(times):.2f} ms at that speed"
        took += f"; as a package, measured {len(again)} times, {shown}"
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
    if missing := [*not_run(jobs)]:
        yield f"not run: {'; '.join(missing)}"
    if packages := {(budget, key(cell["policy"])): cell for _, budget, cell in cells if cell["measured"]["verdict"]}:
        ratios = (
            [at_table_speed(cell["measured"], name) / cell["predicted"][name] for cell in packages.values()] for name in RESOURCES
        )
        memory, latency = (f"{low:.2f} to {high:.2f}" for low, high in map(most_of, ratios))
        machines = {
            f"{row['machine']['cpu']}, {row['machine']['runtime']}, {row['machine']['threads']} threads" for row in measured
        }
        yield (
            f"{len(packages)} distinct packages measured on {' and '.join(sorted(machines))}; over their predictions, nine of ten: "
            f"memory {memory}, latency at the table's speed {latency}"
        )


def ran(job: dict[str, Any]) -> list[str]:
    """The methods that a job came to, those without a policy for any budget, too."""
    return [method for method in job["cells"] if method != FULL]


def not_run(jobs: Sequence[Any]) -> Iterator[str]:
    """What is missing of jobs that did not come to their end: "method for models"."""
    for method in dict.fromkeys(method for job in jobs for method in ran(job)):
        if models := [f"{job['task']}-{job['seed']}" for job in jobs if method not in job["cells"]]:
            yield f"{method} for {', '.join(models)}"


def tables(
    costs: CostModel, full: ModelRow, jobs: Sequence[Any], cells: Sequence[Any], measured: Sequence[Any]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(title, rows): means over tasks, each task, and what the packages cost."""
    methods, names = dict.fromkeys(method for method, _, _ in cells), tuple(columns(costs))
    seeds = len({job["seed"] for job in jobs})
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
        scored = {m: {name: f1_em(asked[m, name], seeds) for name in names} for m in methods}
        title = "SQuAD, F1 / exact match (in hundredths), the seeds ± half their range"
        yield title, [{"method": m, **scored[m], **beside(m)} for m in methods]
        bits = {m: {name: spread([cell["mean_bits"] for cell in asked[m, name]]) for name in names} for m in methods}
        yield "SQuAD, mean bits", [{"method": m, **bits[m]} for m in methods]
    for name in names if glue else ():
        yield (
            f"{name}, by task",
            [
                {"method": method}
                | {
                    task: of_seeds([100 * cell["headline"] for cell in of[method, name] if cell["task"] == task], seeds)
                    for task in glue
                }
                | {"mean bits": spread([cell["mean_bits"] for cell in of[method, name]])}
                for method in methods
                if of[method, name]
            ],
        )
    if not (again := [row for row in measured if set(row["policy"].values()) == {FULL}]):
        return
    whole = {"peak_memory_bytes": median(row["peak_memory_bytes"] for row in again), "latency_ms": full.latency_ms}
    costing = []
    for method in methods:
        row = {"method": method}
        for name in names:
            known = [cell["measured"] for cell in of[method, name] if cell["measured"]["verdict"]]
            parts = [[at_table_speed(seen, resource) / whole[resource] for seen in known] for resource in RESOURCES]
            row[name] = ", ".join(f"{mean(part):.2f}" for part in parts) if known else "–"
        costing.append(row)
    yield (
        "Measured memory, latency at the table's speed, of the packages as a fraction of fp32's (its latency: the table's)",
        costing,
    )


def at_table_speed(row: dict[str, Any], resource: str) -> float:
    """What was measured, over how slow the machine's reference was then."""
    return float(row[resource]) / float((row["slowness"] or {}).get(resource, 1.0))


def most_of(values: Sequence[float]) -> tuple[float, float]:
    """From the twentieth part on to the last but that; all of few."""
    ordered = sorted(values)
    return ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]


def of_seeds(values: Sequence[float], seeds: int) -> str:
    """Their `spread`, and how many there are where it is not every seed's."""
    return spread(list(values), 1) + (f" ({len(values)} of {seeds} seeds)" if 0 < len(values) < seeds else "")


def f1_em(cells: Sequence[Any], seeds: int) -> str:
    """ "F1 / exact match", each with its spread; – of nothing."""
    return (
        " / ".join(of_seeds([100 * cell["scores"][name] for cell in cells], seeds) for name in ("f1", "exact_match"))
        if cells
        else "–"
    )


def _tasks(jobs: Sequence[Any]) -> list[str]:
    return [job["task"] for job in jobs]


def _over_tasks(rows: Sequence[Any], figure: str, jobs: Sequence[Any] = ()) -> str:
    """Mean over GLUE's tasks of each seed, in hundredths, over the seeds ± half their range; – unless all tasks are there."""
    wanted = len({*_tasks(jobs or rows)} - {SQUAD})
    by_seed: dict[int, list[float]] = {}
    for row in (row for row in rows if row["task"] != SQUAD):
        by_seed.setdefault(row["seed"], []).append(100 * row[figure])
    return of_seeds(
        [mean(values) for values in by_seed.values() if len(values) == wanted], len({job["seed"] for job in jobs or rows})
    )
