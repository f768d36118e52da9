"""Ways of finding a policy that are not the solver: LLM-QFA's search, the network of prices."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from small_costs import cost_model

from toolchain.costs.model import CostModel
from toolchain.errors import DamagedFileError, InfeasibleBudgetError
from toolchain.kernels import CATALOGUE
from toolchain.policy import prices
from toolchain.policy.search import search, shrink
from toolchain.policy.solver import objective_of, solve
from toolchain.spec import Budget, Policy
from toolchain.train.prices import PriceNetwork, problems
from toolchain.train.sampler import PolicySampler

KERNELS = ("w2g32", "w4g32", "w8g32")


def _bits_cost(units: int) -> CostModel:
    """Each unit costs its bits in milliseconds."""
    return cost_model(
        {"latency_ms": {f"u{index}": {name: float(CATALOGUE[name].weight_bits) for name in KERNELS} for index in range(units)}}
    )


def _keeps(costs: CostModel, policy: Policy, budget: Budget) -> bool:
    return all(costs.totals(policy)[name] <= limit * (1 + 1e-9) for name, limit in budget.limits.items())


def _every(costs: CostModel) -> list[Policy]:
    names = [unit.name for unit in costs.units]
    return [Policy.of(dict(zip(names, choice, strict=True))) for choice in itertools.product(KERNELS, repeat=len(names))]


# ---- LLM-QFA's search


def _draw(costs: CostModel):
    return lambda kernels, bits, rng: PolicySampler(costs.units, kernels).mixed(bits, rng)


def test_the_search_takes_the_best_of_what_it_scored_inside_the_budget() -> None:
    costs, budget = _bits_cost(6), Budget(latency_ms=24)
    scored: list[Policy] = []

    def score(policy: Policy) -> float:
        scored.append(policy)
        return sum((index + 1) / CATALOGUE[policy[f"u{index}"]].weight_bits for index in range(6))

    found = search(score, costs, budget, _draw(costs))
    assert len(scored) == 150
    assert _keeps(costs, found.policy, budget)
    assert found.score == min(score(policy) for policy in list(scored) if _keeps(costs, policy, budget))
    assert search(score, costs, budget, _draw(costs)) == found  # the same every time
    with pytest.raises(InfeasibleBudgetError, match="none did"):
        search(score, costs, Budget(latency_ms=11), _draw(costs), first=5, second=2)


def test_the_search_spares_the_units_that_need_bits() -> None:
    costs = _bits_cost(3)
    policies = _every(costs)
    weight = {"u0": 0.0, "u1": 1.0, "u2": 100.0}
    scores = [sum(value / CATALOGUE[policy[unit]].weight_bits for unit, value in weight.items()) for policy in policies]
    shrunk = shrink(costs.kernels, policies, scores)
    assert shrunk == {"u0": KERNELS[:2], "u1": KERNELS, "u2": KERNELS[1:]}


# ---- prices


def _problem(seed: int) -> tuple[CostModel, dict[str, dict[str, float]], np.random.Generator]:
    rng = np.random.default_rng(seed)
    units = [f"u{index}" for index in range(24)]
    size = np.exp(rng.normal(0, 0.6, 24))
    bits = np.array([CATALOGUE[name].weight_bits for name in KERNELS])

    def table(values: np.ndarray) -> dict[str, dict[str, float]]:
        return {unit: dict(zip(KERNELS, row.tolist(), strict=True)) for unit, row in zip(units, values, strict=True)}

    memory = size[:, None] * bits * 1e5
    time = size[:, None] * (0.5 + bits * rng.random()) * np.exp(rng.normal(0, 0.1, (24, 3)))
    losses = np.exp(rng.normal(0, 1, 24))[:, None] * np.exp(-0.9 * bits)
    return cost_model({"peak_memory_bytes": table(memory), "latency_ms": table(time)}), table(losses), rng


def test_numpy_and_torch_see_the_same_prices() -> None:
    network = PriceNetwork(seed=3)
    seen, _, _ = problems(np.random.default_rng(0), 5)
    arrays = {name: weight.detach().numpy() for name, weight in network.weights.items()}
    tensors = prices.Situation(*(torch.from_numpy(value) for value in (seen.loss, seen.cost, seen.mask, seen.limit, seen.present)))
    np.testing.assert_allclose(prices.forward(arrays, seen), network(tensors).detach().numpy(), rtol=2e-4, atol=2e-4)


def test_imagined_answers_are_optima() -> None:
    """What training is told: the policy of least loss + λ·cost keeps the budget, and no policy that keeps it loses less."""
    rng = np.random.default_rng(5)
    for _ in range(4):
        seen, wanted, binding = problems(rng, 2)
        for b in range(2):
            situation = prices.Situation(*(value[b] for value in (seen.loss, seen.cost, seen.mask, seen.limit, seen.present)))
            worth = np.where(situation.mask > 0, prices.reduced(situation, np.log(np.maximum(wanted[b], 1e-30))), np.inf)
            chosen = worth.argmin(-1)
            spent = np.take_along_axis(situation.cost, chosen[None, :, None], -1)[..., 0].sum(-1)
            assert (spent <= situation.limit + 1e-4)[situation.present > 0].all()
            units = range(len(chosen))
            table = {
                f"{r}": {
                    f"u{u}": {f"k{k}": float(situation.cost[r, u, k]) for k in np.flatnonzero(situation.mask[u])} for u in units
                }
                for r in np.flatnonzero(binding[b])
            }
            losses = {f"u{u}": {f"k{k}": float(situation.loss[u, k]) for k in np.flatnonzero(situation.mask[u])} for u in units}
            resources = dict(
                zip(table, ("latency_ms", "peak_memory_bytes", "energy_mj", "first_token_ms", "compute_flop"), strict=False)
            )
            costs = cost_model({resources[r]: rows for r, rows in table.items()})
            budget = Budget(**{resources[r]: 1.00001 * float(spent[int(r)]) for r in table if spent[int(r)] > 0})
            mine = float(np.take_along_axis(situation.loss, chosen[:, None], -1).sum())
            assert solve(costs, losses, budget).objective == pytest.approx(mine, rel=1e-3, abs=1e-6)


def test_the_order_of_units_and_kernels_says_nothing() -> None:
    costs, losses, _ = _problem(1)
    network = prices.read(prices.SHIPPED)
    budget = Budget(peak_memory_bytes=sum(costs.bounds("peak_memory_bytes")) / 3)
    backwards = cost_model(
        {name: {unit: dict(reversed(table[unit].items())) for unit in reversed(table)} for name, table in costs.per_unit.items()}
    )
    here, there = (prices.proposal(network, model, losses, budget) for model in (costs, backwards))
    for unit, row in here.items():
        assert there[unit] == pytest.approx(row, rel=1e-3)


def test_the_shipped_prices_are_about_right_on_devices_they_never_saw() -> None:
    """Prices themselves: after the projection even untrained ones look good, since the solver holds the limit whatever it is told."""
    untrained = {name: weight.detach().numpy() for name, weight in PriceNetwork(seed=0).weights.items()}
    rng = np.random.default_rng(999)
    errors: dict[str, list[float]] = {"shipped": [], "untrained": []}
    for _ in range(6):
        seen, wanted, binding = problems(rng, 16)
        for name, weights in (("shipped", prices.read(prices.SHIPPED)), ("untrained", untrained)):
            off = np.abs(prices.forward(weights, seen) - np.log(np.maximum(wanted, 1e-9)))
            errors[name] += off[binding].tolist()
    assert np.median(errors["shipped"]) < 0.6 * np.median(errors["untrained"])


def test_projected_prices_keep_every_budget() -> None:
    network = prices.read(prices.SHIPPED)
    for seed in range(12):
        costs, losses, rng = _problem(100 + seed)
        limits = {}
        for name in ("peak_memory_bytes", "latency_ms")[: rng.integers(1, 3)]:
            low, high = costs.bounds(name)
            limits[name] = low + float(rng.uniform(0.1, 0.9)) * (high - low)
        budget = Budget(**limits)
        policy = solve(costs, prices.proposal(network, costs, losses, budget, prices.PROJECTED), budget).policy
        assert _keeps(costs, policy, budget)
        assert objective_of(policy, losses) >= solve(costs, losses, budget).objective * (1 - 1e-9)


def test_a_damaged_network_is_refused(tmp_path: Path) -> None:
    whole = prices.SHIPPED.read_bytes()
    for name, content in {"short": whole[:1000], "empty": b"", "text": b"prices"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match="prices"):
            prices.read(path)
    weights = prices.read(prices.SHIPPED)
    prices.write(tmp_path / "nan", weights | {"norm": weights["norm"] * np.nan}, {})
    with pytest.raises(DamagedFileError, match="finite"):
        prices.read(tmp_path / "nan")
