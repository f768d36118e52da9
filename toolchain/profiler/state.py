"""What state a device is in while it is measured: clocks, governor, load, temperatures; of a GPU its own. Read from sysfs, procfs and NVML.

Evidence, not a protocol: nothing is decided by it. An entry is {"value": x}, or {"value": null, "reason": why nobody can tell}.
By hand: a device has no psutil, which does not read governors either.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import toolchain
from toolchain.errors import MeterError
from toolchain.profiler.meters import nvml
from toolchain.profiler.meters.meter import text
from toolchain.spec import CUDA

Entry = dict[str, Any]


def versions() -> dict[str, str]:
    """What runs here besides the runtime, which `agent.identify` names."""
    return {
        "bittailor": toolchain.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def read(provider: str, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> dict[str, Any]:
    """{"versions", "cpus", "clock_mhz", "governor", "load", "temperature_c", "gpu"}: now.

    clock_mhz: median over the CPUs. load: mean number of runnable threads of the last minute, everybody's. temperature_c: by sensor.
    gpu: of the CUDA provider's GPU {"name", "clock_mhz", "memory_clock_mhz", "temperature_c", "utilisation"}.
    """
    return {
        "versions": versions(),
        "cpus": _value(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()),
        "clock_mhz": _asked(lambda: _clock_mhz(sysfs, proc)),
        "governor": _asked(lambda: _governor(sysfs)),
        "load": _asked(lambda: float(_required(proc / "loadavg").split()[0])),
        "temperature_c": _asked(lambda: _temperatures(sysfs)),
        "gpu": _asked(nvml.state) if provider == CUDA else _value(None, "the package runs on the CPU"),
    }


def _value(value: Any, reason: str = "") -> Entry:
    return {"value": value, **({"reason": reason} if value is None else {})}


def _asked(question: Callable[[], Any]) -> Entry:
    try:
        return _value(question())
    except (MeterError, OSError, ValueError, IndexError) as error:
        return _value(None, str(error))


def _required(path: Path) -> str:
    found = text(path)
    if not found:
        raise MeterError(f"{path} does not answer")
    return found


def _clock_mhz(sysfs: Path, proc: Path) -> float:
    """Of cpufreq, in kHz; in a virtual machine there is none, and the kernel's own figure is the least it knows."""
    found = [float(text(path)) / 1e3 for path in _cpus(sysfs, "scaling_cur_freq") if text(path).isdigit()]
    if not found:
        lines = (line.partition(":") for line in text(proc / "cpuinfo").splitlines())
        found = [float(value) for name, _, value in lines if name.strip() == "cpu MHz"]
    if not found:
        raise MeterError(f"neither cpufreq in {sysfs} nor {proc / 'cpuinfo'} tells it")
    return round(median(found), 1)


def _governor(sysfs: Path) -> str:
    """Of all CPUs; several kinds with how many have which."""
    found = Counter(name for path in _cpus(sysfs, "scaling_governor") if (name := text(path)))
    if not found:
        raise MeterError(f"no cpufreq in {sysfs / 'devices/system/cpu'}: a virtual machine, or the firmware sets the clock")
    return next(iter(found)) if len(found) == 1 else ", ".join(f"{name} on {count}" for name, count in sorted(found.items()))


def _cpus(sysfs: Path, name: str) -> list[Path]:
    return sorted((sysfs / "devices/system/cpu").glob(f"cpu[0-9]*/cpufreq/{name}"))


def _temperatures(sysfs: Path) -> dict[str, float]:
    """Sensor → °C, of the thermal zones and of hwmon's chips; sysfs has thousandths."""
    found: dict[str, float] = {}
    for zone in sorted((sysfs / "class/thermal").glob("thermal_zone*")):
        _note(found, f"{zone.name} {text(zone / 'type')}".strip(), text(zone / "temp"))
    for path in sorted((sysfs / "class/hwmon").glob("hwmon*/temp*_input")):
        stem = path.name.removesuffix("_input")
        _note(found, f"{text(path.parent / 'name')} {text(path.with_name(f'{stem}_label')) or stem}".strip(), text(path))
    if not found:
        raise MeterError(f"no sensor in {sysfs / 'class/thermal'} or {sysfs / 'class/hwmon'}")
    return found


def _note(found: dict[str, float], name: str, said: str) -> None:
    try:
        found[name] = int(said) / 1e3
    except ValueError:
        return  # a sensor that is off answers with an error, and there are others
