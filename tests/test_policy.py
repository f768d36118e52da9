"""The solver against brute force, its messages, the projection, the meta-network and its file."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_costs import cost_model

from toolchain.costs.model import CostModel, Tie
from toolchain.errors import DamagedFileError, InfeasibleBudgetError, InputError
from toolchain.policy import proposal
from toolchain.policy.meta_network import MetaNetwork
from toolchain.policy.projection import gap_to_optimum, project
from toolchain.policy.sensitivity import measure
from toolchain.policy.solver import objective_of, solve
from toolchain.spec import Budget, Policy

KERNELS = ("w2g32", "w3g32", "w4g32")
RESOURCES = ("peak_memory_bytes", "latency_ms", "compute_flop")


@st.composite
def problems(draw: st.DrawFn) -> tuple[CostModel, dict[str, dict[str, float]], Budget]:
    """Up to 5 units and 3 kernels, up to 3 limits, ties with savings of either sign; numbers from a few values, so that equals abound."""
    names = [f"u{index}" for index in range(draw(st.integers(1, 5)))]
    numbers = st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 7.25, 10.1])
    kernels = {name: KERNELS[: draw(st.integers(1, 3))] for name in names}

    def table() -> dict[str, dict[str, float]]:
        return {name: {kernel: draw(numbers) for kernel in kernels[name]} for name in names}

    resources = RESOURCES[: draw(st.integers(1, 3))]
    per_unit = {resource: table() for resource in resources}
    ties = []
    if len(names) > 1 and draw(st.booleans()):
        shared = [kernel for kernel in kernels[names[0]] if kernel in kernels[names[-1]]]
        savings = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
        ties = [Tie((names[0], names[-1]), {kernel: {"peak_memory_bytes": draw(savings)} for kernel in shared})]
    costs = cost_model(per_unit, {resource: draw(numbers) for resource in resources}, ties)
    limits = {resource: draw(st.floats(0.5, 12 * len(names), width=32)) for resource in resources if draw(st.booleans())}
    if limits and draw(st.booleans()):  # a limit that some policy meets exactly
        some = Policy.of({name: draw(st.sampled_from(kernels[name])) for name in names})
        limits = {name: max(costs.totals(some)[name], 0.5) for name in limits}
    return costs, table(), Budget(**limits)


def _every_policy(costs: CostModel) -> list[Policy]:
    names = [unit.name for unit in costs.units]
    return [
        Policy.of(dict(zip(names, choice, strict=True))) for choice in itertools.product(*(costs.kernels[name] for name in names))
    ]


def _keeps(costs: CostModel, policy: Policy, budget: Budget) -> bool:
    totals = costs.totals(policy)
    return all(totals[name] <= limit * (1 + 1e-9) for name, limit in budget.limits.items())


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_solver_equals_brute_force(problem: tuple[CostModel, dict[str, dict[str, float]], Budget]) -> None:
    costs, value, budget = problem
    kept = [policy for policy in _every_policy(costs) if _keeps(costs, policy, budget)]
    if not kept:
        with pytest.raises(InfeasibleBudgetError):
            solve(costs, value, budget)
        return
    solution = solve(costs, value, budget)
    assert solution.optimal
    assert _keeps(costs, solution.policy, budget)
    assert solution.objective == pytest.approx(min(objective_of(policy, value) for policy in kept), abs=1e-9)
    assert solution.objective == pytest.approx(objective_of(solution.policy, value), abs=1e-12)


def test_a_policy_a_hair_over_a_limit_is_refused() -> None:
    """By one part in ten million: less than the solver's own tolerance."""
    costs = cost_model({"latency_ms": {"a": {"w2g32": 1.0, "w4g32": 2.0 * (1 + 1e-7)}}})
    value = {"a": {"w2g32": 1.0, "w4g32": 0.0}}
    assert solve(costs, value, Budget(latency_ms=2.0)).policy["a"] == "w2g32"
    assert solve(costs, value, Budget(latency_ms=2.0 * (1 + 1e-7))).policy["a"] == "w4g32"


def test_a_tie_is_counted_once_only_when_both_ends_agree() -> None:
    bytes_ = {name: {"w2g32": 10.0, "w4g32": 20.0} for name in ("embed", "head")}
    tie = Tie(("embed", "head"), {"w2g32": {"peak_memory_bytes": 10.0}, "w4g32": {"peak_memory_bytes": 20.0}})
    value = {name: {"w2g32": 5.0, "w4g32": 0.0} for name in ("embed", "head")}
    costs = cost_model({"peak_memory_bytes": bytes_}, ties=[tie])
    assert set(solve(costs, value, Budget(peak_memory_bytes=20)).policy.values()) == {"w4g32"}
    assert set(solve(costs, value, Budget(peak_memory_bytes=19)).policy.values()) == {"w2g32"}
    assert set(solve(costs, value, Budget(peak_memory_bytes=10)).policy.values()) == {"w2g32"}
    with pytest.raises(InfeasibleBudgetError):
        solve(costs, value, Budget(peak_memory_bytes=9))


def test_infeasible_names_the_limit_and_by_how_much() -> None:
    costs = cost_model(
        {"latency_ms": {"a": {"w2g32": 4.0, "w4g32": 8.0}}, "peak_memory_bytes": {"a": {"w2g32": 3e6, "w4g32": 6e6}}},
        {"latency_ms": 1.0, "peak_memory_bytes": 1e6},
    )
    value = {"a": {"w2g32": 1.0, "w4g32": 0.0}}
    with pytest.raises(
        InfeasibleBudgetError, match=r"latency_ms must be at least 5 ms, got 4 ms \(1 ms or 25% too low\)"
    ) as caught:
        solve(costs, value, Budget(latency_ms=4.0, peak_memory_bytes=1e9))
    assert "memory" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InfeasibleBudgetError, match=r"peak_memory_bytes must be at least 4 MB, got 2 MB"):
        solve(costs, value, Budget(peak_memory_bytes=2e6))


def test_infeasible_combination_names_the_limit_to_relax_least() -> None:
    costs = cost_model(
        {"latency_ms": {"a": {"w2g32": 8.0, "w4g32": 4.0}}, "peak_memory_bytes": {"a": {"w2g32": 3e6, "w4g32": 3.3e6}}},
    )
    value = {"a": {"w2g32": 1.0, "w4g32": 0.0}}
    with pytest.raises(InfeasibleBudgetError, match=r"not all together.*peak_memory_bytes must be at least 3.3 MB, got 3 MB .*10%"):
        solve(costs, value, Budget(latency_ms=5.0, peak_memory_bytes=3e6))


def test_infeasible_three_ways_says_by_how_much_all_must_rise() -> None:
    """Any two of the three limits conflict, so no single one can be relaxed while the others hold."""
    table = {
        resource: {"a": {kernel: 1.0 if kernel == cheap else 2.0 for kernel in KERNELS}}
        for resource, cheap in zip(RESOURCES, KERNELS, strict=True)
    }
    with pytest.raises(InfeasibleBudgetError, match=r"all would have to rise by 1e\+02%|all would have to rise by 100%"):
        solve(cost_model(table), {"a": dict.fromkeys(KERNELS, 0.0)}, Budget(**dict.fromkeys(RESOURCES, 1.0)))


def test_solver_refuses_missing_and_nan_values_and_reports_unmeasured_limits() -> None:
    costs = cost_model({"latency_ms": {"a": {"w2g32": 1.0, "w4g32": 2.0}}})
    with pytest.raises(InputError, match="w4g32 of unit 'a'"):
        solve(costs, {"a": {"w2g32": 0.0}}, Budget(latency_ms=2))
    with pytest.raises(InputError, match="finite"):
        solve(costs, {"a": {"w2g32": 0.0, "w4g32": math.nan}}, Budget(latency_ms=2))
    assert solve(costs, {"a": {"w2g32": 0.0, "w4g32": 1.0}}, Budget(latency_ms=2, energy_mj=1)).unmeasured == ("energy_mj",)


def test_solver_scales_to_200_units_of_10_kernels() -> None:
    rng = np.random.default_rng(0)
    kernels = [f"k{index}" for index in range(10)]
    units = [f"u{index}" for index in range(200)]
    size = np.sort(rng.random((200, 10)), axis=1)  # more bits: more bytes and time (not in lock-step), less loss
    speed = size * (0.5 + rng.random((200, 10)))
    loss = np.sort(rng.random((200, 10)) ** 3, axis=1)[:, ::-1]

    def table(numbers: np.ndarray) -> dict[str, dict[str, float]]:
        return {unit: dict(zip(kernels, row.tolist(), strict=True)) for unit, row in zip(units, numbers, strict=True)}

    costs = cost_model({"peak_memory_bytes": table(size * 1e6), "latency_ms": table(speed)})
    start = time.monotonic()
    solution = solve(costs, table(loss), Budget(peak_memory_bytes=0.4 * 200e6, latency_ms=0.35 * 200))
    assert time.monotonic() - start < 5  # about 0.3 s on an idle core
    assert solution.optimal


def test_projection_takes_the_most_likely_feasible_policy_and_the_gap_is_relative() -> None:
    costs = cost_model({"latency_ms": {name: {"w2g32": 1.0, "w4g32": 2.0} for name in ("a", "b")}})
    likely = {"a": {"w2g32": math.log(0.1), "w4g32": math.log(0.9)}, "b": {"w2g32": math.log(0.4), "w4g32": math.log(0.6)}}
    budget = Budget(latency_ms=3.0)
    chosen = project(likely, costs, budget)
    assert dict(chosen) == {"a": "w4g32", "b": "w2g32"}
    loss = {"a": {"w2g32": 1.0, "w4g32": 0.5}, "b": {"w2g32": 3.0, "w4g32": 0.5}}
    assert gap_to_optimum(chosen, costs, loss, budget) == pytest.approx((3.5 - 1.5) / 1.5)
    assert gap_to_optimum(solve(costs, loss, budget).policy, costs, loss, budget) == 0
    free = {name: dict.fromkeys(row, 0.0) for name, row in loss.items()}
    assert gap_to_optimum(chosen, costs, free, budget) == 0


def test_sensitivity_is_a_clamped_difference_to_the_reference() -> None:
    scores = {"w2g32": 3.0, "w4g32": 1.5, "fp32": 1.0, "w8g32": 0.9}
    calls = []

    def score(policy: Policy) -> float:
        calls.append(policy)
        return scores[policy["a"]] + 10 * scores[policy["b"]]

    units = cost_model({"latency_ms": {"a": dict.fromkeys(scores, 1.0), "b": dict.fromkeys(scores, 1.0)}}).units
    losses = measure(score, units, {"a": tuple(scores), "b": ("w2g32", "fp32")}, {"a": "fp32", "b": "fp32"})
    assert losses["a"] == pytest.approx({"w2g32": 2.0, "w4g32": 0.5, "fp32": 0.0, "w8g32": 0.0})
    assert losses["b"] == pytest.approx({"w2g32": 20.0, "fp32": 0.0})
    assert len(calls) == 1 + 4
    with pytest.raises(InputError, match="finite"):
        measure(lambda policy: math.nan, units, {"a": (), "b": ()}, {"a": "fp32", "b": "fp32"})


CANDIDATES = {"a": ("w2g32", "w4g32"), "b": ("w2g32", "w3g32", "w4g32"), "c": ("fp32",)}


def test_meta_network_proposes_only_candidates_and_learns() -> None:
    network = MetaNetwork(CANDIDATES, seed=1)
    probabilities = network(torch.tensor([[0.1, 0.2, 0.3, 1.0], [1.0, 1.0, 1.0, 1.0]])).exp()
    assert probabilities.shape == (2, 3, 3)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3))
    assert probabilities[:, 0, 2].abs().max() == 0
    assert probabilities[:, 2, 1:].abs().max() == 0
    low, high = torch.tensor([0.0, 0, 0, 0]), torch.ones(4)
    wanted = {
        "low": Policy.of({"a": "w2g32", "b": "w3g32", "c": "fp32"}),
        "high": Policy.of({"a": "w4g32", "b": "w4g32", "c": "fp32"}),
    }
    targets = torch.stack([network.one_hot(wanted["low"]), network.one_hot(wanted["high"])])
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(60):
        optimiser.zero_grad()
        (-(targets * network(torch.stack([low, high])).clamp_min(-50)).sum(-1).mean()).backward()
        optimiser.step()
    assert network.policy(network(low)) == wanted["low"]
    assert network.policy(network(high)) == wanted["high"]


def test_gumbel_samples_follow_the_distribution_and_are_differentiable() -> None:
    network = MetaNetwork(CANDIDATES, seed=2)
    encoding = torch.tensor([0.3, 0.3, 0.3, 1.0])
    generator = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(CANDIDATES["b"], 0)
    for _ in range(2000):
        policy, soft = network.sample(encoding, tau=0.7, generator=generator)
        assert network.policy(soft) == policy
        counts[policy["b"]] += 1
    expected = {kernel: math.exp(p) for kernel, p in network.log_probabilities(encoding.tolist())["b"].items()}
    assert {kernel: count / 2000 for kernel, count in counts.items()} == pytest.approx(expected, abs=0.04)
    soft[1, 0].backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_meta_network_file_round_trips_reads_without_torch_and_refuses_damage(tmp_path: Path) -> None:
    network = MetaNetwork(CANDIDATES, seed=3)
    path = tmp_path / "meta_network.safetensors"
    network.save(path)
    encoding = (0.2, 1.0, 0.5, 1.0)
    ours = network.log_probabilities(encoding)
    assert MetaNetwork.load(path).log_probabilities(encoding) == ours
    theirs = proposal.log_probabilities(path, encoding)
    assert list(theirs) == list(CANDIDATES)
    for unit, row in ours.items():
        assert theirs[unit] == pytest.approx(row, abs=1e-5)
    path.write_bytes(path.read_bytes()[:-100])
    for read in (MetaNetwork.load, lambda file: proposal.log_probabilities(file, encoding)):
        with pytest.raises(DamagedFileError, match="meta-network"):
            read(path)
    with pytest.raises(DamagedFileError):
        MetaNetwork.load(tmp_path / "missing.safetensors")
