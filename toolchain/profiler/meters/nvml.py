"""NVML: the total-energy counter of one NVIDIA GPU, in mJ since the driver was loaded. It sees the GPU's board and nothing else.

The counter steps about every 100 ms, so windows are 5 s or longer (Zeus). The GPU is the one that the CUDA provider uses, CUDA's first,
found by its PCI bus: NVML counts GPUs by bus, CUDA the fastest first (CUDA_DEVICE_ORDER) and only those in CUDA_VISIBLE_DEVICES. Where
libcuda does not answer it is the first of CUDA_VISIBLE_DEVICES, or 0. Volta or newer. `pynvml` (nvidia-ml-py) is imported here alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

from toolchain.errors import InputError, MeterError
from toolchain.profiler import gpu
from toolchain.profiler.meters.meter import Reading


class Nvml:
    """One GPU's counter."""

    name, sampled, step_s, least_window_s, patience_s, longest_gap_s = "nvml", False, 0.0, 5.0, 5.0, inf

    def __init__(self, sysfs: Path = Path("/sys")) -> None:
        """Raises MeterError without driver, package, or counter."""
        self._nvml = pynvml = _opened()
        try:
            self._gpu = _visible(pynvml)
            name = self._asked(pynvml.nvmlDeviceGetName)
            self.reads = name.decode() if isinstance(name, bytes) else str(name)
            self._first = self._last = self._counter_mj()
        except BaseException:
            pynvml.nvmlShutdown()
            raise
        self._changes = 0

    def read(self) -> Reading:
        seen = self._counter_mj()
        if seen < self._last:
            raise MeterError(f"the energy counter of {self.reads} fell from {self._last} to {seen} mJ: the driver was loaded anew")
        self._changes += seen > self._last
        self._last = seen
        energy = float(seen - self._first)
        return Reading(energy, energy, self._changes)

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _counter_mj(self) -> int:
        return int(self._asked(self._nvml.nvmlDeviceGetTotalEnergyConsumption))

    def _asked(self, question: Callable[[Any], Any]) -> Any:
        try:
            return question(self._gpu)
        except self._nvml.NVMLError as error:
            raise MeterError(f"NVML does not answer ({error})") from error


def state() -> dict[str, Any]:
    """{"name", "clock_mhz", "memory_clock_mhz", "temperature_c", "utilisation" (0 to 1)} of the GPU now. Raises MeterError."""
    pynvml = _opened()
    try:
        gpu_ = _visible(pynvml)
        name = pynvml.nvmlDeviceGetName(gpu_)
        return {
            "name": name.decode() if isinstance(name, bytes) else str(name),
            "clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu_, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu_, pynvml.NVML_CLOCK_MEM),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(gpu_, pynvml.NVML_TEMPERATURE_GPU),
            "utilisation": pynvml.nvmlDeviceGetUtilizationRates(gpu_).gpu / 100,
        }
    except pynvml.NVMLError as error:
        raise MeterError(f"NVML does not answer ({error})") from error
    finally:
        pynvml.nvmlShutdown()


def _opened() -> Any:
    """pynvml, initialised. Raises MeterError."""
    try:
        import pynvml
    except ImportError:
        problem = "no NVML: the Python package nvidia-ml-py is not installed"
        raise MeterError(problem, "type: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise MeterError(f"NVML does not answer ({error})") from error
    return pynvml


def _visible(pynvml: Any) -> Any:
    """NVML's handle of the first GPU that CUDA sees. Raises MeterError for a part of one: the counter is the whole GPU's."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    if first.startswith("MIG"):
        raise MeterError("NVML has no energy counter for a part of a GPU (MIG)")
    try:
        bus = gpu.pci_bus_id()
    except InputError:
        bus = ""
    try:
        if bus:
            return pynvml.nvmlDeviceGetHandleByPciBusId(bus)
        if first.startswith("GPU"):
            return pynvml.nvmlDeviceGetHandleByUUID(first)
        return pynvml.nvmlDeviceGetHandleByIndex(int(first))
    except ValueError:
        raise MeterError(f"expected CUDA_VISIBLE_DEVICES to begin with a number or GPU-…, got {first!r}") from None
    except pynvml.NVMLError as error:
        raise MeterError(f"NVML does not answer ({error})") from error
