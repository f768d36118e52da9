"""Budgets of a device for one model, derived from its own cost table: low, medium and high.

    memory_f   = min + f·(max − min)          over policies without fp32 (with it, every budget would afford 8 bits)
    latency_f  = L*(memory_f) + f·(max − L*)  L*: the fastest policy within memory_f, so that both limits can be kept together

at f = 0.2, 0.5 and 0.8. Room is left above each for what the prediction's spread and the machine's drift may add: a limit closer
than that could not be told kept from broken.
"""

from __future__ import annotations

from dataclasses import replace

from toolchain.costs.model import CostModel
from toolchain.policy.solver import solve
from toolchain.spec import Budget

FRACTIONS = {"low": 0.2, "medium": 0.5, "high": 0.8}
DRIFT = 0.25
"""Relative drift of a shared machine's latency within minutes (we have seen 67 and 93 tokens/s of the same model within 20)."""


def derive(cost_model: CostModel) -> dict[str, Budget]:
    """{"low", "medium", "high"} → limits on peak memory and latency. Compute is the same for every policy, so it sets no limit."""
    kernels = {unit: tuple(name for name in names if name != "fp32") or names for unit, names in cost_model.kernels.items()}
    quantised = replace(cost_model, kernels=kernels)
    memory_low, memory_high = quantised.bounds("peak_memory_bytes")
    _, latency_high = quantised.bounds("latency_ms")
    memory_room = 1 + cost_model.relative_spread["peak_memory_bytes"]
    latency_room = (1 + cost_model.relative_spread["latency_ms"]) * (1 + DRIFT)
    budgets = {}
    for name, fraction in FRACTIONS.items():
        memory = memory_low + fraction * (memory_high - memory_low)
        fastest = solve(quantised, cost_model.per_unit["latency_ms"], Budget(peak_memory_bytes=memory)).policy
        least = cost_model.totals(fastest)["latency_ms"]
        latency = least + fraction * (latency_high - least)
        budgets[name] = Budget(
            peak_memory_bytes=float(round(memory * memory_room)), latency_ms=round(latency * latency_room, 4), name=name
        )
    return budgets


def planned(budget: Budget, cost_model: CostModel) -> Budget:
    """The budget less the prediction's spread: what a policy's predicted cost must keep so that its measured cost keeps `budget`."""
    limits = {name: limit / (1 + cost_model.relative_spread.get(name, 0.0)) for name, limit in budget.limits.items()}
    return Budget(**limits, name=budget.name)


def promise(predicted: dict[str, float], cost_model: CostModel) -> Budget:
    """The budget of a package that was given a policy instead of one: its own prediction, with the same room."""
    room = {"peak_memory_bytes": 1.0, "latency_ms": 1 + DRIFT}
    limits = {name: predicted[name] * (1 + cost_model.relative_spread[name]) * extra for name, extra in room.items()}
    return Budget(**limits, name="promise")
