"""What the PTQ/QAT study (arXiv:2411.06084) does to a trained weight besides rounding it: logarithmic codes, and the scaling factor γ.

By hand: no library has this log quantiser by group, and γ must come out in the scales that our kernels read.

    log     Q(w) = sign(w)·2^⌊log₂|w|⌋   (equation 8; relative error below ½)   with b bits: a sign, and 2^(b−1) − 1 exponents below the
            largest of the group; what is smaller than all of them is 0
    γ       γ = sqrt(E[x²] / E[Q(x)²])   (equation 18), x a unit's outputs on calibration text: Q(x)·γ has their second moment again.
            A linear layer's output is linear in its scales, so γ folds into them and costs nothing on the device

No kernel of the runtime computes on logarithmic codes: a package cannot have them, only a table of qualities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.quantize.affine import groups
from toolchain.spec import Kernel


@torch.no_grad()
def log_quantise(weight: Tensor, kernel: Kernel) -> Tensor:
    """weight [N, K] float32 on the logarithmic grid of the kernel's bits and group size, dequantised [N, K].

    Raises ValueError for fewer than 2 bits (no exponent is left beside the sign) and non-finite weights.
    """
    if kernel.weight_bits < 2 or not kernel.quantised:
        raise ValueError(f"expected a quantised kernel of 2 bits or more, got {kernel.name}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("expected finite weights, got NaN or infinity")
    K = weight.shape[1]
    G, width = groups(K, kernel)
    grouped = torch.nn.functional.pad(weight, (0, G * width - K)).reshape(weight.shape[0], G, width)
    # frexp is exact where log2 is not: |w| = m·2^e with ½ ≤ m < 1, so ⌊log₂|w|⌋ = e − 1.
    exponent = torch.frexp(grouped.abs())[1] - 1
    size = torch.ldexp(torch.ones_like(grouped), exponent)
    top = torch.where(grouped == 0, torch.iinfo(torch.int32).min, exponent).amax(-1, keepdim=True)
    kept = (grouped != 0) & (exponent > top - (2 ** (kernel.weight_bits - 1) - 1))
    return torch.where(kept, torch.sign(grouped) * size, 0.0).reshape(weight.shape[0], -1)[:, :K]


@torch.no_grad()
def gamma(weight: Tensor, quantised: Tensor, moments: Tensor) -> float:
    """γ of a linear layer's output: weight and what became of it [N, K], moments [K, K] the mean of x xᵀ over its inputs.

    E[y²] = Σ_n w_n M w_nᵀ, so no output is computed. 1.0 where the quantised layer's output is all zero: nothing can be scaled.
    """
    M = moments.double()
    before, after = (float(((rows @ M) * rows).sum()) for rows in (weight.double(), quantised.double()))
    return (before / after) ** 0.5 if after > 0 else 1.0
