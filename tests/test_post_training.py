"""Logarithmic codes, the scaling factor γ and the closed-form allocation: what their source says of them, and what its formulas say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.kernels import CATALOGUE
from toolchain.quantize.affine import dequantize, quantize
from toolchain.quantize.allocation import allocate, rounded
from toolchain.quantize.post_training import gamma, log_quantise

LOG_KERNELS = ["w2g32", "w3g32", "w4g128", "w8g32"]


def _weight(seed: int, N: int = 6, K: int = 80) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32))


@given(seed=st.integers(0, 2**16), scale=st.floats(1e-20, 1e20), name=st.sampled_from(LOG_KERNELS))
@settings(deadline=None)
def test_logarithmic_codes_are_signed_powers_of_two_below_the_weight(seed: int, scale: float, name: str) -> None:
    kernel = CATALOGUE[name]
    weight = _weight(seed) * scale
    seen = log_quantise(weight, kernel)
    kept = seen != 0
    assert torch.equal(torch.frexp(seen[kept])[0].abs(), torch.full_like(seen[kept], 0.5)), "no power of two"
    assert torch.equal(torch.sign(seen[kept]), torch.sign(weight[kept]))
    error = ((weight - seen).abs() / weight.abs())[kept]
    assert float(error.max()) < 0.5  # proposition 6
    width = kernel.group_size
    for start in range(0, weight.shape[1], width):
        for row in seen[:, start : start + width]:
            assert len(set(row.abs().tolist()) - {0.0}) <= 2 ** (kernel.weight_bits - 1) - 1


def test_a_power_of_two_keeps_its_value_and_what_is_below_all_exponents_is_dropped() -> None:
    weight = torch.tensor([[8.0, -4.0, 2.0, 1.0, 0.0, 7.99, 0.99]])
    assert log_quantise(weight, CATALOGUE["w3g32"]).tolist() == [[8.0, -4.0, 2.0, 0.0, 0.0, 4.0, 0.0]]  # three exponents: 8, 4, 2
    assert log_quantise(weight, CATALOGUE["w2g32"]).tolist() == [[8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    assert not log_quantise(torch.zeros(2, 5), CATALOGUE["w4g32"]).any()


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_kernel_without_codes_has_no_logarithmic_ones(name: str) -> None:
    with pytest.raises(ValueError, match="2 bits"):
        log_quantise(_weight(0), CATALOGUE[name])


@given(seed=st.integers(0, 2**16), name=st.sampled_from(["w2g32", "w3g32", "w4g32", "w8a8"]))
@settings(deadline=None)
def test_gamma_gives_the_outputs_their_second_moment_again(seed: int, name: str) -> None:
    weight = _weight(seed)
    quantised = torch.from_numpy(dequantize(quantize(weight.numpy(), CATALOGUE[name])))
    inputs = _weight(seed + 1, N=300) @ torch.diag(torch.linspace(0.1, 3.0, 80))
    moments = inputs.T @ inputs / len(inputs)
    factor = gamma(weight, quantised, moments)
    before, after = ((inputs.double() @ rows.double().T).square().mean() for rows in (weight, factor * quantised))
    assert float(after) == pytest.approx(float(before), rel=1e-4)  # the moments are float32


def test_gamma_of_what_became_nothing_is_one() -> None:
    assert gamma(_weight(0), torch.zeros(6, 80), torch.eye(80)) == 1.0


@given(
    worth=st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e3), st.integers(1, 10**6)), min_size=1, max_size=12),
    bits=st.floats(0.5, 8),
)
def test_the_allocation_is_the_theorems_and_spends_the_budget(worth: list[tuple[float, float, int]], bits: float) -> None:
    alpha, variance, sizes = ({f"l{place}": row[part] for place, row in enumerate(worth)} for part in range(3))
    found = allocate(alpha, variance, sizes, bits, 8.0)
    total = sum(sizes.values())
    assert sum(sizes[name] * each for name, each in found.items()) == pytest.approx(bits * total, rel=1e-9)
    prices = {name: alpha[name] * variance[name] / 4**each for name, each in found.items()}
    inner = [prices[name] for name, each in found.items() if 0 < each < 8]
    assert max(inner, default=1.0) == pytest.approx(min(inner, default=1.0), rel=1e-6)  # b = ½ log₂(α σ² / λ) with one λ
    price = inner[0] if inner else None
    for name, each in found.items() if price else ():
        assert each > 0 or prices[name] <= price * (1 + 1e-6), "worth more than what got bits"
        assert each < 8 or prices[name] >= price * (1 - 1e-6), "worth less than what got no more"


def test_four_times_the_worth_is_one_bit_more() -> None:
    found = allocate({"a": 4.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 10, "b": 10}, 4.0, 8.0)
    assert found == {"a": pytest.approx(4.5), "b": pytest.approx(3.5)}


def test_what_the_widest_cannot_take_goes_to_the_others() -> None:
    assert allocate({"a": 4.0**9, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 10, "b": 10}, 6.0, 8.0) == {
        "a": 8.0,
        "b": pytest.approx(4.0),
    }


OFFERED = (2, 3, 4, 8)


@given(wanted=st.lists(st.tuples(st.floats(0, 12), st.integers(1, 1000)), min_size=1, max_size=10), bits=st.floats(2, 9))
def test_rounded_bits_are_offered_and_no_layer_could_have_more(wanted: list[tuple[float, int]], bits: float) -> None:
    each = {f"l{place}": row[0] for place, row in enumerate(wanted)}
    sizes = {f"l{place}": row[1] for place, row in enumerate(wanted)}
    found = rounded(each, sizes, bits, OFFERED)
    assert set(found.values()) <= set(OFFERED)
    left = bits * sum(sizes.values()) - sum(sizes[name] * width for name, width in found.items())
    assert left >= -1e-6
    for name, width in found.items():
        wider = min((other for other in OFFERED if other > width), default=None)
        assert wider is None or sizes[name] * (wider - width) > left - 1e-6


def test_who_wants_least_of_a_step_goes_down_and_who_wants_most_goes_up() -> None:
    sizes = {"a": 1, "b": 1, "c": 1}
    assert rounded({"a": 3.4, "b": 2.9, "c": 3.6}, sizes, 3, OFFERED) == {"a": 3, "b": 3, "c": 3}  # nearest: 3, 3, 4
    assert rounded({"a": 2.4, "b": 2.1, "c": 2.3}, sizes, 7 / 3, OFFERED) == {"a": 3, "b": 2, "c": 2}  # nearest: 2, 2, 2


def test_what_cannot_be_allocated_is_refused() -> None:
    with pytest.raises(ValueError, match="cost something"):
        allocate({"a": 0.0}, {"a": 1.0}, {"a": 1}, 4, 8.0)
    with pytest.raises(ValueError, match="2 bits or more"):
        rounded({"a": 1.0}, {"a": 1}, 1.5, (2, 4))
    assert math.isclose(allocate({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1, "b": 1}, 3, 8.0)["b"], 6.0)
