"""What one process of the agent saw of a package, and where the middle of many such processes lies. Cannot measure, knows no budget.

Windows of one process agree with each other, two processes do not (`benchmarks/sessions.py`): a process, not a window, is what a bound
counts as independent. Its level is the median of its windows; levels are compared on the log scale, where slowness is a sum.

    bound      mean of log levels ± Student's t · max(s, BETWEEN) / √n: independent replications (Law, Simulation Modeling and Analysis,
               5th ed., section 9.5.2). BETWEEN keeps a few levels that agree by chance from promising too much.
    looks      whoever measures until it is decided looks several times. The i-th look may err with α / (i(i + 1)), which sums to α over
               any number of looks: error spending (Lan & DeMets 1983) by the union bound, so looks need not be independent.

By hand: a device has no scipy, and of a distribution only Student's quantile is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median, stdev
from typing import Any

from toolchain.errors import InputError

BETWEEN = 0.02
"""Least relative standard deviation between processes: "one process is 1 to 2% off however many windows it takes" (README)."""


SHARE = 0.15
"""Standard deviation of the share by which a latency follows its reference, about 1, before any process has told."""

REFERENCE_NOISE = 0.03
"""Of a process's reference itself, relative, at most: variation of that size says nothing of a share. Taken for the machine's speed it
would pull every share towards 0 (regression dilution)."""

_ROUNDS = 4

_MANY = 1000
"""Degrees of freedom of what is as good as normally distributed."""


@dataclass(frozen=True)
class Block:
    """One process: by latency the median of each window in ms, by kind of work the reference's nanoseconds in the same windows.

    valid: enough windows in which others left the CPUs alone; else all windows are here. p95_ms: 95th percentile of the single runs of
    those windows; None where it was not asked for. niceness: the priority that the system gave it; at −20 it goes before others.
    """

    trials: Mapping[str, tuple[float, ...]]
    reference_ns: Mapping[str, tuple[float, ...]]
    dropped: int = 0
    valid: bool = True
    p95_ms: float | None = None
    niceness: int = 0

    def level_ms(self, name: str, work: str = "", then_ns: float = 0.0, share: float = 1.0) -> float:
        """Median over the windows of a latency, each brought to the speed at which the reference for `work` takes then_ns, if the latency
        goes with reference^share. "": as it was. "latency_p95_ms" is the single runs' 95th percentile, brought there as a whole."""
        if name == "latency_p95_ms":
            assert self.p95_ms is not None
            return self.p95_ms * (then_ns / median(self.reference_ns[work])) ** share if work else self.p95_ms
        if not work:
            return float(median(self.trials[name]))
        return float(
            median(x * (then_ns / now) ** share for x, now in zip(self.trials[name], self.reference_ns[work], strict=True))
        )

    def to_json(self) -> dict[str, Any]:
        trials = {name: list(times) for name, times in self.trials.items()}
        references = {work: list(times) for work, times in self.reference_ns.items()}
        seen = {"trials": trials, "reference_ns": references, "dropped": self.dropped, "valid": self.valid}
        return {**seen, "p95_ms": self.p95_ms, "niceness": self.niceness}

    @classmethod
    def from_json(cls, data: Any) -> Block:
        """Raises InputError for anything but what `to_json` wrote."""
        try:
            trials = {str(name): _times(times) for name, times in data["trials"].items()}
            references = {str(work): _times(times) for work, times in data["reference_ns"].items()}
            windows = {len(times) for times in (*trials.values(), *references.values())}
            if not trials or len(windows) != 1:
                raise ValueError(f"windows {sorted(windows)}")
            p95 = data.get("p95_ms")
            return cls(
                trials,
                references,
                int(data["dropped"]),
                data["valid"] is True,
                None if p95 is None else _times([p95])[0],
                int(data.get("niceness", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(
                f"expected a block of a report of check --json, got {type(error).__name__}: {str(error)[:80]}",
                "make the report again: bittailor check PACKAGE --json > REPORT",
            ) from error


def _times(values: Any) -> tuple[float, ...]:
    times = tuple(map(float, values))
    if not times or not all(1e-6 < time < 1e15 for time in times) or any(isinstance(value, str) for value in values):
        raise ValueError(f"times {str(values)[:40]}")
    return times


def spent(alpha: float, look: int) -> float:
    """How often the look-th look (1, 2, ...) may err so that all of them together err with at most `alpha`."""
    return alpha / (look * (look + 1))


@cache
def student(tail: float, freedom: int) -> float:
    """t with P(T > t) = tail (0 < tail < ½) for Student's T of so many degrees of freedom, to nine digits.

    By bisection of the finite sums of Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    if not 0 < tail < 0.5 or freedom < 1:
        raise InputError(f"expected 0 < tail < 0.5 and freedom >= 1, got {tail} and {freedom}")
    low, high = 0.0, 1.0
    while _above(high, freedom) > tail:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _above(middle, freedom) > tail else (low, middle)
    return high


def _above(t: float, freedom: int) -> float:
    """P(T > t)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = total = 0.0
    for power in range(odd, freedom - 1, 2):  # cos⁰, cos², ... or cos¹, cos³, ... up to freedom − 2
        term = (cosine if odd else 1.0) if power == odd else term * cosine**2 * (power - 1) / power
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 - inside) / 2


def middle(levels: Sequence[float]) -> float:
    """Geometric mean of the processes' levels, in their unit."""
    return math.exp(fmean(map(math.log, levels)))


def bounds(levels: Sequence[float], tail: float, doubt: float = 0.0) -> tuple[float, float]:
    """(low, high): each a one-sided bound on the middle that errs with at most `tail`. Raises InputError for fewer than two levels.

    doubt: standard deviation, in logs, of what all levels alike may be off besides."""
    n = len(levels)
    if n < 2:
        raise InputError(f"expected at least 2 levels, got {n}")
    half = student(tail, n - 1) * max(stdev(map(math.log, levels)), BETWEEN) / math.sqrt(n)
    half = math.hypot(half, doubt and student(tail, _MANY) * doubt)
    return middle(levels) * math.exp(-half), middle(levels) * math.exp(half)


def at_speed(blocks: Sequence[Block], name: str, work: str, then_ns: float) -> tuple[list[float], float]:
    """(levels, doubt) of processes brought to the speed at which the reference for `work` takes then_ns: by the share with which they
    follow it, fitted as in `compared`, and what is unknown of it, for `bounds`. That they are fitted to the levels themselves the bounds do
    not count: looks that share what may err leave more room than that takes (tried at the limit itself in the tests)."""
    fit = _Fit.of([blocks], name, work)
    apart = fmean(math.log(median(block.reference_ns[work]) / then_ns) for block in blocks)
    return [block.level_ms(name, work, then_ns, fit.share) for block in blocks], abs(apart) * fit.unknown


def ratio_bounds(
    now: Sequence[float], then: Sequence[float], below: float, above: float, doubt: float = 0.0, fitted: int = 0
) -> tuple[float, float, float]:
    """(ratio, low, high) of the middles, now over then: low errs with at most `below`, high with `above`. Welch's t on logs (1947).

    doubt: standard deviation of what their ratio may be off besides, in logs. fitted: numbers that were fitted to the levels themselves."""
    if min(len(now), len(then)) < 2:
        raise InputError(f"expected at least 2 levels on each side, got {len(now)} and {len(then)}")
    parts = [(max(stdev(map(math.log, side)), BETWEEN) ** 2 / len(side), len(side) - 1) for side in (now, then)]
    variance = sum(part for part, _ in parts)
    freedom = int(variance**2 / sum(part**2 / n for part, n in parts)) - fitted
    both = len(now) + len(then) - 2
    variance *= both / max(both - fitted, 1)
    low, high = (student(tail, max(freedom, 1)) * math.sqrt(variance + doubt**2) for tail in (below, above))
    ratio = middle(now) / middle(then)
    return ratio, ratio * math.exp(-low), ratio * math.exp(high)


def compared(
    now: Sequence[Block], then: Sequence[Block], name: str, works: Sequence[str], below: float, above: float
) -> tuple[float, float, float, str]:
    """(ratio, low, high, work): how much slower a latency is now than then, as `ratio_bounds`, at one speed of the machine; work: the kind
    of work whose reference told the speed, of those known to all blocks the one with which most is explained; "" where there is none.

    Speed is not one number: between the two speeds of one pair of virtual cores the reference's time differed by 1.9, a package's by 1.6.
    So a latency follows its reference by a share of its own, time ∝ reference^share, which is fitted to the processes of both
    sides (one slope, two levels: analysis of covariance, Fisher 1932; whether the sides differ plays no part in it) from a prior of
    1 ± SHARE. What is unknown of it widens the bounds as far as the machine's speed then and now lie apart: sides that never saw the
    same speed say little of each other.
    """
    known = [work for work in works if all(work in block.reference_ns for block in (*now, *then))]
    if not known:
        plain = [[block.level_ms(name) for block in side] for side in (now, then)]
        return (*ratio_bounds(plain[0], plain[1], below, above), "")
    fits = {work: _Fit.of([now, then], name, work) for work in known}
    work = min(known, key=lambda one: fits[one].left)
    fit = fits[work]
    levels = [[block.level_ms(name, work, 1.0, fit.share) for block in side] for side in (now, then)]
    doubt = fit.unknown * abs(fit.means[0] - fit.means[1])
    return (*ratio_bounds(levels[0], levels[1], below, above, doubt, fitted=1), work)


@dataclass(frozen=True)
class _Fit:
    """share: the slope of log latency over log reference. left: variance that it leaves. unknown: standard deviation of the share.
    means: of the log reference, by side."""

    share: float
    left: float
    unknown: float
    means: tuple[float, ...]

    @classmethod
    def of(cls, sides: Sequence[Sequence[Block]], name: str, work: str) -> _Fit:
        """One slope, a level for each side."""
        points = [
            [(math.log(median(block.reference_ns[work])), math.log(block.level_ms(name))) for block in side] for side in sides
        ]
        means = [(fmean(x for x, _ in side), fmean(y for _, y in side)) for side in points]
        apart = [(x - mean_x, y - mean_y) for side, (mean_x, mean_y) in zip(points, means, strict=True) for x, y in side]
        squares, products = math.fsum(x * x for x, _ in apart), math.fsum(x * y for x, y in apart)
        freedom = len(apart) - len(sides)
        # How much of the reference's variation is the machine's.
        real = max(0.0, 1 - freedom * REFERENCE_NOISE**2 / squares) if squares else 0.0
        slope = products / (squares * real) if real else 1.0
        share, told, left = 1.0, 0.0, BETWEEN**2
        for _ in range(_ROUNDS):  # the less noise, the more the processes say against the prior
            told = squares * real**2 / max(left, BETWEEN**2)
            told /= told + 1 / SHARE**2
            share = told * slope + (1 - told)
            left = math.fsum((y - share * x) ** 2 for x, y in apart) / max(freedom - 1, 1)
        # What is left of the prior's doubt, and what is not known of the reference's noise.
        unknown = math.sqrt((1 - told) * SHARE**2 + (told * (1 - real) * slope) ** 2)
        return cls(share, left, unknown, tuple(mean_x for mean_x, _ in means))
