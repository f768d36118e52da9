"""The exact front: for a falling limit on one resource, the policy of least additive loss that keeps it. Blind to what losses mean.

    loss ▲ ·
         │ └·            each point is one solved programme: nothing below it and to its left exists in the cost model.
         │   └──·        Between two points other optimal policies may lie; none of them is below the steps' lower corners.
         └────────▶ cost

Augmented ε-constraint (Mavrotas, Effective implementation of the ε-constraint method, 2009): a hair of the cost is added to the loss, so
that of policies of equal loss the cheapest is found.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.costs.model import CostModel
from toolchain.policy.solver import Values, find, objective_of
from toolchain.progress import track
from toolchain.spec import Budget, Policy

POINTS = 32
"""Limits that are tried. They lie denser at the cheap end, where losses change most."""
_HAIR = 1e-6
"""Of the losses' whole range, what the cost's whole range counts for."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class FrontPoint:
    """The policy of least loss within `limit`: its cost, in the resource's unit, its loss, and whether the solver proved it."""

    limit: float
    cost: float
    loss: float
    proven: bool
    policy: Policy


def exact_front(model: CostModel, losses: Values, resource: str, points: int = POINTS, seconds: float = 10.0) -> list[FrontPoint]:
    """Points of the front from cheapest to dearest, none dominated by another; `seconds` is the solver's limit for each.

    One limit at a time: a policy that must keep a second limit as well may lie above this front. Raises what `solver.find` does.
    """
    low, high = model.bounds(resource)
    limits = [low + (high - low) * (step / (points - 1)) ** 2 for step in range(points)]
    values = _augmented(model, losses, resource)
    found: dict[Policy, FrontPoint] = {}
    for limit in track(limits, len(limits), f"front of {resource}"):
        budget = Budget.from_json({resource: limit * (1 + _ROUNDING)})
        solution = find(model, values, budget, seconds)
        if solution is None or solution.policy in found:  # none below the cheapest policy's own rounding
            continue
        cost, loss = model.totals(solution.policy)[resource], objective_of(solution.policy, losses)
        found[solution.policy] = FrontPoint(limit, cost, loss, solution.optimal, solution.policy)
    return _undominated(list(found.values()))


def _augmented(model: CostModel, losses: Values, resource: str) -> dict[str, dict[str, float]]:
    """The losses, with the cost times what makes its whole range a hair of theirs."""
    spans = [max(losses[unit].values()) - min(losses[unit].values()) for unit in model.kernels]
    low, high = model.bounds(resource)
    rate = _HAIR * sum(spans) / (high - low) if high > low else 0.0
    cost = model.per_unit[resource]
    return {
        unit: {kernel: losses[unit][kernel] + rate * cost[unit][kernel] for kernel in row} for unit, row in model.kernels.items()
    }


def _undominated(points: list[FrontPoint]) -> list[FrontPoint]:
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (point.cost, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept
