"""The torch fake-quantisers against the numpy reference (exactly) and against autograd through plain straight-through rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from toolchain.kernels import CATALOGUE
from toolchain.quantize import affine
from toolchain.quantize.fake import CACHED, codes, fake_quantise, fake_quantise_activation, fake_quantise_chosen
from toolchain.spec import Kernel

QUANTISED = [kernel for kernel in CATALOGUE.values() if kernel.quantised]
shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 7, 32, 33, 96, 160]))
sizes = st.floats(2.0**-126, 2.0**13, width=32)
values = st.one_of(st.just(0.0), sizes, sizes.map(lambda size: -size))
seeds = st.integers(0, 2**32 - 1)


def _weights(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Groups of very different size and sign, with exact zeros, constant rows and ties among them."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 3, size=(shape[0], 1)) + rng.choice([0, 0, 1], size=(shape[0], 1))
    w[rng.random(shape) < 0.1] = 0
    if rng.random() < 0.3:
        w = np.round(w * 4) / 4
    return w.astype(np.float32)


@pytest.mark.parametrize("kernel", QUANTISED, ids=lambda kernel: kernel.name)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=seeds, clipped=st.booleans())
def test_forward_codes_and_numpy_reference_are_bit_for_bit_equal(
    kernel: Kernel, shape: tuple[int, int], seed: int, clipped: bool
) -> None:
    w = _weights(shape, seed)
    bounds: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    if clipped:
        N, G = shape[0], affine.groups(shape[1], kernel)[0]
        size = (np.random.default_rng(seed).uniform(0, 1, size=(2, N, G)) * np.abs(w).max()).astype(np.float32)
        bounds = (-size[0], size[1])
    tensors = [None if bound is None else torch.from_numpy(bound) for bound in bounds]
    reference = affine.quantize(w, kernel, *bounds)
    ours = codes(torch.from_numpy(w), kernel, *tensors)
    assert np.array_equal(ours.codes, reference.codes)
    assert np.array_equal(ours.scales, reference.scales)
    assert np.array_equal(ours.zero_points, reference.zero_points)
    forward = fake_quantise(torch.from_numpy(w), kernel, *tensors).numpy()
    assert np.array_equal(forward, affine.dequantize(reference))


@pytest.mark.parametrize("name", ["w8a8", "w8g32", "w4g128"])
@settings(max_examples=40, deadline=None)
@given(x=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=40), elements=values))
def test_activation_quantiser_equals_numpy(name: str, x: np.ndarray) -> None:
    kernel = CATALOGUE[name]
    assert np.array_equal(fake_quantise_activation(torch.from_numpy(x), kernel).numpy(), affine.quantize_activation(x, kernel))


def _straight_through(weight: torch.Tensor, kernel: Kernel, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The same formula through autograd, `round` counting as the identity."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x + (x.round() - x).detach()

    N, K = weight.shape
    grouped = weight.reshape(N, -1, kernel.group_size or K)
    if kernel.symmetric:
        s, z = torch.maximum(-low, high) / 63, torch.full_like(low, 128)
        q = (rounded(grouped / s[..., None]) + z[..., None]).clamp(65, 191)
    else:
        s = (high - low) / (kernel.levels - 1)
        z = rounded(-low / s)
        q = (rounded(grouped / s[..., None]) + z[..., None]).clamp(0, kernel.levels - 1)
    return ((q - z[..., None]) * s[..., None]).reshape(N, K)


@pytest.mark.parametrize("name", ["w2g32", "w3g32", "w4g32", "w8a8"])
def test_gradients_equal_autograd_through_straight_through_rounding(name: str) -> None:
    kernel = CATALOGUE[name]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    G = affine.groups(64, kernel)[0]
    low, high = ((torch.rand(8, G, generator=generator, dtype=torch.float64) * 1.2 + 0.8) * sign for sign in (-1, 1))
    upstream = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    inputs = [tensor.clone().requires_grad_() for tensor in (weight, low, high)]
    expected = torch.autograd.grad((_straight_through(inputs[0], kernel, *inputs[1:]) * upstream).sum(), inputs)
    inputs = [tensor.clone().requires_grad_() for tensor in (weight, low, high)]
    got = torch.autograd.grad((fake_quantise(inputs[0], kernel, *inputs[1:]) * upstream).sum(), inputs)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert any(gradient.abs().sum() > 0 for gradient in got[1:])


def test_without_bounds_the_gradient_is_the_identity() -> None:
    weight = torch.randn(4, 32, requires_grad=True)
    upstream = torch.randn(4, 32)
    fake_quantise(weight, CATALOGUE["w2g32"]).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)
    x = torch.randn(2, 5, 32, requires_grad=True)
    fake_quantise_activation(x, CATALOGUE["w8a8"]).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("name", ["w8a8", "w4g32"])
def test_activations_of_a_bf16_pass_are_quantised_as_the_kernel_does_it(name: str) -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = fake_quantise_activation(x.float(), CATALOGUE[name])
    assert torch.equal(fake_quantise_activation(x, CATALOGUE[name]), exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chosen_activation_quantiser_is_the_one_that_was_chosen(dtype: torch.dtype) -> None:
    kernels = tuple(CATALOGUE[name] for name in ("w8g32", "w8a8", "w4g128"))
    x = torch.randn(3, 5, 160, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    seen = []
    for place in range(len(kernels) + 1):
        x.grad = None
        value = fake_quantise_chosen(x, kernels, torch.tensor(place))
        seen.append(value.detach())
        assert torch.equal(value, fake_quantise_activation(x, kernels[place]) if place < len(kernels) else x)
        value.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, torch.ones_like(x))
    assert len({value.float().numpy().tobytes() for value in seen}) == len(seen)


def test_fp32_passes_through_and_codes_refuses_it_and_nan() -> None:
    weight = torch.randn(4, 32)
    assert fake_quantise(weight, CATALOGUE["fp32"]) is weight
    assert fake_quantise_activation(weight, CATALOGUE["fp32"]) is weight
    with pytest.raises(ValueError, match="fp32"):
        codes(weight, CATALOGUE["fp32"])
    with pytest.raises(ValueError, match="finite"):
        codes(weight * float("nan"), CATALOGUE["w4g32"])


@pytest.mark.parametrize("name", ["w8a8", "w8g32", "w2g32"])
@pytest.mark.parametrize("clipped", [True, False])
def test_a_weight_larger_than_the_cache_is_quantised_row_by_row_alike(name: str, clipped: bool) -> None:
    kernel, shape = CATALOGUE[name], (3000, 96)  # 288,000 weights: two chunks, the last one shorter
    assert shape[0] * shape[1] > CACHED
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(2, shape[0], affine.groups(shape[1], kernel)[0], generator=generator) + 0.1
    given = [torch.randn(shape, generator=generator), *([-size[0], size[1]] if clipped else [])]
    flow = torch.randn(shape, generator=generator)

    def outcome(rows: slice) -> list[torch.Tensor]:
        ends = [tensor[rows].clone().requires_grad_() for tensor in given]
        rounded = fake_quantise(ends[0], kernel, *ends[1:])
        rounded.backward(flow[rows])
        return [rounded.detach(), *(end.grad for end in ends if end.grad is not None)]

    whole, *pieces = (outcome(slice(*rows)) for rows in ((0, 3000), (0, 1000), (1000, 3000)))
    assert len(whole) == (4 if clipped else 2)
    for value, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(value, torch.cat(parts))
