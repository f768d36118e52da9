"""hwmon: power sensors of boards, above all TI's INA chips (Jetson's INA3221), and the power meter that a server's ACPI describes.

    class/hwmon/hwmonN/{name, inM_label, inM_input (mV), currM_input (mA), powerM_input (µW), update_interval (ms),
                          powerM_average (µW), powerM_average_interval (ms)}
    bus/i2c/drivers/ina3221x/*/iio*/{rail_name_M, in_powerM_input (mW)}          JetPack 4 and older

An ACPI power meter tells the average over its interval, often a second or more: it is read no faster, and windows are 50 intervals long.
Which rails are added: the board's input alone where a rail has its name (VDD_IN, POM_5V_IN, VIN), since the others hang on it; else every
rail of every chip. A rail that feeds another one is then counted twice, so `reads` names them all: on a board that is not Jetson Orin
Nano or NX, look at the schematic. Sensors of other chips (fans, GPUs, network cards) are never added.
Sources: Documentation/hwmon/{sysfs-interface,ina3221,ina2xx,acpi_power_meter}.rst of Linux; NVIDIA Jetson Linux Developer Guide.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path

from toolchain.errors import MeterError
from toolchain.profiler.meters.meter import Reading, number, text
from toolchain.profiler.meters.sampled import Sampler

_CHIPS = re.compile(r"ina\d+\w*|power_meter")
_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")
_UNUSED = "NC"
_CHANNELS = ("1", "2", "3")
_INTERVAL_S = 0.02
"""Between samples, where the chip does not say that it measures less often."""
_REMEDY = "type: sudo chmod a+r on it, or run as a user who may"


@dataclass(frozen=True)
class Rail:
    """One measured supply: its power is power_mw / scale, or the product of voltage (mV) and current (mA)."""

    name: str
    files: tuple[Path, ...]
    scale: float
    interval_s: float

    def power_mw(self) -> float:
        product = 1.0
        for path in self.files:
            product *= number(path, _REMEDY)
        return product / self.scale


class Hwmon:
    """The board's rails, sampled together."""

    name, sampled, least_window_s, patience_s, longest_gap_s = "hwmon", True, 5.0, 5.0, inf

    def __init__(self, sysfs: Path = Path("/sys"), clock: Callable[[], float] = time.monotonic, threaded: bool = True) -> None:
        """threaded: False where whoever reads does the sampling. Raises MeterError without a sensor that can be read."""
        rails = board_rails(sysfs)
        self.reads = " + ".join(rail.name for rail in rails)
        self.step_s = max(_INTERVAL_S, *(rail.interval_s for rail in rails))
        self._sampler = Sampler(lambda: sum(rail.power_mw() for rail in rails), self.step_s, clock)
        if threaded:
            self._sampler.start()

    def read(self) -> Reading:
        return self._sampler.read()

    def close(self) -> None:
        self._sampler.close()


def board_rails(sysfs: Path) -> list[Rail]:
    """The rails that make up the board's power. Raises MeterError if none is known."""
    rails = [*_hwmon_rails(sysfs), *_iio_rails(sysfs)]
    if not rails:
        raise MeterError(f"no power sensor in {sysfs / 'class' / 'hwmon'} (looked for INA chips and ACPI's power meter)")
    whole = [rail for rail in rails if rail.name.rpartition(" ")[2] in _INPUTS]
    return whole[:1] or rails


def _hwmon_rails(sysfs: Path) -> list[Rail]:
    rails = []
    for folder in sorted((sysfs / "class" / "hwmon").glob("hwmon*")):
        chip = text(folder / "name")
        if not _CHIPS.fullmatch(chip):
            continue
        interval = _seconds(folder / "update_interval")
        powers = sorted(folder.glob("power*_input")) or sorted(folder.glob("power*_average"))
        if powers:
            labels = [text(path.with_name(f"{_stem(path)}_label")) for path in powers]
            slowest = [max(interval, _seconds(path.with_name(f"{path.name}_interval"))) for path in powers]
            rails += [
                Rail(_named(chip, label, _stem(path)), (path,), 1e3, least)
                for label, path, least in zip(labels, powers, slowest, strict=True)
            ]
            continue
        for current in sorted(folder.glob("curr*_input")):
            place = _stem(current).removeprefix("curr")
            voltage, label = folder / f"in{place}_input", text(folder / f"in{place}_label")
            # Not a channel that is not connected, nor the INA3221's fourth current, which is the sum of the others.
            if place in _CHANNELS and voltage.exists() and label != _UNUSED and text(folder / f"in{place}_enable") != "0":
                rails.append(Rail(_named(chip, label, f"channel {place}"), (voltage, current), 1e3, interval))
    return rails


def _iio_rails(sysfs: Path) -> list[Rail]:
    rails = []
    for chip in sorted((sysfs / "bus" / "i2c" / "drivers" / "ina3221x").glob("*-*")):
        for folder in sorted(chip.glob("iio*"))[:1]:  # iio_device is a link to iio:deviceN
            for path in sorted(folder.glob("in_power*_input")):
                label = text(folder / f"rail_name_{_stem(path).removeprefix('in_power')}")
                if label != _UNUSED:
                    rails.append(Rail(_named("ina3221x", label, _stem(path)), (path,), 1.0, 0.0))
    return rails


def _seconds(path: Path) -> float:
    """An interval that a chip tells in ms; 0 where it tells none."""
    said = text(path)
    return int(said) / 1e3 if re.fullmatch("[0-9]{1,6}", said) else 0.0


def _named(chip: str, label: str, otherwise: str) -> str:
    return f"{chip} {label or otherwise}"


def _stem(path: Path) -> str:
    return path.name.rpartition("_")[0]
