"""The battery's own gauge: what the whole device draws, screen and radio included, while no charger is attached.

    class/power_supply/*/{type, scope, status, power_now (µW) | current_now (µA) × voltage_now (µV) | energy_now (µWh)
                          | charge_now (µAh) × voltage_now}

Poor: gauges refresh every second to every half minute, and energy_now moves by 1 to 10 mWh (3.6 to 36 J) at a time. Windows are a minute or
longer, and small differences stay unseen. Source: Documentation/ABI/testing/sysfs-class-power of Linux.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from pathlib import Path

from toolchain.errors import MeterError
from toolchain.profiler.meters.meter import Reading, number, text
from toolchain.profiler.meters.sampled import Sampler

_INTERVAL_S = 0.5
_UWH_MJ = 3.6  # one µWh in mJ
_REMEDY = "on Android an app may not read it: run as the shell user (adb)"


class Battery:
    """The first battery that feeds the device."""

    name, least_window_s, patience_s, longest_gap_s = "battery", 60.0, 120.0, inf

    def __init__(self, sysfs: Path = Path("/sys"), clock: Callable[[], float] = time.monotonic, threaded: bool = True) -> None:
        """threaded: as `Hwmon` has it. Raises MeterError without a battery, on a charger, or where the gauge tells nothing."""
        self._folder = battery(sysfs)
        self._discharging()
        power, kind = self._power()
        self._sampler: Sampler | None = None
        if power:
            self._sampler = Sampler(power, _INTERVAL_S, clock)
            if threaded:
                self._sampler.start()
        else:
            kind = next((name for name in ("energy_now", "charge_now") if (self._folder / name).exists()), "")
            if not kind:
                raise MeterError(f"{self._folder} tells neither power nor current nor energy")
            self._kind = kind
            self._left, self._energy_mj, self._changes = number(self._folder / kind, _REMEDY), 0.0, 0
        self.sampled, self.step_s = power is not None, _INTERVAL_S if power else 0.0
        self.reads = f"{self._folder.name} {kind}"

    def read(self) -> Reading:
        self._discharging()
        if self._sampler:
            return self._sampler.read()
        left = number(self._folder / self._kind, _REMEDY)
        if left != self._left:
            self._energy_mj += (self._left - left) * self._unit_mj()
            self._left, self._changes = left, self._changes + 1
        return Reading(self._energy_mj, self._energy_mj, self._changes)

    def close(self) -> None:
        if self._sampler:
            self._sampler.close()

    def _discharging(self) -> None:
        status = text(self._folder / "status")
        if status != "Discharging":
            raise MeterError(
                f"the battery {self._folder.name} is {status.lower() or 'silent about its state'}, not discharging:"
                " what it loses is not what the device draws",
                "unplug the charger",
            )

    def _power(self) -> tuple[Callable[[], float] | None, str]:
        """The power reading in mW and its name; (None, "") where there is no such file."""
        folder = self._folder
        if (folder / "power_now").exists():
            return lambda: abs(number(folder / "power_now", _REMEDY)) / 1e3, "power_now"
        if (folder / "current_now").exists() and (folder / "voltage_now").exists():

            def product() -> float:  # some drivers count a current that leaves as negative
                return abs(number(folder / "current_now", _REMEDY)) * number(folder / "voltage_now", _REMEDY) / 1e9

            return product, "current_now x voltage_now"
        return None, ""

    def _unit_mj(self) -> float:
        """What one unit of the gauge is worth: of charge, at the voltage of now; the voltage alone moves, and is not energy."""
        return _UWH_MJ * (number(self._folder / "voltage_now", _REMEDY) / 1e6 if self._kind == "charge_now" else 1.0)


def battery(sysfs: Path) -> Path:
    """The folder of the first battery that is the device's own, not a mouse's. Raises MeterError."""
    supplies = sysfs / "class" / "power_supply"
    for folder in sorted(supplies.glob("*")):
        if text(folder / "type") == "Battery" and text(folder / "scope") != "Device" and text(folder / "present") != "0":
            return folder
    raise MeterError(f"no battery in {supplies}")
