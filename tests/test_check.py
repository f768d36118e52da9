import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.blocks import Block, Speed
from toolchain.check import decide, exit_code, median_interval, overall
from toolchain.errors import InputError
from toolchain.spec import Budget, Measurement, Verdict


def _measured(*trials, **changes):
    values = {"value": float(np.median(trials)), "n": len(trials), "valid": len(trials) >= 2, "trials": tuple(map(float, trials))}
    return Measurement(**{**values, **changes})


def _latency(limit, measurement):
    (verdict,) = decide(Budget(latency_ms=limit), {"latency_ms": measurement})
    return verdict


@pytest.mark.parametrize(
    ("n", "k"), [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8), (30, 10), (50, 18), (100, 40)]
)
def test_the_interval_is_the_tabulated_order_statistics(n, k):
    """k from the tables of confidence intervals for the median (Conover; Hahn & Meeker), 95%, two-sided."""
    assert median_interval(np.random.default_rng(n).permutation(np.arange(1, n + 1))) == (k, n + 1 - k)


_SAMPLERS = {
    "skewed": (lambda rng, shape: rng.lognormal(0, 1, shape), 1.0),
    "two humps": (lambda rng, shape: np.where(rng.random(shape) < 0.6, 1.0, 1.5) + rng.normal(0, 0.02, shape), None),
    "outliers": (lambda rng, shape: 10 + np.abs(rng.standard_cauchy(shape)), 11.0),
    "coarse clock": (lambda rng, shape: rng.integers(3, 6, shape).astype(float), 4.0),
}


@pytest.mark.parametrize("name", _SAMPLERS)
@pytest.mark.parametrize("n", [6, 9, 20, 51])
def test_the_interval_holds_the_median_in_95_of_100_experiments_whatever_the_distribution(name, n):
    sample, median = _SAMPLERS[name]
    rng = np.random.default_rng(n)
    median = float(np.median(sample(rng, 1_000_001))) if median is None else median
    experiments = 3000
    found = [median_interval(trials) for trials in sample(rng, (experiments, n))]
    held = np.mean([low <= median <= high for low, high in found])
    assert held >= 0.95 - 3 * (0.95 * 0.05 / experiments) ** 0.5


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_near_normal_trials_still_hold_the_median_in_95_of_100_experiments(n):
    experiments = 4000
    trials = np.random.default_rng(n).normal(50, 3, (experiments, n))
    held = np.mean([low <= 50 <= high for low, high in map(median_interval, trials)])
    assert held >= 0.95 - 3 * (0.95 * 0.05 / experiments) ** 0.5


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=60))
def test_the_interval_holds_the_sample_median_and_ignores_the_order_of_trials(trials):
    low, high = median_interval(trials)
    assert 0 <= low <= float(np.median(trials)) * (1 + 1e-12)
    assert float(np.median(trials)) <= high * (1 + 1e-12)
    assert median_interval(trials[::-1]) == (low, high)


def test_one_trial_has_no_interval():
    with pytest.raises(InputError, match="at least 2 trials, got 1"):
        median_interval([1.0])


def test_a_limit_is_held_against_the_whole_interval():
    nine = _measured(*range(1, 10))  # interval [2, 8]
    assert _latency(8, nine).verdict == "within"  # at the limit is within
    assert _latency(7.99, nine).verdict == "could not tell"
    assert _latency(2, nine).verdict == "could not tell"
    assert _latency(1.99, nine).verdict == "over"
    assert (_latency(5, nine).low, _latency(5, nine).high, _latency(5, nine).measured) == (2, 8, 5)
    assert "inside the interval of 9 trials" in _latency(5, nine).reason


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=30), st.floats(0.1, 1e6), st.floats(0, 1e6))
def test_a_wider_limit_never_gives_a_worse_verdict(trials, limit, more):
    rank = ["over", "could not tell", "within"]
    measurement = _measured(*trials)
    assert rank.index(_latency(limit + more, measurement).verdict) >= rank.index(_latency(limit, measurement).verdict)


def test_two_trials_tell_only_what_is_far_from_the_limit():
    assert _latency(20, _measured(10, 10.2)).verdict == "within"
    assert _latency(10.3, _measured(10, 10.2)).verdict == "could not tell"
    assert _latency(5, _measured(10, 10.2)).verdict == "over"


def test_memory_is_held_by_its_largest_process_and_compute_by_its_count():
    budget = Budget(peak_memory_bytes=100, compute_flop=100)
    verdicts = decide(budget, {"peak_memory_bytes": _measured(90, 101, 80), "compute_flop": _measured(100)})
    assert [(v.name, v.verdict, v.measured) for v in verdicts] == [
        ("peak_memory_bytes", "over", 101),
        ("compute_flop", "within", 100),
    ]


@pytest.mark.parametrize(
    ("measurement", "words"),
    [
        (None, "not measured"),
        (Measurement(None, reason="no energy meter: no RAPL"), "no RAPL"),
        (_measured(3.0), "1 clean trials"),
        (_measured(1, 1, 1, valid=False, reason="the machine was busy"), "busy"),
        (_measured(1, 2, 3, value=float("nan")), "finite"),
        (_measured(1, 2, float("inf"), value=2.0), "finite"),
        (Measurement(1.0, n=9, valid=True), "0 trials were kept"),
    ],
)
def test_what_was_not_properly_measured_could_not_be_told(measurement, words):
    verdict = _latency(1e9, measurement)
    assert verdict.verdict == "could not tell"
    assert words in verdict.reason
    json.dumps(verdict.to_json(), allow_nan=True)


def _verdicts(*found):
    return [Verdict(f"limit{i}", 1.0, 0.5, 0.4, 0.6, verdict) for i, verdict in enumerate(found)]


@pytest.mark.parametrize(
    ("found", "expected", "code"),
    [
        (["within", "within"], "within", 0),
        (["within", "could not tell", "over"], "over", 1),
        (["within", "could not tell"], "could not tell", 3),
        ([], "could not tell", 3),
    ],
)
def test_the_worst_limit_decides(found, expected, code):
    assert overall(_verdicts(*found)) == expected
    assert exit_code(expected) == code


def _block(level_ms, valid=True, slowness=1.0):
    references = {"token": (10.0 * slowness,) * 5, "streamed token": (5.0,) * 5, "tokens": (7.0,) * 5}
    return Block({"latency_ms": (level_ms,) * 5}, references, 0, valid)


@pytest.mark.parametrize(
    ("name", "level", "valid", "expected"),
    [
        ("low", 1.5, True, "within"),  # a machine half as fast: 0.75 at the table's speed
        ("low", 3.0, True, "over"),
        ("low", 2.5, True, "could not tell"),  # 1.25, but a package need not follow its reference in full
        ("mine", 1.5, True, "could not tell"),  # an absolute limit is held as measured
        ("mine", 3.5, True, "over"),  # on a machine as fast as for the table it would be, too
        ("low", 1.5, False, "could not tell"),  # disturbed: it must keep the limit as it ran
        ("mine", 0.5, False, "within"),  # disturbed, and kept all the same
        ("mine", 1.5, False, "could not tell"),
    ],
)
def test_a_slow_machine_is_no_proof_against_a_package(tmp_path, monkeypatch, name, level, valid, expected):
    from toolchain.commands import acceptance
    from toolchain.hardware import load
    from toolchain.package.manifest import write_manifest

    (tmp_path / "model.onnx").write_bytes(b"")
    here = {"cpu": "this", "threads": 2, "runtime": "one", "provider": "CPUExecutionProvider", "protocol": "p"}
    memory = Measurement(5e6, 0.0, 3, True, (5e6, 5e6, 5e6))
    monkeypatch.setattr(acceptance, "measure_block", lambda *_, **__: _block(level, valid, slowness=2.0))
    monkeypatch.setattr(acceptance, "weigh_package", lambda *_: (memory, 1e6))
    monkeypatch.setattr(acceptance.Host, "of", lambda device: acceptance.Host(device, 2))
    monkeypatch.setattr(acceptance.Host, "identify", lambda _: here)
    budget = {"name": name, "latency_ms": 1.0, "peak_memory_bytes": 6e6}
    manifest = {
        "model": {"vocabulary": 8, "context": 8, "kind": "decoder"},
        "workload": "generate:2+2",
        "policy": {},
        "budget": budget,
        "predicted": None,
    }
    manifest["reference_ns"] = {"latency_ms": {"token": 10.0}}
    write_manifest(tmp_path, {**manifest, "measured_on": here}, ())
    assert acceptance.check_package(tmp_path, load("local"), {}).verdict == expected
    if name == "low" and valid:  # another machine has no such excuse
        write_manifest(tmp_path, {**manifest, "measured_on": {**here, "cpu": "another"}}, ())
        assert acceptance.check_package(tmp_path, load("local"), {}).verdict == "over"


def _phase(total_mj: float, above_mj: float, slowness: float) -> dict[str, object]:
    return {"energy_mj": total_mj, "above_idle_mj": above_mj, "reference_ns": {"token": 10.0 * slowness}}


@pytest.mark.parametrize(
    ("slowness", "total_mj", "expected"),
    [
        (1.5, 130.0, "could not tell"),  # 20 + 110 / 1.5 = 93 at the table's speed
        (1.05, 130.0, "over"),
        (1.5, 300.0, "over"),  # 207 at the table's speed
        (1.5, 90.0, "within"),
    ],
)
def test_energy_over_its_limit_on_a_slow_machine_may_be_idle_power(slowness, total_mj, expected):
    from toolchain.commands import acceptance

    trials = tuple(total_mj * factor for factor in (0.99, 0.995, 1.0, 1.0, 1.005, 1.01))
    seen = Measurement(total_mj, 0.0, 6, True, trials)
    held = decide(Budget.from_json({"energy_mj": 100.0}), {"energy_mj": seen})
    speeds = {"latency_ms": Speed("token", 10.0)}
    verdict = acceptance._excused(held, {"encode": _phase(total_mj, 20.0, slowness)}, speeds)[0]
    assert verdict.verdict == expected
    assert acceptance._excused(held, {"encode": _phase(total_mj, 20.0, slowness)}, {})[0] == held[0]


@pytest.mark.parametrize(
    ("limit", "error", "expected"),
    [
        (102.0, None, "within"),
        (102.0, 0.005, "within"),
        (102.0, 0.05, "could not tell"),
        (106.1, 0.05, "within"),
        (98.0, None, "over"),
        (98.0, 0.05, "could not tell"),
        (94.0, 0.05, "over"),
    ],
)
def test_a_meters_error_is_no_noise_that_more_trials_take_out(limit, error, expected):
    seen = _measured(99, 99.5, 100, 100, 100.5, 101)
    (held,) = decide(Budget.from_json({"energy_mj": limit}), {"energy_mj": seen}, {"energy_mj": error})
    assert held.verdict == expected
    assert ("meter" in held.reason) == (expected == "could not tell")


def test_a_users_budget_that_has_a_derived_ones_name_is_the_users(tmp_path):
    """Derived limits are held at the table's speed, a user's as measured."""
    from toolchain.commands.workflow import find_budget
    from toolchain.hardware import load
    from toolchain.spec import DERIVED_BUDGETS

    (tmp_path / "low.yaml").write_text("latency_ms: 20\n")
    budget = find_budget(str(tmp_path / "low.yaml"), {}, None, None, load("local"))
    assert budget.name not in DERIVED_BUDGETS
    assert budget.latency_ms == 20
