"""How curved the loss is in each weight matrix: the largest eigenvalue of its block of the Hessian, by power iteration.

What Q-BERT (arXiv:1909.05840) ranks layers by: Ω = |mean(λ)| + std(λ), λ of several batches. By hand: the libraries that have it take whole
models, not chosen blocks, or are no longer kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, pstdev

import torch
from torch import Tensor

ITERATIONS = 20
LEAST, CLOSE = 8, 1e-2
"""An iteration ends where its eigenvalue changes by less than this share, but not before so many steps: from a start that happens to lie
across the eigenvector looked for, the first ones change next to nothing."""


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by plain matrix products: the fused ones have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def largest_eigenvalues(
    loss: Callable[[], Tensor], weights: Sequence[Tensor], iterations: int = ITERATIONS, seed: int = 0
) -> list[float]:
    """The eigenvalue largest in size of ∂²loss/∂w² for each w of `weights` by itself, with its sign. loss: makes the graph anew.

    Weights that the loss does not depend on have 0. Raises ValueError for a loss that is not finite.
    """
    with twice_differentiable():
        value = loss()
        if not bool(torch.isfinite(value)):
            raise ValueError(f"expected a finite loss, got {value.item()}")
        slopes = torch.autograd.grad(value, list(weights), create_graph=True, allow_unused=True)
        generator = torch.Generator().manual_seed(seed)
        return [
            0.0 if slope is None or not slope.requires_grad else _power_iteration(slope, weight, iterations, generator)
            for slope, weight in zip(slopes, weights, strict=True)
        ]


def _power_iteration(slope: Tensor, weight: Tensor, iterations: int, generator: torch.Generator) -> float:
    direction = torch.randn(weight.shape, generator=generator).to(weight)
    direction /= direction.norm()
    found = 0.0
    for step in range(iterations):
        (product,) = torch.autograd.grad((slope * direction).sum(), weight, retain_graph=True, allow_unused=True)
        if product is None or float(size := product.norm()) == 0:
            return 0.0
        before, found = found, float((product * direction).sum())
        direction = product / size
        if step >= LEAST and abs(found - before) <= CLOSE * abs(found):
            break
    return found


def ranked(eigenvalues: Sequence[Sequence[float]]) -> list[float]:
    """Ω of each weight: eigenvalues [batches][weights] → |mean| + standard deviation over the batches."""
    return [abs(mean(each)) + pstdev(each) for each in zip(*eigenvalues, strict=True)]
