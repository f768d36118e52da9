"""The exact solver: the policy of least additive value among those whose predicted costs keep a budget.

A multiple-choice knapsack with one row per limit, as a 0/1 linear programme for HiGHS (`scipy.optimize.milp`). A binary z per tie and
kernel says that both ends took that kernel, which is when the shared tensor is counted once. Blind to what the values mean: the
projection gives it negative log-probabilities, the sensitivity baseline gives it losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from toolchain.errors import BittailorError, InfeasibleBudgetError, InputError
from toolchain.quiet import STDOUT, to_nowhere
from toolchain.spec import Budget, Policy

if TYPE_CHECKING:
    from toolchain.costs.model import CostModel

Values = Mapping[str, Mapping[str, float]]
"""unit → kernel → number."""

_OPTIMAL, _STOPPED, _INFEASIBLE = 0, 1, 2  # scipy's status codes
_ROOM = 1e-9  # a limit counts as kept up to this relative excess: sums of floats in another order differ by that much
_HAIR = 1e-6
_UNITS = {
    "peak_memory_bytes": (1e6, "MB"),
    "compute_flop": (1e9, "GFLOP"),
    "latency_ms": (1.0, "ms"),
    "energy_mj": (1.0, "mJ"),
    "first_token_ms": (1.0, "ms"),
}


@dataclass(frozen=True)
class Solution:
    """policy; its objective Σ value; optimal = False where time ran out before the proof; unmeasured = limits nothing could be held to."""

    policy: Policy
    objective: float
    optimal: bool
    unmeasured: tuple[str, ...] = ()


class _Programme:
    """Columns: one binary per (unit, kernel), then one per (tie, kernel) and, for a relaxation, one free column t ≥ 0."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.choices = [(unit.name, kernel) for unit in costs.units for kernel in costs.kernels[unit.name]]
        self.column = {choice: index for index, choice in enumerate(self.choices)}
        self.pairs = [
            (tie, kernel)
            for tie in costs.ties
            for kernel in tie.savings
            if all((unit, kernel) in self.column for unit in tie.units)
        ]
        self.width = len(self.choices) + len(self.pairs)

    def row(self, resource: str) -> np.ndarray:
        """Coefficients of a resource's total, without its fixed part."""
        table = self.costs.per_unit[resource]
        row = np.zeros(self.width)
        row[: len(self.choices)] = [table[unit][kernel] for unit, kernel in self.choices]
        row[len(self.choices) :] = [-tie.savings[kernel].get(resource, 0.0) for tie, kernel in self.pairs]
        return row

    def structure(self, extra: int) -> list[LinearConstraint]:
        """One kernel per unit; z = x_a ∧ x_b."""
        width = self.width + extra
        position = {unit.name: index for index, unit in enumerate(self.costs.units)}
        rows = [position[unit] for unit, _ in self.choices]
        shape = (len(position), width)
        one = coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=shape)
        constraints = [LinearConstraint(one.tocsr(), 1, 1)]
        for index, (tie, kernel) in enumerate(self.pairs):
            z, a, b = len(self.choices) + index, *(self.column[unit, kernel] for unit in tie.units)
            block = np.zeros((3, width))
            block[0, [z, a]] = 1, -1
            block[1, [z, b]] = 1, -1
            block[2, [a, b, z]] = 1, 1, -1
            constraints.append(LinearConstraint(block, -np.inf, [0, 0, 1]))
        return constraints

    def minimise(
        self, objective: np.ndarray, limits: Mapping[str, float], seconds: float, relax: bool = False
    ) -> tuple[Policy, float, bool] | None:
        """(policy, value of the last column or 0, proven) of least objective under the limits; None if there is none.

        relax: minimise t instead, where every limit may be exceeded by the relative amount t.
        """
        width = self.width + relax
        constraints = self.structure(int(relax))
        rows = {resource: self.row(resource) for resource in limits}
        for resource, limit in limits.items():
            row = np.append(rows[resource] / limit, [-1.0] * relax)  # scaled by the limit: HiGHS' tolerances are absolute
            constraints.append(LinearConstraint(row, -np.inf, 1 + _ROOM - self.costs.fixed.get(resource, 0.0) / limit))
        goal = np.append(np.zeros(self.width), 1.0) if relax else objective
        scale = float(np.abs(goal).max()) or 1.0
        integrality = np.ones(width)
        upper = np.ones(width)
        if relax:
            integrality[-1], upper[-1] = 0, np.inf
        while True:
            with to_nowhere(STDOUT):  # HiGHS leaves a debugging line there now and then
                found = milp(
                    goal * (1000 / scale),  # HiGHS stops at an absolute gap of 1e-6: a billionth of the largest coefficient
                    integrality=integrality,
                    bounds=Bounds(np.zeros(width), upper),
                    constraints=constraints,
                    options={"mip_rel_gap": 0.0, "time_limit": seconds},
                )
            if found.status == _INFEASIBLE:
                return None
            if found.x is None or found.status not in (_OPTIMAL, _STOPPED):
                problem = f"expected an answer from the solver within {seconds:g} s, got: {found.message}"
                raise BittailorError(problem, "loosen the budget or offer fewer kernels")
            policy = self.policy(found.x)
            totals = self.costs.totals(policy) if limits and not relax else {}
            if all(totals[resource] <= limit * (1 + 2 * _ROOM) for resource, limit in limits.items() if not relax):
                return policy, float(found.x[-1]) if relax else 0.0, found.status == _OPTIMAL
            # Over a limit by less than HiGHS' own tolerance (1e-6): forbid exactly this policy and ask again.
            cut = np.zeros(width)
            cut[[self.column[choice] for choice in policy.items()]] = 1
            constraints.append(LinearConstraint(cut, -np.inf, len(policy) - 1))

    def policy(self, x: np.ndarray) -> Policy:
        best: dict[str, tuple[float, str]] = {}
        for value, (unit, kernel) in zip(x, self.choices, strict=False):
            if unit not in best or value > best[unit][0]:
                best[unit] = (value, kernel)
        return Policy.of({unit: kernel for unit, (_, kernel) in best.items()})


def measured_limits(cost_model: CostModel, budget: Budget) -> tuple[dict[str, float], tuple[str, ...]]:
    """(the budget's limits on resources that the cost model measured, the names of the others)."""
    limits = {name: limit for name, limit in budget.limits.items() if name in cost_model.per_unit}
    return limits, tuple(name for name in budget.limits if name not in limits)


def solve(cost_model: CostModel, value: Values, budget: Budget, seconds: float = 30.0) -> Solution:
    """The policy of least Σ_unit value[unit][kernel] whose predicted totals keep every measured limit of `budget`. Exact.

    A limit on a resource that was not measured cannot be held; its name comes back in `Solution.unmeasured`.
    Raises InputError for missing or non-finite values, InfeasibleBudgetError naming the limit that binds and by how much.
    """
    found = find(cost_model, value, budget, seconds)
    if found is None:
        why = _explain(_Programme(cost_model), measured_limits(cost_model, budget)[0], seconds)
        raise InfeasibleBudgetError(why, "raise that limit, or type: bittailor predict to see costs")
    return found


def find(cost_model: CostModel, value: Values, budget: Budget, seconds: float = 30.0, cheapest: str = "") -> Solution | None:
    """As `solve`, but None where no policy keeps the budget: saying why takes several solutions more.

    cheapest: a resource; of policies whose values differ by less than a hair of the values' whole range, the one that takes least of it.
    """
    limits, unmeasured = measured_limits(cost_model, budget)
    programme = _Programme(cost_model)
    objective = np.zeros(programme.width)
    for index, (unit, kernel) in enumerate(programme.choices):
        try:
            objective[index] = value[unit][kernel]
        except KeyError:
            raise InputError(f"expected a value for kernel {kernel} of unit {unit!r}, got none") from None
    if not np.isfinite(objective).all():
        unit, kernel = programme.choices[int(np.argmin(np.isfinite(objective)))]
        raise InputError(f"expected finite values, got {value[unit][kernel]} for kernel {kernel} of unit {unit!r}")
    shifted = objective.copy()  # only differences within a unit matter; without the offsets the solver's scale fits the differences
    position: dict[str, list[int]] = {}
    for index, (unit, _) in enumerate(programme.choices):
        position.setdefault(unit, []).append(index)
    for columns in position.values():
        shifted[columns] -= objective[columns].min()
    if cheapest:
        low, high = cost_model.bounds(cheapest)
        span = sum(shifted[columns].max() for columns in position.values()) or 1.0
        shifted += _HAIR * span / ((high - low) or 1.0) * programme.row(cheapest)
    found = programme.minimise(shifted, limits, seconds)
    if found is None:
        return None
    policy, _, optimal = found
    return Solution(policy, objective_of(policy, value), optimal, unmeasured)


def objective_of(policy: Mapping[str, str], value: Values) -> float:
    """Σ value over a policy's choices."""
    return float(sum(value[unit][kernel] for unit, kernel in policy.items()))


def _written(resource: str, amount: float) -> str:
    factor, unit = _UNITS.get(resource, (1.0, ""))
    return f"{amount / factor:.4g} {unit}".strip()


def _explain(programme: _Programme, limits: Mapping[str, float], seconds: float) -> str:
    """Which limit binds and by how much; where each alone could be kept, the one to relax least while the others hold."""
    alone = []
    for resource, limit in limits.items():
        least = _least(programme, resource, {}, seconds)
        if least is not None and least > limit * (1 + _ROOM):
            alone.append((resource, limit, least))
    if alone:
        parts = [
            f"{resource} must be at least {_written(resource, least)}, got {_written(resource, limit)}"
            f" ({_written(resource, least - limit)} or {100 * (least / limit - 1):.2g}% too low)"
            for resource, limit, least in alone
        ]
        return "no policy keeps this budget: " + "; ".join(parts)
    best: tuple[float, str, float] | None = None
    for resource, limit in limits.items():
        others = {name: other for name, other in limits.items() if name != resource}
        least = _least(programme, resource, others, seconds)
        if least is not None and (best is None or least / limit < best[0]):
            best = (least / limit, resource, least)
    if best is not None:
        ratio, resource, least = best
        return (
            f"each limit of this budget can be kept alone but not all together: with the others kept, {resource} must be at least"
            f" {_written(resource, least)}, got {_written(resource, limits[resource])}"
            f" ({_written(resource, least - limits[resource])} or {100 * (ratio - 1):.2g}% too low)"
        )
    relaxed = programme.minimise(np.zeros(programme.width), limits, seconds, relax=True)
    by = f"by {100 * relaxed[1]:.2g}%" if relaxed else "by more"
    return f"each limit of this budget ({', '.join(limits)}) can be kept alone but not all together: all would have to rise {by}"


def _least(programme: _Programme, resource: str, limits: Mapping[str, float], seconds: float) -> float | None:
    """The least total of a resource over the policies that keep `limits`; None if none does."""
    found = programme.minimise(programme.row(resource), limits, seconds)
    return None if found is None else programme.costs.totals(found[0])[resource]
