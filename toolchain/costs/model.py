"""policy → cost, from a cost table: the sum of the measured cost of every unit plus the model's measured remainder.

Owns prediction and its spread. Refuses to know how rows were measured and who chose the policy.

    latency(π) = Σ_units t(shape, kernel, tokens) + remainder          remainder = median over measured models of (whole − Σ)
    memory(π)  = Σ_units peak bytes(shape, kernel) + fixed − shared    spread    = the largest residual of those models

Additive operator model (ProxylessNAS, arXiv:1812.00332). Blind to what fusion saves across units; the spread says how blind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from statistics import median

from toolchain.costs.table import CostTable, ModelRow, missing
from toolchain.kernels import CATALOGUE, candidates, runs_as
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import Cost, Estimate, Unit, Workload

NO_METER = "no energy meter was read"


@dataclass(frozen=True)
class Tie:
    """Two units that store one tensor if they take the same kernel; `savings`: kernel → resource → what is then not spent twice."""

    units: tuple[str, str]
    savings: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class CostModel:
    """Additive costs of every policy of one model, for one workload on one device.

    kernels: unit → kernels offered. per_unit: resource → unit → kernel → cost. fixed: resource → constant part.
    relative_spread: resource → largest relative residual seen. Resources are those of a budget, first_token_ms and package_bytes;
    a resource that nothing measured is absent.
    """

    units: tuple[Unit, ...]
    kernels: Mapping[str, tuple[str, ...]]
    per_unit: Mapping[str, Mapping[str, Mapping[str, float]]]
    fixed: Mapping[str, float]
    ties: tuple[Tie, ...]
    relative_spread: Mapping[str, float]
    workload: Workload
    device: str
    no_energy: str = NO_METER

    def totals(self, policy: Mapping[str, str]) -> dict[str, float]:
        """Predicted cost of a policy per resource."""
        return {resource: self._total(resource, policy) for resource in self.per_unit}

    def _total(self, resource: str, policy: Mapping[str, str]) -> float:
        cost = self.per_unit[resource]
        total = self.fixed[resource] + sum(cost[unit.name][policy[unit.name]] for unit in self.units)
        for tie in self.ties:
            first, second = (policy[name] for name in tie.units)
            if first == second:
                total -= tie.savings.get(first, {}).get(resource, 0.0)
        return total

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
            return Estimate(totals[resource], totals[resource] * self.relative_spread.get(resource, 0.0))

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


def working_set(units: Iterable[Unit], kernel: str, cache_bytes: int) -> str:
    """Whether a model whose units all took `kernel` streams its weights from memory between two uses of one unit."""
    return (
        "streamed"
        if sum(packed_bytes(unit, CATALOGUE[kernel]) for unit in units if unit.op != "Gather") > cache_bytes
        else "cached"
    )


def cost_model(
    units: tuple[Unit, ...],
    fingerprint: str,
    table: CostTable,
    workload: Workload,
    flop: float,
    cache_bytes: int,
) -> CostModel:
    """The cost model of one model (its units and fingerprint) for a workload. Raises MissingCostError naming the first missing row.

    flop: operations of one inference (`flops`); the same for every policy, since a kernel changes how, not how many.
    """
    device = table.header.device
    kernels = {unit.name: candidates(unit, table.header.kernels) for unit in units}
    per_unit: dict[str, dict[str, dict[str, float]]] = {"peak_memory_bytes": {}, "package_bytes": {}, "compute_flop": {}}
    phases = {"decode": "latency_ms", "prefill": "first_token_ms", "encode": "latency_ms"}
    for phase, tokens in workload.phases.items():
        times = per_unit.setdefault(phases[phase], {})
        for unit in units:
            times[unit.name] = {
                kernel: table.unit(unit, runs_as(kernel), tokens, working_set(units, kernel, cache_bytes)).latency_ms
                for kernel in kernels[unit.name]
            }
    for unit in units:
        rows = {kernel: table.memory(unit, runs_as(kernel)) for kernel in kernels[unit.name]}
        per_unit["peak_memory_bytes"][unit.name] = {kernel: row.peak_bytes for kernel, row in rows.items()}
        per_unit["package_bytes"][unit.name] = {kernel: float(row.packed_bytes) for kernel, row in rows.items()}
        per_unit["compute_flop"][unit.name] = dict.fromkeys(rows, 0.0)
    ties = _ties(units, kernels)
    model = CostModel(units, kernels, per_unit, dict.fromkeys(per_unit, 0.0), ties, {}, workload, device)
    measured = [row for row in table.of(ModelRow) if row.model == fingerprint and row.workload == str(workload)]
    if not measured:
        raise missing(f"whole-model rows for {workload} of this model", device)
    fixed, spread = {"compute_flop": flop}, {"compute_flop": 0.0}
    for resource in per_unit:
        if resource == "compute_flop":
            continue
        pairs = [(getattr(row, resource), model._total(resource, row.units)) for row in measured]
        # Below zero is noise: units cannot cost more than the model they are in, and a cost that may be negative makes no limit.
        fixed[resource] = max(0.0, median(whole - units_sum for whole, units_sum in pairs))
        spread[resource] = max(abs(fixed[resource] + units_sum - whole) / whole for whole, units_sum in pairs)
    meter = table.header.meter
    why = meter.removeprefix("none: ") if meter.startswith("none") else f"this version does not read {meter!r}"
    return CostModel(units, kernels, per_unit, fixed, ties, spread, workload, device, f"{NO_METER}: {why}" if why else NO_METER)


def _ties(units: tuple[Unit, ...], kernels: Mapping[str, tuple[str, ...]]) -> tuple[Tie, ...]:
    ties = []
    for unit in units:
        if unit.role == "embedding" and unit.tied_to:
            both = set(kernels[unit.name]) & set(kernels[unit.tied_to])
            savings = {kernel: {"package_bytes": float(packed_bytes(unit, CATALOGUE[kernel]))} for kernel in both}
            ties.append(Tie((unit.name, unit.tied_to), savings))
    return tuple(ties)


def flops(units: Iterable[Unit], workload: Workload, layers: int, width: int) -> float:
    """Floating-point operations of one inference: 2·K·N per token of every linear and the head, plus 4·width per attended pair and layer.

    A multiply-add counts two, whatever its number format; `width` is heads × head width. Norms and activations (below 1%) are left out.
    """
    linear = sum(2.0 * unit.parameters for unit in units if unit.op != "Gather")
    if workload.kind == "encode":
        tokens = workload.prompt_tokens
        return workload.batch * (tokens * linear + 4.0 * width * layers * tokens * tokens)
    total = workload.prompt_tokens + workload.new_tokens
    return total * linear + 4.0 * width * layers * total * (total + 1) / 2
