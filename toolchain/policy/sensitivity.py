"""What each kernel costs in quality on each unit, one unit at a time. The score comes in as a callable: no supernet, no data here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from toolchain.errors import InputError
from toolchain.progress import track
from toolchain.spec import Policy, Unit


def measure(
    score: Callable[[Policy], float], units: Iterable[Unit], candidates: Mapping[str, Iterable[str]], reference: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """unit → kernel → score(reference with this one unit changed) − score(reference), at least 0.

    The clamp keeps noise from being sold as a gain: a kernel that scores better than the reference alone is free, no more.
    Calls score 1 + Σ|candidates| times (never twice for the reference). Raises InputError where a score is not finite.
    """
    base = _finite(score, Policy.of(reference), "the reference policy")
    work = [(unit.name, kernel) for unit in units for kernel in candidates[unit.name]]
    losses: dict[str, dict[str, float]] = {}
    for unit, kernel in track(work, len(work), "sensitivity"):
        row = losses.setdefault(unit, {})
        if kernel == reference[unit]:
            row[kernel] = 0.0
            continue
        row[kernel] = max(0.0, _finite(score, Policy.of({**reference, unit: kernel}), f"{kernel} on unit {unit!r}") - base)
    return losses


def _finite(score: Callable[[Policy], float], policy: Policy, what: str) -> float:
    value = score(policy)
    if not math.isfinite(value):
        raise InputError(f"expected a finite score for {what}, got {value}", "use other text for the calibration windows")
    return value
