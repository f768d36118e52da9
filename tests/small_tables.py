"""A cost table for a graph, made up by formula instead of measured: complete, cheap, and the same every time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from toolchain.costs.borrowed import describe
from toolchain.costs.operations import tokens_in_flight, working_set
from toolchain.costs.rows import Header, MemoryRow, ModelMemoryRow, ModelRow, UnitRow
from toolchain.costs.table import CostTable
from toolchain.graph.layers import units_within
from toolchain.graph.model import Graph
from toolchain.hardware import load, thread_count
from toolchain.kernels import CATALOGUE, candidates, parts, runs_as
from toolchain.profiler.model_rows import missing
from toolchain.profiler.profile import current_header, default_workload
from toolchain.profiler.unit_rows import token_counts
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import WORKS, Unit, Workload

OVERHEAD_MS, OVERHEAD_BYTES = 0.3, 2e6
MS_PER_POSITION, BYTES_PER_TOKEN = 0.001, 1e3


@cache
def header_here() -> Header:
    """What a table measured here and now would say of this machine."""
    device = load("local")
    header = current_header(device, thread_count(device), "none: made up", "made up by a test")
    return replace(header, reference_ns=dict.fromkeys(WORKS, 1e5))


def unit_ms(unit: Unit, kernel: str, tokens: int) -> float:
    """By the bytes of what runs; int8 dynamic is four times as fast with several tokens in flight, as on real machines."""
    part = parts(CATALOGUE[kernel])[-1 if tokens > 1 else 0]
    quick = 0.25 if part.activation == "int8_tensor" and tokens > 1 else 1.0
    return quick * tokens * packed_bytes(unit, part) * 1e-8 + 1e-4


def complete_table(graph: Graph, workload: Workload | None = None, header: Header | None = None) -> CostTable:
    """Rows of every unit shape, kernel and token count, and of every anchor, which costs its units' sum and a constant."""
    workload, header = workload or default_workload(graph), header or header_here()
    table = CostTable(header, {}).adding([describe(graph)])
    for unit in graph.units:
        for kernel in dict.fromkeys(map(runs_as, candidates(unit, header.kernels))):
            weight = packed_bytes(unit, CATALOGUE[kernel])
            kind = working_set(graph.units, kernel, header.cache_bytes)
            times = [
                UnitRow(*unit.shape, kernel, tokens, kind, unit_ms(unit, kernel, tokens), 1e-5, 7, True)
                for tokens in token_counts(graph, unit.shape, workload)
            ]
            table = table.adding([MemoryRow(*unit.shape, kernel, 1.5 * weight, weight, 2), *times])
    for wanted in missing(graph, workload, table):
        anchor = wanted.anchor
        units = units_within(graph.units, anchor.layers)
        for phase in wanted.times:
            running = [(unit, tokens) for unit in units if (tokens := tokens_in_flight(unit, phase))]
            times_ms = [unit_ms(unit, anchor.policy[unit.name], tokens) for unit, tokens in running]
            key = (graph.fingerprint, phase.name, phase.batch, phase.tokens, phase.past, anchor.layers, anchor.name)
            latency = OVERHEAD_MS + MS_PER_POSITION * phase.past + sum(times_ms)
            table = table.adding([ModelRow(*key, dict(anchor.policy), "cached", latency, 0.0, 15, True)])
        weight = sum(packed_bytes(unit, CATALOGUE[anchor.policy[unit.name]]) for unit in units)
        for tokens in wanted.memory:
            capacity = tokens + workload.new_tokens
            peak = OVERHEAD_BYTES + BYTES_PER_TOKEN * tokens + 1.5 * weight + anchor.layers * graph.cache_bytes_per_layer(capacity)
            key_ = (graph.fingerprint, workload.batch, tokens, capacity, anchor.layers, anchor.name)
            table = table.adding([ModelMemoryRow(*key_, dict(anchor.policy), peak, peak)])
    return table
