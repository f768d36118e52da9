"""What other measured models say of one that was not: factors of its kernels, and its remainder.

    a_k of the model        = median over the others of a_k
    remainder of the model  = size · median over the others of (remainder / size)

size is layers × hidden for time (every layer has its attention and norms, as wide as the model) and hidden for memory (activations are
freed and used again by the next layer). Where one of the others has exactly the same units, it alone is asked. How wrong this is is
found by leaving each model out; with one other model nobody knows, and the whole remainder counts as spread.
Refuses to know how the others were calibrated (`from_table.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from toolchain.costs.rows import ModelShapeRow
from toolchain.graph.model import Graph
from toolchain.kernels import runs_as
from toolchain.spec import Unit

Costs = Mapping[str, Mapping[str, float]]
"""unit → kernel → isolated cost."""


def describe(graph: Graph) -> ModelShapeRow:
    """The row that makes a model's other rows readable without the model."""
    units = {unit.name: [unit.op, unit.K, unit.N, unit.role] for unit in graph.units}
    return ModelShapeRow(graph.fingerprint, graph.kind, graph.layers, graph.hidden, graph.kv_heads, graph.head_dim, units)


def shape_of(row: ModelShapeRow) -> Graph:
    """As much of the model's graph as costs depend on: no folder, no vocabulary."""
    units = tuple(Unit(name, op, K, N, role) for name, (op, K, N, role) in row.units.items())
    return Graph(
        directory=Path(),
        units=units,
        kind=row.kind,
        architecture="",
        layers=row.layers,
        kv_heads=row.kv_heads,
        head_dim=row.head_dim,
        hidden=row.hidden,
        vocabulary=0,
        context=0,
        inputs=(),
        source="",
        fingerprint=row.model,
    )


@dataclass(frozen=True)
class Whole:
    """One resource of one model: factors (kind of unit → a_k), remainder, relative spread; note: whom it was borrowed from."""

    factors: Mapping[str, float]
    remainder: float
    spread: float
    note: str = ""


@dataclass(frozen=True)
class Known:
    """Another model that was measured, in this resource."""

    units: tuple[Unit, ...]
    size: float
    isolated: Costs
    whole: Whole


def kind_of(unit: Unit, kernel: str) -> str:
    """What shares a factor: a kernel in the layers; in the head and the embedding, whose shapes and neighbours differ, another."""
    return runs_as(kernel) if unit.role == "linear" else f"{unit.role} {runs_as(kernel)}"


def calibrated(units: Iterable[Unit], isolated: Costs, factors: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Isolated costs → what the units cost inside their model."""
    return {
        unit.name: {name: factors.get(kind_of(unit, name), 1.0) * cost for name, cost in isolated[unit.name].items()}
        for unit in units
    }


def totals(costs: Costs, remainder: float) -> dict[str, float]:
    """Kernel → what a model costs whose units all take it; one that has no such kernel counts as its average."""
    kernels = {kernel for unit in costs.values() for kernel in unit}
    return {kernel: remainder + sum(unit.get(kernel, fmean(unit.values())) for unit in costs.values()) for kernel in kernels}


def borrow(units: Sequence[Unit], size: float, isolated: Costs, others: Sequence[Known]) -> Whole:
    """Factors and remainder for a model of these units. ValueError without others."""
    wanted = [(unit.name, *unit.shape) for unit in units]
    for other in others:
        if [(unit.name, *unit.shape) for unit in other.units] == wanted:
            whole = other.whole
            return Whole(whole.factors, whole.remainder, whole.spread, "remainder measured on another model of the same shape")
    factors, remainder = _medians(size, others)
    if len(others) == 1:
        least = min(totals(calibrated(units, isolated, factors), remainder).values())
        note = "remainder taken from one other model: its error is not known, the spread holds all of it"
        return Whole(factors, remainder, others[0].whole.spread + remainder / least, note)
    error = max(_error(left, [other for other in others if other is not left]) for left in others)
    note = f"remainder taken from {len(others)} other models (leave-one-model-out error of the whole: at most {error:.0%})"
    return Whole(factors, remainder, error, note)


def _medians(size: float, others: Sequence[Known]) -> tuple[dict[str, float], float]:
    kinds = sorted({kind for other in others for kind in other.whole.factors})
    factors = {kind: median(other.whole.factors[kind] for other in others if kind in other.whole.factors) for kind in kinds}
    return factors, size * median(other.whole.remainder / other.size for other in others)


def _error(left: Known, others: Sequence[Known]) -> float:
    """Largest relative error, over the kernels, with which the others predict the whole of the one left out from its own units."""
    factors, remainder = _medians(left.size, others)
    said = totals(calibrated(left.units, left.isolated, factors), remainder)
    own = totals(calibrated(left.units, left.isolated, left.whole.factors), left.whole.remainder)
    return max(abs(said[kernel] / own[kernel] - 1) for kernel in own)
