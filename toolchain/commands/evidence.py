"""What a check's verdict rests on besides its numbers: which package, when, on what, in which state. Collected while it is measured."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from toolchain import hardware
from toolchain.package.manifest import Package
from toolchain.profiler.ask import Host
from toolchain.profiler.state import versions
from toolchain.spec import Budget

FORMAT = "bittailor check 1"


class Log:
    """`Log(...)` before anything is measured, `lap` after each measurement, `collected` at the end."""

    def __init__(self, package: Package, host: Host, budget: Budget, typed: bool) -> None:
        """typed: the limits came from the command line, not from the manifest."""
        self._package, self._host, self._budget, self._typed = package, host, budget, typed
        self._date = datetime.now(UTC)
        self.identity = host.identify()
        self._before = host.state()
        self._seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, *resources: str) -> None:
        """What was done since the last lap was the measurement of these."""
        now = time.monotonic()
        self._seconds |= {" + ".join(resources): round(now - self._last, 3)}
        self._last = now

    def collected(self) -> dict[str, Any]:
        """{"format", "package_digest", "date" (UTC), "workload", "budget", "budget_from", "device", "runtime", "protocol", "versions" (of
        this desk), "meter", "state": {"before", "after"} of the device, "seconds"}."""
        device, found = self._host.device, self.identity
        meter, reason = hardware.meter(device, found.get("meters", {}))
        return {
            "format": FORMAT,
            "package_digest": self._package.digest,
            "date": self._date.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "workload": str(self._package.workload),
            "budget": self._budget.to_json(),
            "budget_from": "command line" if self._typed or not self._package.budget else "manifest",
            "device": {
                "name": device.name,
                "transport": device.transport,
                "provider": device.provider,
                "threads": self._host.threads,
                **{name: found.get(name) for name in ("cpu", "cache_bytes")},
            },
            "runtime": found.get("runtime"),
            "protocol": found.get("protocol"),
            "versions": versions(),
            "meter": {"value": None, "reason": reason} if reason else {"value": meter},
            "state": {"before": self._before, "after": self._host.state()},
            "seconds": self._seconds,
        }
