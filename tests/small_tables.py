"""A cost table for a graph, made up by formula instead of measured: complete, cheap, and the same every time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from toolchain.costs.borrowed import describe
from toolchain.costs.operations import tokens_in_flight, working_set, working_set_of
from toolchain.costs.rows import (
    Header,
    MemoryRow,
    ModelEnergyRow,
    ModelMemoryRow,
    ModelRow,
    SessionRow,
    UnitEnergyRow,
    UnitRow,
    work,
)
from toolchain.costs.table import CostTable
from toolchain.graph.layers import units_within
from toolchain.graph.model import Graph
from toolchain.hardware import load, thread_count
from toolchain.kernels import CATALOGUE, candidates, parts, runs_as
from toolchain.profiler import energy_rows, following
from toolchain.profiler.model_rows import missing
from toolchain.profiler.profile import current_header, default_workload
from toolchain.profiler.unit_rows import token_counts
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import WORKS, Unit, Workload

OVERHEAD_MS, OVERHEAD_BYTES = 0.3, 2e6
OVERHEAD_MJ, BUSY_MW, IDLE_MW = 0.01, 25_000.0, 5_000.0
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
    return table.adding(session_rows(graph, table, workload, dict.fromkeys(range(following.FOLLOWED), 1.0), 1.0))


def session_rows(
    graph: Graph, table: CostTable, workload: Workload, slowness: Mapping[int, float], share: float, noise: Sequence[float] = ()
) -> list[SessionRow]:
    """Of every session: all models follow the references by `share`, each at a level of its own. noise: by session, in logs."""
    return unlike_session_rows(graph, table, workload, slowness, (share, share, share), noise)


def unlike_session_rows(
    graph: Graph,
    table: CostTable,
    workload: Workload,
    slowness: Mapping[int, float],
    shares: Sequence[float],
    noise: Sequence[float] = (),
) -> list[SessionRow]:
    """The same, each model by a share of its own."""
    made = []
    for place, anchor in enumerate(following.followed(graph, table)):
        for phase in workload.phases:
            about = (graph.fingerprint, phase.name, phase.batch, phase.tokens, phase.past, anchor.layers, anchor.name)
            for session, slow in slowness.items():
                latency = (1 + place) * slow ** shares[place] * math.exp(noise[session] if noise else 0.0)
                references = {name: slow * time for name, time in table.header.reference_ns.items()}
                made.append(SessionRow(*about, session, latency, references, work(phase.name == "decode", "cached"), True))
    return made


def unit_mj(unit: Unit, kernel: str, tokens: int) -> float:
    """All of its time at full power, and a tenth more for kernels that multiply in int8 with several tokens in flight."""
    part = parts(CATALOGUE[kernel])[-1 if tokens > 1 else 0]
    return unit_ms(unit, part.name, tokens) * BUSY_MW / 1e3 * (1.1 if part.activation == "int8_tensor" else 1.0)


def energy_values(energy_mj: float, meter: str = "rapl: package-0") -> dict[str, Any]:
    """The fields that both kinds of energy rows share: so much at full power."""
    run_ms = energy_mj / BUSY_MW * 1e3
    above = energy_mj - IDLE_MW * run_ms / 1e3
    spreads = {
        "spread_mj": energy_mj / 1e3,
        "above_idle_spread_mj": above / 1e3,
        "meter_error": 0.001,
        "step_s": 0.001,
        "window_s": 1.0,
    }
    return {
        "energy_mj": energy_mj,
        "above_idle_mj": above,
        "idle_mw": IDLE_MW,
        "run_ms": run_ms,
        "n": 3,
        "valid": True,
        "meter": meter,
    } | spreads


def with_energy(graph: Graph, table: CostTable, workload: Workload, meter: str = "rapl") -> CostTable:
    """The table with every energy row that a profile by this meter measures; a model costs its units' sum and a constant per phase."""
    table = replace(table, header=replace(table.header, meter=meter))
    values = f"{meter}: package-0"
    for wanted in energy_rows.missing_units(graph, workload, table, meter):
        op, K, N = wanted.unit.shape
        for case in wanted.cases:
            energy = energy_values(unit_mj(wanted.unit, case.kernel, case.tokens), values)
            row = UnitEnergyRow(op=op, K=K, N=N, kernel=case.kernel, tokens=case.tokens, working_set=case.working_set, **energy)
            table = table.adding([row])
    for whole in energy_rows.missing_models(graph, workload, table, meter):
        policy = whole.anchor.policy
        for phase in whole.phases:
            running = [(unit, tokens) for unit in graph.units if (tokens := tokens_in_flight(unit, phase))]
            energy_mj = OVERHEAD_MJ + sum(unit_mj(unit, policy[unit.name], tokens) for unit, tokens in running)
            at = {"phase": phase.name, "batch": phase.batch, "tokens": phase.tokens, "past": phase.past}
            named = {"model": graph.fingerprint, "layers": graph.layers, "policy": whole.anchor.name, "units": dict(policy)}
            kind = working_set_of(graph.units, policy, table.header.cache_bytes)
            row = ModelEnergyRow(**named, **at, working_set=kind, **energy_values(energy_mj, values))
            table = table.adding([row])
    return table
