"""Power samples → energy: a thread reads a sensor at an interval, the trapezia between samples are summed.

What that gets wrong is seen by summing every second sample as well: where both sums agree, faster sampling would change little.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from toolchain.errors import MeterError
from toolchain.profiler.meters.meter import Reading


class Sampler:
    """Energy under a power reading in mW, from the moment of its making."""

    def __init__(self, power_mw: Callable[[], float], interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._power_mw, self._interval_s, self._clock = power_mw, interval_s, clock
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._error: MeterError | None = None
        self._thread: threading.Thread | None = None
        self._last = self._second = (clock(), power_mw())
        self._energy_mj = self._half_rate_mj = 0.0
        self._changes = self._samples = 0

    def start(self) -> Sampler:
        """Sample in a thread until `close`."""
        self._thread = threading.Thread(target=self._go, daemon=True)
        self._thread.start()
        return self

    def _go(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.read()
            except MeterError:
                return  # kept: the next who reads is told

    def read(self) -> Reading:
        """Takes a sample now. Raises MeterError once the sensor did not answer, from then on."""
        with self._lock:
            if self._error:
                raise self._error
            try:
                power = self._power_mw()
            except MeterError as error:
                self._error = error
                raise
            now = (self._clock(), power)
            self._energy_mj += _trapezium_mj(self._last, now)
            self._samples += 1
            self._changes += power != self._last[1]
            self._last = now
            if self._samples % 2 == 0:
                self._half_rate_mj += _trapezium_mj(self._second, now)
                self._second = now
            return Reading(self._energy_mj, self._half_rate_mj + _trapezium_mj(self._second, now), self._changes, self._samples)

    def close(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()


def _trapezium_mj(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Both (seconds, mW)."""
    return (second[0] - first[0]) * (first[1] + second[1]) / 2
