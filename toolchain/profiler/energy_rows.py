"""Energy rows: every kernel of each unit shape and a few whole models, at the token counts of the workload's phases and at no others.

A window of a counter lasts seconds where one of a clock lasts a fifth of one, so there are as few of them as predict: no grid of token
counts, no kernel that is made of two others, six whole models. Owns which those are. Refuses to know how meters are read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from toolchain.costs.operations import tokens_in_flight
from toolchain.costs.rows import Energy, ModelEnergyRow, Row, UnitEnergyRow
from toolchain.costs.table import CostTable
from toolchain.errors import MeterError
from toolchain.files import scratch
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, candidates, runs_as, uniform
from toolchain.profiler import unit_rows
from toolchain.profiler.ask import Host, References
from toolchain.profiler.measure import summarise
from toolchain.profiler.meters import LEAST_WINDOW_S
from toolchain.profiler.model_rows import EVERYWHERE, Anchor, Packages, bound_of_model, label, subject
from toolchain.profiler.unit_rows import Case
from toolchain.spec import Phase, Policy, Unit, Workload

UNIT_WINDOWS, MODEL_WINDOWS = 2, 3
MIXED, UNIFORM = 4, 2
LONGEST_SECONDS = 300
"""Of windows in one process: the desk waits for half an hour (`ask.TIMEOUT_SECONDS`), and a gauge may ask for three times its least."""


def policies(graph: Graph, available: Sequence[str]) -> list[Anchor]:
    """Two kernels on all units and four mixed policies drawn with a fixed seed, all of them at full depth."""
    names = [name for name in available if runs_as(name) == name and not CATALOGUE[name].prefill]
    chosen = {name: uniform(name, graph.units, available) for name in [name for name in EVERYWHERE if name in names][:UNIFORM]}
    rng = random.Random(0)
    for number in range(MIXED):
        choice = {unit.name: rng.choice(candidates(unit, names)) for unit in graph.units}
        chosen[f"energy-mixed-{number}"] = Policy.of(choice)
    return [Anchor(name, policy, graph.layers) for name, policy in chosen.items()]


@dataclass(frozen=True)
class UnitsWanted:
    """Energy rows that a unit's shape lacks, as many as one process measures."""

    unit: Unit
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class ModelWanted:
    """The phases in which a whole model's energy lacks."""

    anchor: Anchor
    phases: tuple[Phase, ...]


def missing_units(graph: Graph, workload: Workload, table: CostTable, meter: str) -> list[UnitsWanted]:
    """What the table lacks of each shape, holds as not valid, or has from another meter."""
    counts: dict[tuple[str, int, int], set[int]] = {}
    for unit in graph.units:
        counts.setdefault(unit.shape, set()).update(tokens_in_flight(unit, phase) for phase in workload.phases)
    wanted = []
    for unit in {unit.shape: unit for unit in graph.units}.values():
        sets = unit_rows.working_sets(graph, unit, table)
        cases = tuple(
            case
            for case in unit_rows.cases(graph, unit, sets, workload, table.header.cache_bytes)
            if case.tokens in counts[unit.shape]
            and not CATALOGUE[case.kernel].prefill
            and not _held(table, ("unit energy", *unit.shape, case.working_set, case.tokens, case.kernel), meter)
        )
        at_once = max(1, int(LONGEST_SECONDS / (UNIT_WINDOWS * LEAST_WINDOW_S[meter])))
        wanted += [UnitsWanted(unit, cases[start : start + at_once]) for start in range(0, len(cases), at_once)]
    return wanted


def missing_models(graph: Graph, workload: Workload, table: CostTable, meter: str) -> list[ModelWanted]:
    """The same of whole models."""
    wanted = []
    for anchor in policies(graph, table.header.kernels):
        phases = tuple(phase for phase in workload.phases if not _held(table, _key(graph, anchor, phase), meter))
        if phases:
            wanted.append(ModelWanted(anchor, phases))
    return wanted


def _key(graph: Graph, anchor: Anchor, phase: Phase) -> tuple[Any, ...]:
    return ("model energy", graph.fingerprint, phase.name, phase.batch, phase.tokens, phase.past, anchor.layers, anchor.name)


def _held(table: CostTable, key: tuple[Any, ...], meter: str) -> bool:
    row = table.rows.get(key)
    return isinstance(row, Energy) and row.valid and row.meter.partition(":")[0] == meter


def windows(units: Sequence[UnitsWanted], models: Sequence[ModelWanted]) -> int:
    """How many windows of the meter that takes, idle ones included."""
    alone = sum(1 + UNIT_WINDOWS * len(item.cases) for item in units)
    return alone + sum(1 + MODEL_WINDOWS * len(item.phases) for item in models)


def measure_units(host: Host, meter: str, wanted: UnitsWanted) -> list[tuple[list[Row], References]]:
    """The rows of one shape, each with the references' times in its windows, which lie minutes apart. Raises MeterError with why the meter
    could not tell all of it."""
    with scratch() as folder:
        subjects = [unit_rows.subject(wanted.unit, case, folder) for case in wanted.cases]
        answer = _asked(host, subjects, meter, UNIT_WINDOWS)
    made: list[tuple[list[Row], References]] = []
    for case in wanted.cases:
        seen = answer["measured"][case.label]["run"]
        values = _values(answer, seen, case.copies)
        op, K, N = wanted.unit.shape
        values["bound"] = unit_rows.bound(wanted.unit, case, values["run_ms"], seen["reference_ns"], host)
        row = UnitEnergyRow(op=op, K=K, N=N, kernel=case.kernel, tokens=case.tokens, working_set=case.working_set, **values)
        made.append(([row], seen["reference_ns"]))
    return made


def measure_model(
    host: Host, meter: str, graph: Graph, wanted: ModelWanted, packages: Packages, cache_bytes: int
) -> list[tuple[list[Row], References]]:
    """The same of one whole model."""
    anchor = wanted.anchor
    what = subject(graph, anchor.label, packages.of(anchor), wanted.phases)
    answer = _asked(host, [what], meter, MODEL_WINDOWS)
    made: list[tuple[list[Row], References]] = []
    for phase in wanted.phases:
        seen = answer["measured"][anchor.label][label(phase)]
        values = _values(answer, seen, 1)
        kind, bound = bound_of_model(host, graph, anchor, phase, cache_bytes, values["run_ms"], seen["reference_ns"])
        row = ModelEnergyRow(
            model=graph.fingerprint,
            phase=phase.name,
            batch=phase.batch,
            tokens=phase.tokens,
            past=phase.past,
            layers=anchor.layers,
            policy=anchor.name,
            units=dict(anchor.policy),
            working_set=kind,
            bound=bound,
            **values,
        )
        made.append(([row], seen["reference_ns"]))
    return made


def _asked(host: Host, subjects: Sequence[dict[str, Any]], meter: str, trials: int) -> dict[str, Any]:
    """The agent's answer. Raises MeterError if the meter could not tell something of it."""
    answer = host.energy(subjects, meter, trials)
    seen = [phase for phases in answer.get("measured", {}).values() for phase in phases.values()]
    reason = answer["reason"] or next((phase["reason"] for phase in seen if not phase["energy_mj"]), "")
    if reason:
        raise MeterError(reason)
    return answer


def _values(answer: Mapping[str, Any], seen: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """The fields of `Energy` from the agent's answer for one phase, of which one execution ran `copies` units."""
    total = summarise((energy / copies for energy in seen["energy_mj"]), seen["valid"])
    above = summarise((energy / copies for energy in seen["above_idle_mj"]), seen["valid"])
    return {
        "energy_mj": total.value,
        "spread_mj": total.spread,
        "above_idle_mj": above.value,
        "above_idle_spread_mj": above.spread,
        "idle_mw": answer["idle_mw"],
        "run_ms": median(seen["run_ms"]) / copies,
        "n": total.n,
        "valid": total.valid,
        "meter": answer["meter"],
        "step_s": answer["step_s"],
        "window_s": answer["window_s"],
        "meter_error": seen["error"],
    }
