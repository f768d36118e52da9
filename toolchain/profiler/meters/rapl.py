"""RAPL: the energy counters of CPU packages, from Linux powercap (Intel; AMD's have Intel's name too).

    class/powercap/intel-rapl:N/{name, energy_uj, max_energy_range_uj}      name: package-N, or package-N-die-M

Only the packages count. Their subzones (intel-rapl:N:M: core, uncore, dram on clients) are parts of them or would be counted for some
machines and not for others; psys is the whole platform, its packages included; intel-rapl-mmio is the same package by another way.
The counter steps about every millisecond and wraps at max_energy_range_uj: after minutes on a busy server. Readable by root alone since
2020 (CVE-2020-8694: its steps gave away what others compute).
Source: Documentation/power/powercap/powercap.rst of Linux.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import MeterError
from toolchain.profiler.meters.meter import Reading, number, text

MOST_WATTS = 1000.0
"""More than any package draws: whether a counter wrapped unseen is judged by this power."""
_SLACK_S = 0.1  # a counter that steps late shows the energy of more time than has passed between two reads


@dataclass(frozen=True)
class Zone:
    """One package's counter and the highest number it shows."""

    name: str
    counter: Path
    range_uj: int


class Rapl:
    """All packages of a machine together."""

    name, sampled, step_s, least_window_s, patience_s = "rapl", False, 0.0, 1.0, 2.0

    def __init__(self, sysfs: Path = Path("/sys"), clock: Callable[[], float] = time.monotonic) -> None:
        """Raises MeterError where there is no package, or its counter may not be read."""
        self._zones = zones(sysfs)
        self._clock = clock
        self.reads = " + ".join(zone.name for zone in self._zones)
        self._wraps_s = min(zone.range_uj for zone in self._zones) / 1e6 / MOST_WATTS
        self.longest_gap_s = self._wraps_s / 2
        self._last = [number(zone.counter, _remedy(zone)) for zone in self._zones]
        self._at, self._energy_uj, self._changes = clock(), 0, 0

    def read(self) -> Reading:
        now = self._clock()
        gap = now - self._at
        if gap >= self._wraps_s:
            raise MeterError(
                f"the RAPL counter was not read for {gap:.1f} s, and at {MOST_WATTS:.0f} W it wraps every {self._wraps_s:.1f} s:"
                " how often it did cannot be told"
            )
        risen = 0
        for place, zone in enumerate(self._zones):
            seen = number(zone.counter, _remedy(zone))
            rise_uj = rise(self._last[place], seen, zone.range_uj)
            if rise_uj > MOST_WATTS * 1e6 * (gap + _SLACK_S):
                went = f"from {self._last[place]} to {seen} µJ in {gap:.3f} s"
                raise MeterError(f"the RAPL counter of {zone.name} went {went}: it was reset")
            self._last[place] = seen
            risen += rise_uj
        self._at = now
        self._energy_uj += risen
        self._changes += risen > 0
        return Reading(self._energy_uj / 1e3, self._energy_uj / 1e3, self._changes)

    def close(self) -> None:
        """Nothing is held open."""


def rise(before: int, after: int, range_uj: int) -> int:
    """Microjoules between two readings of a counter that starts over at 0 after `range_uj`, if it did so at most once."""
    return (after - before) % (range_uj + 1)


def zones(sysfs: Path) -> list[Zone]:
    """The packages. Raises MeterError if there are none, or they do not say where they wrap."""
    powercap = sysfs / "class" / "powercap"
    found = [
        Zone(text(folder / "name"), folder / "energy_uj", number(folder / "max_energy_range_uj"))
        for folder in sorted(powercap.glob("intel-rapl:*"))
        if text(folder / "name").startswith("package")
    ]
    if not found:
        raise MeterError(f"no RAPL counter in {powercap} (virtual machines and most ARM boards have none)")
    if bad := next((zone for zone in found if zone.range_uj <= 0), None):
        raise MeterError(f"the RAPL counter of {bad.name} says that it wraps at {bad.range_uj} µJ")
    return found


def _remedy(zone: Zone) -> str:
    return f"type: sudo chmod a+r {zone.counter.parent.parent}/intel-rapl:*/energy_uj (until the next start of the machine)"
