"""The largest eigenvalue of a block of a loss's Hessian, against matrices whose eigenvalues are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolchain.quantize.hessian import largest_eigenvalues, ranked

pytestmark = pytest.mark.usefixtures("one_thread")


def quadratic(size: int, seed: int, gap: float = 0.5) -> tuple[torch.Tensor, float]:
    """(symmetric matrix whose largest eigenvalue in size stands off from the others, that eigenvalue)."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.linspace(-1, 1, size, dtype=torch.float64) * gap
    values[0] = 1.0 if seed % 2 else -1.0
    return basis @ torch.diag(values) @ basis.T, float(values[0])


@given(st.integers(2, 12), st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_it_is_the_largest_in_size_with_its_sign_at_any_scale(size: int, seed: int, scale: float) -> None:
    matrix, largest = quadratic(size, seed)
    weight = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    (found,) = largest_eigenvalues(lambda: scale * weight @ matrix @ weight / 2, [weight], iterations=60, seed=seed)
    assert found == pytest.approx(scale * largest, rel=0.05)  # ended where it changed by less than 1%


def test_each_weight_has_its_own_block_whatever_lies_between_them() -> None:
    one, other = (torch.zeros(2, 2, requires_grad=True) for _ in range(2))

    def loss() -> torch.Tensor:
        return one.square().sum() * 3 + other.square().sum() + 100 * (one * other).sum()

    assert largest_eigenvalues(loss, [one, other]) == pytest.approx([6.0, 2.0], rel=1e-5)


def test_a_weight_without_curvature_has_none() -> None:
    straight, absent, bent = (torch.ones(3, requires_grad=True) for _ in range(3))
    found = largest_eigenvalues(lambda: straight.sum() + bent.pow(2).sum(), [straight, absent, bent])
    assert found == pytest.approx([0.0, 0.0, 2.0])


def test_attention_has_a_second_derivative() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x @ weight, x, x, is_causal=True).square().sum()

    assert largest_eigenvalues(loss, [weight])[0] != 0


def test_a_loss_that_is_not_finite_is_refused() -> None:
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="finite"):
        largest_eigenvalues(lambda: weight.sum() * float("inf"), [weight])


def test_units_are_ranked_by_mean_and_spread_over_batches() -> None:
    assert ranked([[1.0, -2.0], [3.0, -2.0]]) == pytest.approx([2.0 + 1.0, 2.0])
