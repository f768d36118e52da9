"""One meta-network for every device: it reads the device's own costs, unit by unit, and answers with a price for each limit.

    each unit        loss and costs of its kernels, as shares of what the whole model could lose or spend  ─┐  token
    the budget       where each limit lies between the cheapest and the dearest policy                      ─┤  token
                     two transformer layers over the tokens (no order: permuting units permutes nothing)     │
    the budget's token  →  price λ_r of each limit;   every unit takes the kernel of least  loss + Σ_r λ_r · cost_r

The prices are the Lagrange multipliers of the knapsack that the exact solver solves: the right ones give its optimum wherever that lies on
the convex hull, and wrong ones still never propose a policy that another beats in everything, on any device. All it sees is shares, so
units, kernels, scales and devices may be others than in training. Ties are not seen: the projection counts them.

`forward` is written once for numpy and torch: `train/prices.py` trains what this module runs, and a package is cut without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.costs.model import CostModel
from toolchain.errors import DamagedFileError
from toolchain.policy.solver import Values
from toolchain.spec import LIMITS, Budget

SHIPPED = Path(__file__).with_name("prices.safetensors")
"""The network, as `python -m toolchain.train.prices` trained it."""

WIDTH, HEADS, LAYERS = 64, 4, 2
FORMAT = "bittailor prices 1"
PROJECTED = 0.1
"""Share of the price that the projection is told: too high a price leaves some of the budget unspent, too low a one does no harm, since the
solver holds the limit anyway (at 0.3 one budget in a hundred still lost 30% more than the optimum)."""
_R = len(LIMITS)
_LEAST_LOSS, _LEAST_COST, _LEAST_LIMIT = 1e-4, 1e-3, 1e-4
"""Added before logarithms are taken: below these shares (of a unit's even part, or of a limit's range) nothing matters."""

SHAPES = {
    "kernel.0.weight": (1 + _R, WIDTH),
    "kernel.0.bias": (WIDTH,),
    "kernel.1.weight": (WIDTH, WIDTH),
    "kernel.1.bias": (WIDTH,),
    "unit.weight": (2 * WIDTH, WIDTH),
    "unit.bias": (WIDTH,),
    "budget.weight": (2 * _R, WIDTH),
    "budget.bias": (WIDTH,),
    **{
        f"{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            "attend.weight": (WIDTH, 3 * WIDTH),
            "attend.out": (WIDTH, WIDTH),
            "norm.0": (WIDTH,),
            "norm.1": (WIDTH,),
            "wide.weight": (WIDTH, 2 * WIDTH),
            "wide.bias": (2 * WIDTH,),
            "narrow.weight": (2 * WIDTH, WIDTH),
            "narrow.bias": (WIDTH,),
        }.items()
    },
    "norm": (WIDTH,),
    "price.weight": (WIDTH, _R),
    "price.bias": (_R,),
}
"""Every weight of the network by name; matrices are [inputs, outputs]."""


@dataclass(frozen=True)
class Situation:
    """A budget on a device, in shares. Arrays may be numpy's or torch's, and have leading batch axes.

    loss [U, C]     of the sum of every unit's worst loss
    cost [R, U, C]  above the unit's cheapest kernel, of the resource's range over policies; R = LIMITS
    mask [U, C]     1 where the unit has such a kernel
    limit [R]       where the limit lies in that range; 0 where there is none
    present [R]     1 where there is a limit on something measured
    """

    loss: Any
    cost: Any
    mask: Any
    limit: Any
    present: Any


def situation(cost_model: CostModel, losses: Values, budget: Budget) -> Situation:
    """What the network sees of a budget on a device whose kernels lose `losses` (unit → kernel → loss)."""
    names = [(unit.name, cost_model.kernels[unit.name]) for unit in cost_model.units]
    most = max(len(kernels) for _, kernels in names)

    def table(values: Values, missing: float) -> np.ndarray:
        """[U, C], `missing` where the unit has no such kernel."""
        return np.array([[values[unit][name] for name in kernels] + [missing] * (most - len(kernels)) for unit, kernels in names])

    mask = np.array([[1.0] * len(kernels) + [0.0] * (most - len(kernels)) for _, kernels in names], np.float32)
    loss = table(losses, 0.0).astype(np.float32)
    loss /= max(float(loss.max(-1).sum()), 1e-12)
    cost = np.zeros((_R, len(names), most), np.float32)
    limit, present = np.zeros((2, _R), np.float32)
    for index, resource in enumerate(LIMITS):
        if resource not in budget.limits or resource not in cost_model.per_unit:
            continue
        low, high = cost_model.bounds(resource)
        if high <= low:
            continue
        present[index] = 1
        limit[index] = (budget.limits[resource] - low) / (high - low)
        amounts = table(cost_model.per_unit[resource], np.inf)
        cost[index] = np.where(mask > 0, amounts - amounts.min(-1, keepdims=True), 0.0) / (high - low)
    return Situation(loss, cost, mask, limit, present)


def forward(weights: Mapping[str, Any], seen: Situation, xp: Any = np) -> Any:
    """log λ [..., R] for a situation; xp: numpy or torch, whichever the arrays are of."""

    def linear(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def rectified(x: Any) -> Any:
        return x * (x > 0)

    def normed(x: Any, name: str) -> Any:
        return x / xp.sqrt((x * x).mean(-1)[..., None] + 1e-6) * weights[name]

    U = seen.loss.shape[-2]
    loss = xp.log(seen.loss * U + _LEAST_LOSS)[..., None]
    costs = xp.log(seen.cost * U + _LEAST_COST) * seen.present[..., None, None]
    kernels = xp.concatenate([loss, xp.moveaxis(costs, -3, -1)], -1)
    kernels = rectified(linear(rectified(linear(kernels, "kernel.0")), "kernel.1")) * seen.mask[..., None]
    # Features are not negative, so that a masked kernel's zeros leave the maximum alone.
    pooled = xp.concatenate([kernels.sum(-2) / seen.mask.sum(-1)[..., None], xp.amax(kernels, -2)], -1)
    budget = xp.concatenate([seen.present, xp.log(xp.clip(seen.limit, 0, 2) + _LEAST_LIMIT) * seen.present], -1)
    x = xp.concatenate([linear(budget, "budget")[..., None, :], linear(pooled, "unit")], -2)
    for layer in range(LAYERS):
        mixed = normed(x, f"{layer}.norm.0") @ weights[f"{layer}.attend.weight"]
        heads = xp.moveaxis(mixed.reshape(*mixed.shape[:-1], 3 * HEADS, WIDTH // HEADS), -2, -3)
        q, k, v = heads[..., :HEADS, :, :], heads[..., HEADS : 2 * HEADS, :, :], heads[..., 2 * HEADS :, :, :]
        scores = q @ xp.moveaxis(k, -2, -1) * (WIDTH // HEADS) ** -0.5
        scores = xp.exp(scores - xp.amax(scores, -1)[..., None])
        read = xp.moveaxis((scores / scores.sum(-1)[..., None]) @ v, -3, -2)
        x = x + read.reshape(*x.shape) @ weights[f"{layer}.attend.out"]
        x = x + linear(rectified(linear(normed(x, f"{layer}.norm.1"), f"{layer}.wide")), f"{layer}.narrow")
    return linear(normed(x[..., 0, :], "norm"), "price")


def reduced(seen: Situation, log_prices: Any, xp: Any = np) -> Any:
    """loss + Σ_r λ_r · cost_r  [..., U, C] at given prices [..., R]; kernels a unit does not have are to be masked by the caller."""
    prices = xp.exp(log_prices) * seen.present
    return seen.loss + (seen.cost * prices[..., None, None]).sum(-3)


def proposal(
    weights: Mapping[str, np.ndarray], cost_model: CostModel, losses: Values, budget: Budget, share: float = 1.0
) -> dict[str, dict[str, float]]:
    """unit → kernel → loss plus `share` of the price of its costs. At share 1 the least is what the network proposes."""
    seen = situation(cost_model, losses, budget)
    worth = reduced(seen, forward(weights, seen) + np.log(share))
    return {
        unit.name: dict(zip(cost_model.kernels[unit.name], row.tolist(), strict=False))
        for unit, row in zip(cost_model.units, worth.astype(np.float64), strict=True)
    }


def read(path: Path) -> dict[str, np.ndarray]:
    """The weights in a file. Raises DamagedFileError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            if (found := (stored.metadata() or {}).get("format")) != FORMAT:
                raise ValueError(f"format {found!r}, expected {FORMAT!r}")
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        if {name: array.shape for name, array in weights.items()} != SHAPES:
            raise ValueError("other names or shapes than this version's")
        if not all(np.isfinite(array).all() for array in weights.values()):
            raise ValueError("numbers that are not finite")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedFileError(f"expected the prices' network in {path}, got: {error}", "install bittailor again") from error
    return weights


def write(path: Path, weights: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Weights and what they were trained on, atomically."""
    from safetensors.numpy import save

    from toolchain.files import write_atomic

    ordered = {name: np.ascontiguousarray(weights[name], np.float32) for name in SHAPES}
    write_atomic(path, save(ordered, metadata={"format": FORMAT, "facts": json.dumps(facts)}))
