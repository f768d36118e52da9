"""Does the cost table predict? Random policies, spread evenly over mean bits: predicted against measured, and the noise floor beside it.

    python benchmarks/predict_accuracy.py MODEL --workload generate:64+32 [--policies 80] [--group 8] [--work DIR] [--json FILE] [--report]

Profiles the model first, if the table in --work lacks rows; what was measured is kept there too, so a killed run goes on. Then packages
are made and measured in groups, in rotation, as the workload says (a real prefill and real decode steps, not the profiler's single
phases), in random order. In every group's rotation stand models that the table holds: three uniform ones (8, 4 and 2 bits, as deep as they
were profiled) and all mixed ones that it holds whole. How much slower they run now than they did then is the machine's doing, and is taken
out of the group's figures: on a line over mean bits, since what waits for memory and what waits for arithmetic drift apart.
A process has moods of its own (`benchmarks/sessions.py`), so a measurement is the mean over two processes, in different groups. A quarter
of the policies is measured a second time, in two others: how well a measurement predicts itself is the noise floor. Printed too: the
ratios corrected by the references alone, as `check` does it, and the raw ones (`accuracy_report.py`).

--report: measure nothing, and report what --work holds so far; on any machine.

Goal: latency within 5% for 90 of 100 policies and within 10% for 99, Spearman >= 0.98, peak memory within 5% for 95, bytes exact.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from accuracy_report import Measured, known_models, report

from toolchain import hardware
from toolchain.commands.workflow import measure_costs, opened
from toolchain.costs.from_table import cost_model
from toolchain.costs.model import CostModel
from toolchain.costs.table import open_table
from toolchain.files import scratch, write_atomic
from toolchain.graph.assemble import assemble
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import drawn
from toolchain.kernels import CATALOGUE, candidates, mean_bits
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import latencies, levelled, subject
from toolchain.profiler.model_rows import Anchor, anchors
from toolchain.spec import Policy, Workload

WINDOWS, PROCESSES = 6, 2


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--workload", required=True, type=Workload.parse)
    parser.add_argument("--policies", type=int, default=80)
    parser.add_argument("--group", type=int, default=8, help="policies in one rotation: more share the known models' time")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the machine has")
    parser.add_argument("--work", type=Path, help="keep the cost table here")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = replace(hardware.load("local"), threads=arguments.threads)
    rng = random.Random(1)
    graph_folder = (Path(arguments.model) / "graph.json").is_file()
    with tempfile.TemporaryDirectory() as temporary, nullcontext() if graph_folder else opened(arguments.model) as source:
        folder, graph = arguments.work or Path(temporary), source.graph if source else Graph.open(Path(arguments.model))
        if arguments.report:
            table = open_table(folder / device.name / "table.jsonl")
            costs = cost_model(graph, table, arguments.workload)
        else:
            found = measure_costs(graph, device, folder, arguments.workload, "benchmark", renew=False)
            table, costs = found.table, found.model
        known = known_models(graph, anchors(graph, table.header.kernels, table.header.cache_bytes))
        bits = np.linspace(2.1, 7.9, arguments.policies)
        policies = {f"policy {number}": random_policy(graph, costs, value, rng) for number, value in enumerate(bits)}
        order = rng.sample(list(policies), len(policies))
        again = rng.sample(order, max(arguments.group, len(order) // 4))
        done = folder / f"measured-5-{graph.fingerprint[:12]}-{arguments.workload}-{len(order)}.json"
        rounds: list[dict[str, dict]] = json.loads(done.read_text()) if done.exists() else [{} for _ in range(2 * PROCESSES)]
        for number, into in enumerate(rounds if not arguments.report else ()):
            wanted = order if number < PROCESSES else again
            names = random.Random(number).sample(wanted, len(wanted))
            for start in range(0, len(names), arguments.group):
                if set(names[start : start + arguments.group]) <= set(into):
                    continue
                group = {name: policies[name] for name in names[start : start + arguments.group]}
                host = Host.of(device)
                rows = measured(graph, group, known, arguments.workload, host, memory=number == 0)
                seen_known = {anchor.name: rows.pop(anchor.name) for anchor in known}
                into |= {name: {**row, "known": seen_known} for name, row in rows.items()}
                write_atomic(done, json.dumps(rounds))
                print(f"round {number + 1} of {len(rounds)}: measured {len(into)} of {len(names)}", file=sys.stderr)
        if not rounds[0]:
            sys.exit(f"expected measurements in {done}, found none; type the same without --report")
        once, twice = ([rows for rows in part if rows] for part in (rounds[:PROCESSES], rounds[PROCESSES:]))
        lines = report(graph, table, costs, known, policies, Measured(once, twice))
    if arguments.json:
        details = {
            name: {
                "bits": mean_bits(policy, graph.units),
                "predicted": costs.totals(policy),
                "measured": [row.get(name) for row in rounds],
            }
            for name, policy in policies.items()
        }
        arguments.json.write_text(json.dumps({"rows": lines, "policies": details}, indent=1) + "\n")


if __name__ == "__main__":
    main()
