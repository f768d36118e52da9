"""What the report computes before anything is drawn: the exact front, who dominates whom, layers of unit names."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from small_costs import cost_model

from toolchain.costs.model import CostModel, Tie
from toolchain.errors import InputError
from toolchain.policy.front import exact_front
from toolchain.policy.solver import Values, objective_of
from toolchain.report.comparison import undominated
from toolchain.report.contents import kinds, layers

KERNELS = ("a", "b", "c")


def _problem(seed: int) -> tuple[CostModel, Values]:
    """Five units, two of them tied, of three kernels; a kernel without loss in each, as fp32 is; some kernels equal in loss."""
    rng = np.random.default_rng(seed)
    units = [f"u{index}" for index in range(5)]
    cost = {unit: {name: float(rng.integers(1, 40)) for name in KERNELS} for unit in units}
    loss = {unit: {"a": 0.0, "b": float(rng.integers(0, 4)) / 4, "c": float(rng.integers(0, 9)) / 4} for unit in units}
    tie = Tie(("u0", "u1"), {name: {"latency_ms": min(cost["u0"][name], cost["u1"][name])} for name in KERNELS})
    return cost_model({"latency_ms": cost}, {"latency_ms": 3.0}, [tie]), loss


def _all_points(costs: CostModel, losses: Values) -> list[tuple[float, float]]:
    names = [unit.name for unit in costs.units]
    policies = [dict(zip(names, choice, strict=True)) for choice in itertools.product(KERNELS, repeat=len(names))]
    return [(costs.totals(policy)["latency_ms"], objective_of(policy, losses)) for policy in policies]


@pytest.mark.parametrize("seed", range(8))
def test_no_policy_beats_a_point_of_the_front(seed: int) -> None:
    costs, losses = _problem(seed)
    every = _all_points(costs, losses)
    front = exact_front(costs, losses, "latency_ms", 24)
    alone = [exact_front(costs, losses, "latency_ms", 2, [share * max(cost for cost, _ in every)]) for share in (0.5, 0.7, 0.9)]
    for point in (*front, *itertools.chain(*alone)):
        assert point.proven
        assert costs.totals(point.policy)["latency_ms"] == pytest.approx(point.cost)
        better = [other for other in every if other[1] < point.loss - 1e-9 and other[0] <= point.cost + 1e-9]
        cheaper = [other for other in every if other[1] <= point.loss + 1e-9 and other[0] < point.cost - 1e-9]
        assert not better
        assert not cheaper
    assert [point.cost for point in front] == sorted(point.cost for point in front)
    assert [point.loss for point in front] == sorted((point.loss for point in front), reverse=True)
    assert front[0].cost == pytest.approx(min(cost for cost, _ in every))
    assert front[-1].loss == 0.0


def test_of_policies_of_equal_loss_the_front_has_the_cheapest() -> None:
    costs = cost_model({"latency_ms": {"u": {"a": 5.0, "b": 2.0, "c": 1.0}, "v": {"a": 3.0, "b": 9.0, "c": 1.0}}})
    losses = {"u": {"a": 0.0, "b": 0.0, "c": 1.0}, "v": {"a": 0.0, "b": 0.0, "c": 1.0}}
    assert [(point.cost, point.loss) for point in exact_front(costs, losses, "latency_ms", 2, [13.0])] == [(2, 2), (5, 0)]


def test_who_is_on_the_front_of_what_was_measured() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 6.0), None, (3.0, 5.0), (4.0, 1.0), (4.0, 1.0)]
    assert undominated(points) == [True, True, False, False, False, True, True]
    assert undominated([None]) == [False]


def test_units_are_laid_out_by_layer_and_kind() -> None:
    policy = {"layers.10.mlp.up": "w4g32", "layers.2.mlp.up": "w8g32", "layers.2.attn.qkv": "w4g32+w8a8"}
    policy |= {"head": "fp32", "layers.x.y": "fp32"}
    found = layers(policy, ["head", "layers.2.attn.qkv", "layers.2.mlp.up"])
    assert found["kinds"] == ["attn.qkv", "mlp.up"]
    assert [row["layer"] for row in found["rows"]] == ["2", "10"]
    assert [[cell and cell["bits"] for cell in row["cells"]] for row in found["rows"]] == [[4, 8], [None, 4]]
    assert [cell["unit"] for cell in found["outside"]] == ["head", "layers.x.y"]


def test_stacks_are_kept_apart() -> None:
    units = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q", "lm_head"]
    assert kinds(units) == {
        units[0]: "encoder.block layer.0.SelfAttention.q",
        units[1]: "decoder.block layer.0.SelfAttention.q",
        "lm_head": "lm_head",
    }
    assert [row["layer"] for row in layers(dict.fromkeys(units, "fp32"))["rows"]] == ["encoder.block 0", "decoder.block 0"]


def test_a_kernel_that_the_catalogue_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="got 'w5g32'"):
        layers({"layers.0.q": "w5g32"})
