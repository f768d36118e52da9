"""What a saved meta-network proposes for a budget, in numpy: cutting a package needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toolchain.errors import DamagedFileError
from toolchain.reading import json_of

LAYERS = 4


def read(path: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, np.ndarray]]:
    """(unit → candidate kernels, weights by name) of a meta-network's file. Raises DamagedFileError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            candidates = {unit: tuple(kernels) for unit, kernels in json_of((stored.metadata() or {})["candidates"]).items()}
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        if not candidates or not all(kernels and all(isinstance(name, str) for name in kernels) for kernels in candidates.values()):
            raise ValueError("a unit without kernels")
        outputs = len(candidates) * max(len(kernels) for kernels in candidates.values())
        inputs = 4
        for index in range(LAYERS):
            weight, bias = arrays[f"layers.{index}.weight"], arrays[f"layers.{index}.bias"]
            if weight.dtype != np.float32 or bias.dtype != np.float32 or bias.ndim != 1 or not bias.size:
                raise ValueError(f"layer {index} of {weight.dtype} with a bias {bias.dtype} {bias.shape}")
            if weight.shape != (len(bias), inputs) or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise ValueError(f"layer {index} has shape {weight.shape} or numbers that are not finite")
            inputs = len(bias)
        if inputs != outputs or len(arrays) != 2 * LAYERS:
            raise ValueError(f"expected {outputs} outputs, got {inputs}")
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise DamagedFileError(f"expected a meta-network in {path}, got: {error}", "train again: bittailor train") from error
    return candidates, arrays


def log_probabilities(path: Path, encoding: Sequence[float]) -> dict[str, dict[str, float]]:
    """unit → kernel → log-probability for an encoding in [0, 1]^4: as `MetaNetwork.log_probabilities`, to float32 rounding."""
    candidates, arrays = read(path)
    x = np.asarray(encoding, np.float32)
    for index in range(LAYERS):
        x = arrays[f"layers.{index}.weight"] @ x + arrays[f"layers.{index}.bias"]
        if index < LAYERS - 1:
            x = np.maximum(x, 0)
    most = max(len(kernels) for kernels in candidates.values())
    out = {}
    for (unit, kernels), row in zip(candidates.items(), x.reshape(len(candidates), most), strict=True):
        scores = row[: len(kernels)].astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        out[unit] = dict(zip(kernels, scores.tolist(), strict=True))
    return out
