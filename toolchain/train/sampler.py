"""Which policies and budgets a training step sees.

Policies: every unit at one bit-width, or mixed ones with a target mean bit-width, whose units are drawn from the maximum-entropy
distribution with that mean: p(kernel) ∝ exp(tilt · bits), one tilt for all units. When which is drawn: `schedule.py`.
Budgets: scenarios with rare encodings are drawn more (MetaQuantLLM: w = q/p, q ∝ 1/frequency over a binned histogram).

Everything is a function of its arguments and a generator: step t of a resumed run draws what step t of an uninterrupted one drew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from toolchain.costs.encoding import encode
from toolchain.costs.model import CostModel
from toolchain.kernels import CATALOGUE
from toolchain.policy.solver import Values, find, solve
from toolchain.spec import RESOURCES, Budget, Policy, Unit

MOST_BITS = 8
"""fp32 counts as this many bits when policies are sampled: above it nothing is lost, so no time is spent on the way from 8 to 32."""


def bits(kernel: str) -> int:
    """Weight bits of a kernel as the sampler counts them."""
    return min(CATALOGUE[kernel].weight_bits, MOST_BITS)


def worth_training(cost_model: CostModel) -> dict[str, tuple[str, ...]]:
    """unit → kernels that some budget could choose: those not beaten by a kernel of more bits that costs no more in any resource.

    3 bits in a 4-bit container is the usual case: it costs what 4 bits cost.
    """

    def beaten(unit: str, kernel: str) -> bool:
        return any(
            CATALOGUE[other].weight_bits > CATALOGUE[kernel].weight_bits
            and all(table[unit][other] <= table[unit][kernel] for table in cost_model.per_unit.values())
            for other in cost_model.kernels[unit]
        )

    return {
        unit.name: tuple(kernel for kernel in cost_model.kernels[unit.name] if not beaten(unit.name, kernel))
        for unit in cost_model.units
    }


@dataclass(frozen=True)
class PolicySampler:
    """units and the quantised kernels each may be trained with (units that have none keep what they have)."""

    units: tuple[Unit, ...]
    candidates: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, units: Sequence[Unit], candidates: Mapping[str, Sequence[str]]) -> PolicySampler:
        """Leaves fp32 out where there is anything else: it has nothing to train."""
        quantised = {unit: tuple(name for name in names if CATALOGUE[name].quantised) for unit, names in candidates.items()}
        return cls(tuple(units), {unit: names or tuple(candidates[unit]) for unit, names in quantised.items()})

    @property
    def levels(self) -> tuple[int, ...]:
        """The distinct bit-widths among all candidates, rising."""
        return tuple(sorted({bits(name) for names in self.candidates.values() for name in names}))

    def level(self, wanted: int, rng: np.random.Generator) -> Policy:
        """Every unit at the candidate bit-width nearest to `wanted`; of kernels with equal bits the same one everywhere."""
        trained = [name for name, kernel in CATALOGUE.items() if not kernel.prefill]
        rank = dict(zip(trained, rng.random(len(trained)).tolist(), strict=True))
        return Policy.of(
            {unit: min(names, key=lambda name: (abs(bits(name) - wanted), rank[name])) for unit, names in self.candidates.items()}
        )

    def uniform(self, rng: np.random.Generator) -> Policy:
        """Every unit's kernel by itself, each as likely as the other."""
        return Policy.of({unit: names[rng.integers(len(names))] for unit, names in self.candidates.items()})

    def mixed(self, target: float, rng: np.random.Generator) -> Policy:
        """Independent draws whose expected mean bits (weighted by parameters) is `target`, as near as the candidates allow."""
        tilt = self._tilt(target)
        rising = {names: _tilted(names, tilt).cumsum() for names in set(self.candidates.values())}
        rising = {names: shares / shares[-1] for names, shares in rising.items()}
        places = rng.random(len(self.candidates))  # as `Generator.choice` draws, in one go: a search draws thousands of policies
        drawn = zip(self.candidates.items(), places, strict=True)
        return Policy.of({unit: names[int(rising[names].searchsorted(place, side="right"))] for (unit, names), place in drawn})

    def _tilt(self, target: float) -> float:
        """Bisection: the expected mean bits rise with the tilt."""
        low, high = -30.0, 30.0
        total = sum(unit.parameters for unit in self.units)
        shares: Counter[tuple[str, ...]] = Counter()
        for unit in self.units:
            shares[self.candidates[unit.name]] += unit.parameters
        for _ in range(40):
            middle = (low + high) / 2
            means = (count * float(_tilted(names, middle) @ _levels(names)[0]) for names, count in shares.items())
            low, high = (middle, high) if sum(means) < target * total else (low, middle)
        return (low + high) / 2

    def range(self) -> tuple[float, float]:
        """(lowest, highest) mean bits over all policies."""
        total = sum(unit.parameters for unit in self.units)
        choices = [(unit.parameters / total, [bits(name) for name in self.candidates[unit.name]]) for unit in self.units]
        return sum(share * min(found) for share, found in choices), sum(share * max(found) for share, found in choices)


@cache
def _levels(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(bits, share of its level) of each kernel."""
    levels = np.array([bits(name) for name in names], float)
    return levels, np.array([1 / sum(levels == level) for level in levels])


def _tilted(names: tuple[str, ...], tilt: float) -> np.ndarray:
    """exp(tilt · bits), normalised; kernels of equal bits share their level's weight: many group sizes make no level likelier."""
    levels, share = _levels(names)
    weight = share * np.exp(tilt * (levels - (levels.max() if tilt > 0 else levels.min())))
    return weight / weight.sum()


def triangle(step: int, period: int, low: float, high: float) -> float:
    """A triangle wave that starts at `low`, is `high` half a period later and back at `low` after a period."""
    phase = (step % period) / period
    return low + (high - low) * (1 - abs(2 * phase - 1))


@dataclass(frozen=True)
class Scenarios:
    """Budgets with their encodings, the exact solver's answers under some values, and how often each should be drawn."""

    budgets: tuple[Budget, ...]
    encodings: np.ndarray
    answers: tuple[Policy, ...]
    weights: np.ndarray

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.choice(len(self.budgets), p=self.weights))


def scenarios(cost_model: CostModel, values: Values, count: int, seed: int, bins: int = 5) -> Scenarios:
    """`count` feasible random budgets: each limit present half of the time, its encoding the square of a uniform number (fp32 stretches the
    ranges so far that all of 2 to 8 bits lies near 0); resources that no policy changes or nobody measured are left out. The last one
    limits nothing. Budgets that no policy keeps are drawn again.
    """
    rng = np.random.default_rng([seed, 17])
    ranges = {name: cost_model.bounds(name) for name in RESOURCES if name in cost_model.per_unit}
    ranges = {name: (low, high) for name, (low, high) in ranges.items() if high > low and high > 0}
    budgets: list[Budget] = []
    answers: list[Policy] = []
    while ranges and len(budgets) < count - 1:
        present = [name for name in ranges if rng.random() < 0.5] or [list(ranges)[rng.integers(len(ranges))]]
        limits = {name: ranges[name][0] + rng.random() ** 2 * (ranges[name][1] - ranges[name][0]) for name in present}
        if min(limits.values()) <= 0:
            continue
        budget = Budget.from_json(limits, "random")
        answer = find(cost_model, values, budget)
        if answer is not None:
            budgets.append(budget)
            answers.append(answer.policy)
    answers.append(solve(cost_model, values, Budget()).policy)
    budgets.append(Budget())
    encodings = np.array([encode(budget, cost_model) for budget in budgets], np.float32)
    keys = [tuple(row) for row in np.minimum((encodings * bins).astype(int), bins - 1).tolist()]
    frequency = Counter(keys)
    weights = np.array([1 / frequency[key] for key in keys])
    return Scenarios(tuple(budgets), encodings, tuple(answers), weights / weights.sum())


def mean_bits_of(policy: Mapping[str, str], units: Sequence[Unit]) -> float:
    """Mean bits per parameter as the sampler counts them (fp32 as 8)."""
    total = sum(unit.parameters for unit in units)
    return sum(bits(policy[unit.name]) * unit.parameters for unit in units) / total
