"""A cost table for a graph, made up by formula instead of measured: complete, cheap, and the same every time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from toolchain.costs.model import working_set
from toolchain.costs.table import CostTable, Header, MemoryRow, ModelRow, UnitRow
from toolchain.graph.model import Graph
from toolchain.hardware import load, thread_count
from toolchain.kernels import CATALOGUE, candidates, runs_as
from toolchain.profiler.model_rows import anchors
from toolchain.profiler.profile import current_header, default_workload
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import Unit, Workload

OVERHEAD_MS, OVERHEAD_BYTES = 0.3, 2e6


@cache
def header_here() -> Header:
    """What a table measured here and now would say of this machine."""
    device = load("local")
    return replace(current_header(device, thread_count(device), "none: made up", "made up by a test"), reference_ns=1e5)


def unit_ms(unit: Unit, kernel: str, tokens: int) -> float:
    return tokens * packed_bytes(unit, CATALOGUE[kernel]) * 1e-8 + 1e-4


def complete_table(graph: Graph, workload: Workload | None = None, header: Header | None = None) -> CostTable:
    """Rows of every unit shape, kernel and phase, and of every anchor, which costs its units' sum and a constant."""
    workload, header = workload or default_workload(graph), header or header_here()
    table = CostTable(header, {})
    for unit in graph.units:
        for kernel in dict.fromkeys(map(runs_as, candidates(unit, header.kernels))):
            weight = packed_bytes(unit, CATALOGUE[kernel])
            table = table.adding([MemoryRow(*unit.shape, kernel, 1.5 * weight, weight, 2)])
            for tokens in workload.phases.values():
                kind = working_set(graph.units, kernel, header.cache_bytes)
                table = table.adding([UnitRow(*unit.shape, kernel, tokens, kind, unit_ms(unit, kernel, tokens), 1e-5, 7, True)])
    for name, policy in anchors(graph.units, header.kernels).items():
        sums = {
            phase: OVERHEAD_MS + sum(unit_ms(unit, runs_as(policy[unit.name]), tokens) for unit in graph.units)
            for phase, tokens in workload.phases.items()
        }
        weight = sum(packed_bytes(unit, CATALOGUE[policy[unit.name]]) for unit in graph.units)
        table = table.adding(
            [
                ModelRow(
                    model=graph.fingerprint,
                    workload=str(workload),
                    policy=name,
                    units=dict(policy),
                    latency_ms=sums.get("decode", sums.get("encode", 0.0)),
                    first_token_ms=sums.get("prefill"),
                    peak_memory_bytes=OVERHEAD_BYTES + 1.5 * weight,
                    package_bytes=weight + 5000,
                    n=15,
                    valid=True,
                )
            ]
        )
    return table
