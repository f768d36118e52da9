"""Which devices answer now, and what they say of themselves: all asked at once, none waited for longer than a stated time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from toolchain.errors import BittailorError
from toolchain.hardware import Availability, reachable, thread_count
from toolchain.profiler.ask import Host
from toolchain.spec import Device

AT_ONCE = 32
PATIENCE_SECONDS = 0.0


@dataclass(frozen=True)
class Reached:
    """A device's state: whether a session could be opened there; its threads, and what its energy meter is or why there is none."""

    device: Device
    state: Availability
    threads: int | None
    meter: str


def reach_all(devices: Sequence[Device]) -> list[Reached]:
    """Every device's state, in order. The slowest takes as long as one first exchange and one start of the agent may (`jobs.py`)."""
    with ThreadPoolExecutor(max(1, min(AT_ONCE, len(devices)))) as pool:
        return list(pool.map(reach, devices))


def reach(device: Device) -> Reached:
    """One device's state. Never raises for a device that does not answer: that is the answer."""
    if device.at_hand:
        name, reason = Host(device, 0).meter() if (state := reachable(device)).usable else ("none", state.reason)
        return Reached(device, state, thread_count(device), f"none: {reason}" if reason else name)
    try:
        host = Host.of(device, PATIENCE_SECONDS)
        state = _has_provider(device, host)
        name, reason = host.meter()
    except BittailorError as error:
        return Reached(device, Availability(False, str(error)), device.threads or None, "none: the device was not asked")
    return Reached(device, state, host.threads, f"none: {reason}" if reason else name)


def _has_provider(device: Device, host: Host) -> Availability:
    identity = host.identify()
    if device.provider in identity["providers"]:
        return Availability(True)
    return Availability(False, f"{identity['runtime']} there has no {device.provider}, only {', '.join(identity['providers'])}")
