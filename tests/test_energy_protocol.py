"""The energy protocol on replayed traces: what a window's energy is divided by, what idle takes off, and when there is a reason instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from constructed_sysfs import Hand
from tiny_graphs import attention

from toolchain.errors import MeterError
from toolchain.profiler import ask, energy, model_rows
from toolchain.profiler.contention import Usage
from toolchain.profiler.energy import Clock, measure
from toolchain.profiler.measure import subject as measure_subject
from toolchain.profiler.meters import Reading
from toolchain.profiler.meters.replay import Replay
from toolchain.profiler.subjects import SUBJECTS, Generate
from toolchain.profiler.transports import jobs
from toolchain.spec import Workload

STEP = 0.1
IDLE_MW, BUSY_MW = 20_000.0, 100_000.0
IDLE_ENDS = 5.7
"""Watching five steps takes 0.5 s, the idle window 5 s and a step at each end: now the first warm-up runs."""


def _trace(seconds: float, idle_ends: float = IDLE_ENDS, step: float = STEP) -> list[tuple[float, float]]:
    """A counter that steps every `step` seconds, at idle power until `idle_ends` and at load from then on."""
    times = [place * step for place in range(math.ceil(seconds / step) + 1)]
    return [(time, min(time, idle_ends) * IDLE_MW + max(0.0, time - idle_ends) * BUSY_MW) for time in times]


class _Quiet:
    others: ClassVar[list[float]] = []

    def usage(self) -> Usage:
        return Usage(1.0, self.others.pop(0) if self.others else 0.0)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> type[_Quiet]:
    """Nobody else uses the machine, except as `others` says, window by window (idle first)."""
    monkeypatch.setattr(_Quiet, "others", [])
    monkeypatch.setattr(energy, "Watch", _Quiet)
    return _Quiet


@pytest.fixture
def hand() -> Hand:
    return Hand()


def _taking(hand: Hand, seconds: float, executions: int = 1) -> Callable[[], int]:
    """A phase that takes so long."""

    def run() -> int:
        hand.sleep(seconds)
        return executions

    return run


def _measure(hand: Hand, trace: list[tuple[float, float]], phases: dict[str, Callable[[], int]], **more: Any) -> dict[str, Any]:
    meter = Replay(trace, hand, more.pop("least_window_s", 5.0))
    return measure(meter, {"package": phases}, more.pop("trials", 2), clock=Clock(hand, hand.sleep), **more)


def test_energy_is_divided_by_executions_and_idle_power_taken_off_for_their_time(hand: Hand) -> None:
    answer = _measure(hand, _trace(60), {"prefill": _taking(hand, 0.05), "decode": _taking(hand, 0.006, 6)}, trials=3)
    assert answer["meter"] == "replay: a recorded trace"
    assert answer["step_s"] == pytest.approx(STEP, rel=0.01)
    assert answer["idle_mw"] == pytest.approx(IDLE_MW, rel=0.002)
    for phase, seconds in (("prefill", 0.05), ("decode", 0.001)):
        seen = answer["measured"]["package"][phase]
        assert (seen["valid"], seen["dropped"], seen["reason"]) == (True, 0, "")
        assert seen["energy_mj"] == pytest.approx([BUSY_MW * seconds] * 3, rel=0.012)  # a run of 50 ms may straddle a step
        assert seen["above_idle_mj"] == pytest.approx([(BUSY_MW - IDLE_MW) * seconds] * 3, rel=0.02)
        assert seen["run_ms"] == pytest.approx([seconds * 1e3] * 3)
        assert seen["error"] == pytest.approx(STEP / 5, rel=0.05)


def test_a_window_opens_and_closes_on_a_step_of_the_counter(hand: Hand) -> None:
    """Runs of a millisecond, a counter of 0.1 s: cut anywhere, a window of 5.03 s would be up to 2% wrong."""
    seen = _measure(hand, _trace(60), {"run": _taking(hand, 0.001)}, window_s=5.03)["measured"]["package"]["run"]
    assert seen["energy_mj"] == pytest.approx([BUSY_MW * 0.001] * 2, rel=0.0005)


def test_a_slow_counter_asks_for_longer_windows(hand: Hand) -> None:
    answer = _measure(hand, _trace(400, 0.0, step=0.4), {"run": _taking(hand, 0.01)})
    assert answer["window_s"] == pytest.approx(energy.STEPS * 0.4, rel=0.01)


def test_a_window_tells_the_references_time_and_does_not_count_it(hand: Hand) -> None:
    """The reference takes 4 ms, every tenth time ten times as long: its mean, without the slowest twentieth, and a hundredth of the window,
    which is taken off both the time and the energy."""
    asked: list[float] = []

    def reference() -> dict[str, float]:
        asked.append(hand())
        seconds = 0.04 if len(asked) % 10 == 0 else 0.004
        hand.sleep(seconds)
        return {"token": seconds * 1e9}

    answer = _measure(hand, _trace(120), {"run": _taking(hand, 0.01)}, window_s=20.0, reference=reference)
    seen = answer["measured"]["package"]["run"]
    assert min(asked) > IDLE_ENDS + 15  # idle is idle: no reference either
    assert 20 < len(asked) < 80
    assert seen["energy_mj"] == pytest.approx([BUSY_MW * 0.01] * 2, rel=0.003)
    assert seen["run_ms"] == pytest.approx([10.0] * 2, rel=0.001)
    for nanoseconds in seen["reference_ns"]["token"]:
        assert 4e6 < nanoseconds < 7.6e6


def test_too_short_a_window_gives_a_reason(hand: Hand) -> None:
    with pytest.raises(MeterError, match="a window of 3 s is too short for replay, which moves every 100 ms: 5 s are the least"):
        _measure(hand, _trace(60), {"run": _taking(hand, 0.01)}, window_s=3.0, least_window_s=1.0)


def test_a_counter_that_does_not_move_gives_a_reason(hand: Hand) -> None:
    with pytest.raises(MeterError, match="did not move in 5 s"):
        _measure(hand, [(0.0, 7.0), (1000.0, 7.0)], {"run": _taking(hand, 0.01)})


@pytest.mark.parametrize(("vanishes", "words"), [(True, "the meter vanished"), (False, "did not move in 1 s")])
def test_a_meter_that_vanishes_or_stops_keeps_what_was_measured_and_no_more(hand: Hand, vanishes: bool, words: str) -> None:
    """The trace ends in the second trial of the second phase."""
    trace = [entry for entry in _trace(60) if entry[0] < 24]
    if not vanishes:
        trace.append((1000.0, trace[-1][1]))
    answer = _measure(hand, trace, {"prefill": _taking(hand, 0.02), "decode": _taking(hand, 0.01)})
    first, second = (answer["measured"]["package"][phase] for phase in ("prefill", "decode"))
    assert first["valid"]
    assert first["energy_mj"] == pytest.approx([BUSY_MW * 0.02] * 2, rel=0.01)
    assert (second["valid"], second["energy_mj"]) == (False, [])
    assert words in second["reason"]


def test_disturbed_windows_are_repeated_and_a_busy_machine_gives_no_valid_trial(hand: Hand, quiet: type[_Quiet]) -> None:
    quiet.others = [0.0, 0.5, 0.0, 0.0]
    seen = _measure(hand, _trace(60), {"run": _taking(hand, 0.01)})["measured"]["package"]["run"]
    assert (seen["valid"], seen["dropped"], len(seen["energy_mj"])) == (True, 1, 2)
    quiet.others = [0.0, 0.0, 0.5, 0.5]
    again = Hand()
    seen = _measure(again, _trace(60), {"run": _taking(again, 0.01)})["measured"]["package"]["run"]
    assert (seen["valid"], seen["dropped"], len(seen["energy_mj"])) == (False, 2, 3)
    assert "other processes" in seen["reason"]


def test_all_phases_are_warm_before_the_first_is_measured(hand: Hand) -> None:
    """After the idle window, for which they must not have run. At 60 W for the first four seconds of work, at 100 W from then on: of a
    window that opened half a second after idle, a sixteenth would be wrong."""
    ran: dict[str, list[float]] = {"prefill": [], "decode": []}

    def phase(name: str) -> Callable[[], int]:
        def run() -> int:
            ran[name].append(hand())
            hand.sleep(0.01)
            return 1

        return run

    warm = IDLE_ENDS + 4.0
    trace = [(time, mj - 0.4 * BUSY_MW * max(0.0, min(time, warm) - IDLE_ENDS)) for time, mj in _trace(60)]
    answer = _measure(hand, trace, {name: phase(name) for name in ran}, warm_up_s=5.0)
    assert answer["idle_mw"] == pytest.approx(IDLE_MW, rel=0.002)
    assert min(ran["prefill"]) == pytest.approx(IDLE_ENDS, abs=2 * STEP)
    assert min(ran["decode"]) < IDLE_ENDS + 1.0  # all of them, not the first alone
    for seen in answer["measured"]["package"].values():
        assert seen["energy_mj"] == pytest.approx([BUSY_MW * 0.01] * 2, rel=0.005)


def test_what_would_outlast_the_desks_patience_is_not_begun(hand: Hand) -> None:
    """A gauge that moves every second: 31 windows of 50 s. The desk would give up, and with it all else that it measured."""
    assert min(ask.TIMEOUT_SECONDS, jobs.LIMIT_SECONDS) - energy.LONGEST_S >= 300
    phases = {str(place): _taking(hand, 0.5) for place in range(5)}
    with pytest.raises(MeterError, match=r"moves every 1 s: 31 windows of 50 s would take 26 min, 25 are the most"):
        _measure(hand, _trace(3000, 0.0, step=1.0), phases, trials=6)
    assert hand() < 10


def test_windows_that_are_repeated_end_before_the_desks_patience_does(hand: Hand, quiet: type[_Quiet]) -> None:
    """What is valid by then is told; a phase that is not says why."""
    quiet.others = [0.0, *[0.0, 0.5] * 2, *[0.5] * 100]
    phases = {"prefill": _taking(hand, 0.5), "decode": _taking(hand, 0.5)}
    answer = _measure(hand, _trace(3000, 0.0, step=1.0), phases, trials=14)
    assert hand() <= energy.LONGEST_S + 2
    first, second = (answer["measured"]["package"][phase] for phase in phases)
    assert (first["valid"], first["reason"], len(first["energy_mj"])) == (True, "", 2)
    assert (second["valid"], second["energy_mj"]) == (False, [])
    assert "fitted into 25 min" in second["reason"]


class _Sensor:
    """Power that is sampled when it is read."""

    name, reads, sampled, step_s, least_window_s, patience_s, longest_gap_s = "hwmon", "a rail", True, 0.02, 5.0, 5.0, 1.0

    def __init__(self, hand: Hand, power_mw: Callable[[float], float]) -> None:
        self._hand, self._power_mw = hand, power_mw
        self._last, self._changes, self._energy = (hand(), power_mw(hand())), 0, 0.0
        self.read_at: list[float] = []

    def read(self) -> Reading:
        now = (self._hand(), self._power_mw(self._hand()))
        self._energy += (now[0] - self._last[0]) * (now[1] + self._last[1]) / 2
        self._changes += now[1] != self._last[1]
        self._last = now
        self.read_at.append(now[0])
        return Reading(self._energy, self._energy * 0.97, self._changes, len(self.read_at))

    def close(self) -> None: ...


def test_a_sensor_that_shows_one_number_under_load_has_stopped_but_may_rest(hand: Hand) -> None:
    def measured(power_mw: Callable[[float], float]) -> dict[str, Any]:
        fresh = Hand()
        return measure(_Sensor(fresh, power_mw), {"a": {"run": _taking(fresh, 0.01)}}, 2, clock=Clock(fresh, fresh.sleep))

    stopped = measured(lambda _: 5000.0)["measured"]["a"]["run"]
    assert "one and the same power" in stopped["reason"]
    alive = measured(lambda seconds: 5000.0 if seconds < 5.005 else 9000.0 + 10 * math.sin(seconds))["measured"]["a"]["run"]
    assert alive["energy_mj"] == pytest.approx([90.0] * 2, rel=0.01)
    assert alive["error"] == pytest.approx(0.03)  # what every second sample alone would have missed


def test_a_meter_is_read_as_often_as_it_must_be(hand: Hand) -> None:
    sensor = _Sensor(hand, lambda seconds: 5000.0 + seconds)
    measure(sensor, {"a": {"run": _taking(hand, 0.01)}}, 2, window_s=20.0, clock=Clock(hand, hand.sleep))
    assert max(np.diff(sensor.read_at)) < sensor.longest_gap_s + 0.05


def test_one_phase_of_a_model_runs_without_the_other(tmp_path: Path) -> None:
    subject = Generate({"folder": attention(tmp_path), "tokens": 5, "new_tokens": 4, "rows": 4096}, 1, shared_pool=False)
    runs = subject.runs()
    decoder = subject._decoder
    assert [runs["decode"]() for _ in range(3)] == [4, 4, 4]  # each from the end of the prompt: the cache does not overflow
    assert decoder.used == 9
    assert runs["prefill"]() == 1
    assert decoder.used == 5


@pytest.mark.parametrize(
    ("name", "workload"),
    [("llama", "generate:8+6"), ("bert", "encode:2x8"), ("t5", "generate:8+6")],
    ids=["decoder", "encoder", "both"],
)
def test_what_runs_for_energy_is_what_is_timed(name: str, workload: str, graphs: Any) -> None:
    """Every phase of a whole model, as the profiler runs it phase by phase and as a package serves it; each can be repeated for ever."""
    graph, wanted = graphs(name), Workload.parse(workload)
    alone = SUBJECTS[f"{graph.kind} phases"](model_rows.subject(graph, "m", graph.directory, wanted.phases), 1, False)
    whole = SUBJECTS[wanted.kind](measure_subject("m", graph.directory, wanted, graph.vocabulary), 1, False)
    assert set(alone.runs()) == set(alone.trial()) == {model_rows.label(phase) for phase in wanted.phases}
    assert set(whole.runs()) == {phase.name for phase in wanted.phases} == {key.removesuffix("_ns") for key in whole.trial()}
    executions = {"prefill": 1, "encode": 1, "decode": wanted.new_tokens}
    for _ in range(3):
        assert {name: run() for name, run in whole.runs().items()} == {
            phase.name: executions[phase.name] for phase in wanted.phases
        }
        assert all(run() >= 1 for run in alone.runs().values())
