"""Budget → the constraint encoding: where each limit lies between the cheapest and the most expensive subnet of this device.

e_r = (budget_r − min_π cost_r) / (max_π cost_r − min_π cost_r), clipped to [0, 1]: MetaQuantLLM's 4-vector (sections 3.1 and 4.2),
normalised by the device's own cost table, so that the table defines the encoding.
"""

from __future__ import annotations

from toolchain.costs.model import CostModel
from toolchain.spec import RESOURCES, Budget


def encode(budget: Budget, cost_model: CostModel) -> tuple[float, float, float, float]:
    """In the order of RESOURCES. 1 where the budget sets no limit, nothing measured the resource, or no policy changes it."""
    encoding = []
    for resource in RESOURCES:
        limit = budget.limits.get(resource)
        if limit is None or resource not in cost_model.per_unit:
            encoding.append(1.0)
            continue
        low, high = cost_model.bounds(resource)
        encoding.append(1.0 if high <= low else min(1.0, max(0.0, (limit - low) / (high - low))))
    memory, compute, latency, energy = encoding
    return (memory, compute, latency, energy)
