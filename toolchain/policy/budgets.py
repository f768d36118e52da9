"""Budgets of a device for one model, derived from its own cost table: low, medium and high.

    memory_f   = min + f·(max − min)          over policies without fp32 (with it, every budget would afford 8 bits)
    latency_f  = L*(memory_f) + f·(max − L*)  L*: the fastest policy within memory_f, so that both limits can be kept together

at f = 0.2, 0.5 and 0.8. Room is left above each for what the prediction's spread and the machine's drift may add: a limit closer
than that could not be told kept from broken.
"""

from __future__ import annotations

from dataclasses import replace

from toolchain.costs.model import CostModel
from toolchain.kernels import CATALOGUE
from toolchain.policy.solver import solve
from toolchain.spec import Budget

FRACTIONS = {"low": 0.2, "medium": 0.5, "high": 0.8}
ROOM = 1.5
"""Times the spread that a plan keeps free: the spread is the largest error of the mixed models, and another may exceed it."""
LEAST_ROOM = 0.05
"""Of a memory limit, however small the spread: what the interpreter has free differs between the processes of a table and of a check, and
the solver spends a plan to the last byte. A quickstart's packages weighed 1.8 to 3.4% more than predicted where the spread was 2.2%."""
DRIFT = 1.0
"""Relative drift of a shared machine's latency: the same package's median was seen to move from 0.22 to 0.45 ms within an hour."""


def derive(cost_model: CostModel) -> dict[str, Budget]:
    """{"low", "medium", "high"} → limits on peak memory and latency. Compute is the same for every policy, so it sets no limit."""
    kernels = {unit: tuple(name for name in names if ordinary(name)) or names for unit, names in cost_model.kernels.items()}
    quantised = replace(cost_model, kernels=kernels)
    memory_low, memory_high = quantised.bounds("peak_memory_bytes")
    _, latency_high = quantised.bounds("latency_ms")
    budgets = {}
    for name, fraction in FRACTIONS.items():
        memory = memory_low + fraction * (memory_high - memory_low)
        fastest = solve(quantised, cost_model.per_unit["latency_ms"], Budget(peak_memory_bytes=memory)).policy
        least = cost_model.totals(fastest)["latency_ms"]
        latency = least + fraction * (latency_high - least)
        budgets[name] = Budget(
            peak_memory_bytes=float(round(memory * _room("peak_memory_bytes", cost_model))),
            latency_ms=round(latency * _room("latency_ms", cost_model), 4),
            name=name,
        )
    return budgets


def planned(budget: Budget, cost_model: CostModel) -> Budget:
    """The budget less the room for spread and drift: what a policy's predicted cost must keep so that its measured cost keeps `budget`."""
    limits = {name: limit / _room(name, cost_model) for name, limit in budget.limits.items()}
    return Budget(**limits, name=budget.name)


def promise(predicted: dict[str, float], cost_model: CostModel) -> Budget:
    """The budget of a package that was given a policy instead of one: its own prediction, with the same room."""
    limits = {name: predicted[name] * _room(name, cost_model) for name in ("peak_memory_bytes", "latency_ms")}
    return Budget(**limits, name="promise")


def ordinary(name: str) -> bool:
    """Kernels that set the range: full precision would stretch it, and so would two sets of weights for one unit."""
    return CATALOGUE[name].quantised and not CATALOGUE[name].prefill


def _room(resource: str, cost_model: CostModel) -> float:
    """The factor between a predicted cost and the limit it is safe to promise."""
    drift = DRIFT if resource in ("latency_ms", "first_token_ms") else 0.0
    least = LEAST_ROOM if resource == "peak_memory_bytes" else 0.0
    return (1 + max(least, ROOM * cost_model.relative_spread.get(resource, 0.0))) * (1 + drift)
