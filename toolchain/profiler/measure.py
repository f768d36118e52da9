"""A package on a device → measurements: latency from timed trials, memory from fresh processes, energy from a meter or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from toolchain.blocks import Block
from toolchain.costs.operations import runs
from toolchain.errors import BittailorError
from toolchain.profiler.ask import Host
from toolchain.spec import Measurement, Workload

MEMORY_TRIALS = 3
BLOCK_WINDOWS = 5
"""Windows of one process: as few as the agent calls valid, since more of them say little more than one of another process."""
ENERGY_TRIALS = 6
"""The fewest whose range holds the median in 95 of 100 cases whatever they are distributed like (`check.median_interval`)."""

_DECODE, _ENCODE = "decode_ns", "encode_ns"
_NAMES = {_DECODE: "latency_ms", _ENCODE: "latency_ms", "prefill_ns": "first_token_ms"}


@dataclass(frozen=True)
class Observation:
    """What was seen of one package: resource → measurement, and by kind of work the reference's time meanwhile."""

    measurements: Mapping[str, Measurement]
    reference_ns: Mapping[str, float]
    dropped: int
    running_bytes: float
    """Resident bytes once it runs: less than the peak where loading sets it."""


def summarise(trials: Iterable[float], valid: bool) -> Measurement:
    """Median and half the distance between the 10th and the 90th percentile; valid needs two trials and the protocol's consent."""
    values = tuple(trials)
    if not values:
        return Measurement(None, reason="no trial was completed")
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    reason = "" if valid else "other processes used the CPU during the trials"
    return Measurement(median(values), (high - low) / 2, len(values), valid and len(values) > 1, values, reason)


def levelled(trials: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """Trials of subjects in rotation with each window's common slowness taken out: what all of them felt, the machine did.

    A window's slowness in a phase is the median, over subjects, of its trial over the subject's own median. Fewer than four subjects
    cannot tell the machine's moods from their own: they are returned as they are.
    """
    made: dict[str, list[dict[str, float]]] = {name: [dict(trial) for trial in seen] for name, seen in trials.items()}
    phases = {phase: [name for name, seen in trials.items() if phase in seen[0]] for seen in trials.values() for phase in seen[0]}
    for phase, names in phases.items():
        if len(names) < 4:
            continue
        middle = {name: median(trial[phase] for trial in trials[name]) for name in names}
        for window in range(len(trials[names[0]])):
            slowness = median(trials[name][window][phase] / middle[name] for name in names)
            for name in names:
                made[name][window][phase] /= slowness
    return made


def subject(name: str, folder: Path, workload: Workload, vocabulary: int) -> dict[str, Any]:
    """The agent's description of a whole model to run."""
    return {
        "name": name,
        "kind": workload.kind,
        "folder": str(folder),
        "batch": workload.batch,
        "tokens": workload.prompt_tokens,
        "new_tokens": workload.new_tokens,
        "rows": vocabulary,
    }


def latencies(trials: Sequence[Mapping[str, float]], valid: bool) -> dict[str, Measurement]:
    """latency_ms, and first_token_ms of a decoder, from the agent's trials."""
    present = _phases(trials)
    return {_NAMES[phase]: summarise((trial[phase] / 1e6 for trial in trials), valid) for phase in present}


def _phases(trials: Sequence[Mapping[str, float]]) -> Sequence[str]:
    """Of whole models. Raises BittailorError for others: an agent that answers so is not ours."""
    present = trials[0].keys() if trials else set()
    if any(trial.keys() != present for trial in trials) or not present <= _NAMES.keys():
        raise BittailorError("expected trials of the same phases, decode and prefill or encode, got others", "measure again")
    return list(present)


def measure_package(folder: Path, workload: Workload, host: Host, vocabulary: int, windows: int = 25) -> Observation:
    """Measure one package: `windows` clean trials of 200 ms or more, and the peak memory of three fresh processes."""
    answer = host.time([subject("package", folder, workload, vocabulary)], windows)
    measured = latencies(answer["trials"]["package"], answer["valid"])
    measured["peak_memory_bytes"], running = weigh_package(folder, workload, host, vocabulary)
    references = {work: median(times) for work, times in answer["reference_ns"].items()}
    return Observation(measured, references, answer["dropped"], running)


def measure_block(
    folder: Path,
    workload: Workload,
    host: Host,
    vocabulary: int,
    tail: bool = False,
    windows: int = BLOCK_WINDOWS,
    first: bool = True,
) -> Block:
    """One process that times a package. tail: the 95th percentile of single runs too. first: before others, where the system lets it."""
    answer = host.time([subject("package", folder, workload, vocabulary)], windows, 0.95 if tail else 0.0, first)
    trials = answer["trials"]["package"]
    quantile = answer.get("quantiles", {}).get("package", {}).get(_DECODE if workload.kind == "generate" else _ENCODE)
    return Block.from_json(
        {
            "trials": {_NAMES[phase]: [trial[phase] / 1e6 for trial in trials] for phase in _phases(trials)},
            "reference_ns": answer["reference_ns"],
            "dropped": answer["dropped"],
            "valid": answer["valid"],
            "p95_ms": quantile / 1e6 if tail and quantile else None,
            "niceness": answer.get("niceness", 0),
        }
    )


def weigh_package(folder: Path, workload: Workload, host: Host, vocabulary: int) -> tuple[Measurement, float]:
    """(peak memory of three fresh processes, the bytes that stay resident once it runs)."""
    what = subject("package", folder, workload, vocabulary)
    weighed = [host.peak(what) for _ in range(MEMORY_TRIALS)]
    peak = summarise((float(seen["peak_bytes"]) for seen in weighed), valid=True)
    return peak, float(median(seen["running_bytes"] for seen in weighed))


@dataclass(frozen=True)
class EnergyOfPackage:
    """What a meter saw of one inference, in mJ: all of it, and what idle power leaves; idle power, the meter, its relative error.

    phases: of each phase of one inference, medians of both, of one run's time and of the reference's nanoseconds by kind of work.
    """

    total: Measurement
    above_idle: Measurement
    idle_mw: float | None = None
    meter: str = ""
    window_s: float | None = None
    meter_error: float | None = None
    phases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Without the total, which is a measurement like the others."""
        above = {"above_idle_mj": self.above_idle.value, "above_idle_spread_mj": self.above_idle.spread}
        seen = {"window_s": self.window_s, "meter_error": self.meter_error, "phases": {**self.phases}}
        return {"meter": self.meter, "idle_mw": self.idle_mw, **above, **seen}


def measure_energy(
    host: Host, folder: Path, workload: Workload, vocabulary: int, meter: str, trials: int = ENERGY_TRIALS, window_s: float = 0.0
) -> EnergyOfPackage:
    """Energy of one inference of a package: each phase in windows of its own, times how often an inference runs it.

    A trial is the sum over the phases' windows of the same turn. Without a number there is the reason.
    """
    answer = host.energy([subject("package", folder, workload, vocabulary)], meter, trials, window_s)
    seen = [(runs(phase, workload), answer["measured"]["package"][phase.name]) for phase in workload.phases if not answer["reason"]]
    reason = answer["reason"] or next((found["reason"] for _, found in seen if not found["valid"]), "")
    if reason:
        none = Measurement(None, reason=reason)
        return EnergyOfPackage(none, none)

    def inference(kind: str) -> Measurement:
        turns = zip(*(found[kind] for _, found in seen), strict=False)  # a phase that was disturbed less often has no more trials
        counts = [times for times, _ in seen]
        return summarise((sum(times * energy for times, energy in zip(counts, turn, strict=True)) for turn in turns), valid=True)

    error = max(found["error"] for _, found in seen)
    phases = {
        phase.name: {
            **{kind: times * median(found[kind]) for kind in ("energy_mj", "above_idle_mj")},
            "run_ms": median(found["run_ms"]),
            "reference_ns": {work: median(trials) for work, trials in found["reference_ns"].items()},
        }
        for phase, (times, found) in zip(workload.phases, seen, strict=True)
    }
    return EnergyOfPackage(
        inference("energy_mj"), inference("above_idle_mj"), answer["idle_mw"], answer["meter"], answer["window_s"], error, phases
    )
