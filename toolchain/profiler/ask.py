"""Host side of the agent: one request, one fresh process, one answer. Here it is a child process; on a device it is a job
(`transports/jobs.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolchain.errors import BittailorError, InputError
from toolchain.files import scratch
from toolchain.hardware import TRANSPORTS, has_provider, meter, thread_count
from toolchain.kernels import offered
from toolchain.profiler import state
from toolchain.profiler.transports.jobs import IDENTIFY, RECONNECT_SECONDS, Link
from toolchain.spec import CPU, CUDA, Device

TIMEOUT_SECONDS = 1800
SYSFS = "/sys"
"""Where the device's meters are read. Tests construct a tree of their own."""


References = Mapping[str, Sequence[float]]
"""By kind of work (`spec.WORKS`): the reference's nanoseconds, one for each window."""


@dataclass(frozen=True)
class Host:
    """A device as the profiler sees it. Subjects are the agent's descriptions of what to run (`agent.py`)."""

    device: Device
    threads: int

    @classmethod
    def of(cls, device: Device, patience_s: float = RECONNECT_SECONDS) -> Host:
        """The device with the threads its file says, or as many as it has CPUs: it is asked, if it is another machine.

        patience_s: for how long a cut link is tried again.
        """
        if device.at_hand:
            return cls(device, thread_count(device))
        link = Link(device, patience_s=patience_s)
        host = cls(device, device.threads or int(link.machine["cpus"]))
        host.__dict__["link"] = link
        return host

    @cached_property
    def link(self) -> Link:
        """The way to a device that is not at hand."""
        if self.device.transport not in TRANSPORTS:
            raise InputError(f"expected a transport among {', '.join(TRANSPORTS)}, got {self.device.transport!r}")
        return Link(self.device)

    def meter(self) -> tuple[str, str]:
        """`hardware.meter`, with the meters of the device's machine."""
        return meter(self.device, self.identify()["meters"])

    def identify(self) -> dict[str, Any]:
        """{"cpu", "cache_bytes", "runtime", "protocol", "providers", "meters": {name: why it cannot be read there, or ""}}."""
        return self._ask({**IDENTIFY, "sysfs": SYSFS})

    def state(self) -> dict[str, Any]:
        """`state.read` of the device, now."""
        if self.device.at_hand:
            return state.read(self.device.provider, Path(SYSFS))
        # With a name of its own: an answer that waits there from an hour ago is no state of now.
        return self._ask({"action": "state", "sysfs": SYSFS, "moment": uuid.uuid4().hex})

    def time(self, subjects: Sequence[dict[str, Any]], windows: int, quantile: float = 0.0, first: bool = False) -> dict[str, Any]:
        """{"trials": {name: [{phase_ns}]}, "reference_ns": {work: [...]}, "dropped", "valid", "niceness"}, all subjects in rotation in one
        process; with a quantile of single runs {"quantiles": {name: {phase_ns}}} too. first: before others, where the system lets it."""
        wanted = {"windows": windows, **({"quantile": quantile} if quantile else {}), **({"precedence": True} if first else {})}
        return self._ask({"action": "time", "threads": self.threads, "subjects": list(subjects), **wanted})

    def energy(self, subjects: Sequence[dict[str, Any]], meter: str, windows: int, window_s: float = 0.0) -> dict[str, Any]:
        """{"reason", "meter", "step_s", "window_s", "idle_mw", "measured": {name: {phase: trials}}} as `energy.measure` says; of a meter
        that cannot tell {"reason"} alone. window_s: seconds of a window, 0: as few as the meter needs."""
        wanted = {"meter": meter, "sysfs": SYSFS, "windows": windows, "window_s": window_s}
        return self._ask({"action": "energy", "threads": self.threads, "subjects": list(subjects), **wanted})

    def peak(self, subject: dict[str, Any]) -> dict[str, int]:
        """{"peak_bytes", "running_bytes"}: rise of a fresh process's resident set, highest and after the runs."""
        return self._ask({"action": "peak", "threads": self.threads, "subject": subject})

    def outputs(self, subjects: Sequence[dict[str, Any]]) -> dict[str, list[Any] | None]:
        """{name: [what the graph makes of each of its inputs, .npy files beside it]}, or None where the runtime there refuses the graph."""
        return self._ask({"action": "outputs", "subjects": list(subjects)})["outputs"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises InputError for a transport or provider we do not have, UnreachableError, BittailorError for what the agent refuses or
        dies of."""
        if not offered(self.device.provider):
            raise InputError(
                f"expected provider {CPU} or {CUDA} for {self.device.name!r}, got {self.device.provider}",
                "this version measures no other",
            )
        request = {**request, "provider": self.device.provider}
        if not self.device.at_hand:
            return self.link.ask(request, {**IDENTIFY, "sysfs": SYSFS, "provider": self.device.provider})
        if not (state := has_provider(self.device.provider)).usable:
            raise InputError(
                f"expected {self.device.provider} for {self.device.name!r}: {state.reason}",
                "type: pip install onnxruntime-gpu" if self.device.provider == CUDA else "",
            )
        with scratch() as folder:
            path = folder / "request.json"
            path.write_text(json.dumps({**request, "host": os.getpid()}))
            # The package's own folder goes first, and -P keeps the working directory out, so that the agent is this version
            # whatever lies there; what the host finds through PYTHONPATH, the agent finds too.
            search = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            try:
                done = subprocess.run(
                    [sys.executable, "-P", "-m", "toolchain.profiler.agent", str(path)],
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT_SECONDS,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
                    check=False,
                )
            except subprocess.TimeoutExpired:
                problem = f"expected an answer from the agent on {self.device.name!r} within {TIMEOUT_SECONDS} s, got none"
                raise BittailorError(problem, "try a shorter --workload") from None
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise BittailorError(f"expected an answer from the agent on {self.device.name!r}, it died: {last[:300]}") from None
        if "error" in answer:
            raise BittailorError(answer["error"])
        return answer
