"""A graph, a cost table and a workload → `CostModel`.

    latency(π) = Σ_units a_k · t(shape, k, tokens) + remainder(layers, tokens, past)
    memory(π)  = Σ_units a_k · bytes(shape, k) + remainder(layers, tokens) + cache(layers, positions)
    energy(π)  = Σ_phases runs · (Σ_units a_k · mJ(shape, k, tokens) + remainder)      where a meter worked (`energy.py`)

Factors a_k and remainder come from the whole models that were measured (`calibrate.py`), most of them at one point of (tokens, past). One
of them was also measured at others: what its remainder gains or loses there, every policy's does, in proportion to the layers.
Raises MissingCostError where a row is missing: nothing is extrapolated. Only where a predictor is given, rows of a shape that was not
measured come from other shapes (`predictor.py`), and factors and remainder of a model that was not, from other models (`borrowed.py`);
the cost model's notes say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from toolchain.costs.borrowed import Costs, Known, Whole, borrow, calibrated, kind_of, shape_of
from toolchain.costs.calibrate import Sample, calibrate
from toolchain.costs.energy import energy_part
from toolchain.costs.model import CostModel, Tie, steady, steady_spread
from toolchain.costs.operations import flops, tokens_in_flight, working_set
from toolchain.costs.predictor import Guess, ShapePredictor, guesses_note, guesses_spread
from toolchain.costs.rows import ModelMemoryRow, ModelRow, ModelShapeRow, between
from toolchain.costs.table import CostTable, missing
from toolchain.errors import DamagedFileError, MissingCostError
from toolchain.graph.layers import units_within
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, candidates, float_type, runs_as
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import Phase, Unit, Workload

_FULL = 5
"""Measured models that a point needs to be calibrated at; fewer are the models that show how the remainder moves."""


def cost_model(graph: Graph, table: CostTable, workload: Workload, predictor: ShapePredictor | None = None) -> CostModel:
    """The cost model of a graph for a workload; with a predictor, what lacks is predicted and noted.

    Raises MissingCostError naming the first missing row, with a predictor the first that cannot be predicted.
    """
    units = graph.units
    kernels = {unit.name: candidates(unit, table.header.kernels) for unit in units}
    parts = {phase.resource: _latency(graph, table, phase, predictor) for phase in workload.phases}
    sizes = {unit.name: {name: float(packed_bytes(unit, CATALOGUE[name])) for name in kernels[unit.name]} for unit in units}
    parts["peak_memory_bytes"] = _memory(graph, table, workload, predictor)
    per_unit = {name: part.costs for name, part in parts.items()}
    fixed = {name: part.fixed for name, part in parts.items()}
    spread = {name: part.spread for name, part in parts.items()}
    notes = {name: part.note for name, part in parts.items() if part.note}
    per_unit["package_bytes"] = sizes
    per_unit["compute_flop"] = {unit.name: dict.fromkeys(kernels[unit.name], 0.0) for unit in units}
    fixed |= {
        "package_bytes": 0.0,
        "compute_flop": flops(units, workload, graph.layers, graph.attention_width, graph.encoder_layers),
    }
    spread |= {"package_bytes": 0.0, "compute_flop": 0.0}
    energy, no_energy = energy_part(graph, table, workload)
    if energy:
        per_unit["energy_mj"], fixed["energy_mj"], spread["energy_mj"] = energy.costs, energy.fixed, energy.spread
    for name in per_unit.keys() - {"package_bytes", "compute_flop"}:  # those are counted
        per_unit[name], fixed[name] = steady(per_unit[name], fixed[name])
        spread[name] = steady_spread(spread[name])
    return CostModel(
        units, kernels, per_unit, fixed, _ties(units, kernels), spread, workload, table.header.device, no_energy, notes
    )


@dataclass(frozen=True)
class _Isolated:
    """Costs of units alone, the largest error that interpolation added, and what of it no row held: (unit, kernel) → guess."""

    costs: Costs
    interpolation_error: float
    guesses: Mapping[tuple[str, str], Guess]


@dataclass(frozen=True)
class _Part:
    """One resource: calibrated cost per unit and kernel, fixed part, relative spread, what else than measurements it rests on."""

    costs: dict[str, dict[str, float]]
    fixed: float
    spread: float
    note: str


def _part(graph: Graph, isolated: _Isolated, whole: Whole, cache: float = 0.0) -> _Part:
    costs, fixed = calibrated(graph.units, isolated.costs, whole.factors), whole.remainder + cache
    note = "; ".join(filter(None, [guesses_note(isolated.guesses, len(graph.units)), whole.note]))
    spread = whole.spread + isolated.interpolation_error + guesses_spread(isolated.guesses, costs, fixed)
    return _Part(costs, fixed, spread, note)


def _times(graph: Graph, table: CostTable, phase: Phase, predictor: ShapePredictor | None) -> _Isolated:
    """Every unit's time under every kernel at a phase."""
    sets = {name: working_set(graph.units, name, table.header.cache_bytes) for name in CATALOGUE}
    costs: dict[str, dict[str, float]] = {}
    errors: list[float] = []
    guesses: dict[tuple[str, str], Guess] = {}
    for unit in graph.units:
        tokens = tokens_in_flight(unit, phase)
        if not tokens:
            costs[unit.name] = dict.fromkeys(candidates(unit, table.header.kernels), 0.0)
            continue
        for kernel in candidates(unit, table.header.kernels):
            try:
                timed = table.latency(unit, runs_as(kernel), tokens, sets[kernel])
                cost = timed.latency_ms
                errors.append(timed.interpolation_error)
            except MissingCostError:
                if predictor is None:
                    raise
                guess = guesses[unit.name, kernel] = predictor.latency(unit, runs_as(kernel), tokens)
                cost = guess.value
            costs.setdefault(unit.name, {})[kernel] = cost
    return _Isolated(costs, max(errors, default=0.0), guesses)


def _bytes(graph: Graph, table: CostTable, predictor: ShapePredictor | None) -> _Isolated:
    """Every unit's peak resident bytes under every kernel."""
    costs: dict[str, dict[str, float]] = {}
    guesses: dict[tuple[str, str], Guess] = {}
    for unit in graph.units:
        for kernel in candidates(unit, table.header.kernels):
            try:
                cost = table.memory(unit, runs_as(kernel)).peak_bytes
            except MissingCostError:
                if predictor is None:
                    raise
                guess = guesses[unit.name, kernel] = predictor.peak_bytes(unit, runs_as(kernel))
                cost = guess.value
            costs.setdefault(unit.name, {})[kernel] = cost
    return _Isolated(costs, 0.0, guesses)


def _latency(graph: Graph, table: CostTable, phase: Phase, predictor: ShapePredictor | None) -> _Part:
    here = _times(graph, table, phase, predictor)
    if predictor is None or any((row.model, row.phase) == (graph.fingerprint, phase.name) for row in table.of(ModelRow)):
        return _part(graph, here, _whole_latency(graph, table, phase, here.costs))

    def known(other: Graph, measured: CostTable) -> Known:
        alone = _times(other, measured, phase, None)
        whole = _whole_latency(other, measured, phase, alone.costs)
        return Known(other.units, other.layers * other.hidden, alone.costs, whole)

    others = _others(graph, predictor, known, f"{phase.name} at {phase.tokens} tokens, {phase.past} in the cache")
    return _part(graph, here, borrow(graph.units, graph.layers * graph.hidden, here.costs, others))


def _others(graph: Graph, predictor: ShapePredictor, known: Callable[[Graph, CostTable], Known], what: str) -> list[Known]:
    """What every other measured model of this one's kind says; those that were not measured for `what` say nothing.

    Raises MissingCostError if none says anything.
    """
    found = []
    for row in predictor.table.of(ModelShapeRow):
        if row.kind == graph.kind and row.model != graph.fingerprint:
            with suppress(MissingCostError):
                found.append(known(shape_of(row), predictor.table))
    if not found:
        raise missing(f"this {graph.kind} or another one ({what})", predictor.table.header.device)
    return found


def _whole_latency(graph: Graph, table: CostTable, phase: Phase, here: Costs) -> Whole:
    """Factors and remainder from the model's own rows; here: its isolated costs at the phase. Raises MissingCostError."""
    rows = [row for row in table.of(ModelRow) if (row.model, row.phase, row.batch) == (graph.fingerprint, phase.name, phase.batch)]
    points: dict[Phase, list[ModelRow]] = {}
    for row in rows:
        points.setdefault(Phase(row.phase, row.batch, row.tokens, row.past), []).append(row)
    wanted = f"whole-model rows of {phase.name} at {phase.tokens} tokens, {phase.past} in the cache,"
    centre = _centre(points, phase)
    if centre is None:
        raise missing(f"{wanted} of this model", table.header.device)
    at_centre = here if centre == phase else _times(graph, table, centre, None).costs
    # Full precision is left out: a model of that alone finds the caches in another state than any policy that will be predicted.
    calibration = calibrate(
        [
            _sample(row, row.latency_ms, at_centre, graph, row.spread_ms / row.latency_ms / row.n**0.5)
            for row in points[centre]
            if row.policy not in CATALOGUE or CATALOGUE[row.policy].quantised
        ],
        graph.layers,
    )
    remainder = calibration.remainder(graph.layers)
    if centre != phase:
        # What the model measured at several points says of this one, in proportion to its layers.
        leftover = {}
        for point, group in points.items():
            for row in group:
                if row.policy == _anywhere(points):
                    sample = _sample(row, row.latency_ms, _times(graph, table, point, None).costs, graph)
                    units_alone = calibration.predict(sample.sums, 0) - calibration.per_run
                    leftover[point.past if phase.name == "decode" else point.tokens] = (row.latency_ms - units_alone) / row.layers
        x, base = (phase.past, centre.past) if phase.name == "decode" else (phase.tokens, centre.tokens)
        moved = _interpolate(leftover, x)
        if moved is None:
            raise missing(f"{wanted} or on both sides of it", table.header.device)
        remainder = max(0.0, remainder + graph.layers * (moved - leftover[base]))
    level = calibration.level
    return Whole({kind: factor * level for kind, factor in calibration.factors.items()}, remainder * level, calibration.spread)


def _centre(points: Mapping[Phase, Sequence[object]], phase: Phase) -> Phase | None:
    """The point where enough models were measured to calibrate: this phase's own, or the nearest."""
    full = [point for point, rows in points.items() if len(rows) >= _FULL]
    return min(full, key=lambda point: abs(point.tokens - phase.tokens) + abs(point.past - phase.past), default=None)


def _anywhere(points: Mapping[Phase, Sequence[ModelRow]]) -> str:
    """Name of the policy that was measured at the most points."""
    return _commonest(points.values())


def _commonest(groups: Iterable[Iterable[ModelRow | ModelMemoryRow]]) -> str:
    """Name of the policy that is in the most groups, at however many depths."""
    names = [name for rows in groups for name in sorted({row.policy for row in rows})]
    return max(names, key=names.count)


def _interpolate(points: Mapping[int, float], x: int) -> float | None:
    """The value at x on the line between its neighbours; None outside."""
    if x in points:
        return points[x]
    below, above = [p for p in points if p < x], [p for p in points if p > x]
    if not below or not above:
        return None
    low, high = max(below), min(above)
    return between(x, low, points[low], high, points[high])


def _sample(row: ModelRow | ModelMemoryRow, whole: float, isolated: Costs, graph: Graph, noise: float = 0.0) -> Sample:
    sums: dict[str, float] = {}
    for unit in units_within(graph.units, row.layers):
        kernel = row.units.get(unit.name, "")
        if kernel not in isolated.get(unit.name, {}):
            problem = f"expected a measured kernel of unit {unit.name!r} in the row of {row.policy!r}, got {kernel!r}"
            raise DamagedFileError(problem, "restore the cost table, or delete it and type: bittailor profile MODEL")
        kind = kind_of(unit, kernel)
        sums[kind] = sums.get(kind, 0.0) + isolated[unit.name][kernel]
    return Sample(whole, sums, row.layers, noise, typical=row.policy not in CATALOGUE, name=row.policy)


def _memory(graph: Graph, table: CostTable, workload: Workload, predictor: ShapePredictor | None) -> _Part:
    isolated = _bytes(graph, table, predictor)
    cache = float(graph.layers * graph.cache_bytes_per_layer(workload.positions, float_type(table.header.kernels)))
    if predictor is None or any(row.model == graph.fingerprint for row in table.of(ModelMemoryRow)):
        return _part(graph, isolated, _whole_memory(graph, table, workload, isolated.costs), cache)

    def known(other: Graph, measured: CostTable) -> Known:
        alone = _bytes(other, measured, None).costs
        return Known(other.units, other.hidden, alone, _whole_memory(other, measured, workload, alone))

    others = _others(graph, predictor, known, f"memory at {workload.prompt_tokens} tokens")
    return _part(graph, isolated, borrow(graph.units, graph.hidden, isolated.costs, others), cache)


def _whole_memory(graph: Graph, table: CostTable, workload: Workload, isolated: Costs) -> Whole:
    """Factors and remainder, without the cache, from the model's own rows. Raises MissingCostError."""
    rows = [row for row in table.of(ModelMemoryRow) if (row.model, row.batch) == (graph.fingerprint, workload.batch)]
    points: dict[int, list[ModelMemoryRow]] = {}
    for row in rows:
        points.setdefault(row.tokens, []).append(row)
    full = [tokens for tokens, group in points.items() if len(group) >= _FULL]
    wanted = f"whole-model memory rows at {workload.prompt_tokens} tokens"
    if not full:
        raise missing(f"{wanted} of this model", table.header.device)
    centre = min(full, key=lambda tokens: abs(tokens - workload.prompt_tokens))

    def sample(row: ModelMemoryRow) -> Sample:
        # Of a few layers, loading sets the peak where embedding or head are large; the whole model's peak is then its running.
        held = row.running_bytes if row.layers < graph.layers else row.peak_bytes
        cache = graph.cache_bytes_per_layer(row.capacity, float_type(table.header.kernels))
        return _sample(row, held - row.layers * cache, isolated, graph)

    calibration = calibrate([sample(row) for row in points[centre]])
    remainder = calibration.remainder(graph.layers)
    if workload.prompt_tokens != centre:
        common = _commonest(points.values())
        leftover = {row.tokens: sample(row).whole for group in points.values() for row in group if row.policy == common}
        moved = _interpolate(leftover, workload.prompt_tokens)
        if moved is None:
            raise missing(f"{wanted} or on both sides of it", table.header.device)
        remainder = max(0.0, remainder + moved - leftover[centre])
    return Whole(calibration.factors, remainder, calibration.spread)


def _ties(units: tuple[Unit, ...], kernels: Mapping[str, tuple[str, ...]]) -> tuple[Tie, ...]:
    ties = []
    for unit in units:
        if unit.role == "embedding" and unit.tied_to:
            both = set(kernels[unit.name]) & set(kernels[unit.tied_to])
            savings = {kernel: {"package_bytes": float(packed_bytes(unit, CATALOGUE[kernel]))} for kernel in both}
            ties.append(Tie((unit.name, unit.tied_to), savings))
    return tuple(ties)
