"""Measurements held against a budget: a verdict per limit, one over all, as exit code. Cannot measure.

The verdict is about the median of a resource, and the trials only tell where the median lies. So each limit is held against a 95%
confidence interval: within if all of it is at or below the limit, over if all of it is above, else "could not tell".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from toolchain.errors import InputError
from toolchain.spec import Budget, Measurement, Verdict

WITHIN, OVER, COULD_NOT_TELL = "within", "over", "could not tell"
CONFIDENCE = 0.95
_TAILS = round(2 / (1 - CONFIDENCE))
_EXIT_CODES = {WITHIN: 0, OVER: 1, COULD_NOT_TELL: 3}

_PEAKS = frozenset({"peak_memory_bytes"})  # the limit is on the worst process, not on the typical one
_COUNTS = frozenset({"compute_flop"})  # counted, not sampled

# Student's t at 97.5% for n − 1 degrees of freedom, n = 2..5: below n = 6 the whole range of the trials holds the median with less
# than 95%, so no distribution-free interval exists.
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def decide(budget: Budget, measurements: Mapping[str, Measurement]) -> list[Verdict]:
    """One verdict per limit of the budget, in the order of RESOURCES; empty for a budget without limits.

    A resource that is absent, null, invalid or not finite gives "could not tell" with the reason. Memory is held by its largest
    trial (several fresh processes: the limit is on the peak), compute by its count, latency and energy by `median_interval`.
    """
    return [_hold(name, limit, measurements.get(name)) for name, limit in budget.limits.items()]


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


def _hold(name: str, limit: float, measurement: Measurement | None) -> Verdict:
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
        low, high = median_interval(trials)
    if high <= limit:
        return Verdict(name, limit, value, low, high, WITHIN)
    if low > limit:
        return Verdict(name, limit, value, low, high, OVER)
    reason = f"the limit lies inside the interval of {len(trials)} trials; take more on a quieter machine, or leave more room"
    return Verdict(name, limit, value, low, high, COULD_NOT_TELL, reason)
