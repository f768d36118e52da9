"""Host side of the agent: one request, one fresh process, one answer. The transport "local" starts the process here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import BittailorError, InputError
from toolchain.files import scratch
from toolchain.hardware import has_provider
from toolchain.kernels import offered
from toolchain.spec import CPU, CUDA, Device

TIMEOUT_SECONDS = 1800


References = Mapping[str, Sequence[float]]
"""By kind of work (`spec.WORKS`): the reference's nanoseconds, one for each window."""


@dataclass(frozen=True)
class Host:
    """A device as the profiler sees it. Subjects are the agent's descriptions of what to run (`agent.py`)."""

    device: Device
    threads: int

    def identify(self) -> dict[str, Any]:
        """{"cpu", "cache_bytes", "runtime", "protocol"}."""
        return self._ask({"action": "identify"})

    def time(self, subjects: Sequence[dict[str, Any]], windows: int) -> dict[str, Any]:
        """{"trials": {name: [{phase_ns}]}, "reference_ns": {work: [...]}, "dropped", "valid"}, all subjects in rotation in one process."""
        return self._ask({"action": "time", "threads": self.threads, "subjects": list(subjects), "windows": windows})

    def peak(self, subject: dict[str, Any]) -> dict[str, int]:
        """{"peak_bytes", "running_bytes"}: rise of a fresh process's resident set, highest and after the runs."""
        return self._ask({"action": "peak", "threads": self.threads, "subject": subject})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises InputError for a transport we do not have, BittailorError for what the agent refuses or dies of."""
        if self.device.transport != "local":
            raise InputError(
                f"expected a device with transport 'local', got {self.device.transport!r}", "this version reaches no other"
            )
        if not offered(self.device.provider):
            raise InputError(
                f"expected provider {CPU} or {CUDA} for {self.device.name!r}, got {self.device.provider}",
                "this version measures no other",
            )
        if not (state := has_provider(self.device.provider)).usable:
            raise InputError(
                f"expected {self.device.provider} for {self.device.name!r}: {state.reason}",
                "type: pip install onnxruntime-gpu" if self.device.provider == CUDA else "",
            )
        with scratch() as folder:
            path = folder / "request.json"
            path.write_text(json.dumps({**request, "provider": self.device.provider, "host": os.getpid()}))
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
