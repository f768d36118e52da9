"""Energy meters: what a device can tell of its own energy. Standard library only; NVML alone needs `nvidia-ml-py`.

| meter     | sees                                 | resolution; shortest window                  | permission                        |
|-----------|--------------------------------------|----------------------------------------------|-----------------------------------|
| `rapl`    | CPU packages, all of them            | counter, ~1 ms, wraps are followed; 1 s      | root since 2020: `sudo chmod a+r` |
| `nvml`    | one NVIDIA GPU's board               | counter, ~100 ms; 5 s or 50 steps            | none; needs `nvidia-ml-py`        |
| `hwmon`   | a board's rails (INA chips, ACPI)    | samples, 20 ms or more; 5 s or 50 samples    | mostly none                       |
| `battery` | the whole device, screen included    | poor: gauge, 1 to 30 s; 60 s or 50 steps     | none; on Android the shell user's |
| `none`    | nothing: energy is null, with reason |                                              |                                   |

`meter: auto` takes the first that can be read: for a CPU provider rapl, hwmon; for a GPU's nvml, hwmon. A battery must be asked for by
name, since a profile by it takes hours. A meter counts all that happens on what it sees: the trials of a disturbed window are repeated,
and idle energy is measured to be told apart. Where a meter cannot tell (no permission, too short a window, one so long that the trials
would take more than 25 minutes, a counter that stands still, a meter that vanishes in the middle, a counter that may have wrapped unseen,
a battery on its charger) there is no number but a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from toolchain.errors import MeterError
from toolchain.profiler.meters.battery import Battery
from toolchain.profiler.meters.hwmon import Hwmon
from toolchain.profiler.meters.meter import Meter, Reading
from toolchain.profiler.meters.nvml import Nvml
from toolchain.profiler.meters.rapl import Rapl

__all__ = ["LEAST_WINDOW_S", "METERS", "Meter", "Reading", "open_meter", "states"]

METERS: dict[str, Callable[[Path], Meter]] = {"rapl": Rapl, "nvml": Nvml, "hwmon": Hwmon, "battery": Battery}
LEAST_WINDOW_S = {kind.name: kind.least_window_s for kind in (Rapl, Nvml, Hwmon, Battery)}
"""What a row takes of each, known before the meter is seen."""


def open_meter(name: str, sysfs: Path) -> Meter:
    """The meter `name`, reading below `sysfs` (/sys). Raises MeterError: why it cannot be read."""
    if name not in METERS:
        raise MeterError(f"expected a meter among {', '.join(METERS)}, got {name!r}")
    try:
        return METERS[name](sysfs)
    except OSError as error:  # a folder that may not be entered
        raise MeterError(f"{error.filename or sysfs} is not readable ({error.strerror})") from error


def states(sysfs: Path) -> dict[str, str]:
    """Every meter, and why it cannot be read here, or ""."""
    found = {}
    for name in METERS:
        try:
            open_meter(name, sysfs).close()
            found[name] = ""
        except MeterError as error:
            found[name] = str(error)
    return found
