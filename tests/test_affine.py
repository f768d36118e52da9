"""Properties of the numpy reference: quantising, dequantising, packing, the bytes it says, and the activation quantisers."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import quantised
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.graph.nodes import quantised_node
from toolchain.kernels import CATALOGUE, candidates, legal, mean_bits, node_op, offered, parts, runs_as, uniform, validate
from toolchain.quantize.affine import SYMMETRIC_MAX, SYMMETRIC_ZERO, Quantized, dequantize, groups, quantize, quantize_activation
from toolchain.quantize.packing import pack, packed_bytes, unpack
from toolchain.spec import Kernel, Unit

KERNELS = quantised({name: CATALOGUE[name] for name in offered()})
EPS = float(np.finfo(np.float32).eps)
kernels = st.sampled_from(KERNELS)


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """[N, K] whose rows differ in size by many orders, with zeros, constant rows, one-sided rows and outliers among them."""
    N, K = draw(st.integers(1, 4)), draw(st.sampled_from([1, 5, 31, 32, 33, 64, 100, 128, 129, 200]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = rng.standard_normal((N, K)) * 10.0 ** rng.integers(-8, 5, (N, 1))
    kind = rng.integers(0, 6, N)
    w[kind == 1] = np.abs(w[kind == 1])
    w[kind == 2] = -np.abs(w[kind == 2])
    w[kind == 3] = w[kind == 3, :1]
    w[kind == 4] = 0
    w[:, rng.random(K) < 0.1] = 0
    w[kind == 5, 0] *= 1000
    return w.astype(np.float32)


def _grouped(w: np.ndarray, kernel: Kernel) -> np.ndarray:
    """[N, G, g], padded with zeros."""
    G, width = groups(w.shape[1], kernel)
    padded = np.zeros((len(w), G * width), np.float32)
    padded[:, : w.shape[1]] = w
    return padded.reshape(len(w), G, width)


def _range(quantized: Quantized, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """(lowest, highest) representable value of every group, [N, G, 1]."""
    zero, scale = quantized.zero_points.astype(np.float64), quantized.scales.astype(np.float64)
    first = SYMMETRIC_ZERO - SYMMETRIC_MAX if kernel.symmetric else 0
    last = SYMMETRIC_ZERO + SYMMETRIC_MAX if kernel.symmetric else kernel.levels - 1
    return ((first - zero) * scale)[..., None], ((last - zero) * scale)[..., None]


@settings(deadline=None)
@given(w=weights(), kernel=kernels)
def test_the_error_is_at_most_half_a_step_inside_the_range(w: np.ndarray, kernel: Kernel) -> None:
    quantized = quantize(w, kernel)
    restored = _grouped(dequantize(quantized), kernel).astype(np.float64)
    low, high = _range(quantized, kernel)
    scale = quantized.scales.astype(np.float64)[..., None]
    target = np.clip(_grouped(w, kernel), low, high)
    # Half a step, and what float32 loses of the quotient, of the product and of the largest value's own digits.
    assert (np.abs(restored - target) <= scale / 2 + 4 * EPS * (np.abs(target) + scale)).all()


@settings(deadline=None)
@given(w=weights(), kernel=kernels)
def test_no_weight_lies_more_than_half_a_step_outside_the_range(w: np.ndarray, kernel: Kernel) -> None:
    """The zero point is rounded, so either end may be cut by half a step, never by more: nothing is clipped away by accident."""
    quantized = quantize(w, kernel)
    low, high = _range(quantized, kernel)
    room = quantized.scales.astype(np.float64)[..., None] * (0.5 + 1e-4)
    grouped = _grouped(w, kernel).astype(np.float64)
    assert (grouped >= low - room).all()
    assert (grouped <= high + room).all()


@settings(deadline=None)
@given(w=weights(), kernel=kernels)
def test_codes_and_zero_points_are_in_range_and_zero_is_exact(w: np.ndarray, kernel: Kernel) -> None:
    quantized = quantize(w, kernel)
    assert quantized.codes.dtype == quantized.zero_points.dtype == np.uint8
    assert quantized.scales.dtype == np.float32
    if kernel.symmetric:
        assert (quantized.zero_points == SYMMETRIC_ZERO).all()
        assert (np.abs(quantized.codes.astype(int) - SYMMETRIC_ZERO) <= SYMMETRIC_MAX).all()
    else:
        assert quantized.codes.max() < kernel.levels
        assert quantized.zero_points.max() < kernel.levels
    assert (quantized.scales > 0).all()
    assert (dequantize(quantized)[w == 0] == 0).all()
    # Padding is zero too: the runtime multiplies it with whatever stands there.
    G, width = groups(w.shape[1], kernel)
    assert (
        quantized.codes.reshape(len(w), -1)[:, w.shape[1] :] == np.repeat(quantized.zero_points, width, 1)[:, w.shape[1] :]
    ).all()
    assert quantized.codes.shape == (len(w), G, width)


@given(value=st.floats(-1e6, 1e6, width=32, allow_subnormal=False), kernel=kernels, K=st.sampled_from([32, 128, 200]))
def test_a_constant_row_is_kept(value: float, kernel: Kernel, K: int) -> None:
    w = np.full((2, K), value, np.float32)
    np.testing.assert_allclose(dequantize(quantize(w, kernel)), w, rtol=2 * EPS * kernel.levels)


@settings(deadline=None)
@given(w=weights(), kernel=kernels)
def test_quantising_what_was_dequantised_changes_nothing_that_matters(w: np.ndarray, kernel: Kernel) -> None:
    once = dequantize(quantize(w, kernel))
    again = quantize(once, kernel)
    step = np.repeat(again.scales, groups(w.shape[1], kernel)[1], 1)[:, : w.shape[1]]
    assert (np.abs(dequantize(again) - once) <= step * (0.5 + 1e-4)).all()


@settings(deadline=None)
@given(w=weights(), kernel=kernels, clip=st.floats(0.3, 1.0))
def test_bounds_set_the_range(w: np.ndarray, kernel: Kernel, clip: float) -> None:
    grouped = _grouped(w, kernel)
    low, high = (np.float32(clip) * end for end in (np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)))
    plain, clipped = quantize(w, kernel), quantize(w, kernel, low, high)
    wide = np.abs(_grouped(w, kernel)).max(-1) > 0
    np.testing.assert_allclose(clipped.scales[wide], plain.scales[wide] * np.float32(clip), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_numbers_are_refused(bad: float) -> None:
    w = np.ones((2, 32), np.float32)
    w[1, 3] = bad
    with pytest.raises(ValueError, match="finite"):
        quantize(w, CATALOGUE["w4g32"])


def test_fp32_is_not_a_quantised_kernel() -> None:
    with pytest.raises(ValueError, match="fp32"):
        quantize(np.ones((2, 32), np.float32), CATALOGUE["fp32"])


def test_four_bits_by_hand() -> None:
    """Range −0.3 .. 1.2 in 15 steps of 0.1, zero at code 3."""
    w = np.zeros((1, 32), np.float32)
    w[0, :4] = [-0.3, 1.2, 0.04, 0.46]
    quantized = quantize(w, CATALOGUE["w4g32"])
    assert quantized.scales[0, 0] == pytest.approx(0.1)
    assert quantized.zero_points[0, 0] == 3
    assert quantized.codes[0, 0, :5].tolist() == [0, 15, 3, 8, 3]
    np.testing.assert_allclose(dequantize(quantized)[0, :5], [-0.3, 1.2, 0.0, 0.5, 0.0], atol=1e-6)


# ---- packing


@given(bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), count=st.integers(1, 70))
def test_pack_and_unpack_are_inverse(bits: int, seed: int, rows: int, count: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)


def test_low_bits_come_first() -> None:
    assert pack(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(np.array([1, 2, 3, 0, 1], np.uint8), 2).tolist() == [0b00111001, 0b01]


_SHAPES = [("MatMul", 256, 48), ("MatMul", 200, 7), ("MatMul", 32, 1), ("MatMul", 129, 5), ("Gather", 256, 17), ("Gather", 96, 3)]


@pytest.mark.parametrize(
    ("op", "K", "N", "name"),
    [(*shape, kernel.name) for shape in _SHAPES for kernel in quantised(dict(CATALOGUE)) if legal(Unit("u", *shape), kernel)],
)
def test_packed_bytes_is_what_the_tensors_weigh(op: str, K: int, N: int, name: str) -> None:
    unit, kernel = Unit("u", op, K, N), CATALOGUE[name]
    w = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    tensors = [array for part in parts(kernel) for _, array in quantised_node(unit, part, quantize(w, part), "x", "y", "node")[1]]
    assert packed_bytes(unit, kernel) == sum(array.nbytes for array in tensors)


def test_packed_bytes_of_fp32() -> None:
    assert packed_bytes(Unit("u", "MatMul", 100, 7), CATALOGUE["fp32"]) == 2800


# ---- activations


@st.composite
def activations(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.sampled_from([(1, 1), (3, 32), (2, 5, 64), (4, 33), (1, 200)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6)
    if rng.random() < 0.3:
        x = np.abs(x) * rng.choice([-1, 1])
    x[rng.random(shape) < 0.2] = 0
    return x.astype(np.float32)


@settings(deadline=None)
@given(x=activations(), kernel=st.sampled_from([kernel for kernel in KERNELS if kernel.activation == "int8_group"]))
def test_grouped_activations_are_within_half_a_step_of_their_group(x: np.ndarray, kernel: Kernel) -> None:
    got = quantize_activation(x, kernel)
    assert got.shape == x.shape
    assert got.dtype == np.float32
    rows = x.reshape(-1, x.shape[-1])
    step = np.abs(_grouped(rows, kernel)).max(-1, keepdims=True).astype(np.float64) / 127
    error = np.abs(_grouped(got.reshape(rows.shape), kernel) - _grouped(rows, kernel))
    assert (error <= step * (0.5 + 1e-4)).all()


@settings(deadline=None)
@given(x=activations())
def test_activations_of_a_whole_tensor_are_within_a_step(x: np.ndarray) -> None:
    """A whole step at the ends of the range, where the rounded zero point cuts up to half of one; half a step elsewhere."""
    got = quantize_activation(x, CATALOGUE["w8a8"])
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    assert (np.abs(got - x) <= step * (1 + 1e-3)).all()
    assert (got[x == 0] == 0).all()
    assert len(np.unique(got)) <= 256


def test_fp32_leaves_activations_alone() -> None:
    x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    np.testing.assert_array_equal(quantize_activation(x, CATALOGUE["fp32"]), x)


def test_a_row_does_not_feel_its_neighbours_in_group_kernels() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 64)).astype(np.float32)
    alone = quantize_activation(x[:1], CATALOGUE["w4g32"])
    x[1] *= 1e4
    np.testing.assert_array_equal(quantize_activation(x, CATALOGUE["w4g32"])[:1], alone)


# ---- the catalogue


def test_every_kernel_runs_as_one_of_the_catalogue_with_the_same_bytes() -> None:
    for name, kernel in CATALOGUE.items():
        twin = CATALOGUE[runs_as(name)]
        unit = Unit("u", "MatMul", 256, 48)
        assert packed_bytes(unit, twin) == packed_bytes(unit, kernel)
        assert node_op("MatMul", twin) == node_op("MatMul", kernel)
    assert runs_as("w3g32") == "w4g32"


UNITS = (
    Unit("embed", "Gather", 64, 512),
    Unit("linear", "MatMul", 64, 96),
    Unit("wide", "MatMul", 160, 64),
    Unit("head", "MatMul", 64, 512),
)


def test_a_bare_name_takes_the_legal_kernel_of_the_same_bits() -> None:
    assert dict(uniform("w4g128", UNITS)) == {"embed": "w4g32", "linear": "w4g32", "wide": "w4g128", "head": "w4g32"}
    assert uniform("w8a8", UNITS)["embed"] == "w8g32"
    assert {*uniform("fp32", UNITS).values()} == {"fp32"}
    assert {*uniform("w3g32", UNITS).values()} == {"w3g32"}


@settings(deadline=None)
@given(st.data())
def test_a_policy_of_candidates_is_valid_and_any_other_is_not(data: st.DataObject) -> None:
    choice = {unit.name: data.draw(st.sampled_from(candidates(unit))) for unit in UNITS}
    assert dict(validate(choice, UNITS)) == choice
    assert 2 <= mean_bits(choice, UNITS) <= 32
    unit = data.draw(st.sampled_from(UNITS))
    others = [name for name in CATALOGUE if name not in candidates(unit)]
    if others:
        from toolchain.errors import PolicyError

        with pytest.raises(PolicyError, match=unit.name):
            validate({**choice, unit.name: data.draw(st.sampled_from(others))}, UNITS)
