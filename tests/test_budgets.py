"""Budgets against what a device's policies cost: how a limit is encoded, and what is derived and promised."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_board import UNITS, board_model, board_table
from small_costs import cost_model as by_hand

from toolchain.costs.encoding import encode
from toolchain.costs.model import CostModel
from toolchain.costs.rows import ModelMemoryRow, ModelRow
from toolchain.kernels import uniform
from toolchain.policy import budgets
from toolchain.policy.solver import solve
from toolchain.spec import RESOURCES, Budget

# ---- encoding


def test_the_encoding_is_where_the_limit_lies_in_the_range() -> None:
    costs = {"a": {"w2g32": 1.0, "w8g32": 5.0}}
    model = by_hand(
        {"peak_memory_bytes": costs, "latency_ms": {"a": {"w2g32": 3.0, "w8g32": 3.0}}},
        {"peak_memory_bytes": 10.0, "latency_ms": 0.0},
    )
    assert encode(Budget(peak_memory_bytes=12.0), model) == (0.25, 1.0, 1.0, 1.0)
    assert encode(Budget(peak_memory_bytes=1.0), model) == (0.0, 1.0, 1.0, 1.0)
    assert encode(Budget(peak_memory_bytes=1e9), model) == (1.0, 1.0, 1.0, 1.0)
    assert encode(Budget(latency_ms=1.0), model) == (1.0, 1.0, 1.0, 1.0)  # no policy changes it
    assert encode(Budget(energy_mj=1.0, compute_flop=1.0), model) == (1.0, 1.0, 1.0, 1.0)  # nothing measured it


_TABLE = board_table()


@given(memory=st.floats(1e-3, 1e12), latency=st.floats(1e-6, 1e6))
def test_every_encoding_is_between_0_and_1(memory: float, latency: float) -> None:
    model = board_model(_TABLE)
    encoding = encode(Budget(peak_memory_bytes=memory, latency_ms=latency), model)
    assert len(encoding) == len(RESOURCES)
    assert all(0 <= value <= 1 for value in encoding)


# ---- derived budgets


def _noisy(seed: int, size: float) -> CostModel:
    """A cost model of a machine whose whole models were measured with an error of up to `size`."""
    rng = random.Random(seed)
    table = board_table()
    rows = [
        replace(
            row,
            latency_ms=row.latency_ms * (1 + rng.uniform(-size, size)),
        )
        for row in table.of(ModelRow)
    ]
    weights = [replace(row, peak_bytes=row.peak_bytes * (1 + rng.uniform(-size, size))) for row in table.of(ModelMemoryRow)]
    return board_model(table.adding([*rows, *weights]))


@pytest.mark.parametrize("size", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_derived_budgets_are_ordered_and_can_be_kept_with_room(seed: int, size: float) -> None:
    model = _noisy(seed, size)
    derived = budgets.derive(model)
    assert list(derived) == ["low", "medium", "high"]
    low, medium, high = derived.values()
    for resource in ("peak_memory_bytes", "latency_ms"):
        assert 0 < low.limits[resource] <= medium.limits[resource] <= high.limits[resource]
    for budget in derived.values():
        plan = budgets.planned(budget, model)
        policy = solve(model, model.per_unit["package_bytes"], plan).policy
        totals = model.totals(policy)
        assert all(totals[resource] <= limit * (1 + 1e-9) for resource, limit in plan.limits.items())
        assert Budget.from_json(budget.to_json()) == budget


def test_a_low_budget_keeps_fp32_out() -> None:
    model = board_model(board_table())
    everything = uniform("fp32", UNITS)
    assert model.totals(everything)["peak_memory_bytes"] > budgets.derive(model)["high"].limits["peak_memory_bytes"]


def test_a_promise_is_the_prediction_with_room() -> None:
    model = _noisy(1, 0.05)
    totals = model.totals(uniform("w4g32", UNITS))
    promise = budgets.promise(totals, model).limits
    assert promise["peak_memory_bytes"] >= totals["peak_memory_bytes"]
    assert promise["latency_ms"] >= totals["latency_ms"] * (1 + budgets.DRIFT)


def test_a_memory_limit_leaves_room_however_small_the_spread() -> None:
    """A quickstart whose table promised 2.2% broke its own low budget by a kilobyte: the solver spends a plan to the last byte."""
    exact = replace(board_model(board_table()), relative_spread={"peak_memory_bytes": 0.001})
    limit = budgets.derive(exact)["low"].limits["peak_memory_bytes"]
    plan = budgets.planned(Budget(peak_memory_bytes=limit), exact).limits["peak_memory_bytes"]
    assert plan == pytest.approx(limit / 1.05)
