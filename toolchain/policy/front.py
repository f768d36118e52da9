"""The exact front: for a falling limit on one resource, the policy of least additive loss that keeps it. Blind to what losses mean.

    loss ▲ ·
         │ └·            each point is one solved programme: in the cost model nothing that costs no more loses less.
         │   └──·        Between two points lie limits that were not tried: a policy there may be below the step, by less than one step.
         └────────▶ cost

Augmented ε-constraint (Mavrotas, Effective implementation of the ε-constraint method, 2009): a hair of the cost counts as loss, so that of
policies of equal loss the cheapest is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toolchain.costs.model import CostModel
from toolchain.policy.solver import Values, find, objective_of
from toolchain.progress import track
from toolchain.spec import Budget, Policy

_ROUNDING = 1e-9


@dataclass(frozen=True)
class FrontPoint:
    """The policy of least loss within `limit`: its cost, in the resource's unit, its loss, and whether the solver proved it."""

    limit: float
    cost: float
    loss: float
    proven: bool
    policy: Policy


def exact_front(
    model: CostModel, losses: Values, resource: str, points: int, at: Iterable[float] = (), seconds: float = 10.0
) -> list[FrontPoint]:
    """Points of the front from cheapest to dearest, none dominated by another: of `points` limits and of those in `at`.

    at: costs of other policies, so that none of them can lie below the front as it is drawn. seconds: the solver's limit for each point.
    Their limits lie denser at the cheap end, where losses change most. One limit at a time: a policy that must keep
    a second limit as well may lie above this front. Raises what `solver.find` does.
    """
    low, high = model.bounds(resource)
    grid = [low + (high - low) * (step / (points - 1)) ** 2 for step in range(points)]
    limits = sorted({*grid, *(limit for limit in at if limit > 0)})
    found: dict[Policy, FrontPoint] = {}
    for limit in track(limits, len(limits), f"front of {resource}"):
        budget = Budget.from_json({resource: limit * (1 + _ROUNDING)})
        solution = find(model, losses, budget, seconds, cheapest=resource)
        if solution is None or solution.policy in found:  # none below the cheapest policy's own rounding
            continue
        cost, loss = model.totals(solution.policy)[resource], objective_of(solution.policy, losses)
        found[solution.policy] = FrontPoint(limit, cost, loss, solution.optimal, solution.policy)
    return _undominated(list(found.values()))


def _undominated(points: list[FrontPoint]) -> list[FrontPoint]:
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (point.cost, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept
