"""What the first NVIDIA GPU says of itself: its name, its cache, how much of its memory is in use. Through libcuda, which every driver
brings, Jetson's too; NVML, which would tell memory by process, does not in a container and is not everywhere.

The memory in use is the whole GPU's: a difference counts whatever others take or give back meanwhile.
"""

from __future__ import annotations

import ctypes
from functools import cache

from toolchain.errors import InputError

_L2_CACHE_BYTES, _MULTIPROCESSORS, _MAJOR, _MINOR = 38, 16, 75, 76
"""CUdevice_attribute of cuda.h."""


@cache
def _driver() -> ctypes.CDLL:
    """libcuda, ready to be asked. It takes no context: one costs hundreds of MB of the GPU's memory, which is seen by whoever measures
    memory there. Raises InputError."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise InputError(f"expected an NVIDIA driver, got none: {error}", "choose a device with the CPU provider") from error
    _call(driver, "cuInit", 0)
    return driver


@cache
def _retain_context() -> None:
    """Keep the first device's primary context, the one onnxruntime uses: what is taken is asked of the current context."""
    context = ctypes.c_void_p()
    _call(_driver(), "cuDevicePrimaryCtxRetain", ctypes.byref(context), _device())
    _call(_driver(), "cuCtxSetCurrent", context)


def _device() -> ctypes.c_int:
    """CUDA's first device, of those that CUDA_VISIBLE_DEVICES leaves, in CUDA's own order."""
    device = ctypes.c_int()
    _call(_driver(), "cuDeviceGet", ctypes.byref(device), 0)
    return device


def _call(driver: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = getattr(driver, name)(*arguments)
    if code:
        raise InputError(f"expected the NVIDIA driver to answer {name}, got error {code}", "type: nvidia-smi")


def _attribute(number: int) -> int:
    value = ctypes.c_int()
    _call(_driver(), "cuDeviceGetAttribute", ctypes.byref(value), number, _device())
    return value.value


def name() -> str:
    """Model, compute capability and multiprocessors; they decide which kernels run, and how fast."""
    text = ctypes.create_string_buffer(256)
    _call(_driver(), "cuDeviceGetName", text, len(text), _device())
    return f"{text.value.decode()} sm_{_attribute(_MAJOR)}{_attribute(_MINOR)} ({_attribute(_MULTIPROCESSORS)} multiprocessors)"


def pci_bus_id() -> str:
    """Where the GPU is plugged in: the one name of it that CUDA and NVML share, whose numbers differ."""
    text = ctypes.create_string_buffer(32)
    _call(_driver(), "cuDeviceGetPCIBusId", text, len(text), _device())
    return text.value.decode()


def cache_bytes() -> int:
    """Size of the GPU's L2 cache."""
    return _attribute(_L2_CACHE_BYTES)


def used_bytes() -> int:
    """Bytes of the GPU's memory that are taken, by whomever."""
    _retain_context()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call(_driver(), "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value
