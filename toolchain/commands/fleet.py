"""One model on several devices at once, each with a table of its own: one that fails does not stop the others."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Semaphore, Thread

from toolchain.commands.workflow import Costs, measure_costs
from toolchain.errors import InputError, reason_of
from toolchain.graph.model import Graph
from toolchain.progress import note
from toolchain.spec import Device, Workload

AT_ONCE = 32
"""Devices. The desk builds graphs and waits, where they are other machines."""
_HERE = Lock()
"""Held by the device at hand that is measured now: another beside it would be its noise. What lies in a folder of this machine is not
asked to wait, since it stands for another; its windows in which others used the CPUs are dropped."""


@dataclass(frozen=True)
class Profiled:
    """What became of one device."""

    device: Device
    done: Future[Costs]

    @property
    def failure(self) -> str:
        """Why it failed, in one line; empty if it did not. What nobody expected too: the others' tables are no less there."""
        error = self.done.exception()
        return reason_of(error) if error else ""

    def costs(self) -> Costs:
        """Raises what stopped it."""
        return self.done.result()


def profile_all(
    graph: Graph, devices: Sequence[Device], folder: Path, workload: Workload | None, model: str, renew: bool, follow: bool
) -> list[Profiled]:
    """Profile the graph on every device; the tables are in `folder`/<device>/. model: its name in the tables' headers.

    Raises InputError, before anything is measured, for two devices of one name: they would share a table.
    """
    names = [device.name for device in devices]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"expected each device once, got {twice[0]!r} {names.count(twice[0])} times")

    def measure(device: Device) -> Costs:
        command = "bittailor " + shlex.join(["profile", model, "--device", device.name])
        try:
            with _HERE if device.at_hand else nullcontext():
                return measure_costs(graph, device, folder, workload, command, renew, follow=follow)
        except Exception as error:
            if len(devices) > 1:
                note(f"bittailor: {device.name} failed: {reason_of(error)}")
            raise

    if len(devices) == 1:  # in the main thread: its progress line is redrawn, and Ctrl-C stops it
        done: Future[Costs] = Future()
        done.set_result(measure(devices[0]))
        return [Profiled(devices[0], done)]
    at_once = Semaphore(AT_ONCE)
    all_of_them = [Profiled(device, Future()) for device in devices]

    def work(one: Profiled) -> None:
        with at_once:
            try:
                one.done.set_result(measure(one.device))
            except Exception as error:  # noqa: BLE001 - it is that device's line
                one.done.set_exception(error)

    # Daemons, unlike an executor's: Ctrl-C ends the command, whatever they wait for. What a device measured it keeps (`jobs.py`).
    for one in all_of_them:
        Thread(target=work, args=(one,), daemon=True).start()
    wait([one.done for one in all_of_them])
    return all_of_them
