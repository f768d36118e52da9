"""The policy that the solver picks from a cost table against the best uniform one under the same latency: how much closer to fp32?

    python benchmarks/policy_quality.py MODEL --text FILE [--workload W] [--work DIR] [--budgets 5] [--json FILE]

Nothing is trained: every package is the model rounded to nearest, so that only the choice of kernels differs. Sensitivity: one unit at a
time, on windows of the first half of the text; distances in the table are on windows of the second half. Distance to fp32: KL per token
(nats) for a decoder; for an encoder, which has no probabilities, relative squared error of its outputs. Budgets: latency limits spread
evenly from the least that any policy can keep to what the uniform policy nearest to fp32 costs. Both packages of a budget are then
measured in rotation. Full precision is left to neither.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from toolchain import hardware
from toolchain.commands.workflow import measure_costs, opened
from toolchain.costs.model import CostModel
from toolchain.errors import InfeasibleBudgetError
from toolchain.files import scratch
from toolchain.graph.assemble import assemble, round_to_nearest
from toolchain.graph.model import Graph
from toolchain.hardware import thread_count
from toolchain.kernels import CATALOGUE, mean_bits, uniform
from toolchain.policy.sensitivity import measure as sensitivities
from toolchain.policy.solver import solve
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import latencies, levelled, subject
from toolchain.session import cache_slots, open_session, token_feeds
from toolchain.spec import Budget, Policy, Workload
from toolchain.text import documents, load_tokenizer, separator_id
from toolchain.text import windows as cut

WINDOWS = 11


def outputs(graph: Graph, policy: Policy, windows: np.ndarray, threads: int) -> list[np.ndarray]:
    """The package's first output for each window [T]: log-probabilities [T, V] of a decoder, else what the encoder answers."""
    made = []
    with scratch() as folder:
        assemble(graph, policy, round_to_nearest(graph), folder)
        session = open_session(folder, threads)
        empty = {slot.past: slot.zeros(0) for slot in cache_slots(session)}
        for row in windows:
            value = session.run(None, {**token_feeds(session, row[None], every_position=True), **empty})[0][0].astype(np.float64)
            if empty:
                value -= value.max(-1, keepdims=True)
                value -= np.log(np.exp(value).sum(-1, keepdims=True))
            made.append(value)
    return made


def distance_to(reference: list[np.ndarray], decoder: bool) -> Callable[[list[np.ndarray]], float]:
    """KL(reference ‖ other) per token in nats, or relative squared error."""

    def distance(other: list[np.ndarray]) -> float:
        if decoder:
            return float(np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in zip(reference, other, strict=True)]))
        error = sum(float(((p - q) ** 2).sum()) for p, q in zip(reference, other, strict=True))
        return error / sum(float((p**2).sum()) for p in reference)

    return distance


def chosen(costs: CostModel, losses: dict[str, dict[str, float]], limit: float) -> Policy:
    return solve(costs, losses, Budget(latency_ms=limit)).policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--workload", type=Workload.parse)
    parser.add_argument("--work", type=Path, help="keep the cost table here")
    parser.add_argument("--budgets", type=int, default=5)
    parser.add_argument(
        "--windows", type=int, default=8, help="windows of 128 tokens for the sensitivities; four times as many judge"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = hardware.load("local")
    threads = thread_count(device)
    with tempfile.TemporaryDirectory() as temporary, opened(arguments.model) as source:
        graph = source.graph
        decoder = graph.kind == "decoder"
        table = measure_costs(graph, device, arguments.work or Path(temporary), arguments.workload, "benchmark", renew=False)
        kernels = {unit: tuple(name for name in names if CATALOGUE[name].quantised) for unit, names in table.model.kernels.items()}
        costs = replace(table.model, kernels=kernels)
        separator = separator_id(graph.directory) if decoder else None
        text = cut(load_tokenizer(graph.directory), documents(arguments.text), 128, separator, framed=not decoder)
        half = len(text) // 2
        few = text[:half][:: max(1, half // arguments.windows)][: arguments.windows]
        judges = text[half:][:: max(1, (len(text) - half) // (4 * arguments.windows))][: 4 * arguments.windows]
        full = uniform("fp32", graph.units)
        near = distance_to(outputs(graph, full, few, threads), decoder)
        far = distance_to(outputs(graph, full, judges, threads), decoder)
        losses = sensitivities(lambda policy: near(outputs(graph, policy, few, threads)), graph.units, kernels, full)
        names = [name for name in CATALOGUE if CATALOGUE[name].quantised and name in table.table.header.kernels]
        uniforms = {name: uniform(name, graph.units) for name in names}
        quality = {name: far(outputs(graph, policy, judges, threads)) for name, policy in uniforms.items()}
        predicted = {name: costs.totals(policy)["latency_ms"] for name, policy in uniforms.items()}
        best = min(quality, key=quality.__getitem__)
        low, high = costs.bounds("latency_ms")[0], predicted[best]
        rows = []
        for limit in np.linspace(low + 0.02 * (high - low), high, arguments.budgets):
            try:
                policy = chosen(costs, losses, float(limit))
            except InfeasibleBudgetError:
                continue
            fits = [name for name in names if predicted[name] <= limit]
            rival = min(fits, key=quality.__getitem__, default=None)
            ours = far(outputs(graph, policy, judges, threads))
            pair = {"chosen": policy} | ({rival: uniforms[rival]} if rival else {})
            rows.append((float(limit), policy, ours, rival, measured(graph, pair, costs.workload, Host(device, threads))))
    unit = "KL to fp32 (nats per token)" if decoder else "relative squared error to fp32"
    where = f"{Path(arguments.model).name}, {costs.workload}, {threads} threads, {table.table.header.runtime}"
    print(f"{where}; {unit}, rounded to nearest, {len(judges)} windows")
    heads = (
        "limit ms",
        "chosen: mean bits",
        "predicted",
        "measured",
        "distance",
        "best uniform",
        "predicted",
        "measured",
        "distance",
        "ratio",
    )
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for limit, policy, ours, rival, seen in rows:
        cells = [
            f"{limit:.3f}",
            f"{mean_bits(policy, graph.units):.2f}",
            f"{costs.totals(policy)['latency_ms']:.3f}",
            f"{seen['chosen']:.3f}",
        ]
        cells.append(f"{ours:.5f}")
        if rival:
            cells += [
                rival,
                f"{predicted[rival]:.3f}",
                f"{seen[rival]:.3f}",
                f"{quality[rival]:.5f}",
                f"{quality[rival] / ours:.2f}",
            ]
        else:
            cells += ["none keeps it", "", "", "", ""]
        print(f"| {' | '.join(cells)} |")
    print("all uniform: " + ", ".join(f"{name} {predicted[name]:.3f} ms {quality[name]:.5f}" for name in names))
    if arguments.json:
        keep = [
            {"limit_ms": limit, "policy": dict(policy), "distance": ours, "uniform": rival, "measured_ms": seen}
            for limit, policy, ours, rival, seen in rows
        ]
        arguments.json.write_text(json.dumps({"rows": keep, "uniform": quality, "predicted_ms": predicted}, indent=1) + "\n")


def measured(graph: Graph, policies: dict[str, Policy], workload: Workload, host: Host) -> dict[str, float]:
    """latency_ms of each, in rotation."""
    with scratch() as folder:
        subjects = []
        for name, policy in policies.items():
            place = folder / name
            place.mkdir()
            assemble(graph, policy, round_to_nearest(graph), place)
            subjects.append(subject(name, place, workload, graph.vocabulary))
        answer = host.time(subjects, WINDOWS)
    trials = levelled(answer["trials"])
    return {name: latencies(trials[name], answer["valid"])["latency_ms"].value or 0.0 for name in policies}


if __name__ == "__main__":
    main()
