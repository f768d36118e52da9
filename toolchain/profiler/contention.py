"""Who else used our CPUs: their busy time less our own, from /proc/stat. Knows nothing of models.

Ours are those that this process may run on: on a machine whose cores are dealt out (taskset, a container with a cpuset), what happens on
the others' does not count. Times come in 10 ms ticks, so a window should last 200 ms or more. By hand: a device has no psutil.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Usage:
    """Wall seconds, and the share (0 to 1) of our CPUs that others used meanwhile; None where the system does not tell."""

    seconds: float
    others: float | None


class Watch:
    """`restart()`, work, `usage()`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._wall, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def usage(self) -> Usage:
        seconds = time.monotonic() - self._wall
        busy = _busy_seconds()
        if busy is None or self._busy is None or seconds <= 0:
            return Usage(seconds, None)
        others = (busy - self._busy) - (_own_seconds() - self._own)
        return Usage(seconds, max(0.0, others) / (seconds * cpu_count()))


def cpu_count() -> int:
    """How many CPUs are ours."""
    return len(_ours() or ()) or os.cpu_count() or 1


def _ours() -> set[int] | None:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return affinity(0) if affinity else None


def _busy_seconds() -> float | None:
    """Seconds our CPUs together were not idle since boot: user, nice, system, irq, softirq and steal. Of all CPUs, where the system shows
    no line for one of ours."""
    try:
        lines = {name: fields for name, *fields in map(str.split, _STAT.read_text().splitlines()) if name.startswith("cpu")}
        ours = [f"cpu{number}" for number in _ours() or ()]
        counted = ours if ours and lines.keys() >= set(ours) else ["cpu"]
        ticks = [int(lines[name][place]) for name in counted for place in (0, 1, 2, 5, 6, 7)]
        return sum(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, KeyError):
        return None


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system
