"""From a proposal to a policy that keeps the budget, and how far that policy is from the best one.

Owns the two exact questions asked about a meta-network's proposal; knows neither the network nor where the losses came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from toolchain.policy.solver import Solution, Values, objective_of, solve
from toolchain.spec import Budget, Policy

if TYPE_CHECKING:
    from toolchain.costs.model import CostModel

_FLOOR = 1e-3


def project(proposal: Values, cost_model: CostModel, budget: Budget) -> Policy:
    """The most likely policy under `proposal` (unit → kernel → log-probability) among those that keep `budget`. Exact.

    Units are independent in the proposal, so the log-likelihood is additive. Raises as `solver.solve`.
    """
    unlikely = {unit: {kernel: -log_probability for kernel, log_probability in row.items()} for unit, row in proposal.items()}
    return solve(cost_model, unlikely, budget).policy


def gap_to_optimum(policy: Mapping[str, str], cost_model: CostModel, sensitivity: Values, budget: Budget) -> float:
    """Relative excess of the policy's predicted loss over the exact optimum's in this budget: 0 is optimal, 0.1 is 10% more loss.

    Predicted loss = Σ sensitivity (nats per token over the reference): additive, so blind to how units interact. Where the optimum
    loses next to nothing, the excess is taken relative to 0.1% of the worst policy's loss. Negative only if `policy` breaks the budget.
    """
    best: Solution = solve(cost_model, sensitivity, budget)
    worst = sum(max(sensitivity[unit.name][kernel] for kernel in cost_model.kernels[unit.name]) for unit in cost_model.units)
    floor = max(best.objective, _FLOOR * worst)
    return (objective_of(policy, sensitivity) - best.objective) / floor if floor > 0 else 0.0
