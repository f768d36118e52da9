"""The closed-form bit allocation of the PTQ/QAT study (arXiv:2411.06084, theorem 8): a baseline beside the exact solver.

    b_l* = ½ log₂(α_l σ_l² / λ)     α_l: what an error in layer l costs, σ_l²: the variance of its weights, λ: the budget's multiplier

λ is found by bisection. The theorem knows of no kernels: b* is then rounded to the widths there are, within the same mean.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

_HALVINGS = 200


def allocate(
    sensitivity: Mapping[str, float], variance: Mapping[str, float], sizes: Mapping[str, int], bits: float, most: float
) -> dict[str, float]:
    """Layer → b_l*, real numbers from 0 to `most` whose mean over all weights (`sizes`: how many a layer has) is `bits`; less where even
    `most` bits for every layer that costs something do not reach it.

    A layer that costs nothing (α or σ² is 0) gets 0. Raises ValueError where no layer costs anything, or for bits that are not positive.
    """
    worth = {name: sensitivity[name] * variance[name] for name in sizes}
    if not bits > 0 or not any(value > 0 for value in worth.values()):
        raise ValueError(f"expected bits above 0 and a layer whose errors cost something, got {bits} and {worth}")
    total = sum(sizes.values())

    def at(log_price: float) -> dict[str, float]:
        return {
            name: min(most, max(0.0, (math.log2(value) - log_price) / 2)) if value > 0 else 0.0 for name, value in worth.items()
        }

    logs = [math.log2(value) for value in worth.values() if value > 0]
    low, high = min(logs) - 2 * most, max(logs)  # every layer has `most`, none has any
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sum(sizes[name] * each for name, each in at(middle).items()) > bits * total:
            low = middle
        else:
            high = middle
    return at(high)


def rounded(wanted: Mapping[str, float], sizes: Mapping[str, int], bits: float, offered: Sequence[int]) -> dict[str, int]:
    """Layer → one of the offered bit-widths: the nearest to what is wanted, then down until the mean over all weights is at most `bits`,
    then up while a layer fits.

    Down goes first which wants least of the way from the next lower width to its own, up which wants most of the way to the next higher
    one, measured to the middle between the two (ties: by name). Raises ValueError where even the least width of all layers is above `bits`.
    """
    widths = sorted(set(offered))
    budget = bits * sum(sizes.values()) * (1 + 1e-12)
    if widths[0] * sum(sizes.values()) > budget:
        raise ValueError(f"expected {widths[0]} bits or more, the least offered, got {bits}")
    chosen = {name: min((abs(width - each), width) for width in widths)[1] for name, each in wanted.items()}

    def spent() -> float:
        return sum(sizes[name] * width for name, width in chosen.items())

    while spent() > budget:
        lower = {name: widths[bisect_left(widths, width) - 1] for name, width in chosen.items() if width > widths[0]}
        name = max(sorted(lower), key=lambda one: (chosen[one] + lower[one]) / 2 - wanted[one])
        chosen[name] = lower[name]
    while True:
        higher = {name: widths[bisect_right(widths, width)] for name, width in chosen.items() if width < widths[-1]}
        fits = [name for name in sorted(higher) if spent() + sizes[name] * (higher[name] - chosen[name]) <= budget]
        if not fits:
            return chosen
        name = max(fits, key=lambda one: wanted[one] - (chosen[one] + higher[one]) / 2)
        chosen[name] = higher[name]
