"""Who else used the CPU: the machine's busy time less our own, from /proc/stat. Knows nothing of models.

Times come in 10 ms ticks, so a window should last 200 ms or more. By hand: a device has no psutil.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Usage:
    """Wall seconds, and the share (0 to 1) of all CPUs that others used meanwhile; None where the system does not tell."""

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
        return Usage(seconds, max(0.0, others) / (seconds * (os.cpu_count() or 1)))


def _busy_seconds() -> float | None:
    """Seconds all CPUs together were not idle since boot: user, nice, system, irq, softirq and steal."""
    try:
        fields = _STAT.read_text().split("\n", 1)[0].split()[1:]
        ticks = [int(field) for field in fields]
        return (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6] + ticks[7]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system
