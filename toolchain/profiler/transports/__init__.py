"""Ways to a device: `local`, `ssh`, `adb`. Each carries one exchange with the device's doorkeeper; what a job is, is `jobs.py`'s."""

from __future__ import annotations

from collections.abc import Callable

from toolchain.profiler.transports.pipe import Transport
from toolchain.spec import Device


def transport_of(device: Device) -> Transport:
    """The transport that the device's file names."""
    from toolchain.profiler.transports.adb import Adb
    from toolchain.profiler.transports.local import Local
    from toolchain.profiler.transports.ssh import Ssh

    ways: dict[str, Callable[[Device], Transport]] = {"local": Local, "ssh": Ssh, "adb": Adb}
    return ways[device.transport](device)
