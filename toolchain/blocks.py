"""What one process of the agent saw of a package, and where the middle of many such processes lies. Cannot measure, knows no budget.

Windows of one process agree with each other, two processes do not (`benchmarks/sessions.py`): a process, not a window, is what a bound
counts as independent. Its level is the median of its windows; levels are compared on the log scale, where slowness is a sum.

    bound      mean of log levels ± Student's t · max(s, BETWEEN) / √n: independent replications (Law, Simulation Modeling and Analysis,
               5th ed., section 9.5.2). BETWEEN keeps a few levels that agree by chance from promising too much.
    looks      whoever measures until it is decided looks several times. The i-th look may err with α / (i(i + 1)), which sums to α over
               any number of looks: error spending (Lan & DeMets 1983) by the union bound, so looks need not be independent.
    speed      against a limit: levels are brought to the limit's speed by the reference (`at_speed`), and what is unknown of that widens
               the bound. Against another report: like is compared with like (`compared`).

By hand: a device has no scipy, and of a distribution only Student's quantile is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median, stdev
from typing import Any

from toolchain.errors import InputError

BETWEEN = 0.02
"""Least relative standard deviation between processes: "one process is 1 to 2% off however many windows it takes" (README)."""


SHARE = 0.15
"""Standard deviation of the share by which a latency follows its reference, about 1, where neither a process nor a cost table tells."""

SHARES, LEAST_UNKNOWN = (0.25, 2.5), 0.02
"""Shares that may be, and the least that stays unknown of one."""

REFERENCE_NOISE = 0.03
"""Of a process's reference itself, relative, at most: variation of that size says nothing of a share. Taken for the machine's speed it
would pull every share towards 0 (regression dilution)."""

ALIKE = 0.1
"""Two processes found the machine alike if no reference's time differs by more, in logs: within a speed of the machine they differ by some
0.03, between the speeds that were seen by 0.3 to 0.6."""

_ROUNDS = 4

_MANY = 1000
"""Degrees of freedom of what is as good as normally distributed."""


@dataclass(frozen=True)
class Share:
    """By how much a latency follows a reference: latency ∝ reference^value. unknown: the standard deviation of what is not known of it.

    Raises ValueError for one that no machine shows, and for one that would make a check deaf to its own processes."""

    value: float = 1.0
    unknown: float = SHARE

    def __post_init__(self) -> None:
        if not SHARES[0] <= self.value <= SHARES[1] or not LEAST_UNKNOWN <= self.unknown <= SHARE:
            raise ValueError(f"a share of {self.value!r} ± {self.unknown!r}")


PRIOR = Share()


@dataclass(frozen=True)
class Speed:
    """The speed of the machine at which the reference for `work` takes `ns`, and how a latency is known to follow it."""

    work: str
    ns: float
    share: Share = PRIOR


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


def at_speed(blocks: Sequence[Block], name: str, speed: Speed) -> tuple[list[float], float]:
    """(levels, doubt) of processes brought to another speed of the machine, and what is unknown of that, for `bounds`.

    A latency follows its reference by a share of its own, which is fitted to the processes from what is known of it before. What stays
    unknown counts as far as their speed and that one lie apart. That it is fitted to the levels themselves the bounds do not count: looks
    that share what may err leave more room than that takes (tried at the limit itself in the tests)."""
    now = [math.log(median(block.reference_ns[speed.work])) for block in blocks]
    found = fitted([(x, math.log(block.level_ms(name))) for x, block in zip(now, blocks, strict=True)], speed.share)
    levels = [block.level_ms(name, speed.work, speed.ns, found.value) for block in blocks]
    return levels, abs(fmean(now) - math.log(speed.ns)) * found.unknown


@dataclass(frozen=True)
class Ratio:
    """How much slower now than then: value, and one-sided bounds. alike: so many processes now, and then, found the machine alike."""

    value: float
    low: float
    high: float
    alike: tuple[int, int]


def compared(now: Sequence[Block], then: Sequence[Block], name: str, below: float, above: float) -> Ratio:
    """A latency of processes now over then, at least two on each side: low errs with at most `below`, high with `above`.

    Speed is not one number: on one pair of virtual cores a reference took 1.55 times as long when the cores were slow and a package 1.75
    times, and beside another process 1.44 and 1.2 times. So no reference tells what another speed would do to a package, and like is
    compared with like (matching, Rubin 1973): a process now with the processes then that found the machine alike, all of whose common
    references took the same time but for ALIKE. What is left between them a package follows as those references do on average. A process
    then counts as often as it was matched, which makes fewer of them (Kish's n); with fewer than two, or two now, there are no bounds:
    0 and ∞.
    """
    known = sorted(set.intersection(*(set(block.reference_ns) for block in (*now, *then))))

    def seen(block: Block) -> tuple[list[float], float]:
        return [math.log(median(block.reference_ns[work])) for work in known], math.log(block.level_ms(name))

    here, there = [seen(block) for block in now], [seen(block) for block in then]

    def matches(state: Sequence[float], among: Iterable[int]) -> dict[int, float]:
        """Place in `there` → the level that its process would have had at this state."""
        found = {}
        for place in among:
            apart = [ours - theirs for ours, theirs in zip(state, there[place][0], strict=True)]
            if all(abs(each) <= ALIKE for each in apart):
                found[place] = there[place][1] + (fmean(apart) if apart else 0.0)
        return found

    pairs = [(level, found) for state, level in here if (found := matches(state, range(len(there))))]
    weights = [
        math.fsum(1 / len(found) for _, found in pairs if place in found) / max(len(pairs), 1) for place in range(len(there))
    ]
    matched = [place for place, weight in enumerate(weights) if weight]
    effective = 1 / math.fsum(weight**2 for weight in weights) if matched else 0.0
    plain = middle([math.exp(level) for _, level in here]) / middle([math.exp(level) for _, level in there])
    if len(pairs) < 2 or effective < 2:
        return Ratio(plain, 0.0, math.inf, (len(pairs), len(matched)))
    slower = [level - fmean(found.values()) for level, found in pairs]
    left = []  # of each process then, over those that found the machine as it did
    for place in matched:
        state, level = there[place]
        if others := matches(state, (other for other in matched if other != place)):
            left.append((level - fmean(others.values())) ** 2 * len(others) / (len(others) + 1))
    variance = max(stdev(slower), BETWEEN) ** 2 / len(pairs) + max(fmean(left) if left else 0.0, BETWEEN**2) / effective
    freedom = max(1, int(len(pairs) + effective - 2))
    low, high = (student(tail, freedom) * math.sqrt(variance) for tail in (below, above))
    ratio = math.exp(fmean(slower))
    return Ratio(ratio, ratio * math.exp(-low), ratio * math.exp(high), (len(pairs), len(matched)))


def fitted(points: Sequence[tuple[float, float]], prior: Share = PRIOR) -> Share:
    """The slope of log latency over log reference: (x, y) of each process, one at least.

    prior: what was known of it before; processes that all found the machine at one speed add nothing."""
    mean_x, mean_y = (fmean(point[axis] for point in points) for axis in (0, 1))
    apart = [(x - mean_x, y - mean_y) for x, y in points]
    squares, products = math.fsum(x * x for x, _ in apart), math.fsum(x * y for x, y in apart)
    freedom = len(apart) - 1
    # How much of the reference's variation is the machine's.
    real = max(0.0, 1 - freedom * REFERENCE_NOISE**2 / squares) if squares else 0.0
    slope = products / (squares * real) if real else prior.value
    share, told, left = prior.value, 0.0, BETWEEN**2
    for _ in range(_ROUNDS):  # the less noise, the more the processes say against the prior
        told = squares * real**2 / max(left, BETWEEN**2)
        told /= told + 1 / prior.unknown**2
        share = told * slope + (1 - told) * prior.value
        left = math.fsum((y - share * x) ** 2 for x, y in apart) / max(freedom - 1, 1)
    # What is left of the prior's doubt, and what is not known of the reference's noise.
    unknown = math.sqrt((1 - told) * prior.unknown**2 + (told * (1 - real) * slope) ** 2)
    if unknown >= prior.unknown or not SHARES[0] <= share <= SHARES[1]:  # the processes tell less than was known
        return prior
    return Share(share, max(unknown, LEAST_UNKNOWN))
