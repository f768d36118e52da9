"""Does the cost table predict energy? Random policies, predicted against measured; one package measured again and again; and Zeus beside.

    python benchmarks/energy.py MODEL --device DEVICE [--workload generate:64+32] [--policies 20] [--repeats 5] [--zeus 5]
                                [--trials 2] [--window S] --work DIR [--readings DIR] [--json FILE] [--report]

Profiles the model first, if the table in --work lacks rows, energy rows among them: the device must have a meter. Everything that was
measured is kept in --readings (default: --work), package by package, so a killed run goes on. Energy is that of one whole inference of the
workload, in mJ, idle power included: what `predict` predicts and `check` measures, by the same protocol (`toolchain/profiler/energy.py`),
each in a process of its own.

    predicted     measured / predicted of every policy; the share within 10% (goal: 90 of 100) and the rank correlation. Twice: as it was
                  measured, and at the speed the machine had when the table began (by the reference in the same windows: of a package
                  that a slow machine held up, idle power's part grows), which is the speed that is predicted. Beside
                  it, what one and the same number for all of them would do: where kernels hardly differ, that is no worse
    repeated      the first policy's package, --repeats times: largest distance from the median
    Zeus          the same window, read by our meter and by Zeus at the same two moments, of the first policy's package run back to back in
                  this process (goal: within 2%). Without the package `zeus` (pip install zeus) the column is null, with the reason.

--report: measure nothing, and report what is kept so far; on any machine. What README shows: --work profiles --readings
benchmarks/readings --report. --kernels: only the model's unit shapes by kernel, from the table in --work (or `profiles`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from predict_accuracy import random_policy

from toolchain import hardware
from toolchain.commands.workflow import measure_costs, opened
from toolchain.costs.bounds import bound_of_phase
from toolchain.costs.from_table import cost_model
from toolchain.costs.operations import working_set_of
from toolchain.costs.rows import Header, UnitEnergyRow
from toolchain.costs.table import CostTable, open_table
from toolchain.errors import MeterError
from toolchain.files import scratch, write_atomic
from toolchain.graph.assemble import assemble
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import drawn
from toolchain.kernels import mean_bits
from toolchain.profiler import ask, meters
from toolchain.profiler.ask import Host
from toolchain.profiler.energy import WARM_S
from toolchain.profiler.measure import measure_energy, subject
from toolchain.profiler.subjects import SUBJECTS
from toolchain.report import table as table_of
from toolchain.spec import Policy, Workload

NEAR = 0.10


def measured(
    host: Host, graph: Graph, policy: Policy, workload: Workload, meter: str, trials: int, window_s: float
) -> dict[str, Any]:
    """What one process saw of a policy's package, or why it saw nothing."""
    with scratch() as folder:
        assemble(graph, policy, drawn, folder, graph.layers)
        seen = measure_energy(host, folder, workload, graph.vocabulary, meter, trials, window_s)
    return {
        "energy_mj": seen.total.value,
        "spread_mj": seen.total.spread,
        "above_idle_mj": seen.above_idle.value,
        "idle_mw": seen.idle_mw,
        "n": seen.total.n,
        "meter": seen.meter,
        "window_s": seen.window_s,
        "meter_error": seen.meter_error,
        "phases": seen.phases,
        "reason": seen.total.reason,
    }


Bracket = Callable[[], Callable[[], float]]
"""Opens a window; what it returns closes it and says the mJ."""


def zeus_bracket(meter: str) -> tuple[Bracket | None, str]:
    """(how Zeus reads what this meter reads, "") or (None, why it does not)."""
    if meter not in ("nvml", "rapl"):
        return None, f"Zeus is compared for nvml and rapl, not for {meter}"
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError as error:
        return None, f"the Python package zeus does not import ({error}); type: pip install zeus"
    monitor = ZeusMonitor(gpu_indices=[0], cpu_indices=[]) if meter == "nvml" else ZeusMonitor(gpu_indices=[])

    def begin() -> Callable[[], float]:
        monitor.begin_window("window", sync_execution=False)  # a run returns when it has ended

        def end() -> float:
            seen = monitor.end_window("window", sync_execution=False)
            joules = seen.gpu_energy if meter == "nvml" else seen.cpu_energy or {}
            return 1e3 * sum(joules.values())

        return end

    return begin, ""


def same_windows(
    host: Host, graph: Graph, policy: Policy, workload: Workload, meter: str, count: int, window_s: float
) -> list[dict[str, Any]]:
    """`count` windows of a package's last phase run back to back in this process, each read by our meter and by Zeus."""
    bracket, reason = zeus_bracket(meter)
    rows: list[dict[str, Any]] = []
    opened_meter = meters.open_meter(meter, Path(ask.SYSFS))
    with scratch() as folder:
        assemble(graph, policy, drawn, folder, graph.layers)
        what = {**subject("package", folder, workload, graph.vocabulary), "provider": host.device.provider}
        run = list(SUBJECTS[what["kind"]](what, host.threads, False).runs().values())[-1]
        for _ in range(count):
            _until(time.monotonic() + WARM_S, run, opened_meter)
            before = opened_meter.read()
            end = bracket() if bracket else None
            start = time.monotonic()
            _until(start + max(window_s, opened_meter.least_window_s), run, opened_meter)
            zeus_mj = end() if end else None
            seconds = time.monotonic() - start
            ours_mj = opened_meter.read().energy_mj - before.energy_mj
            ratio = ours_mj / zeus_mj if zeus_mj else None
            rows.append({"seconds": seconds, "ours_mj": ours_mj, "zeus_mj": zeus_mj, "ours/zeus": ratio, "reason": reason})
    opened_meter.close()
    return rows


def _until(deadline: float, run: Callable[[], int], meter: meters.Meter) -> None:
    read_at = time.monotonic()
    while (now := time.monotonic()) < deadline:
        run()
        if now - read_at > meter.longest_gap_s:
            meter.read()
            read_at = now


def at_tables_speed(row: dict[str, Any], graph: Graph, policy: Policy, workload: Workload, header: Header) -> float | None:
    """What was measured, in mJ, had the machine been as fast as when the table began; None of nothing."""
    kind = working_set_of(graph.units, policy, header.cache_bytes)
    energy = 0.0
    for phase in workload.phases if row["phases"] else ():
        seen = row["phases"][phase.name]
        bound = bound_of_phase(graph.units, policy, phase, kind, seen["run_ms"], seen["reference_ns"], header.provider)
        speed = header.reference_ns[bound] / seen["reference_ns"][bound]
        energy += seen["above_idle_mj"] + (seen["energy_mj"] - seen["above_idle_mj"]) * speed
    return energy or None


def agreement(predicted: dict[str, float], seen: dict[str, float]) -> dict[str, Any]:
    """How measured energy (name → mJ) agrees with predicted, and with its own median; null where nothing was measured."""
    constant = median(seen.values()) if seen else 0.0
    ratios = {name: energy / predicted[name] for name, energy in seen.items()}
    ranks = [np.argsort(np.argsort([of[name] for name in seen])) for of in (predicted, seen)] if len(seen) > 2 else None
    return {
        "policies": len(seen),
        "within_10_percent": sum(abs(ratio - 1) <= NEAR for ratio in ratios.values()) / len(seen) if seen else None,
        "within_10_percent_of_one_number": sum(abs(energy / constant - 1) <= NEAR for energy in seen.values()) / len(seen)
        if seen
        else None,
        "median_measured/predicted": median(ratios.values()) if seen else None,
        "largest_error": max((abs(ratio - 1) for ratio in ratios.values()), default=None),
        "spearman": float(np.corrcoef(*ranks)[0, 1]) if ranks else None,
    }


def _distance(repeats: list[float]) -> float | None:
    return max(abs(energy / median(repeats) - 1) for energy in repeats) if len(repeats) > 1 else None


def summary(
    predicted: dict[str, float], done: dict[str, Any], corrected: Callable[[str, dict[str, Any]], float | None]
) -> dict[str, Any]:
    """The three answers, in numbers; null where nothing was measured. corrected: (policy, row) → mJ at the table's speed."""
    rows = {name: row for name, row in done["policies"].items() if row["energy_mj"] and name in predicted}
    repeats = [row for row in done["repeats"] if row["energy_mj"]]
    beside = [row["ours/zeus"] for row in done["zeus"] if row["ours/zeus"]]
    same = [energy for row in repeats if (energy := corrected(next(iter(predicted)), row))]
    return {
        **agreement(predicted, {name: row["energy_mj"] for name, row in rows.items()}),
        "at_tables_speed": agreement(predicted, {name: energy for name, row in rows.items() if (energy := corrected(name, row))}),
        "repeats": len(repeats),
        "largest_distance_of_repeats": _distance([row["energy_mj"] for row in repeats]),
        "at_tables_speed_repeats": _distance(same),
        "zeus_windows": len(beside),
        "largest_distance_from_zeus": max((abs(ratio - 1) for ratio in beside), default=None),
        "zeus_reason": next((row["reason"] for row in done["zeus"] if row["reason"]), "" if beside else "not measured"),
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model, or a folder with its fp32 graph (graph.json)")
    parser.add_argument("--device", default="local")
    parser.add_argument("--workload", default="", help="default: as the command's")
    parser.add_argument("--policies", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--zeus", type=int, default=5, metavar="WINDOWS")
    parser.add_argument("--trials", type=int, default=2, help="windows of each phase of a policy")
    parser.add_argument("--window", type=float, default=0.0, metavar="S", help="seconds (default: the meter's least)")
    parser.add_argument("--work", type=Path, required=True, help="keep the cost table and the measurements here")
    parser.add_argument("--readings", type=Path, help="keep the measurements here instead")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--kernels", action="store_true", help="print the units' energy by kernel, and do nothing else")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    device = hardware.load(arguments.device)
    host = Host.of(device)
    workload = Workload.parse(arguments.workload) if arguments.workload else None
    ready = (Path(arguments.model) / "graph.json").is_file()
    with nullcontext() if ready else opened(arguments.model) as source:
        graph = source.graph if source else Graph.open(Path(arguments.model))
        if arguments.kernels:
            print(by_kernel(graph, open_table(arguments.work / device.name / "table.jsonl")))
            return
        if arguments.report:
            workload = workload or Workload.parse("encode:1x128" if graph.kind == "encoder" else "generate:64+32")
            costs = cost_model(graph, open_table(arguments.work / device.name / "table.jsonl"), workload)
        else:
            costs = measure_costs(graph, device, arguments.work, workload, "benchmark", renew=False).model
        header = open_table(arguments.work / device.name / "table.jsonl").header
        if "energy_mj" not in costs.per_unit:
            sys.exit(f"expected a device with energy rows, got none: {costs.no_energy}")
        rng = random.Random(1)
        bits = np.linspace(2.1, 7.9, arguments.policies)
        policies = {f"policy {number}": random_policy(graph, costs, value, rng) for number, value in enumerate(bits)}
        predicted = {name: costs.totals(policy)["energy_mj"] for name, policy in policies.items()}
        kept = (
            arguments.readings or arguments.work
        ) / f"energy-1-{graph.fingerprint[:12]}-{costs.workload}-{arguments.policies}.json".replace(":", "-")
        done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"policies": {}, "repeats": [], "zeus": []}
        if not arguments.report:
            _measure(host, graph, costs.workload, policies, arguments, done, kept)

    def corrected(name: str, row: dict[str, Any]) -> float | None:
        return at_tables_speed(row, graph, policies[name], costs.workload, header)

    spread = costs.relative_spread["energy_mj"]
    found = {
        "device": device.name,
        "workload": str(costs.workload),
        "predicted_spread": spread,
        **summary(predicted, done, corrected),
    }
    rows = [
        {"policy": name, "mean bits": mean_bits(policies[name], graph.units), "predicted mJ": predicted[name]}
        | {"measured mJ": row["energy_mj"], "at the table's speed mJ": corrected(name, row) if row["energy_mj"] else None}
        | {"above idle mJ": row["above_idle_mj"], "reason": row["reason"]}
        for name, row in done["policies"].items()
    ]
    repeats = [{"repeat": place, **row} for place, row in enumerate(done["repeats"])]
    for repeat in repeats:
        repeat.pop("phases", None)
    for part in (rows, repeats, done["zeus"]):
        if part:
            print(table_of(part, list(part[0]), markdown=True), end="\n\n")
    print(json.dumps(found, indent=1))
    if arguments.json:
        write_atomic(arguments.json, json.dumps({"summary": found, "rows": rows, "measured": done}, indent=1) + "\n")


def by_kernel(graph: Graph, table: CostTable) -> str:
    """Energy in mJ of one execution of each of the model's unit shapes, a column for each kernel: total / above idle."""
    seen: dict[tuple[Any, ...], dict[str, str]] = {}
    shapes = {unit.shape for unit in graph.units}
    for row in table.of(UnitEnergyRow):
        if (row.op, row.K, row.N) in shapes:
            place = (f"{row.op} {row.K}x{row.N}", row.tokens, row.working_set)
            seen.setdefault(place, {})[row.kernel] = f"{row.energy_mj:.3g} / {row.above_idle_mj:.2g}"
    rows = [{"unit": unit, "tokens": tokens, "weights": kind, **cells} for (unit, tokens, kind), cells in sorted(seen.items())]
    kernels = [name for name in table.header.kernels if any(name in row for row in rows)]
    return table_of(rows, ["unit", "tokens", "weights", *kernels], markdown=True)


def _measure(
    host: Host,
    graph: Graph,
    workload: Workload,
    policies: dict[str, Policy],
    asked: argparse.Namespace,
    done: dict[str, Any],
    kept: Path,
) -> None:
    """Fill `done`, and keep it in a file after every package."""
    name, reason = host.meter()
    if reason:
        sys.exit(f"expected a meter, got none: {reason}")
    order = random.Random(2).sample(list(policies), len(policies))
    first = next(iter(policies.values()))
    todo = [policy for policy in order if not done["policies"].get(policy, {}).get("energy_mj")]
    for number, policy in enumerate(todo):
        done["policies"][policy] = measured(host, graph, policies[policy], workload, name, asked.trials, asked.window)
        write_atomic(kept, json.dumps(done))
        print(f"policies: {number + 1}/{len(todo)}", file=sys.stderr)
    while len(done["repeats"]) < asked.repeats:
        done["repeats"].append(measured(host, graph, first, workload, name, asked.trials, asked.window))
        write_atomic(kept, json.dumps(done))
        print(f"repeats: {len(done['repeats'])}/{asked.repeats}", file=sys.stderr)
    if len(done["zeus"]) < asked.zeus:
        try:
            done["zeus"] = same_windows(host, graph, first, workload, name, asked.zeus, asked.window)
        except MeterError as error:
            done["zeus"] = [{"seconds": None, "ours_mj": None, "zeus_mj": None, "ours/zeus": None, "reason": str(error)}]
        write_atomic(kept, json.dumps(done))


if __name__ == "__main__":
    main()
