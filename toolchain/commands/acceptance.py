"""The acceptance test of a package on its device: measure, hold against the budget, say within, over or could not tell.

Imports nothing of the training stack: this is what a device with onnxruntime and numpy runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolchain import check
from toolchain.commands.evidence import Log
from toolchain.errors import InputError
from toolchain.package.manifest import Package, open_package
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import EnergyOfPackage, Observation, measure_energy, measure_package
from toolchain.progress import note
from toolchain.spec import DERIVED_BUDGETS, Budget, Device, Measurement, Verdict

SLOWER = 1.15
"""From this ratio of the reference kernel's time on, a broken latency limit may be the machine's doing."""

LOAD_PEAK = 1.05
"""From this ratio of peak to running memory on, the report says that loading sets the peak."""


@dataclass(frozen=True)
class Checked:
    """A package's verdicts with what they rest on."""

    verdict: str
    limits: tuple[Verdict, ...]
    measured: Mapping[str, Measurement]
    predicted: Mapping[str, Any] | None
    slowness: Mapping[str, float]
    """Latency → how many times as long its reference takes as when the cost table was measured; empty where that is no excuse."""
    running_bytes: float
    energy: EnergyOfPackage | None = None
    """How the energy came about; None where it was not measured."""
    package: Package | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What the numbers rest on (`evidence.Log`)."""

    @property
    def load_peak(self) -> str:
        """One line where loading, not running, sets the peak; empty where it does not."""
        peak = self.measured["peak_memory_bytes"].value
        if peak is None or peak < LOAD_PEAK * self.running_bytes:
            return ""
        return f"loading sets the peak of {peak / 1e6:.1f} MB; once it runs, {self.running_bytes / 1e6:.1f} MB stay resident"

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "limits": [verdict.to_json() for verdict in self.limits],
            "measured": {name: seen.to_json() for name, seen in self.measured.items()},
            "predicted": self.predicted,
            "slowness": dict(self.slowness),
            "running_bytes": self.running_bytes,
            "load_peak": self.load_peak or None,
            "energy": self.energy.to_json() if self.energy else None,
            "evidence": dict(self.evidence),
        }


def check_package(directory: Path, device: Device, limits: Mapping[str, float]) -> Checked:
    """Measure a package on the device and hold it against its budget, or the limits given instead."""
    package = open_package(directory)
    if package.provider != device.provider:
        raise InputError(
            f"expected a package for {device.provider}, which {device.name!r} has, got one for {package.provider}",
            f"type: bittailor export MODEL --device {device.name} --out PACKAGE",
        )
    budget = Budget.from_json(limits) if limits else package.budget
    if budget is None:
        raise InputError("expected a package with a budget or limits, got neither", "type for example: --latency-ms 20")
    note(f"measuring {directory} for {package.workload}: some ten seconds{' and energy: minutes' if budget.energy_mj else ''}")
    host = Host.of(device)
    log = Log(package, host, budget, typed=bool(limits))
    seen = measure_package(directory, package.workload, host, package.vocabulary)
    log.saw(seen)
    energy_mj, energy = _energy(package, host, budget)
    log.lap("energy_mj")
    measurements = {**seen.measurements, **_counted(package), "energy_mj": energy_mj}
    slowness = _slowness(package, seen, host) if not limits else {}
    verdicts = judged(budget, measurements, slowness)
    return Checked(
        check.overall(verdicts),
        verdicts,
        measurements,
        package.data["predicted"],
        slowness,
        seen.running_bytes,
        energy,
        package,
        log.collected(),
    )


def judged(budget: Budget, measurements: Mapping[str, Measurement], slowness: Mapping[str, float]) -> tuple[Verdict, ...]:
    """One verdict per limit: what was measured, and how much slower the machine is than it was, are all that it rests on."""
    return tuple(
        _judge(verdict, measurements, slowness.get(verdict.name), budget) for verdict in check.decide(budget, measurements)
    )


def _judge(verdict: Verdict, measurements: Mapping[str, Measurement], ratio: float | None, budget: Budget) -> Verdict:
    """The verdict on a latency that the machine, not the package, may have broken. Others stay as they are.

    Disturbed trials that keep the limit all the same do keep it: others on the CPU only make a package slower. On a machine that runs
    the reference for this kind of work slower than when it measured the table, a limit derived from that table is held at the table's
    speed, and the verdict says so; an absolute limit that somebody set is held as measured, and when broken could not be told from the
    machine's mood.
    """
    seen = measurements.get(verdict.name)
    if (
        verdict.name not in ("latency_ms", "first_token_ms")
        or verdict.verdict == check.WITHIN
        or seen is None
        or len(seen.trials) < 2
    ):
        return verdict
    low, high = check.median_interval(seen.trials)
    if not seen.valid:
        if high > verdict.limit:
            return verdict
        return replace(verdict, low=low, high=high, verdict=check.WITHIN, reason=f"although {seen.reason}")
    if ratio is None or ratio < SLOWER:
        return verdict
    slower = f"the machine runs its reference {ratio:.2f} times slower than when the cost table was measured"
    if budget.name not in DERIVED_BUDGETS:
        return replace(verdict, verdict=check.COULD_NOT_TELL, reason=slower)
    corrected = replace(seen, value=(seen.value or 0.0) / ratio, trials=tuple(trial / ratio for trial in seen.trials))
    held = check.decide(Budget.from_json({verdict.name: verdict.limit}), {verdict.name: corrected})[0]
    return replace(held, reason=f"{slower}: {seen.value:.4g} ms corrected by that")


def _slowness(package: Package, seen: Observation, host: Host) -> dict[str, float]:
    """By latency, how much slower this machine is than when it measured the cost table; empty on another machine: slower is no excuse."""
    measured_on = package.data.get("measured_on")
    if not package.reference_ns or not isinstance(measured_on, Mapping):
        return {}
    here = {**host.identify(), "threads": host.threads, "provider": host.device.provider}
    same = all(here.get(name) == value for name, value in measured_on.items())
    return {name: seen.reference_ns[work] / then for name, (work, then) in package.reference_ns.items()} if same else {}


def _counted(package: Package) -> dict[str, Measurement]:
    """What is not sampled: operations are counted."""
    flop = package.predicted.get("compute_flop", {}).get("value")
    why = "counted from the graph's shapes at export, not sampled" if flop else "not counted at export"
    counted = Measurement(flop, 0.0, 1, flop is not None, (flop,) if flop else (), why)
    return {"compute_flop": counted}


def _energy(package: Package, host: Host, budget: Budget) -> tuple[Measurement, EnergyOfPackage | None]:
    """Total energy of one inference, idle power included, as the cost model predicts it; not measured where nothing limits it."""
    if budget.energy_mj is None:
        return Measurement(None, reason="not measured: no limit on energy was set; type for example: --energy-mj 1000"), None
    name, reason = host.meter()
    if reason:
        return Measurement(None, reason=reason), None
    seen = measure_energy(host, package.directory, package.workload, package.vocabulary, name)
    return seen.total, seen
