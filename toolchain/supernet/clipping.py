"""Where the learned clip factors start: the range of each group that loses least, found by a search.

Round-to-nearest over the full range (factor 1) wastes codes at 2 to 4 bits: one extreme weight sets the step of its whole group. And a
sigmoid cannot start at 1. The search starts training where PTQ with MSE clipping ends, so no step is spent on finding that place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.quantize.affine import groups
from toolchain.quantize.fake import fake_quantise
from toolchain.spec import Kernel

CLIPPED_BITS = 4
"""Kernels above this many bits keep min and max: there the best factor is 1 to within half a step."""

_LARGEST = 0.995  # a sigmoid reaches 1 nowhere, and has next to no gradient near it
_COARSE = (0.995, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
_FINE = (0.85, 0.92, 1.0, 1.08, 1.15)


def clips(kernel: Kernel) -> bool:
    """Whether the kernel has learned clip factors."""
    return kernel.quantised and kernel.weight_bits <= CLIPPED_BITS


@torch.no_grad()
def search(weight: Tensor, kernel: Kernel, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(low, high) factors [N, G] that about minimise Σ_k importance_k (w − ŵ)² in each group of weight [N, K].

    importance [K]: mean square of each input (its share in the output's error), all ones when absent. First one factor for both ends,
    then each end by itself, from a fixed list of candidates.
    """
    N, K = weight.shape
    G, width = groups(K, kernel)
    like = {"device": weight.device}
    share = torch.ones(K, **like) if importance is None else importance
    padded = torch.zeros(G * width, **like)
    padded[:K] = share

    def loss(low: Tensor, high: Tensor) -> Tensor:
        wrong = (fake_quantise(weight, kernel, low, high) - weight).square_()
        if short := G * width - K:
            wrong = torch.nn.functional.pad(wrong, (0, short))
        return (wrong.reshape(N, G, width) * padded.reshape(G, width)).sum(-1)

    low = torch.full((N, G), _LARGEST, **like)
    high, best = low.clone(), loss(low, low)
    for factor in _COARSE[1:]:
        trial = torch.full((N, G), factor, **like)
        now = loss(trial, trial)
        better = now < best
        best = torch.where(better, now, best)
        low, high = torch.where(better, trial, low), torch.where(better, trial, high)
    for end in ("low", "high"):
        start = low if end == "low" else high
        for factor in _FINE:
            trial = (start * factor).clamp_max_(_LARGEST)
            now = loss(trial, high) if end == "low" else loss(low, trial)
            better = now < best
            best = torch.where(better, now, best)
            if end == "low":
                low = torch.where(better, trial, low)
            else:
                high = torch.where(better, trial, high)
    return low, high
