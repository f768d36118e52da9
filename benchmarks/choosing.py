"""Which way of choosing a policy is best: does it keep budgets, how near is it to the optimum, what does it really lose, what does it take?

    python benchmarks/choosing.py SUPERNET --table FILE [--table FILE ...] [--workload W] [--budgets 1000] [--measured 5] [--search]

First table: random feasible budgets (each limit present half of the time) on every device's cost table. Share that keeps the budget in
the cost model, before projection and after; the excess of predicted loss over the exact optimum after it; milliseconds. The network of
prices has seen no measured table; the meta-network's device is the one that the supernet was trained for.

Second table: the same for imagined models of 200 units with ten kernels each; their numbers are drawn, only the times mean anything.

Third table: what the chosen subnets really lose, on windows that neither training nor choosing saw: distance to the teacher (decoder:
KL, nats per token), at memory limits and at latency limits spread over the quantised policies' range.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toolchain.commands.choosing import restricted, scorer
from toolchain.costs.encoding import encode
from toolchain.costs.from_table import cost_model
from toolchain.costs.model import CostModel
from toolchain.costs.table import open_table
from toolchain.errors import InfeasibleBudgetError
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, mean_bits
from toolchain.policy import prices, proposal
from toolchain.policy.search import search
from toolchain.policy.solver import Values, find, objective_of, solve
from toolchain.progress import track
from toolchain.spec import RESOURCES, Budget, Policy, Unit, Workload
from toolchain.supernet.store import SupernetFolder

Propose = Callable[[CostModel, Budget], Values]


@dataclass(frozen=True)
class Way:
    """told: what the projection is told, and what is timed; proposed: of which each unit's least is chosen without projection, or None."""

    told: Propose
    proposed: Propose | None = None


_FLOOR = 1e-3
"""Of the worst policy's loss: where the optimum loses next to nothing, excess is taken relative to this."""


def random_budgets(costs: CostModel, count: int, seed: int) -> list[Budget]:
    """Feasible budgets over the quantised policies' ranges: at least what some random policy costs in each limited resource."""
    rng = np.random.default_rng([seed, 61])
    ranges = {name: costs.bounds(name) for name in RESOURCES if name in costs.per_unit}
    ranges = {name: (low, high) for name, (low, high) in ranges.items() if high > low}
    budgets: list[Budget] = []
    while len(budgets) < count:
        present = [name for name in ranges if rng.random() < 0.5] or [list(ranges)[rng.integers(len(ranges))]]
        limits = {name: ranges[name][0] + rng.random() * (ranges[name][1] - ranges[name][0]) for name in present}
        budget = Budget.from_json(limits, "random")
        if len(present) == 1 or find(costs, costs.per_unit[present[0]], budget) is not None:
            budgets.append(budget)
    return budgets


def least(values: Values) -> Policy:
    """Every unit's kernel of least value: a proposal, not projected."""
    return Policy.of({unit: min(row, key=row.__getitem__) for unit, row in values.items()})


def keeps(costs: CostModel, policy: Policy, budget: Budget) -> bool:
    totals = costs.totals(policy)
    return all(totals[name] <= limit * (1 + 1e-9) for name, limit in budget.limits.items())


def against_the_optimum(losses: Values, costs: CostModel, count: int, ways: dict[str, Way]) -> list[dict]:
    """One row per way of proposing."""
    worst = sum(max(losses[unit.name][kernel] for kernel in costs.kernels[unit.name]) for unit in costs.units)
    seen: dict[str, list[tuple]] = {name: [] for name in ways}
    for budget in track(random_budgets(costs, count, 0), count, "budgets"):
        best = solve(costs, losses, budget).objective
        for name, way in ways.items():
            start = time.perf_counter()
            told = way.told(costs, budget)
            middle = time.perf_counter()
            policy = solve(costs, told, budget).policy
            end = time.perf_counter()
            excess = (objective_of(policy, losses) - best) / max(best, _FLOOR * worst)
            raw = way.proposed is not None and keeps(costs, least(way.proposed(costs, budget)), budget)
            seen[name].append((raw, keeps(costs, policy, budget), excess, middle - start, end - middle))
    rows = []
    for name, found in seen.items():
        raw, kept, excess, proposing, projecting = (np.array(column, float) for column in zip(*found, strict=True))
        rows.append(
            {
                "method": name,
                "kept unprojected": raw.mean(),
                "kept": kept.mean(),
                "excess median": np.median(excess),
                "excess 99%": np.percentile(excess, 99),
                "proposal ms": 1e3 * np.median(proposing),
                "projection ms": 1e3 * np.median(projecting),
                "projection ms, worst": 1e3 * projecting.max(),
            }
        )
    return rows


def imagined(rng: np.random.Generator, units: int = 200) -> tuple[CostModel, dict[str, dict[str, float]]]:
    """(costs, losses) of a model of many units with ten kernels each: more bits take more bytes and time, and lose less."""
    kernels = sorted(list(CATALOGUE)[:10], key=lambda name: CATALOGUE[name].weight_bits)
    size = np.sort(rng.random((units, len(kernels))), axis=1)
    time_ = size * (0.5 + rng.random(size.shape))
    loss = np.sort(rng.random(size.shape) ** 3, axis=1)[:, ::-1]

    def table(values: np.ndarray) -> dict[str, dict[str, float]]:
        return {f"u{row}": dict(zip(kernels, values[row].tolist(), strict=True)) for row in range(units)}

    costs = CostModel(
        units=tuple(Unit(f"u{row}", "MatMul", 1024, 1024) for row in range(units)),
        kernels={f"u{row}": tuple(kernels) for row in range(units)},
        per_unit={"peak_memory_bytes": table(size * 1e6), "latency_ms": table(time_)},
        fixed={"peak_memory_bytes": 0.0, "latency_ms": 0.0},
        ties=(),
        relative_spread={},
        workload=Workload.parse("generate:64+32"),
        device="imagined",
    )
    return costs, table(loss)


def print_budgets(rows: list[dict]) -> None:
    print("| method | kept unprojected | kept | excess, median | 99% | proposal ms | projection ms | worst |\n" + "|---" * 8 + "|")
    for row in rows:
        raw = "–" if row["method"] == "solver" else f"{row['kept unprojected']:.1%}"
        shares = f"{raw} | {row['kept']:.1%} | {row['excess median']:.2%} | {row['excess 99%']:.2%}"
        times = f"{row['proposal ms']:.2f} | {row['projection ms']:.1f} | {row['projection ms, worst']:.0f}"
        print(f"| {row['method']} | {shares} | {times} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("supernet", type=Path)
    parser.add_argument(
        "--table", type=Path, action="append", required=True, help="a device's table.jsonl; the first is the trained one's"
    )
    parser.add_argument("--workload", type=Workload.parse, default=Workload.parse("generate:64+32"))
    parser.add_argument("--budgets", type=int, default=1000)
    parser.add_argument(
        "--measured", type=int, default=5, help="memory limits, and as many latency limits, at which subnets are scored"
    )
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--network", type=Path, default=prices.SHIPPED)
    parser.add_argument("--search", action="store_true", help="also LLM-QFA's search, 150 scores a budget")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = SupernetFolder.open(arguments.supernet)
    graph = Graph.open(folder.graph_directory)
    losses, network = folder.sensitivity, prices.read(arguments.network)

    def unlikely(costs: CostModel, budget: Budget) -> Values:
        likely = proposal.log_probabilities(folder.meta_network, encode(budget, costs))
        return {unit: {kernel: -value for kernel, value in row.items()} for unit, row in likely.items()}

    def priced(losses: Values) -> Way:
        def at(share: float) -> Propose:
            return lambda costs, budget: prices.proposal(network, costs, losses, budget, share)

        return Way(at(prices.PROJECTED), at(1.0))

    ways = {"solver": Way(lambda costs, budget: losses), "meta-network": Way(unlikely, unlikely), "prices": priced(losses)}
    out: dict = {"budgets": [], "measured": []}
    for place in arguments.table:
        table = open_table(place)
        costs = restricted(cost_model(graph, table, arguments.workload), folder)
        print(f"\n{table.header.cpu}, {table.header.threads} threads: {arguments.budgets} budgets\n")
        rows = against_the_optimum(losses, costs, arguments.budgets, ways)
        out["budgets"].append({"cpu": table.header.cpu, "threads": table.header.threads, "rows": rows})
        print_budgets(rows)
    large, drawn = imagined(np.random.default_rng(3))

    large_ways = {"solver": Way(lambda costs, budget: drawn), "prices": priced(drawn)}
    print(f"\nimagined: 200 units, ten kernels: {arguments.budgets // 5} budgets\n")
    out["imagined"] = against_the_optimum(drawn, large, arguments.budgets // 5, large_ways)
    print_budgets(out["imagined"])
    costs = restricted(cost_model(graph, open_table(arguments.table[0]), arguments.workload), folder)
    known, unseen = scorer(folder, folder.calibration()), scorer(folder, folder.heldout()[: arguments.windows])
    quantised = replace(
        costs,
        kernels={
            unit: tuple(name for name in names if CATALOGUE[name].quantised) or names for unit, names in costs.kernels.items()
        },
    )
    methods = {name: lambda budget, way=way: solve(costs, way.told(costs, budget), budget).policy for name, way in ways.items()}
    if arguments.search:
        from toolchain.train.sampler import PolicySampler

        methods["search"] = lambda budget: (
            search(known, costs, budget, lambda kernels, bits, rng: PolicySampler(costs.units, kernels).mixed(bits, rng)).policy
        )
    print(f"\n| limit | {' | '.join(f'{name}: bits | loss | s' for name in methods)} |\n|---{'|---' * 3 * len(methods)}|")
    for resource in ("peak_memory_bytes", "latency_ms"):
        low, high = quantised.bounds(resource)
        for fraction in np.linspace(0.08, 0.6, arguments.measured):
            budget = Budget(**{resource: low + float(fraction) * (high - low)})
            cells, row = [], {}
            for name, method in methods.items():
                start = time.perf_counter()
                try:
                    policy = method(budget)
                except InfeasibleBudgetError:  # LLM-QFA's draws may all miss a budget that the solver keeps
                    cells.append("none found | – | –")
                    continue
                spent = time.perf_counter() - start
                loss = unseen(policy)
                row[name] = {"bits": mean_bits(policy, graph.units), "loss": loss, "seconds": spent}
                cells.append(f"{row[name]['bits']:.2f} | {loss:.4f} | {spent:.1f}")
            out["measured"].append({"resource": resource, "limit": budget.limits[resource], "methods": row})
            print(f"| {resource} {budget.limits[resource]:.4g} | {' | '.join(cells)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(out, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
