"""Affine quantisation of a weight matrix, the reference every other implementation is tested against.

Owns what a kernel means in numbers; refuses to know models and devices. By hand, because the codes must fit the runtime's
kernels bit for bit and the torch forward pass (`fake.py`) must reproduce them exactly: same operations, same order, float32.

    lo = min(w, 0), hi = max(w, 0)   per group, or learned bounds lo ≤ 0 ≤ hi
    s = (hi − lo) / (2^b − 1),  z = round(−lo / s),  q = clip(round(w / s) + z, 0, 2^b − 1),  ŵ = (q − z)·s

(PTQ/QAT study, algorithm 1.) Symmetric kernels (w8a8) use s = max(−lo, hi) / 63, z = 128. Kernels with fp16 activations round s to fp16
before anything is divided by it, as the runtime reads it; what their sums lose in fp16 is not modelled: it is the runtime's own affair,
about 1e-3 relative (`profiler/probe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toolchain.spec import Kernel

SYMMETRIC_MAX = 63
SYMMETRIC_ZERO = 128


@dataclass(frozen=True)
class Quantized:
    """Codes of one weight matrix [N, K]: codes uint8 [N, G, g] (K padded to G·g), scales float32 [N, G], zero_points uint8 [N, G]."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    K: int

    @property
    def N(self) -> int:
        return int(self.codes.shape[0])


def groups(K: int, kernel: Kernel) -> tuple[int, int]:
    """(number of groups, group width) along K; the last group is padded with zeros where K does not divide."""
    width = kernel.group_size or K
    return -(-K // width), width


def quantize(weight: np.ndarray, kernel: Kernel, low: np.ndarray | None = None, high: np.ndarray | None = None) -> Quantized:
    """Codes of weight [N, K] float32 under a quantised kernel; bounds low <= 0 <= high [N, G]. ValueError for fp32, non-finite weights."""
    if not kernel.quantised:
        raise ValueError(f"expected a quantised kernel, got {kernel.name}")
    if not np.isfinite(weight).all():
        raise ValueError("expected finite weights, got NaN or infinity")
    N, K = weight.shape
    G, width = groups(K, kernel)
    padded = np.zeros((N, G * width), np.float32)
    padded[:, :K] = weight
    grouped = padded.reshape(N, G, width)
    one = np.float32(1)
    low = np.minimum(grouped.min(-1), np.float32(0)) if low is None else low
    high = np.maximum(grouped.max(-1), np.float32(0)) if high is None else high
    if kernel.symmetric:
        scales = _rounded(np.maximum(-low, high) / np.float32(SYMMETRIC_MAX), kernel)
        scales = np.where(scales > 0, scales, one)
        zero = np.full_like(scales, SYMMETRIC_ZERO)
        code_min, code_max = SYMMETRIC_ZERO - SYMMETRIC_MAX, SYMMETRIC_ZERO + SYMMETRIC_MAX
    else:
        scales = _rounded((high - low) / np.float32(kernel.levels - 1), kernel)
        scales = np.where(scales > 0, scales, one)
        code_min, code_max = 0, kernel.levels - 1
        zero = np.clip(np.rint(-low / scales), code_min, code_max)
    codes = np.clip(np.rint(grouped / scales[..., None]) + zero[..., None], code_min, code_max)
    return Quantized(codes.astype(np.uint8), scales.astype(np.float32), zero.astype(np.uint8), K)


def _rounded(scales: np.ndarray, kernel: Kernel) -> np.ndarray:
    """float32, at the precision the kernel keeps them in. ValueError where they leave its range."""
    with np.errstate(over="ignore"):
        kept = scales.astype(kernel.float_type).astype(np.float32)
    if not np.isfinite(kept).all():
        raise ValueError(f"expected scales within the range of {kernel.float_type} for {kernel.name}, got {scales.max():.3g}")
    return kept


def unquantised(weight: np.ndarray, kernel: Kernel) -> np.ndarray:
    """What a kernel without codes makes of weight [N, K]: itself in fp32, or rounded to fp16; float32 both."""
    return weight.astype(kernel.float_type).astype(np.float32)


def dequantize(quantized: Quantized) -> np.ndarray:
    """ŵ = (q − z)·s, float32 [N, K]."""
    offset = quantized.codes.astype(np.float32) - quantized.zero_points.astype(np.float32)[..., None]
    return (offset * quantized.scales[..., None]).reshape(quantized.N, -1)[:, : quantized.K]


def quantize_activation(x: np.ndarray, kernel: Kernel) -> np.ndarray:
    """What the kernel's own int8 activation quantiser turns x [..., K] into, dequantised float32.

    int8_group: per row and group, s = max|x| / 127 (MatMulNBits, accuracy_level 4). int8_tensor: uint8 over the whole tensor
    with a rounded zero point (DynamicQuantizeMatMul). Both reproduce the runtime to about 3e-7 relative. fp16: rounded to it.
    """
    x = np.asarray(x, np.float32)
    if kernel.activation == "fp16":
        return x.astype(np.float16).astype(np.float32)
    if kernel.activation == "int8_group":
        K = x.shape[-1]
        G, width = groups(K, kernel)
        padded = np.zeros((*x.shape[:-1], G * width), np.float32)
        padded[..., :K] = x
        grouped = padded.reshape(*x.shape[:-1], G, width)
        scale = np.abs(grouped).max(-1, keepdims=True) / np.float32(127)
        usable = scale >= np.finfo(np.float32).tiny  # below, 1 / scale is infinite
        inverse = np.where(usable, np.float32(1) / np.where(usable, scale, 1), np.float32(0))
        return (np.rint(grouped * inverse) * scale).reshape(padded.shape)[..., :K]
    if kernel.activation == "int8_tensor":
        low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
        scale = (high - low) / np.float32(255)
        if scale == 0:
            return x
        zero = np.clip(np.rint(-low / scale), 0, 255)
        return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    return x
