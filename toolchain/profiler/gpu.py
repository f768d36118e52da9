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
    """libcuda, with the first device's primary context (the one onnxruntime uses) current on this thread. Raises InputError."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise InputError(f"expected an NVIDIA driver, got none: {error}", "choose a device with the CPU provider") from error
    context = ctypes.c_void_p()
    _call(driver, "cuInit", 0)
    _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    _call(driver, "cuCtxSetCurrent", context)
    return driver


def _call(driver: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = getattr(driver, name)(*arguments)
    if code:
        raise InputError(f"expected the NVIDIA driver to answer {name}, got error {code}", "type: nvidia-smi")


def _attribute(number: int) -> int:
    value = ctypes.c_int()
    _call(_driver(), "cuDeviceGetAttribute", ctypes.byref(value), number, 0)
    return value.value


def name() -> str:
    """Model, compute capability and multiprocessors; they decide which kernels run, and how fast."""
    text = ctypes.create_string_buffer(256)
    _call(_driver(), "cuDeviceGetName", text, len(text), 0)
    return f"{text.value.decode()} sm_{_attribute(_MAJOR)}{_attribute(_MINOR)} ({_attribute(_MULTIPROCESSORS)} multiprocessors)"


def cache_bytes() -> int:
    """Size of the GPU's L2 cache."""
    return _attribute(_L2_CACHE_BYTES)


def used_bytes() -> int:
    """Bytes of the GPU's memory that are taken, by whomever."""
    driver = _driver()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call(driver, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value
