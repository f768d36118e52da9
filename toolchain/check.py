"""Measurements held against a budget: a verdict per limit, one over all, as exit code. Cannot measure.

The verdict is about the median of a resource, and the trials only tell where the median lies. So each limit is held against a 95%
confidence interval: within if all of it is at or below the limit, over if all of it is above, else "could not tell".

Latency is held against processes instead (`hold_latency`), look by look, with one-sided bounds from `blocks.py`: however often it is
looked, at most ALPHA of all checks say "within" of a package that is over, and as many "over" of one that is within.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from toolchain.blocks import Block, Speed, at_speed, bounds, compared, middle, spent
from toolchain.errors import InputError
from toolchain.spec import Budget, Measurement, Verdict

WITHIN, OVER, COULD_NOT_TELL = "within", "over", "could not tell"
CONFIDENCE = 0.95
_TAILS = round(2 / (1 - CONFIDENCE))
ALPHA = 0.01
"""How often a check may call a package within that is over, or over that is within, all its looks together."""

LEAST_BLOCKS = 3
"""Fewer processes than this tell nothing of how processes differ."""

REGRESSED, NOTICED = 1.02, 1.08
FLAGGED, MISSED = 0.05, 0.01
"""A regression: surely more than 2% slower than the baseline, since two checks of one package differ by as much anyway. None: surely less
than 8%. In between, what is found first (an indifference zone, Wald 1947). How often either may err, all looks together: a flag at
2%, of what is no slower hardly ever; 8% missed."""

HEAVIER = 1.03
BUSY = "other processes used the CPU during the trials"
_EXIT_CODES = {WITHIN: 0, OVER: 1, COULD_NOT_TELL: 3}

_PEAKS = frozenset({"peak_memory_bytes"})  # the limit is on the worst process, not on the typical one
_COUNTS = frozenset({"compute_flop"})  # counted, not sampled

# Student's t at 97.5% for n − 1 degrees of freedom, n = 2..5: below n = 6 the whole range of the trials holds the median with less
# than 95%, so no distribution-free interval exists.
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def decide(
    budget: Budget, measurements: Mapping[str, Measurement], errors: Mapping[str, float | None] = MappingProxyType({})
) -> list[Verdict]:
    """One verdict per limit of the budget, in the order of RESOURCES; empty for a budget without limits.

    A resource that is absent, null, invalid or not finite gives "could not tell" with the reason. Memory is held by its largest
    trial (several fresh processes: the limit is on the peak), compute by its count, latency and energy by `median_interval`.
    errors: resource → how far its meter may be off, relative, on every trial alike; the interval is wider by that at both ends.
    """
    return [_hold(name, limit, measurements.get(name), errors.get(name) or 0.0) for name, limit in budget.limits.items()]


def hold_latency(name: str, limit: float, blocks: Sequence[Block], look: int, speed: Speed | None = None) -> Verdict:
    """The look-th look at one latency (ms) of a package: the middle of its processes, with one-sided bounds, against the limit.

    speed: every window is brought to it, as far as the package follows its reference; what is unknown of that widens the bounds, the
    further the machine's speed is from that one. Processes that others disturbed count only where fewer than LEAST_BLOCKS are clean, and
    then can keep the limit but not break it: others on the CPU only make a package slower.
    """
    clean = [block for block in blocks if block.valid]
    disturbed = len(clean) < LEAST_BLOCKS
    used = list(blocks) if disturbed else clean
    if name == "latency_p95_ms" and (few := [block for block in used if block.p95_ms is None]):
        reason = f"{len(few)} of {len(used)} processes had too few single runs for a 95th percentile"
        return Verdict(name, limit, None, None, None, COULD_NOT_TELL, reason)
    if len(used) < LEAST_BLOCKS:
        return Verdict(
            name, limit, None, None, None, COULD_NOT_TELL, f"{len(used)} processes were timed, {LEAST_BLOCKS} are the least"
        )
    levels, doubt = at_speed(used, name, speed) if speed else ([block.level_ms(name) for block in used], 0.0)
    low, high = bounds(levels, spent(ALPHA, look), doubt)
    if disturbed and speed:  # a neighbour may slow the reference more than the package: it must keep the limit as it ran, too
        high = max(high, bounds([block.level_ms(name) for block in used], spent(ALPHA, look))[1])
    if high <= limit:
        return Verdict(name, limit, middle(levels), low, high, WITHIN, f"although {BUSY}" if disturbed else "")
    if disturbed:
        return Verdict(name, limit, middle(levels), low, high, COULD_NOT_TELL, BUSY)
    if low > limit:
        return Verdict(name, limit, middle(levels), low, high, OVER)
    reason = f"the limit lies between the bounds of {len(used)} processes; leave more room, or measure longer: --most-seconds"
    near_low, near_high = bounds(levels, spent(ALPHA, look))
    if not near_low <= limit < near_high:
        reason = (
            "how far the package follows the machine's speed is not known so well: bittailor profile MODEL --follow, now and while it "
            "is as fast as then, or --renew; and export anew"
        )
    return Verdict(name, limit, middle(levels), low, high, COULD_NOT_TELL, reason)


def hold_ratio(name: str, now: Sequence[Block], then: Sequence[Block], look: int) -> Verdict:
    """The look-th look at how much slower a latency is than in those of a baseline's processes that found the machine alike
    (`blocks.compared`). Over: surely more than REGRESSED. Within: surely less than NOTICED."""
    verdict = Verdict(f"{name} / baseline", REGRESSED, None, None, None, COULD_NOT_TELL)
    sides = [[block for block in side if block.valid and name in block.trials] for side in (now, then)]
    if min(map(len, sides)) < LEAST_BLOCKS:
        few = f"{len(sides[0])} undisturbed processes now, {len(sides[1])} in the baseline; {LEAST_BLOCKS} are the least"
        return replace(verdict, reason=few)
    seen = compared(sides[0], sides[1], name, spent(FLAGGED, look), spent(MISSED, look))
    found = f"{seen.alike[0]} of {len(sides[0])} processes and {seen.alike[1]} of the baseline's {len(sides[1])} found the machine alike"
    if min(seen.alike) < LEAST_BLOCKS or seen.high == math.inf:
        return replace(verdict, measured=seen.value, reason=f"{found}; make the baseline longer: --least-seconds 120")
    held = replace(verdict, measured=seen.value, low=seen.low, high=seen.high)
    if seen.low > REGRESSED:
        return replace(held, verdict=OVER, reason=f"a regression: {(seen.value - 1):+.1%} against the baseline; {found}")
    if seen.high < NOTICED:
        return replace(held, verdict=WITHIN, reason=f"no regression of {NOTICED - 1:.0%} or more; {found}")
    possible = f"{(seen.low - 1):+.1%} to {(seen.high - 1):+.1%} are possible"
    return replace(held, reason=f"{(seen.value - 1):+.1%}, but {possible}; {found}; measure both longer")


def hold_peak_ratio(now: Measurement, then: Sequence[float]) -> Verdict:
    """The largest process's memory against the baseline's largest: a rise of more than HEAVIER is one. Of one package they were
    seen to differ by 1%."""
    name = "peak_memory_bytes / baseline"
    if not now.trials or not then:
        return Verdict(name, HEAVIER, None, None, None, COULD_NOT_TELL, "memory was not measured in both")
    ratio = max(now.trials) / max(then)
    return Verdict(name, HEAVIER, ratio, ratio, ratio, OVER if ratio > HEAVIER else WITHIN)


def median_interval(trials: Sequence[float]) -> tuple[float, float]:
    """(low, high): an interval that holds the median of what was sampled in at least 95% of repetitions of the experiment.

    From six trials on: the order statistics x_(k) and x_(n+1−k), with the largest k for which 1 − 2·P(Binomial(n, ½) ≤ k − 1) is
    still at least 0.95. This needs no assumption but independent trials, so outliers and two-humped timings do not fool it.
    For two to five trials nothing is free of assumptions: Student's interval about the mean, which assumes near-normal trials and
    is wide (±6.4 times the distance of two trials), stretched to include all of them and cut at 0.
    Source: David & Nagaraja, Order Statistics, 3rd ed., section 7.1. Raises InputError for fewer than two trials.
    """
    n = len(trials)
    if n < 2:
        raise InputError(f"expected at least 2 trials, got {n}")
    ordered = sorted(trials)
    if n in _STUDENT:
        mean = math.fsum(ordered) / n
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in ordered) / (n - 1))
        half = _STUDENT[n] * deviation / math.sqrt(n)
        return max(min(mean - half, ordered[0]), 0.0), max(mean + half, ordered[-1])
    k, tail, term = 0, 0, 1  # term = C(n, k); whole numbers, because 2^n leaves the floats at n = 1024
    while _TAILS * (tail + term) <= 2**n:
        tail += term
        term = term * (n - k) // (k + 1)
        k += 1
    return ordered[k - 1], ordered[n - k]


def overall(verdicts: Sequence[Verdict]) -> str:
    """Over if any limit is broken, else "could not tell" if any is open or there was none to hold, else within."""
    found = {verdict.verdict for verdict in verdicts}
    if OVER in found:
        return OVER
    return WITHIN if found == {WITHIN} else COULD_NOT_TELL


def exit_code(verdict: str) -> int:
    """0 within, 1 over, 3 could not tell (2 is a wrong command or file)."""
    return _EXIT_CODES[verdict]


def _hold(name: str, limit: float, measurement: Measurement | None, error: float) -> Verdict:
    if measurement is None or measurement.value is None:
        reason = (measurement.reason if measurement else "") or "not measured"
        return Verdict(name, limit, None, None, None, COULD_NOT_TELL, reason)
    value, trials = measurement.value, measurement.trials
    if not all(map(math.isfinite, (value, *trials))):
        return Verdict(name, limit, None, None, None, COULD_NOT_TELL, "the measurement is not a finite number")
    if name in _COUNTS:
        low = high = value
    elif not measurement.valid:
        reason = measurement.reason or f"the measurement is not valid ({measurement.n} clean trials, 2 are the least)"
        return Verdict(name, limit, value, None, None, COULD_NOT_TELL, reason)
    elif name in _PEAKS:
        value = low = high = max((value, *trials))
    elif len(trials) < 2:
        return Verdict(name, limit, value, None, None, COULD_NOT_TELL, f"{len(trials)} trials were kept, 2 are the least")
    else:
        near = median_interval(trials)
        low, high = near[0] * max(0.0, 1 - error), near[1] * (1 + error)
        if low <= limit < high and not near[0] <= limit < near[1]:
            return Verdict(name, limit, value, low, high, COULD_NOT_TELL, f"its meter may be off by {error:.1%}; leave more room")
    if high <= limit:
        return Verdict(name, limit, value, low, high, WITHIN)
    if low > limit:
        return Verdict(name, limit, value, low, high, OVER)
    reason = f"the limit lies inside the interval of {len(trials)} trials; take more on a quieter machine, or leave more room"
    return Verdict(name, limit, value, low, high, COULD_NOT_TELL, reason)
