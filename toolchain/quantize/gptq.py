"""GPTQ (arXiv:2210.17323): round column by column, and let the columns still to come make up for what was lost.

With H = mean of x xᵀ over a layer's inputs, the output's error is (w − ŵ) H (w − ŵ)ᵀ; once column k is rounded, the rest of a row moves by
−(w_k − ŵ_k)/U_kk · U_k,>k, U the upper Cholesky factor of H⁻¹. Columns in order of falling H_kk ("act-order"); every group's range is
fixed before (the search for bounds has found it), so the order is free. By hand: the libraries that have it do not round as our kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.quantize.affine import groups
from toolchain.quantize.fake import steps
from toolchain.spec import Kernel

DAMP = 0.01
_BLOCK = 64
"""Columns rounded before the rest of the matrix hears of it: one product instead of 64."""


@torch.no_grad()
def compensated(weight: Tensor, hessian: Tensor, kernel: Kernel, low: Tensor, high: Tensor, damp: float = DAMP) -> Tensor:
    """Each weight as it stood when its turn came, [N, K]: rounded to nearest with bounds low <= 0 <= high [N, G] it gives GPTQ's codes.

    weight [N, K], hessian [K, K] (mean of x xᵀ, any scale). A column whose inputs were all zero is left alone.
    """
    N, K = weight.shape
    width = groups(K, kernel)[1]
    H = hessian.double().clone()
    mean = H.diagonal().mean().clamp_min(1e-12)
    H.diagonal().add_(damp * mean)
    order = torch.argsort(H.diagonal(), descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    moving = weight[:, order].clone()
    out = torch.empty_like(moving)
    scales, zeros = steps(low, high, kernel)
    group = torch.div(order, width, rounding_mode="floor")
    scale, bottom, top = scales[:, group], -zeros[:, group], kernel.levels - 1 - zeros[:, group]
    for start in range(0, K, _BLOCK):
        end = min(start + _BLOCK, K)
        errors = torch.empty(N, end - start, device=weight.device)
        for k in range(start, end):
            now = moving[:, k]
            out[:, k] = now
            rounded = torch.minimum(torch.maximum((now / scale[:, k]).round(), bottom[:, k]), top[:, k]) * scale[:, k]
            error = (now - rounded) / upper[k, k]
            errors[:, k - start] = error
            if k + 1 < end:
                moving[:, k + 1 : end] -= error[:, None] * upper[k, k + 1 : end]
        if end < K:
            moving[:, end:] -= errors @ upper[start:end, end:]
    restored = torch.empty_like(out)
    restored[:, order] = out
    return restored
