"""Codes ↔ bytes, low bits first: the layout of MatMulNBits and GatherBlockQuantized (and of our files at rest)."""

from __future__ import annotations

import numpy as np

from toolchain.kernels import parts
from toolchain.spec import Kernel, Unit


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., n] → uint8 [..., ceil(n·bits/8)]; the last byte is padded with zero bits. bits in {2, 4, 8}."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    per_byte = 8 // bits
    short = -codes.shape[-1] % per_byte
    if short:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), np.uint8)], axis=-1)
    lanes = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = np.zeros(lanes.shape[:-1], np.uint8)
    for lane in range(per_byte):
        packed |= lanes[..., lane] << (bits * lane)
    return packed


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverse of `pack`: the first `count` codes of each row."""
    if bits == 8:
        return packed[..., :count]
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    lanes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return lanes.reshape(*packed.shape[:-1], -1)[..., :count]


def packed_bytes(unit: Unit, kernel: Kernel) -> int:
    """Exact bytes of a unit's tensors under a kernel: codes, scales and zero points (alignment not counted)."""
    if kernel.prefill:
        return sum(packed_bytes(unit, part) for part in parts(kernel))
    if not kernel.quantised:
        return kernel.container_bits // 8 * unit.parameters
    if kernel.activation == "int8_tensor":
        return unit.parameters + 4 * unit.N
    G = -(-unit.K // kernel.group_size)
    codes = G * kernel.group_size * kernel.container_bits // 8
    zero_points = -(-G * kernel.container_bits // 8)
    scales = G * (2 if kernel.float_type == "float16" else 4)
    return unit.N * (codes + scales + zero_points)
