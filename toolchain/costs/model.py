"""`CostModel`: additive costs of every policy of one model, for one workload on one device; policy → cost.

Owns prediction and its spread. Refuses to know where the numbers come from (`from_table.py`) and who chooses a policy.

    latency(π) = Σ_units t(unit, kernel) + remainder        memory(π) = Σ_units bytes(unit, kernel) + fixed − shared

Additive operator model (ProxylessNAS, arXiv:1812.00332). Blind to what fusion saves across units; the spread says how blind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from toolchain.spec import Cost, Estimate, Unit, Workload

NO_METER = "no energy meter was read"


_DIGITS = 7
"""With nine, one of four packages that two machines made of one supernet differed by a hundredth of a byte."""


def steady(costs: Mapping[str, Mapping[str, float]], fixed: float) -> tuple[dict[str, dict[str, float]], float]:
    """Costs and fixed part to a ten-millionth of the largest of them: far below what any clock or fit can tell, far above what a fit's last
    digits owe to the order in which a machine's instruction set adds up. The same table then gives the same policy and the same
    manifest on every machine."""
    largest = max((abs(cost) for row in costs.values() for cost in row.values()), default=0.0)
    largest = max(largest, abs(fixed))
    if not 0 < largest < math.inf:
        return {unit: dict(row) for unit, row in costs.items()}, fixed
    digits = _DIGITS - 1 - math.floor(math.log10(largest))
    return {unit: {kernel: round(cost, digits) for kernel, cost in row.items()} for unit, row in costs.items()}, round(
        fixed, digits
    )


def steady_spread(relative: float) -> float:
    """A relative spread to a ten-millionth."""
    return round(relative, _DIGITS)


@dataclass(frozen=True)
class Tie:
    """Two units that store one tensor if they take the same kernel; `savings`: kernel → resource → what is then not spent twice."""

    units: tuple[str, str]
    savings: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class CostModel:
    """Additive costs of every policy of one model, for one workload on one device.

    kernels: unit → kernels offered. per_unit: resource → unit → kernel → cost. fixed: resource → constant part.
    relative_spread: resource → largest relative error of a prediction seen. Resources are those of a budget, first_token_ms and
    package_bytes; a resource that nothing measured is absent. notes: resource → what else than measurements its numbers rest on.
    """

    units: tuple[Unit, ...]
    kernels: Mapping[str, tuple[str, ...]]
    per_unit: Mapping[str, Mapping[str, Mapping[str, float]]]
    fixed: Mapping[str, float]
    ties: tuple[Tie, ...]
    relative_spread: Mapping[str, float]
    workload: Workload
    device: str
    no_energy: str = NO_METER  # why energy_mj is absent
    notes: Mapping[str, str] = field(default_factory=dict)

    def totals(self, policy: Mapping[str, str]) -> dict[str, float]:
        """Predicted cost of a policy per resource."""
        return {resource: self._total(resource, policy) for resource in self.per_unit}

    def _total(self, resource: str, policy: Mapping[str, str]) -> float:
        cost = self.per_unit[resource]
        parts = [self.fixed[resource], *(cost[unit.name][policy[unit.name]] for unit in self.units)]
        for tie in self.ties:
            first, second = (policy[name] for name in tie.units)
            if first == second:
                parts.append(-tie.savings.get(first, {}).get(resource, 0.0))
        return math.fsum(
            parts
        )  # rounded once: how sum() rounds changed with Python 3.12, and the same policy gives the same manifest

    def renamed(self, names: Mapping[str, str]) -> CostModel:
        """The same costs of kernels under other names; those without one are left out."""

        def kept(row: Mapping[str, Any]) -> dict[str, Any]:
            return {names[kernel]: cost for kernel, cost in row.items() if kernel in names}

        return replace(
            self,
            kernels={unit: tuple(names[kernel] for kernel in row if kernel in names) for unit, row in self.kernels.items()},
            per_unit={resource: {unit: kept(row) for unit, row in table.items()} for resource, table in self.per_unit.items()},
            ties=tuple(replace(tie, savings=kept(tie.savings)) for tie in self.ties),
        )

    def bounds(self, resource: str) -> tuple[float, float]:
        """(lowest, highest) cost of the resource over all policies, ties included."""
        cost = self.per_unit[resource]
        tied = {name for tie in self.ties for name in tie.units}
        low = high = self.fixed[resource]
        for unit in self.units:
            if unit.name not in tied:
                values = [cost[unit.name][kernel] for kernel in self.kernels[unit.name]]
                low, high = low + min(values), high + max(values)
        for tie in self.ties:
            first, second = tie.units
            values = [
                cost[first][a] + cost[second][b] - (tie.savings.get(a, {}).get(resource, 0.0) if a == b else 0.0)
                for a, b in product(self.kernels[first], self.kernels[second])
            ]
            low, high = low + min(values), high + max(values)
        return low, high

    def predict(self, policy: Mapping[str, str]) -> Cost:
        """A policy's cost with its spread: a prediction, not a measurement."""
        totals = self.totals(policy)

        def estimate(resource: str, reason: str) -> Estimate:
            if resource not in totals:
                return Estimate(None, reason=reason)
            spread = totals[resource] * self.relative_spread.get(resource, 0.0)
            return Estimate(totals[resource], spread, note=self.notes.get(resource, ""))

        return Cost(
            latency_ms=estimate("latency_ms", "not measured"),
            first_token_ms=estimate("first_token_ms", "an encoder generates no tokens"),
            peak_memory_bytes=estimate("peak_memory_bytes", "not measured"),
            package_bytes=estimate("package_bytes", "not measured"),
            compute_flop=estimate("compute_flop", "not computed"),
            energy_mj=estimate("energy_mj", self.no_energy),
            workload=self.workload,
            device=self.device,
        )
