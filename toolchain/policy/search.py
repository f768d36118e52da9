"""LLM-QFA's search for a subnet (arXiv:2405.20202): score random ones, shrink the space by what they tell, score more, take the best.

    1  `first` random policies, their mean bits spread evenly over the space
    2  per unit, the rank correlation of its bits with the score: the third of the units that need bits most lose their lowest bit-width,
       the third that need them least their highest
    3  `second` policies of the shrunk space that keep the budget

The source leaves open how the correlation shrinks the space; thirds are our reading. The named method beside which ours is shown. Scores
and draws come in as callables: no supernet, no data here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from toolchain.costs.model import CostModel
from toolchain.errors import InfeasibleBudgetError
from toolchain.kernels import CATALOGUE, mean_bits
from toolchain.policy.solver import measured_limits
from toolchain.progress import track
from toolchain.spec import Budget, Policy

Candidates = Mapping[str, tuple[str, ...]]
Draw = Callable[[Candidates, float, np.random.Generator], Policy]
"""(unit → kernels, target mean bits, generator) → a random policy of about that mean."""

FIRST, SECOND = 100, 50
_TRIES = 200
"""Draws for one policy that keeps the budget; the target mean bits fall from try to try."""


@dataclass(frozen=True)
class Found:
    """The best policy in the budget, its score, and how many policies were scored for it."""

    policy: Policy
    score: float
    scored: int


def search(
    score: Callable[[Policy], float],
    cost_model: CostModel,
    budget: Budget,
    draw: Draw,
    seed: int = 0,
    first: int = FIRST,
    second: int = SECOND,
) -> Found:
    """The search as published: lower scores are better. Raises InfeasibleBudgetError where no draw keeps the budget."""
    rng = np.random.default_rng([seed, 41])
    limits, _ = measured_limits(cost_model, budget)

    def keeps(policy: Policy) -> bool:
        totals = cost_model.totals(policy)
        return all(totals[name] <= limit for name, limit in limits.items())

    low, high = _range(cost_model.kernels, cost_model)
    targets = np.linspace(low, high, first)
    spread = [draw(cost_model.kernels, float(target), rng) for target in targets]
    scores = [score(policy) for policy in track(spread, len(spread), "search 1/2")]
    fits = [(value, policy) for value, policy in zip(scores, spread, strict=True) if keeps(policy)]
    shrunk = shrink(cost_model.kernels, spread, scores)
    low, high = _range(shrunk, cost_model)
    for _ in track(range(second), second, "search 2/2"):
        target = rng.uniform(low, high)
        for attempt in range(_TRIES):
            policy = draw(shrunk, low + (target - low) * (1 - attempt / _TRIES), rng)
            if keeps(policy):
                fits.append((score(policy), policy))
                break
    if not fits:
        raise InfeasibleBudgetError(
            f"expected one of {first} random policies or of {second * _TRIES} draws to keep the budget, none did",
            "use the exact solver: --method solver",
        )
    best, policy = min(fits, key=lambda item: item[0])
    return Found(policy, best, first + second)


def shrink(candidates: Candidates, policies: list[Policy], scores: list[float]) -> dict[str, tuple[str, ...]]:
    """The space without the lowest bit-width of units whose bits lower the score most, and the highest of those whose bits do least."""
    from scipy.stats import spearmanr

    pull = {}
    for unit in candidates:
        bits = [CATALOGUE[policy[unit]].weight_bits for policy in policies]
        pull[unit] = float(spearmanr(bits, scores).statistic) if len(set(bits)) > 1 else 0.0
    ranked = sorted(candidates, key=lambda unit: pull[unit])  # the most negative first: more bits, lower score
    third = len(ranked) // 3
    drop = dict.fromkeys(ranked[:third], min) | dict.fromkeys(ranked[len(ranked) - third :], max)
    out = {}
    for unit, names in candidates.items():
        levels = [CATALOGUE[name].weight_bits for name in names]
        gone = drop[unit](levels) if unit in drop else None
        out[unit] = tuple(name for name, bits in zip(names, levels, strict=True) if bits != gone) or names
    return out


def _range(candidates: Candidates, cost_model: CostModel) -> tuple[float, float]:
    """(lowest, highest) mean bits of the space."""

    def extreme(choose: Callable[..., str]) -> float:
        names = {unit: choose(kernels, key=lambda name: CATALOGUE[name].weight_bits) for unit, kernels in candidates.items()}
        return mean_bits(Policy.of(names), cost_model.units)

    return extreme(min), extreme(max)
