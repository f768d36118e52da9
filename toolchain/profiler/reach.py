"""Which devices answer now, and what they say of themselves: all asked at once, none waited for longer than a stated time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from toolchain.errors import reason_of
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
    """One device's state. Never raises: what stops it is that device's answer, and no reason to hide the others."""
    try:
        if device.at_hand and not (state := reachable(device)).usable:
            return Reached(device, state, thread_count(device), f"none: {state.reason}")
        host = Host.of(device, PATIENCE_SECONDS)
        if not device.at_hand:
            state = _has_provider(device, host)
        name, reason = host.meter()
    except Exception as error:  # noqa: BLE001 - a device may answer anything
        state = Availability(False, reason_of(error))
        return Reached(device, state, device.threads or None, "none: the device was not asked")
    return Reached(device, state, host.threads, f"none: {reason}" if reason else name)


def _has_provider(device: Device, host: Host) -> Availability:
    identity = host.identify()
    if device.provider in identity["providers"]:
        return Availability(True)
    return Availability(False, f"{identity['runtime']} there has no {device.provider}, only {', '.join(identity['providers'])}")
