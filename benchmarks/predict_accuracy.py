"""Does the cost table predict? Random policies, spread evenly over mean bits: predicted against measured, and the noise floor beside it.

    python benchmarks/predict_accuracy.py MODEL --workload generate:64+32 [--policies 80] [--group 8] [--work DIR] [--json FILE]

Profiles the model first, if the table in --work lacks rows; what was measured is kept there too, so a killed run goes on. Then packages
are made and measured in groups, in rotation, as the workload says (a real prefill and real decode steps, not the profiler's single
phases), in random order. In every group's rotation stand three models that the table holds (uniform at 8, 4 and 2 bits, as deep as they
were profiled): how much slower they run now than they did then is the machine's doing, and is taken out of the group's figures. Where
many tokens are in flight arithmetic is the limit at any bit-width: the median of the three. Decoding waits for memory or for arithmetic,
which drift apart: there a policy's drift is read at its mean bits, on the lines between the three.
A process has moods of its own (`benchmarks/sessions.py`), so a measurement is the mean over two processes, in different groups. A quarter
of the policies is measured a second time, in two others: how well a measurement predicts itself is the noise floor. Printed too: the
ratios corrected by the references alone, as `check` does it, and the raw ones.

Goal: latency within 5% for 90 of 100 policies and within 10% for 99, Spearman >= 0.98, peak memory within 5% for 95, bytes exact.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import numpy as np

from toolchain import hardware
from toolchain.commands.workflow import measure_costs, opened
from toolchain.costs.model import CostModel
from toolchain.costs.operations import working_set_of
from toolchain.costs.rows import ModelRow, work
from toolchain.costs.table import CostTable
from toolchain.files import scratch, write_atomic
from toolchain.graph.assemble import assemble, package_bytes
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import drawn
from toolchain.hardware import thread_count
from toolchain.kernels import CATALOGUE, candidates, mean_bits
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import latencies, levelled, subject
from toolchain.profiler.model_rows import Anchor, anchors
from toolchain.spec import Policy, Workload

WINDOWS, PROCESSES = 6, 2
KNOWN = ("w2g32", "w4g32", "w8g128")
"""Models that the table holds, and that tell the machine's drift since: bound by arithmetic, in between, by memory; bits rising."""


def random_policy(graph: Graph, costs: CostModel, bits: float, rng: random.Random) -> Policy:
    """Every unit draws a kernel; the odds are tilted until the mean is `bits`, and one policy in four holds some full-precision units."""
    full = rng.random() < 0.25
    quantised = {unit.name: [name for name in costs.kernels[unit.name] if name != "fp32"] for unit in graph.units}
    low, high = -3.0, 3.0
    policy = {}
    for _ in range(30):
        tilt, state = (low + high) / 2, random.Random(rng.random())
        policy = {
            name: state.choices(names, [np.exp(tilt * CATALOGUE[kernel].weight_bits) for kernel in names])[0]
            for name, names in quantised.items()
        }
        if abs(mean_bits(policy, graph.units) - bits) < 0.1:
            break
        low, high = (tilt, high) if mean_bits(policy, graph.units) < bits else (low, tilt)
    if full:
        for unit in rng.sample(graph.units, max(1, len(graph.units) // 12)):
            if "fp32" in candidates(unit, costs.kernels[unit.name]):
                policy[unit.name] = "fp32"
    return Policy.of(policy)


def measured(
    graph: Graph, policies: dict[str, Policy], known: list[Anchor], workload: Workload, host: Host, memory: bool
) -> dict[str, dict[str, float]]:
    """Per name, those of `known` too: latencies, and if asked peak memory and the files' bytes."""
    seen: dict[str, dict[str, float]] = {}
    with scratch() as folder:
        subjects = {}
        depths = {anchor.name: (anchor.policy, anchor.layers) for anchor in known}
        depths |= {name: (policy, graph.layers) for name, policy in policies.items()}
        for name, (policy, layers) in depths.items():
            place = folder / name
            place.mkdir()
            assemble(graph, policy, drawn, place, layers)
            subjects[name] = subject(name, place, workload, graph.vocabulary)
        answer = host.time(list(subjects.values()), WINDOWS)
        trials = levelled(answer["trials"])
        for name, what in subjects.items():
            row = {key: value.value or 0.0 for key, value in latencies(trials[name], answer["valid"]).items()}
            row |= {"valid": float(answer["valid"])}
            row |= {work: median(times) for work, times in answer["reference_ns"].items()}
            if memory and name in policies:
                files = [*Path(what["folder"]).iterdir(), *graph.companions()]
                row["peak_memory_bytes"] = host.peak(what)["peak_bytes"]
                row["package_bytes"] = sum(file.stat().st_size for file in files)
            seen[name] = row
    return seen


def known_latencies(table: CostTable, graph: Graph, known: Anchor, workload: Workload) -> dict[str, float]:
    """What was measured of a known model in the workload's phases when the table was made."""
    found = {}
    for phase in workload.phases:
        for row in table.of(ModelRow):
            point = (row.model, row.policy, row.layers, row.phase, row.batch, row.tokens, row.past)
            if point == (graph.fingerprint, known.name, known.layers, phase.name, phase.batch, phase.tokens, phase.past):
                found[phase.resource] = row.latency_ms
    return found


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation (scipy's, which is there wherever the solver is)."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def spearman_beyond_noise(predicted: list[float], seen: list[float], noise: float) -> tuple[float, int]:
    """Spearman over policies that differ by more than noise: sorted by what was measured, each a factor 1 + noise above the one before."""
    chosen: list[int] = []
    for place in sorted(range(len(seen)), key=seen.__getitem__):
        if not chosen or seen[place] > seen[chosen[-1]] * (1 + noise):
            chosen.append(place)
    if len(chosen) < 3:
        return float("nan"), len(chosen)
    return spearman([predicted[place] for place in chosen], [seen[place] for place in chosen]), len(chosen)


def summary(name: str, ratios: list[float]) -> dict[str, float | str]:
    errors = np.abs(np.array(ratios) - 1)
    return {
        "what": name,
        "n": len(ratios),
        "within 5%": float((errors <= 0.05).mean()),
        "within 10%": float((errors <= 0.10).mean()),
        "worst": float(errors.max()),
        "median ratio": float(np.median(ratios)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--workload", required=True, type=Workload.parse)
    parser.add_argument("--policies", type=int, default=80)
    parser.add_argument("--group", type=int, default=8, help="policies in one rotation: more share the known models' time")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the machine has")
    parser.add_argument("--work", type=Path, help="keep the cost table here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = replace(hardware.load("local"), threads=arguments.threads)
    host = Host(device, thread_count(device))
    rng = random.Random(1)
    graph_folder = (Path(arguments.model) / "graph.json").is_file()
    with tempfile.TemporaryDirectory() as temporary, nullcontext() if graph_folder else opened(arguments.model) as source:
        graph = source.graph if source else Graph.open(Path(arguments.model))
        costs = measure_costs(graph, device, arguments.work or Path(temporary), arguments.workload, "benchmark", renew=False)
        header = costs.table.header
        known = [anchor for anchor in anchors(graph, header.kernels, header.cache_bytes) if anchor.name in KNOWN]
        bits = np.linspace(2.1, 7.9, arguments.policies)
        policies = {f"policy {number}": random_policy(graph, costs.model, value, rng) for number, value in enumerate(bits)}
        order = rng.sample(list(policies), len(policies))
        again = rng.sample(order, max(arguments.group, len(order) // 4))
        done = (arguments.work or Path(temporary)) / f"measured-4-{graph.fingerprint[:12]}-{arguments.workload}-{len(order)}.json"
        rounds: list[dict[str, dict]] = json.loads(done.read_text()) if done.exists() else [{} for _ in range(2 * PROCESSES)]
        for number, into in enumerate(rounds):
            drawn_order = order if number < PROCESSES else again
            names = random.Random(number).sample(drawn_order, len(drawn_order))
            for start in range(0, len(names), arguments.group):
                if set(names[start : start + arguments.group]) <= set(into):
                    continue
                group = {name: policies[name] for name in names[start : start + arguments.group]}
                rows = measured(graph, group, known, arguments.workload, host, memory=number == 0)
                seen_known = {anchor.name: rows.pop(anchor.name) for anchor in known}
                into |= {name: {**row, "known": seen_known} for name, row in rows.items()}
                write_atomic(done, json.dumps(rounds))
                print(f"round {number + 1} of {len(rounds)}: measured {len(into)} of {len(names)}", file=sys.stderr)
        once, twice = rounds[:PROCESSES], rounds[PROCESSES:]
        first = rounds[0]
        kinds = {name: working_set_of(graph.units, policies[name], costs.table.header.cache_bytes) for name in order}
        then_ms = {anchor.name: known_latencies(costs.table, graph, anchor, arguments.workload) for anchor in known}
        predicted = {name: costs.model.totals(policy) for name, policy in policies.items()}
        lines, ranks = [], []
        for resource in ("latency_ms", "first_token_ms"):
            if resource not in costs.model.per_unit:
                continue

            def slower(row: dict, name: str, resource: str = resource) -> float:
                return row["known"][name][resource] / then_ms[name][resource]

            def machine(row: dict, name: str, resource: str = resource, slower: Callable = slower) -> float:
                """How much slower the machine is than in the table, by the known models."""
                moves = [slower(row, other) for other in KNOWN]
                if resource != "latency_ms" or arguments.workload.kind != "generate":
                    return median(moves)
                return float(
                    np.interp(mean_bits(policies[name], graph.units), [CATALOGUE[other].weight_bits for other in KNOWN], moves)
                )

            def by_reference(row: dict, name: str, resource: str = resource) -> float:
                bound = work(resource == "latency_ms" and arguments.workload.kind == "generate", kinds[name])
                return row[bound] / costs.table.header.reference_ns[bound]

            def raw(row: dict, name: str) -> float:
                return 1.0

            def average(rounds: list[dict], slowness: Callable, resource: str = resource) -> dict[str, float]:
                return {name: mean(seen[name][resource] / slowness(seen[name], name) for seen in rounds) for name in rounds[0]}

            for other in KNOWN:
                moves = [slower(seen[name], other) for seen in once for name in order]
                print(
                    f"{resource}: known {other} ran {min(moves):.2f} to {max(moves):.2f} times as long as in the table",
                    file=sys.stderr,
                )
            now, later = average(once, machine), average(twice, machine)
            for how, seen in (
                ("", now),
                (", by the references instead", average(once, by_reference)),
                (", raw", average(once, raw)),
            ):
                ratios = [predicted[name][resource] / seen[name] for name in order]
                lines.append(summary(f"{resource}: predicted / measured{how}", ratios))
            lines.append(summary(f"{resource}: measured again / measured", [later[name] / now[name] for name in again]))
            noise = float(np.percentile([abs(later[name] / now[name] - 1) for name in again], 90))
            pair = [predicted[name][resource] for name in order], [now[name] for name in order]
            ranks.append((resource, spearman(*pair), noise, *spearman_beyond_noise(*pair, noise)))
        memory_ratios = [predicted[name]["peak_memory_bytes"] / first[name]["peak_memory_bytes"] for name in order]
        lines.append(summary("peak_memory_bytes: predicted / measured", memory_ratios))
        exact = sum(package_bytes(graph, policies[name]) == first[name]["package_bytes"] for name in order)
    print(
        f"{graph.source}, {arguments.workload}, {thread_count(device)} threads, {costs.table.header.runtime}, {costs.table.header.cpu}"
    )
    print("| what | n | within 5% | within 10% | worst | median ratio |\n|---|---|---|---|---|---|")
    for row in lines:
        shares = f"{row['within 5%']:.1%} | {row['within 10%']:.1%} | {row['worst']:.1%}"
        print(f"| {row['what']} | {row['n']} | {shares} | {row['median ratio']:.3f} |")
    for resource, rank, noise, beyond, count in ranks:
        print(
            f"Spearman {resource}: {rank:.3f} of all; {beyond:.3f} of {count} that differ by more than noise ({noise:.1%}) from the next"
        )
    disturbed = sum(not row["valid"] for seen in rounds for row in seen.values())
    print(f"package bytes exact: {exact} of {len(order)}; measured while disturbed: {disturbed}")
    spread = {name: f"{value:.1%}" for name, value in costs.model.relative_spread.items()}
    print(f"spread that the table promised: {spread}")
    if arguments.json:
        details = {
            name: {
                "bits": mean_bits(policies[name], graph.units),
                "predicted": predicted[name],
                "measured": [seen[name] for seen in once],
                "again": [seen.get(name) for seen in twice],
            }
            for name in order
        }
        arguments.json.write_text(json.dumps({"rows": lines, "spearman": ranks, "policies": details}, indent=1) + "\n")


if __name__ == "__main__":
    main()
