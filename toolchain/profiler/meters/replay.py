"""A recorded trace that reads like a meter, so that a protocol's arithmetic can be tested without one. No device file can name it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import inf

from toolchain.errors import MeterError
from toolchain.profiler.meters.meter import Reading


class Replay:
    """A counter's trace [(seconds, mJ)], read at the clock's time: the last entry that is not later. After the last entry it vanishes."""

    name, reads, sampled, step_s, patience_s, longest_gap_s = "replay", "a recorded trace", False, 0.0, 5.0, inf

    def __init__(self, trace: Sequence[tuple[float, float]], clock: Callable[[], float], least_window_s: float = 5.0) -> None:
        self._times, self._values = [time for time, _ in trace], [value for _, value in trace]
        self._clock, self.least_window_s = clock, least_window_s
        self._place, self._changes = -1, -1
        self.read()

    def read(self) -> Reading:
        now = self._clock()
        place = bisect_right(self._times, now) - 1
        if place < 0 or now > self._times[-1]:
            raise MeterError(f"the trace holds nothing at {now:.3f} s: the meter vanished")
        value = self._values[place]
        self._changes += self._place < 0 or value != self._values[self._place]
        self._place = place
        return Reading(value, value, self._changes)

    def close(self) -> None:
        """Nothing is held open."""
