"""The acceptance test of a package on its device: measure, hold against the budget, say within, over or could not tell.

Imports nothing of the training stack: this is what a device with onnxruntime and numpy runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from toolchain import check
from toolchain.blocks import Block, Speed
from toolchain.commands.baseline import Baseline
from toolchain.commands.deciding import Decided, Patience, decide_in_looks
from toolchain.commands.evidence import Log
from toolchain.commands.quality import QualityLimits, hold_quality
from toolchain.errors import InputError
from toolchain.package.manifest import Package, open_package
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import EnergyOfPackage, measure_block, measure_energy, summarise, weigh_package
from toolchain.progress import note
from toolchain.spec import DERIVED_BUDGETS, Budget, Device, Measurement, Verdict

_USUAL, _NO_QUALITY = Patience(), QualityLimits()

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
    decided: Decided | None = None
    """Every process that was timed, and after how many looks it was decided."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """What was measured on: cpu, runtime, protocol, threads, provider. A baseline must agree in all of it, and in the workload."""
    workload: str = ""
    package: Package | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What the numbers rest on besides (`evidence.Log`)."""

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
            "machine": dict(self.machine),
            "workload": self.workload,
            "decision": self.decided.to_json() if self.decided else None,
            "blocks": [block.to_json() for block in self.decided.blocks] if self.decided else [],
            "evidence": dict(self.evidence),
        }


def check_package(
    directory: Path,
    device: Device,
    limits: Mapping[str, float],
    patience: Patience = _USUAL,
    baseline: Path | None = None,
    quality: QualityLimits = _NO_QUALITY,
    precedence: bool = True,
) -> Checked:
    """Hold a package against its budget, or the limits given instead: quality and memory first, then its latency process by process until
    each limit is decided (`deciding.py`). baseline: an earlier report that its latency and memory are compared with. precedence: its
    processes go before the device's others where the system lets them."""
    package = open_package(directory)
    if package.provider != device.provider:
        raise InputError(
            f"expected a package for {device.provider}, which {device.name!r} has, got one for {package.provider}",
            f"type: bittailor export MODEL --device {device.name} --out PACKAGE",
        )
    budget = Budget.from_json(limits) if limits else package.budget
    if budget is None and (quality.given or baseline):
        budget = Budget()
    if budget is None:
        raise InputError("expected a package with a budget or limits, got neither", "type for example: --latency-ms 20")
    quality.refuse_nonsense(package)
    earlier = Baseline.read(baseline) if baseline else None
    host = Host.of(device)
    log = Log(package, host, budget, typed=bool(limits))
    machine = {name: log.identity[name] for name in ("cpu", "runtime", "protocol")}
    machine |= {"threads": host.threads, "provider": device.provider}
    if earlier:
        earlier.refuse_others(machine, str(package.workload))
    qualities = hold_quality(quality, package, elsewhere=not device.at_hand)
    note(
        f"measuring {directory} for {package.workload}: some twenty seconds, at most {patience.most_s:.0f}"
        f"{'; and energy: minutes' if budget.energy_mj else ''}"
    )
    what = (directory, package.workload, host, package.vocabulary)
    log.lap("quality")
    peak, running = weigh_package(*what)
    log.lap("peak_memory_bytes")
    speeds = _speeds(package, machine) if not limits else {}
    decided = decide_in_looks(
        lambda: measure_block(*what, tail=budget.latency_p95_ms is not None, first=precedence),
        lambda blocks, look: _latencies(budget, blocks, look, speeds) + _against(earlier, blocks, look),
        patience,
    )
    log.lap("latency_ms", "first_token_ms", "latency_p95_ms")
    energy_mj, energy = _energy(package, host, budget)
    log.lap("energy_mj")
    measurements = {**_measured(decided.blocks), "peak_memory_bytes": peak, **_counted(package), "energy_mj": energy_mj}
    error = energy.meter_error if energy else None
    verdicts = _in_order(budget, measurements, decided.verdicts, error) + qualities
    verdicts = _excused(verdicts, energy.phases if energy else {}, _speeds(package, machine))
    if earlier:
        verdicts.append(check.hold_peak_ratio(peak, earlier.peak_bytes))
    slowness = _all_slowness(decided.blocks, speeds)
    return Checked(
        check.overall(verdicts),
        tuple(verdicts),
        measurements,
        package.data["predicted"],
        slowness,
        running,
        energy,
        decided,
        machine,
        str(package.workload),
        package,
        log.collected(),
    )


def _in_order(
    budget: Budget, measurements: Mapping[str, Measurement], timed: Sequence[Verdict], meter_error: float | None
) -> list[Verdict]:
    """The limits of a budget in its order, those on latency as they were timed; then what else was timed."""
    held = check.decide(budget, measurements, {"energy_mj": meter_error})
    found = {verdict.name: verdict for verdict in (*held, *timed)}
    return [found.pop(name) for name in budget.limits] + list(found.values())


def judged_again(package: Package, report: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """One verdict per limit of a report's budget, from its raw trials and processes at its last look. Raises ValueError where its
    summaries are not theirs; KeyError, TypeError, InputError for what is no report."""
    evidence = report["evidence"]
    limits = {name: limit for name, limit in evidence["budget"].items() if name != "name"}
    budget = Budget.from_json(evidence["budget"]) if limits else Budget()
    blocks = tuple(map(Block.from_json, report["blocks"]))
    measured = {str(name): Measurement.from_json(seen) for name, seen in report["measured"].items()}
    for name, seen in _measured(blocks).items():
        if measured[name] != seen:
            raise ValueError(f"{name} {measured[name].value}, its processes give {seen.value}")
    for name, seen in measured.items():
        if seen.value is not None and (seen.n != len(seen.trials) or seen.value != median(seen.trials)):
            raise ValueError(f"{name} {seen.value} of {seen.n} trials, which the {len(seen.trials)} in it do not give")
    speeds = _speeds(package, report["machine"]) if evidence["budget_from"] == "manifest" else {}
    slowness = _all_slowness(blocks, speeds)
    if report["slowness"] != slowness:
        raise ValueError(f"slowness {report['slowness']}, its references give {slowness}")
    energy = report["energy"] or {}
    if not 0 <= (energy.get("meter_error") or 0.0) < inf:
        raise ValueError(f"meter_error {energy['meter_error']!r}")
    timed = _latencies(budget, blocks, int(report["decision"]["looks"]), speeds)
    held = _in_order(budget, measured, timed, energy.get("meter_error"))
    phases = energy.get("phases", {})
    return tuple(_excused(held, phases, _speeds(package, report["machine"])))


def _latencies(budget: Budget, blocks: Sequence[Block], look: int, speeds: Mapping[str, Speed]) -> list[Verdict]:
    """The look-th look at each limit on latency.

    A limit that was derived from the device's cost table speaks of the machine as it was then: it is held at that speed, and the verdict
    says so. A limit that somebody set is held as measured, and when broken by no more than the machine runs slower than for the table it
    could not be told from the machine's mood.
    """
    verdicts = []
    for name in ("latency_ms", "first_token_ms", "latency_p95_ms"):
        if (limit := budget.limits.get(name)) is None:
            continue
        speed = speeds.get("latency_ms" if name == "latency_p95_ms" else name)
        if speed and not all(speed.work in block.reference_ns for block in blocks):
            speed = None
        ratio = _slowness(blocks, speed) if speed else 1.0
        slower = f"the machine's reference takes {ratio:.2f} times as long as when the cost table was measured"
        held = check.hold_latency(name, limit, blocks, look, speed if budget.name in DERIVED_BUDGETS else None)
        if speed and budget.name in DERIVED_BUDGETS and held.measured is not None:
            as_seen = check.hold_latency(name, limit, blocks, look).measured
            reason = f"{held.reason}; {slower}: {as_seen:.4g} ms as measured, held at the table's speed".removeprefix("; ")
            held = replace(held, reason=reason)
        elif held.verdict == check.OVER and ratio >= SLOWER and held.low is not None and held.low / ratio <= limit:
            held = replace(held, verdict=check.COULD_NOT_TELL, reason=slower)
        verdicts.append(held)
    return verdicts


def _excused(verdicts: Sequence[Verdict], phases: Mapping[str, Mapping[str, Any]], speeds: Mapping[str, Speed]) -> list[Verdict]:
    """The verdicts, one on energy that is over by no more than idle power flows longer on a machine that is slow now: that is "could not
    tell". phases: what the meter saw of each, with its reference (`EnergyOfPackage`)."""
    made = list(verdicts)
    place = next((place for place, held in enumerate(made) if held.name == "energy_mj" and held.verdict == check.OVER), None)
    total = sum(seen["energy_mj"] for seen in phases.values())
    if place is None or total <= 0:
        return made
    at_speed, worst = 0.0, 1.0
    for name, seen in phases.items():
        speed = speeds.get("first_token_ms" if name == "prefill" else "latency_ms")
        times = seen["reference_ns"]
        ratio = times[speed.work] / speed.ns if speed and speed.work in times else 1.0
        at_speed += seen["above_idle_mj"] + (seen["energy_mj"] - seen["above_idle_mj"]) / ratio
        worst = max(worst, ratio)
    held = made[place]
    if worst >= SLOWER and held.low is not None and held.low * at_speed / total <= held.limit:
        reason = (
            f"the machine's reference takes {worst:.2f} times as long as when the cost table was measured, while idle power flows"
        )
        made[place] = replace(held, verdict=check.COULD_NOT_TELL, reason=reason)
    return made


def _against(earlier: Baseline | None, blocks: Sequence[Block], look: int) -> list[Verdict]:
    """The look-th look at each latency against the baseline's. One side that went before the device's other processes and one that did not
    are alike where nothing else ran; the verdict says so."""
    if not earlier:
        return []
    first = [{block.niceness < 0 for block in side} for side in (blocks, earlier.blocks)]
    unlike = "" if first[0] == first[1] else "; only one of the two went before the device's other processes"
    names = [name for name in ("latency_ms", "first_token_ms") if name in blocks[0].trials]
    held = [check.hold_ratio(name, blocks, earlier.blocks, look) for name in names]
    return [replace(verdict, reason=f"{verdict.reason}{unlike}") for verdict in held]


def _speeds(package: Package, machine: Mapping[str, Any]) -> dict[str, Speed]:
    """`Package.speeds`; empty on another machine than the table's: slower is no excuse."""
    measured_on = package.data.get("measured_on")
    if not isinstance(measured_on, Mapping):
        return {}
    return package.speeds if all(machine.get(name) == value for name, value in measured_on.items()) else {}


def _all_slowness(blocks: Sequence[Block], speeds: Mapping[str, Speed]) -> dict[str, float]:
    """By latency, of those whose reference any process has: a GPU's has no finer ones."""
    return {
        name: _slowness(blocks, speed)
        for name, speed in speeds.items()
        if any(speed.work in block.reference_ns for block in blocks)
    }


def _slowness(blocks: Sequence[Block], speed: Speed) -> float:
    """How many times as long the reference takes now as then: the median over processes."""
    return median(median(block.reference_ns[speed.work]) / speed.ns for block in blocks if speed.work in block.reference_ns)


def _measured(blocks: Sequence[Block]) -> dict[str, Measurement]:
    """What was seen, at no other speed than the machine had: all windows of the undisturbed processes, of all where none was."""
    clean = [block for block in blocks if block.valid] or list(blocks)
    valid = clean[0].valid
    seen = {name: summarise((time for block in clean for time in block.trials[name]), valid) for name in clean[0].trials}
    tails = [block.p95_ms for block in clean if block.p95_ms is not None]
    return seen | ({"latency_p95_ms": summarise(tails, valid)} if tails else {})


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
