"""Which policies and budgets training sees, and the numbers it makes small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_costs import bytes_and_time, cost_model
from test_supernet import tiny_llama

from toolchain.kernels import uniform
from toolchain.spec import Budget, Unit
from toolchain.train.losses import ExpectedCost, Interference, Target, divergence_of, pull
from toolchain.train.sampler import PolicySampler, mean_bits_of, scenarios, triangle, worth_training
from toolchain.train.schedule import schedule
from toolchain.train.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = ("fp32", "w8g32", "w4g32", "w3g32", "w2g32")


def some_units(count: int = 12) -> tuple[Unit, ...]:
    return tuple(Unit(f"u{index}", "MatMul", 64, 32 * (1 + index % 3)) for index in range(count))


def test_a_mixed_policy_is_what_choices_one_by_one_would_draw() -> None:
    """A run that was begun before draws were made in one go goes on as it would have. Kernels of equal bits: their shares are known."""
    units = some_units(9)
    names = {unit.name: ("w2g32", "w2g128")[: 1 + place % 2] for place, unit in enumerate(units)}
    sampler, ours, theirs = PolicySampler.of(units, names), np.random.default_rng(7), np.random.default_rng(7)
    for _ in range(50):
        drawn = sampler.mixed(2.0, ours)
        assert dict(drawn) == {
            unit: kernels[theirs.choice(len(kernels), p=[1 / len(kernels)] * len(kernels))] for unit, kernels in names.items()
        }
    assert ours.bit_generator.state == theirs.bit_generator.state


def test_mixed_policies_meet_their_target_mean() -> None:
    units = some_units(30)
    sampler = PolicySampler.of(units, {unit.name: KERNELS for unit in units})
    assert sampler.levels == (2, 3, 4, 8)
    assert sampler.range() == pytest.approx((2, 8))
    rng = np.random.default_rng(0)
    for target in (2.2, 3.0, 5.0, 7.5):
        means = [mean_bits_of(sampler.mixed(target, rng), units) for _ in range(200)]
        assert np.mean(means) == pytest.approx(target, abs=0.12)
    assert set(sampler.mixed(2.0, rng).values()) == {"w2g32"}
    assert set(sampler.mixed(8.0, rng).values()) == {"w8g32"}


def test_two_group_sizes_do_not_make_a_width_likelier_and_a_level_is_one_kernel() -> None:
    units = some_units(4)
    sampler = PolicySampler.of(units, {unit.name: ("w2g32", "w2g128", "w4g32") for unit in units})
    rng = np.random.default_rng(0)
    drawn = [kernel for _ in range(500) for kernel in sampler.mixed(3.0, rng).values()]
    assert drawn.count("w4g32") / len(drawn) == pytest.approx(0.5, abs=0.04)
    assert drawn.count("w2g128") / len(drawn) == pytest.approx(0.25, abs=0.04)
    levels = {frozenset(sampler.level(2, rng).values()) for _ in range(30)}
    assert levels == {frozenset({"w2g32"}), frozenset({"w2g128"})}


def test_a_sandwich_visits_the_lowest_level_every_other_time() -> None:
    units = some_units(4)
    rng = np.random.default_rng(0)

    def visited(names: tuple[str, ...], steps: int = 8) -> list[set[str]]:
        visits = schedule(PolicySampler.of(units, {unit.name: names for unit in units}), steps, Settings())
        return [set(visits(step, rng)[0].values()) for step in range(steps)]

    two, three, four, eight = ({name} for name in ("w2g32", "w3g32", "w4g32", "w8g32"))
    assert visited(KERNELS) == [two, three, two, four, two, three, two, four]
    assert visited(("w2g32", "w8g32"), 3) == [two, two, two]
    assert visited(("w8g32",), 2) == [eight, eight]


def test_triangle_wave_spends_equal_time_everywhere() -> None:
    wave = [triangle(step, 100, 2.0, 8.0) for step in range(200)]
    assert (wave[0], wave[50], wave[100]) == (2.0, 8.0, 2.0)
    counts, _ = np.histogram(wave, bins=6)
    assert counts.max() <= counts.min() + 4


def test_a_kernel_that_costs_no_less_than_one_of_more_bits_is_not_trained() -> None:
    costs = cost_model(
        {
            "latency_ms": {"a": {"w4g32": 2.0, "w3g32": 2.0, "w2g32": 1.0}, "b": {"w4g32": 2.0, "w3g32": 1.9, "w2g32": 3.0}},
            "peak_memory_bytes": {"a": {"w4g32": 4.0, "w3g32": 4.0, "w2g32": 2.0}, "b": {"w4g32": 4.0, "w3g32": 4.0, "w2g32": 2.0}},
        }
    )
    assert worth_training(costs) == {"a": ("w4g32", "w2g32"), "b": ("w4g32", "w3g32", "w2g32")}


def test_scenarios_are_feasible_and_rare_encodings_are_drawn_more() -> None:
    units = some_units(4)
    costs = bytes_and_time(units, KERNELS)
    losses = {unit.name: {"fp32": 0.0, "w8g32": 0.01, "w4g32": 0.1, "w3g32": 0.3, "w2g32": 2.0} for unit in units}
    found = scenarios(costs, losses, 60, seed=1)
    assert len(found.budgets) == len(found.answers) == len(found.encodings) == 60
    for budget, answer in zip(found.budgets, found.answers, strict=True):
        assert all(costs.totals(answer)[name] <= limit * (1 + 1e-8) for name, limit in budget.limits.items())
    keys = [tuple(row) for row in np.minimum((found.encodings * 5).astype(int), 4).tolist()]
    share = {key: sum(w for w, other in zip(found.weights, keys, strict=True) if other == key) for key in keys}
    assert max(share.values()) == pytest.approx(min(share.values()))  # every occupied bin is as likely as any other
    assert len(share) > 5
    assert np.array_equal(scenarios(costs, losses, 60, seed=1).encodings, found.encodings)


def test_decoder_distance_is_kl_per_kept_token() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    per_token = (p * (p / q).log()).sum(-1)
    assert float(divergence_of("decoder", teacher, student)) == pytest.approx(float(per_token.mean()), rel=1e-5)
    assert float(Target("decoder", teacher).distance(student)) == pytest.approx(float(per_token.mean()), rel=1e-4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = float((per_token * mask).sum() / 3)
    assert float(divergence_of("decoder", teacher, student, mask)) == pytest.approx(kept, rel=1e-5)
    assert float(Target("decoder", teacher, mask).distance(student)) == pytest.approx(kept, rel=1e-4)
    assert float(Target("decoder", teacher).distance(teacher)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_count_relatively_and_of_a_language_model_in_nats(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, hidden = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]) if masked else None
    kept = torch.ones(2, 3) if mask is None else mask
    off = [hidden * 1.1, hidden]  # an error of relative square 0.01 behind the first of two blocks
    assert float(Target("encoder", logits, mask, [hidden] * 2).apart(off)) == pytest.approx(0.005, rel=1e-4)
    p = logits.softmax(-1)
    variance = (p * logits.square()).sum(-1) - (p * logits).sum(-1).square()
    of_window = (variance * kept).sum(1) / kept.sum(1)
    expected = 0.005 * float((of_window[:, None] * kept).sum() / kept.sum()) / 2
    assert float(Target("decoder", logits, mask, [hidden] * 2).apart(off)) == pytest.approx(expected, rel=1e-4)
    assert float(Target("decoder", logits, mask, [hidden] * 2).apart([hidden] * 2)) == 0


def test_encoder_distance_sees_direction_and_size() -> None:
    teacher = torch.tensor([[[3.0, 4.0]]])
    assert float(divergence_of("encoder", teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(divergence_of("encoder", teacher, 2 * teacher)) == pytest.approx(
        1.0
    )  # same direction, error as long as the vector
    assert float(divergence_of("encoder", teacher, -teacher)) == pytest.approx(2 + 4)


def test_interference_weights_rise_and_fall_with_bits_and_average_to_one() -> None:
    units = some_units(4)
    policies = [uniform(name, units) for name in ("w2g32", "w4g32", "w8g32")]
    weights = Interference(units, policies, a=1.0)
    alphas = [weights.alpha(policy) for policy in policies]
    assert alphas == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    assert np.mean(alphas) == pytest.approx(1)
    assert [weights.beta(policy) for policy in policies] == pytest.approx([0.025, 0.05, 0.1])


def test_the_pull_is_the_gradient_of_the_mean_square_of_the_adapters() -> None:
    """On top of a gradient that is there already, and on none; bounds are left alone."""
    generator = torch.Generator().manual_seed(0)
    made = {f"k/{module}/{part}": torch.randn(3, 5, generator=generator) for module in "mn" for part in ("A", "B", "low")}
    ours, theirs = ({name: tensor.clone().requires_grad_() for name, tensor in made.items()} for _ in range(2))
    for parameters in (ours, theirs):
        parameters["k/m/A"].square().sum().backward()
    pull(ours, 0.7)
    adapters = [tensor.flatten() for name, tensor in theirs.items() if not name.endswith("/low")]
    (0.7 * torch.cat(adapters).square().mean()).backward()
    for name, tensor in ours.items():
        gradient = theirs[name].grad
        if name.endswith("/low"):
            assert tensor.grad is None
        else:
            assert tensor.grad is not None
            assert gradient is not None
            assert torch.allclose(tensor.grad, gradient, rtol=1e-6)
            assert float(gradient.abs().max()) > 0
    pull({}, 1.0)


def test_expected_cost_of_a_certain_choice_is_the_policys_cost_and_pulls_under_the_budget() -> None:
    _, units = tiny_llama()
    costs = bytes_and_time(units, KERNELS)
    penalties = ExpectedCost(costs, costs.kernels)
    policy = uniform("w4g32", units, KERNELS)
    chosen = torch.tensor([[float(kernel == policy[unit]) for kernel in kernels] for unit, kernels in costs.kernels.items()])
    total = costs.totals(policy)["peak_memory_bytes"]
    assert float(penalties.expected("peak_memory_bytes", chosen)) == pytest.approx(total)
    assert float(penalties.excess(Budget(peak_memory_bytes=total / 1.5), chosen)) == pytest.approx(0.5)
    assert float(penalties.excess(Budget(peak_memory_bytes=total * 1.01, energy_mj=1.0), chosen)) == 0
    logits = torch.zeros(len(units), 5, requires_grad=True)
    penalties.excess(Budget(latency_ms=0.1), logits.softmax(-1)).backward()
    assert logits.grad is not None
    names = costs.kernels["qkv"]
    assert logits.grad[1, names.index("fp32")] > 0 > logits.grad[1, names.index("w2g32")]
