"""Energy meters on constructed trees of sysfs: what they add up, and when they give a reason instead of a number."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from constructed_sysfs import RANGE_UJ, Hand, advancing, package, write
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import InputError, MeterError
from toolchain.profiler import gpu
from toolchain.profiler.meters import METERS, open_meter, states
from toolchain.profiler.meters.battery import Battery
from toolchain.profiler.meters.hwmon import Hwmon, board_rails
from toolchain.profiler.meters.nvml import Nvml
from toolchain.profiler.meters.rapl import MOST_WATTS, Rapl, rise
from toolchain.profiler.meters.sampled import Sampler

# ---- RAPL


def _counter(number: int, value: int) -> dict[str, object]:
    return {f"class/powercap/intel-rapl:{number}/energy_uj": value}


def test_a_counter_that_wraps_goes_on_rising(tmp_path: Path) -> None:
    clock = Hand()
    meter = Rapl(write(tmp_path, package(0, RANGE_UJ - 1_000_000)), clock)
    clock.seconds = 1.0
    write(tmp_path, _counter(0, RANGE_UJ - 400_000))
    assert meter.read().energy_mj == 600
    clock.seconds = 2.0
    write(tmp_path, _counter(0, 599_999))
    assert meter.read().energy_mj == 1600
    assert meter.read().changes == 2


@given(st.integers(1, 2**48), st.data())
def test_whatever_is_used_between_two_reads_is_told_if_it_is_less_than_the_range(range_uj: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, range_uj))
    used = data.draw(st.lists(st.integers(0, range_uj), max_size=20))
    shown = [start]
    for energy in used:  # the counter as the hardware has it: it takes every number from 0 to the range
        shown.append((shown[-1] + energy) % (range_uj + 1))
    assert [rise(before, after, range_uj) for before, after in pairwise(shown)] == used


def test_packages_are_added_and_parts_of_them_are_not(tmp_path: Path) -> None:
    """Each package wraps by itself; core, dram, psys and the same package by way of mmio are not energy of their own."""
    clock = Hand()
    tree = write(tmp_path, {**package(0, 0), **package(1, 5_000, range_uj=9_000), **package(2, 0, name="psys")})
    for part in ("intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:1:0", "intel-rapl-mmio:0"):
        zone = f"class/powercap/{part}"
        name = "package-0" if "mmio" in part else ("core" if part.endswith(":0") else "dram")
        write(tree, {f"{zone}/name": name, f"{zone}/energy_uj": 0, f"{zone}/max_energy_range_uj": RANGE_UJ})
    meter = Rapl(tree, clock)
    assert meter.reads == "package-0 + package-1"
    for zone in (tree / "class" / "powercap").iterdir():
        (zone / "energy_uj").write_text("7000")
    write(tree, _counter(1, 999))
    assert meter.read().energy_mj == 7 + 5  # 5000 → 9000, and on from 0 to 999


def test_a_machine_without_counters_says_so(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match=r"no RAPL counter in .*virtual machines"):
        Rapl(tmp_path)
    with pytest.raises(MeterError, match="no RAPL counter"):
        Rapl(write(tmp_path, package(0, 0, name="psys")))


@contextmanager
def _nobody() -> Iterator[Path]:
    """A folder that everybody can see, as a user who is not root: root may read everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        before = os.geteuid()
        if before == 0:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(before)


def test_a_counter_that_only_root_may_read_says_what_to_type() -> None:
    with _nobody() as folder:
        tree = write(folder, package(0, 0))
        (tree / "class/powercap/intel-rapl:0/energy_uj").chmod(0)
        with pytest.raises(MeterError, match=r"not readable .*type: sudo chmod a\+r .*/intel-rapl:\*/energy_uj"):
            Rapl(tree)
        assert "sudo chmod" in states(tree)["rapl"]
        (tree / "class/powercap/intel-rapl:0/energy_uj").chmod(stat.S_IRUSR)
        assert states(tree)["rapl"] == ""


def test_a_counter_that_may_have_wrapped_unseen_gives_no_number(tmp_path: Path) -> None:
    """10 J at 1000 W is 10 ms: read 9 ms apart it can be told, 10 ms apart it cannot."""
    assert MOST_WATTS == 1000
    clock = Hand()
    meter = Rapl(write(tmp_path, package(0, 0, range_uj=10_000_000)), clock)
    assert meter.longest_gap_s == pytest.approx(0.005)
    clock.seconds = 0.009
    write(tmp_path, _counter(0, 4_000))
    assert meter.read().energy_mj == 4
    clock.seconds += 0.010
    with pytest.raises(MeterError, match=r"not read for .* wraps every .* cannot be told"):
        meter.read()


def test_a_counter_that_was_reset_is_not_taken_for_one_that_wrapped(tmp_path: Path) -> None:
    clock = Hand()
    meter = Rapl(write(tmp_path, package(0, 5_000_000)), clock)
    clock.seconds = 1.0
    write(tmp_path, _counter(0, 0))
    with pytest.raises(MeterError, match="it was reset"):
        meter.read()


def test_a_counter_that_vanishes_gives_no_number(tmp_path: Path) -> None:
    meter = Rapl(write(tmp_path, package(0, 0)))
    (tmp_path / "class/powercap/intel-rapl:0/energy_uj").unlink()
    with pytest.raises(MeterError, match="does not answer"):
        meter.read()


def test_a_constructed_counter_that_runs_is_followed(tmp_path: Path) -> None:
    with advancing(tmp_path, watts=30.0) as tree:
        meter, start = Rapl(tree), time.monotonic()
        time.sleep(0.4)
        energy, seconds = meter.read().energy_mj, time.monotonic() - start
    assert energy / seconds == pytest.approx(30_000, rel=0.1)


# ---- samples


def test_energy_is_the_area_under_the_samples_and_every_second_one_tells_how_wrong_that_is() -> None:
    clock, powers = Hand(), [1000.0, 2000.0, 1000.0, 2000.0, 2000.0]
    left = iter(powers)
    sampler = Sampler(lambda: next(left), 0.1, clock)
    for _ in powers[1:]:
        clock.seconds += 0.1
        reading = sampler.read()
    assert reading.energy_mj == pytest.approx(150 + 150 + 150 + 200)
    assert reading.half_rate_mj == pytest.approx(200 + 300)  # 1000 → 1000 → 2000 mW, each over 0.2 s
    assert (reading.changes, reading.samples) == (3, 4)


def _ina3221(rails: dict[int, tuple[str, int, int]]) -> dict[str, object]:
    files: dict[str, object] = {"class/hwmon/hwmon3/name": "ina3221", "class/hwmon/hwmon3/update_interval": 5}
    for place, (label, millivolts, milliamperes) in rails.items():
        files |= {
            f"class/hwmon/hwmon3/in{place}_label": label,
            f"class/hwmon/hwmon3/in{place}_input": millivolts,
            f"class/hwmon/hwmon3/curr{place}_input": milliamperes,
        }
    return files


ORIN_NANO = {1: ("VDD_IN", 5000, 1000), 2: ("VDD_CPU_GPU_CV", 5000, 300), 3: ("VDD_SOC", 5000, 200)}


def test_a_board_whose_input_is_measured_is_not_counted_twice(tmp_path: Path) -> None:
    clock = Hand()
    meter = Hwmon(write(tmp_path, _ina3221(ORIN_NANO)), clock, threaded=False)
    assert meter.reads == "ina3221 VDD_IN"
    clock.seconds = 2.0
    assert meter.read().energy_mj == pytest.approx(10_000)  # 5 W for 2 s


def test_rails_without_a_common_input_are_added_and_named(tmp_path: Path) -> None:
    """As on an AGX: the INA3221's fourth current is the sum of the others, and an empty channel has the name NC."""
    rails = {1: ("VDD_GPU_SOC", 800, 6000), 2: ("NC", 0, 0), 3: ("VIN_SYS_5V0", 5000, 900), 4: ("sum of shunt voltages", 700, 6900)}
    tree = write(tmp_path, {**_ina3221(rails), "class/hwmon/hwmon1/name": "nvme", "class/hwmon/hwmon1/power1_input": 9_000_000})
    write(tree, {"class/hwmon/hwmon4/name": "ina238", "class/hwmon/hwmon4/power1_input": 2_500_000})
    found = board_rails(tree)
    assert [rail.name for rail in found] == ["ina3221 VDD_GPU_SOC", "ina3221 VIN_SYS_5V0", "ina238 power1"]
    assert [rail.power_mw() for rail in found] == [4800, 4500, 2500]


def test_a_power_meter_that_averages_is_read_once_an_interval(tmp_path: Path) -> None:
    """ACPI's: sampled as if it told the power of now, a window of 5 s would hold five of its numbers and call them 250."""
    meter = {
        "name": "power_meter",
        "power1_average": 210_000_000,
        "power1_average_interval": 1000,
        "power1_average_interval_max": 9000,
    }
    tree = write(tmp_path, {f"class/hwmon/hwmon2/{name}": content for name, content in meter.items()})
    (rail,) = board_rails(tree)
    assert (rail.name, rail.power_mw(), rail.interval_s) == ("power_meter power1", 210_000, 1.0)
    assert Hwmon(tree, Hand(), threaded=False).step_s == 1.0
    (tree / "class/hwmon/hwmon2/power1_average_interval").unlink()
    assert Hwmon(tree, Hand(), threaded=False).step_s == pytest.approx(0.02)


def test_an_old_jetson_tells_milliwatts_by_another_way(tmp_path: Path) -> None:
    chip = "bus/i2c/drivers/ina3221x/6-0040/iio_device"
    tree = write(tmp_path, {f"{chip}/rail_name_0": "POM_5V_IN", f"{chip}/in_power0_input": 2345})
    write(tree, {f"{chip}/rail_name_1": "POM_5V_GPU", f"{chip}/in_power1_input": 400})
    (rail,) = board_rails(tree)
    assert (rail.name, rail.power_mw()) == ("ina3221x POM_5V_IN", 2345)


def test_a_sensor_that_vanishes_while_it_is_sampled_gives_no_number(tmp_path: Path) -> None:
    meter = Hwmon(write(tmp_path, _ina3221(ORIN_NANO)))
    assert meter.read().samples > 0
    (tmp_path / "class/hwmon/hwmon3/curr1_input").unlink()
    time.sleep(0.1)
    write(tmp_path, {"class/hwmon/hwmon3/curr1_input": 1000})  # back again, but what it would have said meanwhile is lost
    with pytest.raises(MeterError, match="curr1_input does not answer"):
        meter.read()
    meter.close()


def test_a_board_without_power_sensors_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match=r"no power sensor in .*INA"):
        Hwmon(write(tmp_path, {"class/hwmon/hwmon0/name": "cpu_thermal", "class/hwmon/hwmon0/temp1_input": 40_000}))


# ---- batteries


def _battery(**files: object) -> dict[str, object]:
    whole = {"type": "Battery", "status": "Discharging", "present": 1, **files}
    return {f"class/power_supply/BAT0/{name}": content for name, content in whole.items()}


@pytest.mark.parametrize(
    ("files", "reads"),
    [
        ({"power_now": 4_000_000, "energy_now": 1}, "BAT0 power_now"),
        ({"current_now": -1_000_000, "voltage_now": 4_000_000}, "BAT0 current_now x voltage_now"),
    ],
)
def test_a_gauge_that_tells_power_is_integrated(tmp_path: Path, files: dict[str, int], reads: str) -> None:
    clock = Hand()
    mouse = {f"class/power_supply/AAA/{name}": value for name, value in (("type", "Battery"), ("scope", "Device"))}
    meter = Battery(write(tmp_path, {**mouse, **_battery(**files)}), clock, threaded=False)
    assert (meter.reads, meter.sampled) == (reads, True)
    clock.seconds = 3.0
    assert meter.read().energy_mj == pytest.approx(12_000)


@pytest.mark.parametrize(
    ("before", "after"),
    [({"energy_now": 5000}, {"energy_now": 4000}), ({"charge_now": 1500, "voltage_now": 4_000_000}, {"charge_now": 1250})],
)
def test_a_gauge_that_tells_what_is_left_is_a_counter(tmp_path: Path, before: dict[str, int], after: dict[str, int]) -> None:
    meter = Battery(write(tmp_path, _battery(**before)))
    assert not meter.sampled
    if "voltage_now" in before:
        write(tmp_path, _battery(**{**before, "voltage_now": 4_040_000}))
    assert (meter.read().energy_mj, meter.read().changes) == (0, 0)  # a voltage that trembles is not energy
    write(tmp_path, _battery(**{**before, **after}))
    assert meter.read().energy_mj == pytest.approx(3600)  # one mWh


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging"])
def test_a_battery_on_its_charger_tells_nothing_of_the_device(tmp_path: Path, status: str) -> None:
    with pytest.raises(MeterError, match=f"BAT0 is {status.lower()}, not discharging.*unplug the charger"):
        Battery(write(tmp_path, _battery(status=status, power_now=4_000_000)))
    meter = Battery(write(tmp_path, _battery(power_now=4_000_000)), threaded=False)
    write(tmp_path, _battery(status=status, power_now=4_000_000))  # somebody plugs it in
    with pytest.raises(MeterError, match="unplug the charger"):
        meter.read()


def test_a_device_without_a_battery_or_with_a_silent_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="no battery in"):
        Battery(tmp_path)
    with pytest.raises(MeterError, match="neither power nor current nor energy"):
        Battery(write(tmp_path, _battery()))


# ---- NVML: no GPU here, so a driver that does not exist answers


class _Refused(Exception):
    pass


def _driver(counter: Any) -> SimpleNamespace:
    return SimpleNamespace(
        NVMLError=_Refused,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: f"gpu {index}",
        nvmlDeviceGetHandleByPciBusId=lambda bus: f"on bus {bus}",
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetName=lambda handle: f"a GPU, {handle}",
        nvmlDeviceGetTotalEnergyConsumption=counter,
    )


def _no_libcuda() -> str:
    raise InputError("expected an NVIDIA driver, got none")


def test_a_gpus_counter_is_that_of_the_gpu_cuda_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1_000, 1_000, 1_750, 20])
    monkeypatch.setitem(sys.modules, "pynvml", _driver(lambda handle: next(values)))
    monkeypatch.setattr(gpu, "pci_bus_id", _no_libcuda)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    meter = Nvml()
    assert (meter.reads, meter.least_window_s) == ("a GPU, gpu 3", 5.0)
    assert (meter.read().changes, meter.read().energy_mj) == (0, 750)
    with pytest.raises(MeterError, match="fell from 1750 to 20"):
        meter.read()


def test_a_gpu_is_found_by_its_bus_because_cuda_and_nvml_count_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's first is its fastest; NVML's is the one on the lowest bus. Of CUDA_VISIBLE_DEVICES CUDA knows, as of its own order."""
    monkeypatch.setitem(sys.modules, "pynvml", _driver(lambda handle: 0))
    monkeypatch.setattr(gpu, "pci_bus_id", lambda: "0000:65:00.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Nvml().reads == "a GPU, on bus 0000:65:00.0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert Nvml().reads == "a GPU, on bus 0000:65:00.0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    with pytest.raises(MeterError, match="part of a GPU"):
        Nvml()


def test_a_gpu_that_does_not_tell_its_name_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> str:
        raise _Refused("GPU is lost")

    driver = _driver(lambda handle: 0)
    driver.nvmlDeviceGetName = lost
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    with pytest.raises(MeterError, match=r"NVML does not answer \(GPU is lost\)"):
        Nvml()


def test_a_gpu_without_counter_or_a_part_of_one_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> int:
        raise _Refused("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", _driver(refuse))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(MeterError, match=r"NVML does not answer \(Not Supported\)"):
        Nvml()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    with pytest.raises(MeterError, match="part of a GPU"):
        Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MeterError, match="pip install nvidia-ml-py"):
        Nvml()


# ---- all of them


def test_every_meter_says_whether_it_can_be_read(tmp_path: Path) -> None:
    found = states(write(tmp_path, {**package(0, 0), **_battery(status="Full")}))
    assert list(found) == list(METERS) == ["rapl", "nvml", "hwmon", "battery"]
    assert found["rapl"] == ""
    assert "no power sensor" in found["hwmon"]
    assert "unplug" in found["battery"]
    with pytest.raises(MeterError, match="among rapl"):
        open_meter("tricorder", tmp_path)


def test_a_folder_that_may_not_be_entered_is_no_meter_and_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /sys is for another user in some containers: the agent is to say who it is all the same."""

    def denied(self: Path, pattern: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "glob", denied)
    found = states(tmp_path)
    assert f"{tmp_path / 'class' / 'powercap'} is not readable (Permission denied)" in found["rapl"]
    assert all(found.values())
