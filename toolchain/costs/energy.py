"""Energy rows → what a policy's inference costs in mJ: the third sum of `from_table.py`, and the reason where there is none.

    energy(π) = Σ_phases runs_p · ( Σ_units a_kp · mJ(shape, k, tokens) + remainder_p )        prefill once, decode once per new token

All of it is TOTAL energy, idle power included, since that is what a battery or a bill loses and what `check` measures and gates. A row's
total is above-idle energy + idle power × its time, both terms add up over units, and so does their sum; what idles while no unit runs
(attention, norms, overhead) is in the remainder, like its work. Above-idle energy stays in the rows, for those who compare machines.
Factors and remainder come from whole models at full depth (`calibrate.py`); a model's mixed policies, each predicted without its own row,
say how far off a prediction is. Nothing is interpolated and nothing taken from other models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolchain.costs.borrowed import Costs, kind_of
from toolchain.costs.calibrate import Calibration, Sample, calibrate
from toolchain.costs.model import NO_METER
from toolchain.costs.operations import runs, tokens_in_flight, working_set
from toolchain.costs.rows import ModelEnergyRow, UnitEnergyRow
from toolchain.costs.table import CostTable
from toolchain.errors import DamagedFileError
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, candidates, parts, runs_as
from toolchain.spec import Phase, Unit, Workload

FEWEST = 4
"""Whole models that calibrate a phase at least."""


@dataclass(frozen=True)
class EnergyPart:
    """mJ of one inference per unit and kernel, what the model adds, and the relative spread."""

    costs: dict[str, dict[str, float]]
    fixed: float
    spread: float


def measured_as(kernel: str, tokens: int) -> str:
    """The kernel whose energy row serves: of one with two phases, the part that runs at so many tokens (the branch's own cost is in the
    remainder)."""
    return runs_as(parts(CATALOGUE[kernel])[-1 if tokens > 1 else 0].name)


def energy_part(graph: Graph, table: CostTable, workload: Workload) -> tuple[EnergyPart | None, str]:
    """(energy of every policy, "") or (None, why it is not known)."""
    meter = table.header.meter
    name = meter.partition(":")[0]
    if name in ("", "none"):
        why = meter.partition(":")[2].strip()
        return None, f"{NO_METER}: {why}" if why else NO_METER
    found = [_phase(graph, table, phase, name) for phase in workload.phases]
    lacking = next((part for part in found if isinstance(part, str)), "")
    if lacking:
        return None, f"expected {lacking} by {name} in the cost table, found none; type: bittailor profile MODEL"
    costs: dict[str, dict[str, float]] = {unit.name: {} for unit in graph.units}
    fixed = spread = 0.0
    for phase, part in zip(workload.phases, found, strict=True):
        assert not isinstance(part, str)
        isolated, fitted = part
        times = runs(phase, workload)
        for unit in graph.units:
            tokens = tokens_in_flight(unit, phase)
            for kernel, energy in isolated[unit.name].items():
                factor = fitted.factors.get(kind_of(unit, measured_as(kernel, tokens)), 1.0)
                costs[unit.name][kernel] = costs[unit.name].get(kernel, 0.0) + times * factor * energy
        fixed += times * fitted.remainder(graph.layers)
        spread = max(spread, fitted.spread)
    return EnergyPart(costs, fixed, spread), ""


def _phase(graph: Graph, table: CostTable, phase: Phase, meter: str) -> tuple[Costs, Calibration] | str:
    """(isolated mJ of every unit and kernel, the fit of whole models), or what lacks."""
    isolated: dict[str, dict[str, float]] = {}
    for unit in graph.units:
        tokens = tokens_in_flight(unit, phase)
        isolated[unit.name] = {}
        for kernel in candidates(unit, table.header.kernels):
            energy = _alone(graph, table, unit, kernel, tokens, meter) if tokens else 0.0
            if energy is None:
                return f"the energy of {unit.op} {unit.K}x{unit.N} {measured_as(kernel, tokens)} at {tokens} tokens"
            isolated[unit.name][kernel] = energy
    rows = _models(graph, table, phase, meter)
    if len(rows) < FEWEST:
        return f"the energy of {FEWEST} whole models or more ({phase.name} at {phase.tokens} tokens, {phase.past} in the cache)"
    return isolated, calibrate([_sample(row, isolated, graph) for row in rows])


def _alone(graph: Graph, table: CostTable, unit: Unit, kernel: str, tokens: int, meter: str) -> float | None:
    name = measured_as(kernel, tokens)
    row = table.rows.get(("unit energy", *unit.shape, working_set(graph.units, name, table.header.cache_bytes), tokens, name))
    return row.energy_mj if isinstance(row, UnitEnergyRow) and row.meter.partition(":")[0] == meter else None


def _models(graph: Graph, table: CostTable, phase: Phase, meter: str) -> list[ModelEnergyRow]:
    wanted = (graph.fingerprint, phase.name, phase.batch, phase.tokens, phase.past, graph.layers, meter)
    return [
        row
        for row in table.of(ModelEnergyRow)
        if (row.model, row.phase, row.batch, row.tokens, row.past, row.layers, row.meter.partition(":")[0]) == wanted
    ]


def _sample(row: ModelEnergyRow, isolated: Mapping[str, Mapping[str, float]], graph: Graph) -> Sample:
    sums: dict[str, float] = {}
    for unit in graph.units:
        kernel = row.units.get(unit.name, "")
        if kernel not in isolated[unit.name]:
            problem = f"expected a measured kernel of unit {unit.name!r} in the energy row of {row.policy!r}, got {kernel!r}"
            raise DamagedFileError(problem, "restore the cost table, or delete it and type: bittailor profile MODEL")
        kind = kind_of(unit, kernel)
        sums[kind] = sums.get(kind, 0.0) + isolated[unit.name][kernel]
    noise = max(row.spread_mj / row.energy_mj / row.n**0.5, row.meter_error)
    return Sample(row.energy_mj, sums, row.layers, noise, typical=row.policy not in CATALOGUE, name=row.policy)
