"""Trees of files laid out as Linux lays out /sys: constructed for tests, no machine's own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RANGE_UJ = 262_143_328_850
"""What a Xeon's packages say."""


def write(root: Path, files: dict[str, object]) -> Path:
    """`root` with each file of `files` (path below it → content). A file appears whole, as a read of sysfs is."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(f"{content}\n")
        os.replace(part, path)
    return root


def package(number: int, energy_uj: int, range_uj: int = RANGE_UJ, name: str = "") -> dict[str, object]:
    """One zone of powercap."""
    zone = f"class/powercap/intel-rapl:{number}"
    return {f"{zone}/name": name or f"package-{number}", f"{zone}/energy_uj": energy_uj, f"{zone}/max_energy_range_uj": range_uj}


@contextmanager
def advancing(root: Path, watts: float) -> Iterator[Path]:
    """A constructed RAPL counter that a thread advances at constant power, every two milliseconds, as if a machine used it."""
    stop = threading.Event()
    start = time.monotonic()
    write(root, package(0, 0))

    def advance() -> None:
        while not stop.wait(0.002):
            uj = int((time.monotonic() - start) * watts * 1e6) % (RANGE_UJ + 1)
            write(root, {"class/powercap/intel-rapl:0/energy_uj": uj})

    thread = threading.Thread(target=advance, daemon=True)
    thread.start()
    try:
        yield root
    finally:
        stop.set()
        thread.join()


class Hand:
    """A clock that tests turn by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
