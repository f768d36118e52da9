"""Differentiable fake-quantisers: what a kernel does to a weight or an activation, in torch, with straight-through gradients.

Owns the torch side of `affine.py` and nothing else: the same float32 operations in the same order, so that the value of the forward
pass is bit for bit what `affine.dequantize` makes of the exported codes. Both are autograd functions by hand: the common
`x + (q(x) - x).detach()` rounds twice and is *not* bit-exact, and autograd through a dozen elementwise steps is several times slower.

Gradients (a rounding counts as the identity; the zero point as −lo/s):
    weight           1 where the code is inside the range, 0 where it was clipped; 1 everywhere when no bounds are given.
                     The dependence of the range on the group's extreme weights is left out (plain straight-through).
    bounds           with q = round(w/s):  ∂ŵ/∂s = q − w/s inside, the bound's own offset where clipped; chained through
                     s = (hi − lo)/(2^b − 1)   (LSQ, arXiv:1902.08153, for both ends of the range)
    activations      1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolchain.quantize.affine import SYMMETRIC_MAX, SYMMETRIC_ZERO, Quantized, groups
from toolchain.spec import Kernel

CACHED = 2**18
"""Weights that go through the elementwise passes together on a CPU: 1 MB a tensor."""


def _grouped(x: Tensor, kernel: Kernel) -> Tensor:
    """[..., K] → [..., G, g], padded with zeros where the group width does not divide K."""
    G, width = groups(x.shape[-1], kernel)
    if short := G * width - x.shape[-1]:
        x = torch.nn.functional.pad(x, (0, short))
    return x.reshape(*x.shape[:-1], G, width)


def _ungrouped(x: Tensor, K: int) -> Tensor:
    return x.reshape(*x.shape[:-2], -1)[..., :K]


def _grid(grouped: Tensor, kernel: Kernel, low: Tensor | None, high: Tensor | None) -> tuple[Tensor, ...]:
    """(lo, scales, zero, smallest offset, largest offset) of each group, all [N, G]; offset = code − zero point."""
    if low is None or high is None:
        low, high = torch.aminmax(grouped, dim=-1)
        low, high = low.clamp_max_(0), high.clamp_min_(0)
    if kernel.symmetric:
        scales = torch.maximum(-low, high) / SYMMETRIC_MAX
        scales = torch.where(scales > 0, scales, 1.0)
        zero = torch.full_like(scales, SYMMETRIC_ZERO)
        return low, scales, zero, torch.full_like(scales, -SYMMETRIC_MAX), torch.full_like(scales, SYMMETRIC_MAX)
    scales, zero = steps(low, high, kernel)
    return low, scales, zero, -zero, (kernel.levels - 1) - zero


def steps(low: Tensor, high: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """(scales, zero points) [N, G] of an asymmetric kernel between bounds low <= 0 <= high [N, G]."""
    scales = (high - low) / (kernel.levels - 1)
    if kernel.float_type == "float16":
        scales = scales.half().float()
    scales = torch.where(scales > 0, scales, 1.0)
    return scales, (-low / scales).round_().clamp_(0, kernel.levels - 1)


class _FakeQuantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, low: Tensor | None, high: Tensor | None, kernel: Kernel) -> Tensor:
        ctx.kernel, ctx.bounded = kernel, low is not None
        rounded, *grid = _in_chunks(lambda *rows: _rounded(kernel, *rows), weight, low, high)
        if ctx.bounded:
            ctx.save_for_backward(weight, *grid)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.bounded:
            return gradient, None, None, None
        return *_in_chunks(lambda *rows: _gradients(ctx.kernel, *rows), *ctx.saved_tensors, gradient), None


def _rounded(kernel: Kernel, weight: Tensor, low: Tensor | None, high: Tensor | None) -> tuple[Tensor, ...]:
    """ŵ [N, K], and of each group what its gradients need: lo, scale, smallest and largest offset [N, G]."""
    grouped = _grouped(weight, kernel)
    least, scales, _, bottom, top = _grid(grouped, kernel, low, high)
    # round(w/s) + z clipped to the codes, minus z, is round(w/s) clipped to the offsets: all are small integers, exact in float32.
    offset = (grouped / scales[..., None]).round_()
    offset = torch.minimum(torch.maximum(offset, bottom[..., None], out=offset), top[..., None], out=offset)
    return _ungrouped(offset.mul_(scales[..., None]), weight.shape[1]), least, scales, bottom, top


def _gradients(
    kernel: Kernel, weight: Tensor, low: Tensor, scales: Tensor, bottom: Tensor, top: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of weight [N, K], lo and hi [N, G]."""
    ratio = _grouped(weight, kernel) / scales[..., None]
    nearest = ratio.round()
    offset = torch.minimum(torch.maximum(nearest, bottom[..., None]), top[..., None])
    beyond = nearest.sub_(offset)
    flow = _grouped(gradient, kernel)
    over, under = torch.where(beyond > 0, flow, 0.0), torch.where(beyond < 0, flow, 0.0)
    inner = (flow - over).sub_(under)
    above, below = over.sum(-1), under.sum(-1)
    d_scale = (inner * offset.sub_(ratio)).sum(-1)  # offset − w/s; only its inside part counts here
    if kernel.symmetric:
        d_scale = (d_scale + SYMMETRIC_MAX * (above - below)) / SYMMETRIC_MAX
        wider = scales * SYMMETRIC_MAX > -low * (1 + 1e-6)  # the wider side sets the scale
        d_high, d_low = torch.where(wider, d_scale, 0.0), torch.where(wider, 0.0, -d_scale)
    else:
        # a clipped weight sits on a bound: ŵ = bound·s, and the bound's offset moves with lo through the zero point
        slope = low / scales
        d_scale += above * (top - slope) + below * (bottom - slope)
        d_high = d_scale / (kernel.levels - 1)
        d_low = above + below - d_high
    return _ungrouped(inner, weight.shape[1]), d_low, d_high


def _in_chunks(act: Callable[..., tuple[Tensor, ...]], *given: Tensor | None) -> tuple[Tensor, ...]:
    """act over the rows of tensors [N, ...]; on a CPU over few at a time, which stay in its cache from one elementwise pass to the next."""
    first = next(tensor for tensor in given if tensor is not None)
    rows = max(1, CACHED // first.shape[1])
    if first.device.type != "cpu" or first.shape[0] <= rows:
        return act(*given)
    pieces = [[None] * -(-first.shape[0] // rows) if tensor is None else tensor.split(rows) for tensor in given]
    return tuple(torch.cat(parts) for parts in zip(*(act(*piece) for piece in zip(*pieces, strict=True)), strict=True))


def fake_quantise(weight: Tensor, kernel: Kernel, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """What the kernel makes of weight [N, K] float32, dequantised [N, K]; of fp32 the weight itself, of fp16 the weight rounded to it.

    low, high: bounds [N, G] of each group, low <= 0 <= high, both or neither; without, its minimum and maximum. Gradients: see the
    module's first lines.
    """
    if not kernel.quantised:
        return fake_quantise_activation(weight, kernel)  # the rounding is the same, and so is its gradient
    return _FakeQuantise.apply(weight, low, high, kernel)


@torch.no_grad()
def codes(weight: Tensor, kernel: Kernel, low: Tensor | None = None, high: Tensor | None = None) -> Quantized:
    """The codes that the same call of `fake_quantise` rounds to: `affine.dequantize` of them equals its value bit for bit.

    Raises ValueError for a kernel without codes or non-finite weights.
    """
    if not kernel.quantised:
        raise ValueError(f"expected a quantised kernel, got {kernel.name}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("expected finite weights, got NaN or infinity")
    grouped = _grouped(weight, kernel)
    _, scales, zero, bottom, top = _grid(grouped, kernel, low, high)
    offset = (grouped / scales[..., None]).round_()
    offset = torch.minimum(torch.maximum(offset, bottom[..., None]), top[..., None])
    values = offset + zero[..., None]
    whole, zero = values.to(torch.uint8).cpu(), zero.to(torch.uint8).cpu()
    return Quantized(whole.numpy(), scales.cpu().numpy().astype(np.float32), zero.numpy(), weight.shape[1])


class _FakeQuantiseActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, kernel: Kernel) -> Tensor:
        x = given.float()  # as the kernels do it, also where the model's pass is in bf16
        return _FakeQuantiseActivation.quantised(x, kernel).to(given.dtype)

    @staticmethod
    def quantised(x: Tensor, kernel: Kernel) -> Tensor:
        if kernel.activation == "fp16":
            return x.half().float()
        if kernel.activation == "int8_group":
            grouped = _grouped(x, kernel)
            least, most = torch.aminmax(grouped, dim=-1, keepdim=True)
            scale = torch.maximum(-least, most) / 127
            usable = scale >= torch.finfo(scale.dtype).tiny  # below, 1 / scale is infinite
            inverse = torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)
            return _ungrouped((grouped * inverse).round_().mul_(scale), x.shape[-1])
        least, most = torch.aminmax(x)
        low, high = least.clamp_max(0), most.clamp_min(0)
        scale = (high - low) / 255
        usable = torch.where(scale > 0, scale, 1.0)  # all zeros stay zeros; to ask which it is would make a GPU wait
        zero = (-low / usable).round_().clamp_(0, 255)
        return (x / usable).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(usable)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def fake_quantise_activation(x: Tensor, kernel: Kernel) -> Tensor:
    """What the kernel's own quantiser makes of its input x [..., K], dequantised; gradient 1. As `affine.quantize_activation`."""
    if kernel.activation == "fp32":
        return x
    return _FakeQuantiseActivation.apply(x, kernel)


def fake_quantise_chosen(x: Tensor, kernels: Sequence[Kernel], choice: Tensor) -> Tensor:
    """As `fake_quantise_activation` by kernels[choice], x itself where choice [] int64 is none of their places: for compiled passes, which
    then serve every choice. No autograd function: torch 2.11 compiles one without its backward pass, and no gradient comes through.
    """
    seen = x.detach()
    value = seen
    for place, kernel in enumerate(kernels):
        value = torch.where(choice == place, _FakeQuantiseActivation.quantised(seen.float(), kernel).to(x.dtype), value)
    return value + (x - seen)  # x − x is exactly 0 where x is finite
