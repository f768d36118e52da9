"""Where a kernel's training starts: each group's bounds by a search, its weights by GPTQ; and what is kept of that.

Bounds. Round-to-nearest over the full range wastes codes at 2 to 4 bits: one extreme weight sets the step of its whole group. The search
starts training where PTQ with MSE clipping ends.

Weights. GPTQ's codes themselves are a bad start: every weight then sits in the middle of its step, and an adapter has to move it by half
a step before anything changes. So training starts from each weight as it stood when GPTQ rounded it (`gptq.compensated`): it rounds to
the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.quantize.affine import groups
from toolchain.quantize.fake import fake_quantise, steps
from toolchain.quantize.gptq import compensated
from toolchain.spec import Kernel, Unit
from toolchain.supernet.passes import Pass

BOUNDED_BITS = 4
"""Kernels above this many bits keep min and max: there the best range is the whole one to within half a step."""

SMALLEST = 1e-6
"""Least size of a bound: its logarithm is what is trained."""

_COARSE = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
_FINE = (0.85, 0.92, 1.0, 1.08, 1.15)


def bounded(kernel: Kernel) -> bool:
    """Whether the kernel's ranges are trained."""
    return kernel.quantised and kernel.weight_bits <= BOUNDED_BITS


@dataclass(frozen=True)
class Frozen:
    """Weights [N, K] under bounds low <= 0 <= high [N, G], one byte each: the code they round to, and where within its step they stand.

    places uint8 [N, K]: code · F + part, F = 256 / 2^b parts of a step. A part's middle is taken, which never lies on a rounding edge: GPTQ
    counts on every single code, and plain 8-bit codes, which put a few weights on the other side of theirs, lose much of what it gains.
    """

    places: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, weight: Tensor, kernel: Kernel, low: Tensor, high: Tensor) -> Frozen:
        """Weights beyond the bounds are brought to the outer edge of the last step."""
        scale, zero, parts = cls._grid(low, high, weight.shape[1], kernel)
        steps_from_low = weight / scale + zero
        code = steps_from_low.round().clamp_(0, kernel.levels - 1)
        part = ((steps_from_low - code + 0.5) * parts).floor_().clamp_(0, parts - 1)
        return cls((code * parts + part).to(torch.uint8), low, high)

    def weight(self, kernel: Kernel) -> Tensor:
        """float32 [N, K], the same on every call."""
        scale, zero, parts = self._grid(self.low, self.high, self.places.shape[1], kernel)
        return ((self.places + 0.5) / parts - 0.5 - zero) * scale

    @staticmethod
    def _grid(low: Tensor, high: Tensor, K: int, kernel: Kernel) -> tuple[Tensor, Tensor, int]:
        """(scale, zero point) of each weight [N, K], and the parts of a step."""
        width = groups(K, kernel)[1]
        scale, zero = (each.repeat_interleave(width, 1)[:, :K] for each in steps(low, high, kernel))
        return scale, zero, 256 // kernel.levels


@torch.no_grad()
def search(weight: Tensor, kernel: Kernel, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(low, high) bounds [N, G] that about minimise Σ_k importance_k (w − ŵ)² in each group of weight [N, K]; low < 0 < high.

    importance [K]: mean square of each input (its share in the output's error), all ones when absent. First one factor on both ends of
    the whole range, then each end by itself, from a fixed list of factors.
    """
    N, K = weight.shape
    G, width = groups(K, kernel)
    like = {"device": weight.device}
    share = torch.ones(K, **like) if importance is None else importance
    padded = torch.zeros(G * width, **like)
    padded[:K] = share
    grouped = torch.nn.functional.pad(weight, (0, G * width - K)).reshape(N, G, width)
    least, most = torch.aminmax(grouped, dim=-1)
    least, most = least.clamp_max_(-SMALLEST), most.clamp_min_(SMALLEST)

    def loss(low: Tensor, high: Tensor) -> Tensor:
        wrong = (fake_quantise(weight, kernel, low * least, high * most) - weight).square_()
        return (torch.nn.functional.pad(wrong, (0, G * width - K)).reshape(N, G, width) * padded.reshape(G, width)).sum(-1)

    low = torch.ones(N, G, **like)
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
            trial = (start * factor).clamp_max_(1.0)
            now = loss(trial, high) if end == "low" else loss(low, trial)
            better = now < best
            best = torch.where(better, now, best)
            if end == "low":
                low = torch.where(better, trial, low)
            else:
                high = torch.where(better, trial, high)
    return (low * least).clamp_max_(-SMALLEST), (high * most).clamp_min_(SMALLEST)


def frozen_start(weight: Tensor, moments: Tensor, kernel: Kernel, low: Tensor, high: Tensor) -> Frozen:
    """GPTQ's weights under these bounds. moments [K, K]: mean of x xᵀ over the layer's inputs."""
    return Frozen.of(compensated(weight, moments, kernel, low, high), kernel, low, high)


@torch.no_grad()
def input_moments(
    model: nn.Module, units: Iterable[Unit], windows: Tensor, batch: int = 8, masks: Tensor | None = None
) -> dict[str, Tensor]:
    """module → mean of x xᵀ over its inputs x [K, K] in windows [n, T]; layers fed the same tensor (q, k, v) share one.

    masks: 0/1 [n, T] of padded windows, whose padding does not count; None: full ones. The diagonal says what an error in a column of the
    weight costs. An embedding has no inputs; where a head shares its tensor, the head's count for it.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    same: dict[str, str] = {}
    last: tuple[str, Any] = ("", None)
    kept: Tensor | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal last
            if inputs[0] is last[1]:
                same[name] = last[0]
                return
            last = (name, inputs[0])
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            if kept is not None and kept.numel() == x.shape[0]:  # a head may see one token of each window
                x = x[kept]
            square = x.T @ x
            sums[name] = sums.get(name, torch.zeros_like(square)) + square
            rows[name] = rows.get(name, 0) + x.shape[0]

        return add

    units, passes = tuple(units), Pass.of(model)
    linears = [module for unit in units if unit.op == "MatMul" for module in unit.modules]
    handles = [model.get_submodule(module).register_forward_pre_hook(hook(module)) for module in linears]
    try:
        for start in range(0, len(windows), batch):
            piece = slice(start, start + batch)
            mask = None if masks is None else masks[piece]
            kept = None if mask is None else mask.flatten().bool()
            model(**passes.arguments(windows[piece], mask))
    finally:
        for handle in handles:
            handle.remove()
    means = {name: total / rows[name] for name, total in sums.items()}
    means |= {name: means[first] for name, first in same.items()}
    by_tensor = {id(model.get_submodule(module).weight): module for module in linears}
    shared = {
        module: means[by_tensor[key]]
        for unit in units
        if unit.op != "MatMul"
        for module in unit.modules
        if (key := id(model.get_submodule(module).weight)) in by_tensor
    }
    return means | shared
