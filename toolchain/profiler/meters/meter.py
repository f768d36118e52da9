"""What every energy meter has in common: a reading that only rises, how long a window it needs, and why it cannot tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from toolchain.errors import MeterError
from toolchain.reading import read_text

_MOST_BYTES = 1 << 16
"""Of a file of sysfs, which has a page at most."""
_MOST_DIGITS = 20
"""Of a number there: 64 bits and a sign."""


@dataclass(frozen=True)
class Reading:
    """Energy since the meter was opened; the same from every second sample alone (of a counter: the same); how often it was seen to
    change; samples taken so far (of a counter 0)."""

    energy_mj: float
    half_rate_mj: float
    changes: int
    samples: int = 0


class Meter(Protocol):
    """An opened meter.

    name, reads        "rapl", "package-0 + package-1": what its number is the energy of
    sampled            it samples power (and takes a sample when it is read) instead of reading a counter that steps
    step_s             seconds between two samples; of a counter 0: how often it steps is seen by watching it (`energy.step_seconds`)
    least_window_s     no shorter window is a measurement
    patience_s         how long a counter may stand still while it is watched
    longest_gap_s      it must be read at least this often
    """

    name: str
    reads: str
    sampled: bool
    step_s: float
    least_window_s: float
    patience_s: float
    longest_gap_s: float

    def read(self) -> Reading:
        """Raises MeterError: the reason why there is no number."""
        ...

    def close(self) -> None: ...


def number(path: Path, remedy: str = "") -> int:
    """The whole number in a file of sysfs. Raises MeterError naming the file, with the remedy where reading it is not allowed."""
    try:
        said = read_text(path, _MOST_BYTES)
        if len(said.strip()) > _MOST_DIGITS:
            raise ValueError(f"{len(said)} characters")
        return int(said)
    except PermissionError as error:
        raise MeterError(f"{path} is not readable ({error.strerror})", remedy) from error
    except (OSError, ValueError) as error:
        raise MeterError(f"{path} does not answer ({getattr(error, 'strerror', None) or error})") from error


def text(path: Path) -> str:
    """A line of sysfs, or "" where there is none."""
    try:
        return read_text(path, _MOST_BYTES).strip()
    except (OSError, ValueError):
        return ""
