"""The energy protocol: a meter and subjects → per phase the energy of one execution, total and above idle, in trials. No meter, no number.

    settle          step            idle             turn 1: A.prefill  A.decode  B.prefill ...     turn 2 ...     valid or not
    |--------------|---------------|----------------|------------|===========|------------|=====|------------ ... |-----------|
    wait until      watch how often one window in    half a second,  window: runs back to back,                    ≥ 2 clean
    others use      a counter       which nothing    twice at least, ≥ the meter's least and                       trials of
    < 15% of the    steps           runs: idle power on until the    ≥ 50 of its steps, and on                     each phase
    CPUs (≤ 10 s)                   (GPU: then 5 s   counter steps   until it steps again
                                    of all phases)

A window, not a run, is a trial: total = energy of the window / executions, above idle = total − idle power × seconds / executions. Because
it opens and closes on a step, what a counter holds back at one end is what it held back at the other. A window in which others used
> 15% of the CPUs is dropped and repeated, at most as often as wanted: most meters see what others do too.
One phase runs at a time, over and over, since a step of decoding costs a small part of a prefill. A window also tells how fast the machine
was: every now and then the reference runs, for a hundredth of the time; its time and as much of the energy are taken off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from toolchain.errors import MeterError
from toolchain.profiler.contention import Watch
from toolchain.profiler.meters import Meter, Reading

STEPS = 50
"""Steps of a counter, or samples, that a window holds at least: one more or less at an end is 2% of it."""
LEAST_TRIALS = 2
LONGEST_S = 1500.0
"""What one process measures at most: the desk waits for half an hour (`ask.TIMEOUT_SECONDS`), and models are loaded before this begins."""
WARM_S = 0.5
"""Clocks that fell at rest have risen again."""
BUSY = 0.15
REFERENCE_SHARE = 0.01
"""Of a window's time, for the reference."""
_WATCHED = 4  # steps that tell how often a counter steps
_LOOK_S = 0.00025  # between two looks at it
_STOPPED = 10
"""A counter that has not stepped for as many of its steps has stopped."""
_STOPPED_S = 0.2
"""And not before this: a process may be kept waiting."""

Run = Callable[[], int]
"""Runs a phase once or some times, and says how often."""
Reference = Callable[[], Mapping[str, float]]
"""Runs the reference once → nanoseconds by kind of work."""


@dataclass(frozen=True)
class Clock:
    """Seconds, and waiting: another one in tests."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Window:
    """What a meter saw of a window. error: relative, how far sampling or stepping may be off at most. reference_ns: by kind of work, how
    long the reference took meanwhile: the mean, as a window's energy is one, without the slowest twentieth, which somebody held up."""

    energy_mj: float
    seconds: float
    executions: int
    error: float
    reference_ns: Mapping[str, float] = field(default_factory=dict)


def measure(
    meter: Meter,
    subjects: Mapping[str, Mapping[str, Run]],
    trials: int,
    window_s: float = 0.0,
    clock: Clock | None = None,
    busy: float = BUSY,
    warm_up_s: float = 0.0,
    reference: Reference | None = None,
) -> dict[str, Any]:
    """{"meter", "step_s", "window_s", "idle_mw", "measured": {name: {phase: {"energy_mj": [...], "above_idle_mj": [...], "run_ms": [...],
    "reference_ns": {work: [...]}, "error", "dropped", "valid", "reason"}}}}.

    window_s: seconds of a window; 0: the meter's least. busy: the share of the CPUs from which on others disturb. warm_up_s: for how long
    all phases run before the first turn. Raises MeterError where it cannot tell even the idle power, or the windows would take longer than
    `LONGEST_S`; later on, what was measured stays, and the phases that were not say why.
    """
    clock = clock or Clock()
    start = clock.now()
    step_s = meter.step_s or step_seconds(meter, clock)
    least_s = max(meter.least_window_s, STEPS * step_s)
    if window_s and window_s < least_s:
        raise MeterError(
            f"a window of {window_s:g} s is too short for {meter.name}, which moves every {step_s * 1e3:.3g} ms:"
            f" {least_s:.3g} s are the least"
        )
    seconds = window_s or least_s
    phases = {(name, phase): run for name, runs in subjects.items() for phase, run in runs.items()}
    trials = max(LEAST_TRIALS, trials)
    windows = 1 + len(phases) * trials
    if (needed_s := windows * (seconds + WARM_S)) > LONGEST_S:
        raise MeterError(
            f"{meter.name} ({meter.reads}) moves every {step_s:.3g} s: {windows} windows of {seconds:.0f} s would take"
            f" {needed_s / 60:.0f} min, {LONGEST_S / 60:.0f} are the most"
        )
    taking = _Taking(meter, step_s, seconds, clock, busy, reference)
    idle_mw = taking.idle_mw()
    taking.warm_up(phases.values(), warm_up_s)
    clean: dict[tuple[str, str], list[Window]] = {key: [] for key in phases}
    disturbed: dict[tuple[str, str], list[Window]] = {key: [] for key in phases}
    gone = ""
    while not gone and (open_ := [key for key in phases if _goes_on(clean[key], disturbed[key], trials)]):
        for key in open_:
            if clock.now() + seconds - start > LONGEST_S:
                gone = f"not all trials fitted into {LONGEST_S / 60:.0f} min: others used the CPU, or one run is long"
                break
            watch = Watch()
            try:
                window = taking.window(phases[key])
            except MeterError as error:
                gone = str(error)
                break
            others = watch.usage().others
            (disturbed if others is not None and others > busy else clean)[key].append(window)
    measured: dict[str, dict[str, Any]] = {name: {} for name in subjects}
    for key in phases:
        name, phase = key
        measured[name][phase] = _told(clean[key], disturbed[key], idle_mw, gone)
    return {
        "meter": f"{meter.name}: {meter.reads}",
        "step_s": step_s,
        "window_s": taking.seconds,
        "idle_mw": idle_mw,
        "measured": measured,
    }


def _goes_on(clean: list[Window], disturbed: list[Window], trials: int) -> bool:
    return len(clean) < trials and len(disturbed) < trials


def _told(clean: list[Window], disturbed: list[Window], idle_mw: float, gone: str) -> dict[str, Any]:
    """The answer for one phase. Not valid: all windows, so that somebody can see how disturbed; none where the meter is gone."""
    valid = len(clean) >= LEAST_TRIALS
    if not valid and gone:
        return {
            "energy_mj": [],
            "above_idle_mj": [],
            "run_ms": [],
            "reference_ns": {},
            "error": 0.0,
            "dropped": len(disturbed),
            "valid": False,
            "reason": gone,
        }
    shown = clean if valid else clean + disturbed
    total = [window.energy_mj / window.executions for window in shown]
    seconds = [window.seconds / window.executions for window in shown]
    return {
        "energy_mj": total,
        "above_idle_mj": [energy - idle_mw * second for energy, second in zip(total, seconds, strict=True)],
        "run_ms": [second * 1e3 for second in seconds],
        "reference_ns": {work: [window.reference_ns[work] for window in shown] for work in shown[0].reference_ns},
        "error": max(window.error for window in shown),
        "dropped": len(disturbed),
        "valid": valid,
        "reason": "" if valid else "other processes used the CPU during the trials",
    }


def step_seconds(meter: Meter, clock: Clock) -> float:
    """How often a counter steps, in seconds, by watching it. Raises MeterError for one that stands still."""
    steps: list[float] = []
    last, start = meter.read(), clock.now()
    while len(steps) <= _WATCHED:
        clock.sleep(_LOOK_S)
        seen, now = meter.read(), clock.now()
        if seen.changes > last.changes:
            steps.append(now)
        elif now - (steps or [start])[-1] > meter.patience_s:
            raise MeterError(f"the counter of {meter.name} ({meter.reads}) did not move in {meter.patience_s:g} s")
        last = seen
    return median(after - before for before, after in pairwise(steps))


@dataclass(frozen=True)
class _Taking:
    """Windows of one length by one meter."""

    meter: Meter
    step_s: float
    seconds: float
    clock: Clock
    busy: float
    reference: Reference | None = None

    def idle_mw(self) -> float:
        """Power while nothing of ours runs, from one undisturbed window, or the quietest of three."""
        seen: list[tuple[float, float]] = []
        for _ in range(3):
            watch = Watch()
            window = self._window(self._rest)
            others = watch.usage().others
            seen.append((others or 0.0, window.energy_mj / window.seconds))
            if others is None or others < self.busy:
                break
        power = min(seen)[1]
        if power <= 0:
            raise MeterError(f"{self.meter.name} ({self.meter.reads}) reads {power:g} mW where nothing runs")
        return power

    def _rest(self) -> int:
        self.clock.sleep(min(self.step_s, 0.01))
        return 1

    def warm_up(self, runs: Collection[Run], seconds: float) -> None:
        """Run all of them in turn until so many seconds are over: a GPU that idled comes to speed in seconds, not in `WARM_S`."""
        start = self.clock.now()
        while self.clock.now() - start < seconds:
            for run in runs:
                run()
            if self.reference:
                self.reference()
            self.meter.read()  # some counters must be read now and then

    def window(self, run: Run) -> Window:
        """Raises MeterError if the meter does not move under this load, or vanishes."""
        start, warm = self.clock.now(), 0
        while warm < 2 or self.clock.now() - start < WARM_S:
            run()
            warm += 1
        return self._window(run, loaded=True)

    def _window(self, run: Run, loaded: bool = False) -> Window:
        before, start, _ = self._at_step(run)
        read_at, executions = start, 0
        references: list[Mapping[str, float]] = []
        spent = 0.0
        while (now := self.clock.now()) - start < self.seconds:
            executions += run()
            if now - read_at > self.meter.longest_gap_s:
                self.meter.read()
                read_at = now
            if loaded and self.reference and spent <= REFERENCE_SHARE * (now - start):
                began = self.clock.now()
                references.append(self.reference())
                spent += self.clock.now() - began
        after, end, more = self._at_step(run)
        if loaded and after.changes == before.changes:  # at rest, a coarse sensor may well show one number
            raise MeterError(
                f"{self.meter.name} ({self.meter.reads}) showed one and the same power for {end - start:.3g} s under load"
            )
        seconds = end - start - spent
        energy = (after.energy_mj - before.energy_mj) * seconds / (end - start)
        return Window(energy, seconds, executions + more, self._error(before, after, end - start), _means(references))

    def _at_step(self, run: Run) -> tuple[Reading, float, int]:
        """(the reading, its time, executions until then): of a counter just after a step, of what is sampled at once."""
        first, start, executions = self.meter.read(), self.clock.now(), 0
        if self.meter.sampled:
            return first, start, executions
        while True:
            executions += run()
            seen, now = self.meter.read(), self.clock.now()
            if seen.changes > first.changes:
                return seen, now, executions
            if now - start > max(_STOPPED * self.step_s, _STOPPED_S):
                raise MeterError(f"the counter of {self.meter.name} ({self.meter.reads}) did not move in {now - start:.3g} s")

    def _error(self, before: Reading, after: Reading, seconds: float) -> float:
        energy = after.energy_mj - before.energy_mj
        if not self.meter.sampled:
            return self.step_s / seconds
        halves = after.half_rate_mj - before.half_rate_mj
        return abs(energy - halves) / energy if energy > 0 else 0.0


def _means(seen: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By kind of work, the mean without the slowest twentieth."""
    kept = len(seen) - len(seen) // 20
    return {work: sum(sorted(times[work] for times in seen)[:kept]) / kept for work in seen[0]} if seen else {}
