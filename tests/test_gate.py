"""What `check` decides of processes it timed: error rates of the whole sequential decision, on simulated processes."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_machines import SPEED, Machine, Restless, TwoSpeeds

from toolchain.blocks import Block, Speed, bounds, compared, spent, student
from toolchain.check import hold_latency, hold_ratio
from toolchain.commands.deciding import LOOKS, Patience, decide_in_looks
from toolchain.errors import InputError


def _decided(machine: Machine, limit: float, speed: Speed | None = SPEED, most_s: float = 120.0) -> Any:
    return decide_in_looks(
        machine.measure,
        lambda blocks, look: [hold_latency("latency_ms", limit, blocks, look, speed)],
        Patience(0, most_s),
        lambda: machine.now,
    )


@pytest.mark.parametrize(
    ("freedom", "tail", "t"),
    [
        (1, 0.05, 6.314),
        (1, 0.005, 63.657),
        (2, 0.01, 6.965),
        (3, 0.005, 5.841),
        (5, 0.0005, 6.869),
        (8, 0.05, 1.860),
        (71, 0.025, 1.994),
    ],
)
def test_students_quantile_is_the_tabulated_one(freedom: int, tail: float, t: float) -> None:
    assert student(tail, freedom) == pytest.approx(t, abs=6e-4)


def test_all_looks_together_spend_no_more_than_there_is() -> None:
    assert sum(spent(0.01, look) for look in range(1, 1000)) < 0.01
    assert spent(0.01, 1) == 0.005


def test_a_package_ten_percent_from_its_limit_is_told_from_either_side() -> None:
    """200 checks, the machine's speed wandering by far more than 10%."""
    for room, right in ((1 / 0.9, "within"), (1 / 1.1, "over")):
        found = [_decided(Machine(seed, 0.6), 0.6 * room) for seed in range(100)]
        assert [one.verdicts[0].verdict for one in found] == [right] * 100
        assert max(one.seconds for one in found) < 120


@pytest.mark.parametrize("between", [0.03, 0.1])
def test_a_package_barely_over_its_limit_is_seldom_called_within(between: float) -> None:
    """At the limit itself, where it is hardest: at most ALPHA for each side, all looks together."""
    said = [_decided(Machine(seed, 1.0, between), 0.9999).verdicts[0].verdict for seed in range(150)]
    assert said.count("within") <= 0.01 * 150 + 3 * math.sqrt(0.01 * 150)
    assert said.count("could not tell") > 140


def test_windows_are_not_taken_for_processes() -> None:
    """Processes that differ by 10% with windows that agree: five windows of each must not pass for five times as many processes."""
    wrong = sum(_decided(Machine(seed, 1.0, 0.1, 0.001), 0.97).verdicts[0].verdict == "within" for seed in range(100))
    assert wrong <= 4


def test_an_open_limit_is_measured_longer_until_the_time_is_over() -> None:
    near, far = _decided(Machine(0, 1.0), 1.02), _decided(Machine(0, 1.0), 2.0)
    assert (len(far.blocks), far.looks) == (LOOKS[0], 1)
    assert near.looks > 1
    stopped = _decided(Machine(0, 1.0), 1.0001, most_s=30.0)
    assert stopped.verdicts[0].verdict == "could not tell"
    assert "--most-seconds" in stopped.verdicts[0].reason
    assert stopped.seconds <= 30
    short = _decided(Machine(0, 1.0), 2.0, most_s=1.0)  # a large model: three processes all the same, and they may tell
    assert (len(short.blocks), short.verdicts[0].verdict) == (3, "within")
    least = decide_in_looks(Machine(0, 1.0).measure, lambda *_: [], Patience(0, 5), iter(range(100)).__next__)
    assert len(least.blocks) < LOOKS[0]


def test_at_least_so_long_is_measured_as_was_asked() -> None:
    machine = Machine(0, 1.0)
    looked: list[int] = []

    def judge(blocks: Any, look: int) -> Any:
        looked.append(len(blocks))
        return [hold_latency("latency_ms", 2.0, blocks, look, SPEED)]

    found = decide_in_looks(machine.measure, judge, Patience(50, 120), lambda: machine.now)
    assert found.seconds >= 50
    assert looked == [21]  # the looks before it were not used


def test_disturbed_processes_can_keep_a_limit_and_not_break_it() -> None:
    calm = [Machine(seed, 1.0).measure() for seed in range(6)]
    busy = [Block({"latency_ms": (2.0 + 0.01 * place,) * 5}, block.reference_ns, 10, False) for place, block in enumerate(calm)]
    assert hold_latency("latency_ms", 3.0, busy, 1).verdict == "within"
    assert "other processes" in hold_latency("latency_ms", 3.0, busy, 1).reason
    assert hold_latency("latency_ms", 1.5, busy, 1).verdict == "could not tell"
    mixed = hold_latency("latency_ms", 1.5, [*busy, *calm], 1, SPEED)
    assert (mixed.verdict, mixed.measured) == ("within", pytest.approx(1.0, rel=0.1))  # the clean ones alone


@settings(max_examples=40)
@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=12), st.floats(0.01, 100), st.floats(1, 3))
def test_a_wider_limit_never_gives_a_worse_verdict(levels: list[float], limit: float, more: float) -> None:
    rank = ["over", "could not tell", "within"]
    blocks = [Block({"latency_ms": (level,)}, {}) for level in levels]
    one, other = (rank.index(hold_latency("latency_ms", x, blocks, 1).verdict) for x in (limit, limit * more))
    assert other >= one


def _against(seed: int, ratio: float, processes: int = 24) -> str:
    before = Machine(2 * seed, 1.0, 0.03, 0.03)
    then = [before.measure() for _ in range(processes)]
    now = Machine(2 * seed + 1, ratio, 0.03, 0.03)
    found = decide_in_looks(
        now.measure, lambda blocks, look: [hold_ratio("latency_ms", blocks, then, look)], Patience(), lambda: now.now
    )
    return found.verdicts[0].verdict


def test_eight_percent_slower_than_the_baseline_is_noticed_and_the_same_is_not() -> None:
    """Show 2 in simulation, with processes that differ by 3.3% as on the machine of README; the two machines' moods are apart."""
    slower, same = [_against(seed, 1.08) for seed in range(100)], [_against(seed, 1.0) for seed in range(100)]
    assert slower.count("over") >= 95
    assert same.count("over") <= 1
    assert same.count("within") >= 95


def test_like_is_compared_with_like() -> None:
    """A process now with those of the baseline that found the machine alike, by every reference; by hand."""

    def block(level: float, token: float, tokens: float) -> Block:
        return Block({"latency_ms": (level,)}, {"token": (token,), "tokens": (tokens,)})

    then = [block(1.0, 9, 50)] * 4 + [block(3.0, 18, 60)] * 4 + [block(1.5, 18, 50)] * 4
    ratio = compared([block(3.3, 18, 60)] * 6, then, "latency_ms", 0.05, 0.05)
    assert (ratio.value, ratio.alike) == (pytest.approx(1.1), (6, 4))
    mixed = compared(
        [block(3.3, 18, 60), block(1.1, 9, 50), block(1.65, 18, 50), block(9.9, 36, 99)], then, "latency_ms", 0.05, 0.05
    )
    assert (mixed.value, mixed.alike) == (pytest.approx(1.1), (3, 12))
    near = compared([block(1.0, 9 * 1.04, 50 * 1.04)] * 6, then, "latency_ms", 0.05, 0.05)
    assert near.value == pytest.approx(1 / 1.04)  # what is left between them it follows
    verdict = hold_ratio("latency_ms", [block(3.3, 18, 60)] * 6, then, 1)
    assert (verdict.verdict, verdict.measured) == ("over", pytest.approx(1.1))
    assert "6 of 6 processes and 4 of the baseline's 12 found the machine alike" in verdict.reason
    never = hold_ratio("latency_ms", [block(3.3, 30, 60)] * 6, then, 1)
    assert (never.verdict, never.low) == ("could not tell", None)
    assert "--least-seconds" in never.reason
    few = hold_ratio("latency_ms", [block(3.3, 18, 60)] * 6, then[:2], 1)
    assert (few.verdict, "2 in the baseline" in few.reason) == ("could not tell", True)
    bare = [Block({"latency_ms": (level,)}, {}) for level in (1.0, 1.01, 0.99, 1.0)]  # a device that has no references
    assert compared(bare, bare, "latency_ms", 0.05, 0.05).value == pytest.approx(1)


@pytest.mark.parametrize("sharing", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("before", [(0.05, 0.4), (0.3, 0.2)])
def test_a_machine_that_is_slow_in_more_ways_than_one_is_no_regression(before: tuple[float, float], sharing: float) -> None:
    """One slope over all its states flagged up to 50 of 60 unchanged packages. A baseline that hardly saw the state of now cannot tell."""
    said: dict[float, list[str]] = {1.0: [], 1.08: []}
    for ratio, verdicts in said.items():
        for seed in range(60):
            then = Restless(2 * seed, 1.0, *before)
            verdicts.append(Restless(2 * seed + 1, ratio, sharing, 0.05).against([then.measure() for _ in range(30)]))
    assert said[1.0].count("over") <= 3
    assert said[1.08].count("within") <= 1
    if sharing == 0 or before[0] > 0.1:
        assert said[1.0].count("within") >= 50
        assert said[1.08].count("over") >= 57


@pytest.mark.parametrize("sharing", [0.0, 0.4, 1.0])
def test_a_package_that_does_not_follow_its_reference_in_full_is_compared_at_one_speed_all_the_same(sharing: float) -> None:
    """Held to follow in full, at the slower speed it looks 15% faster than a baseline that was mostly made at the other."""
    verdicts: dict[float, list[str]] = {1.0: [], 1.08: []}
    for ratio, seen in verdicts.items():
        for seed in range(60):
            before = TwoSpeeds(2 * seed, 1.0, 0.4)
            seen.append(TwoSpeeds(2 * seed + 1, ratio, sharing).against([before.measure() for _ in range(30)]))
    assert verdicts[1.08].count("within") <= 1
    assert verdicts[1.0].count("over") <= 3
    if sharing < 1:  # else the speeds lie apart where the baseline saw little of this one: some stay open
        assert verdicts[1.08].count("over") >= 57
        assert verdicts[1.0].count("within") >= 54
    assert verdicts[1.08].count("over") >= 45


@pytest.mark.parametrize("noise", [0.01, 0.02, 0.03])
@pytest.mark.parametrize("shift", [0.9, 1.1, 1.25])
def test_a_noisy_reference_on_a_quiet_machine_says_nothing_of_the_share(noise: float, shift: float) -> None:
    """The machine is `shift` times as slow as when the baseline was made, and never anything else. A slope fitted to a reference's own
    noise is next to 0, and would put the whole shift down to the package."""

    def measured(rng: np.random.Generator, level: float, speed: float) -> Block:
        reference = 100.0 * speed * np.exp(noise * rng.standard_normal() + 0.01 * rng.standard_normal(5))
        times = level * speed * np.exp(0.02 * rng.standard_normal() + 0.01 * rng.standard_normal(5))
        return Block({"latency_ms": tuple(times)}, {"model token": tuple(reference)})

    wrong = {1.0: "over", 1.1: "within"}
    seen = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        then = [measured(rng, 1.0, 1.0) for _ in range(30)]
        for ratio, error in wrong.items():
            seen.append(hold_ratio("latency_ms", [measured(rng, ratio, shift) for _ in range(12)], then, 1).verdict == error)
    assert sum(seen) <= 5  # of what is no slower, a flag at this look is one in forty; what is missed one in two hundred


def test_a_fitted_share_errs_no_oftener_at_the_limit_itself() -> None:
    """It takes a degree of freedom that `at_speed` does not count; that all looks share what may err makes up for more."""
    held = [TwoSpeeds(seed, 1.0, 0.4).held(0.99999).verdict for seed in range(300)]
    assert 300 - held.count("could not tell") <= 0.01 * 300 + 3 * math.sqrt(0.01 * 300)
    assert held.count("could not tell") >= 290


@pytest.mark.parametrize("sharing", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("limit", "wrong"), [(1 / 0.9, "over"), (1 / 1.1, "within")])
def test_a_package_that_does_not_follow_its_reference_in_full_keeps_or_breaks_its_limit(
    sharing: float, limit: float, wrong: str
) -> None:
    """Held to follow in full it looks 15% faster than it is at the table's speed. A check that sees both speeds learns its share."""
    held = [TwoSpeeds(seed, 1.0, sharing).held(limit) for seed in range(60)]
    said = [one.verdict for one in held]
    assert said.count(wrong) <= 1
    if sharing == 0:
        assert said.count("could not tell") == 0
    if sharing == 1:
        assert "the machine's speed" in held[said.index("could not tell")].reason


def test_sides_that_never_saw_the_same_speed_cannot_be_told_apart() -> None:
    seen = []
    for seed in range(60):
        before = TwoSpeeds(2 * seed, 1.0, 0.0)
        seen.append(TwoSpeeds(2 * seed + 1, 1.08, 1.0).against([before.measure() for _ in range(30)]))
    assert seen == ["could not tell"] * 60


def test_bounds_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    levels = np.exp(0.1 * rng.standard_normal((4000, 6)))
    found = [bounds(list(row), 0.05) for row in levels]
    assert np.mean([high < 1 for _, high in found]) == pytest.approx(0.05, abs=0.011)
    assert np.mean([low > 1 for low, _ in found]) == pytest.approx(0.05, abs=0.011)
    low, high = bounds([1.0] * 6, 0.005)  # six that agree by chance
    assert low < 0.98
    assert high > 1.02


_JUNK = st.none() | st.booleans() | st.floats() | st.text(max_size=3)


@settings(max_examples=40)
@given(_JUNK | st.lists(_JUNK, max_size=3) | st.dictionaries(st.text(max_size=3), _JUNK | st.lists(_JUNK, max_size=2), max_size=2))
def test_a_block_is_read_whole_or_refused(data: Any) -> None:
    good = Machine(0, 1.0).measure()
    assert Block.from_json(json.loads(json.dumps(good.to_json()))) == good
    for bad in (
        data,
        {**good.to_json(), "trials": data},
        {**good.to_json(), "reference_ns": {"token": data}},
        {**good.to_json(), "p95_ms": data},
    ):
        with contextlib.suppress(InputError):
            assert Block.from_json(bad).trials
