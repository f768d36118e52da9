"""Rows of whole models ("anchors"): a few policies measured end to end, so that what the units' sum leaves over becomes known.

Owns which policies those are. Weights are rounded to nearest: their values do not change a kernel's time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from toolchain.costs.table import CostTable, ModelRow
from toolchain.files import scratch
from toolchain.graph.assemble import assemble, round_to_nearest
from toolchain.graph.model import Graph
from toolchain.kernels import candidates, uniform
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import latencies, subject
from toolchain.spec import Policy, Unit, Workload

UNIFORM = ("fp32", "w8a8", "w8g128", "w4g32", "w2g128")
MIXED = 3
WINDOWS = 15


def anchors(units: tuple[Unit, ...], available: Iterable[str]) -> dict[str, Policy]:
    """The policies under which a whole model is measured: uniform ones, and mixed ones drawn with a fixed seed."""
    available = tuple(available)
    policies = {name: uniform(name, units, available) for name in UNIFORM if name in available}
    rng = random.Random(0)
    for number in range(MIXED):
        choice = {unit.name: rng.choice([name for name in candidates(unit, available) if name != "fp32"]) for unit in units}
        policies[f"mixed-{number}"] = Policy.of(choice)
    return policies


def complete(graph: Graph, workload: Workload, table: CostTable) -> bool:
    """Whether the table holds a valid row of every anchor."""
    keys = [("model", graph.fingerprint, str(workload), name) for name in anchors(graph.units, table.header.kernels)]
    return all(getattr(table.rows.get(key), "valid", False) for key in keys)


def measure(host: Host, graph: Graph, workload: Workload, kernels: Iterable[str]) -> tuple[list[ModelRow], list[float]]:
    """(rows not yet corrected for drift, the reference's times meanwhile)."""
    policies = anchors(graph.units, kernels)
    rows = []
    with scratch() as folder:
        subjects = {}
        for name, policy in policies.items():
            place = folder / name
            place.mkdir()
            assemble(graph, policy, round_to_nearest(graph), place)
            subjects[name] = subject(name, place, workload, graph.vocabulary)
        answer = host.time(list(subjects.values()), WINDOWS)
        for name, item in subjects.items():
            seen = latencies(answer["trials"][name], answer["valid"])
            latency, first = seen["latency_ms"], seen.get("first_token_ms")
            files = [*Path(item["folder"]).iterdir(), *graph.companions()]
            rows.append(
                ModelRow(
                    model=graph.fingerprint,
                    workload=str(workload),
                    policy=name,
                    units=dict(policies[name]),
                    latency_ms=latency.value or 0.0,
                    latency_spread_ms=latency.spread or 0.0,
                    first_token_ms=first.value if first else None,
                    first_token_spread_ms=first.spread if first else None,
                    peak_memory_bytes=host.peak(item),
                    package_bytes=sum(path.stat().st_size for path in files),
                    n=latency.n,
                    valid=latency.valid,
                )
            )
    return rows, answer["reference_ns"]
