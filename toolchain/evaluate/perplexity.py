"""Perplexity of a decoder folder on token windows, each window alone through the runtime that will serve the model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from toolchain.decoding import Decoder
from toolchain.errors import InputError
from toolchain.progress import track
from toolchain.session import cache_slots, open_session, token_feeds
from toolchain.spec import CPU

_ROWS = 64  # positions whose logits are turned into float64 at once: bounds memory for large vocabularies


def perplexity(
    directory: Path, windows: np.ndarray, threads: int = 0, stepwise: bool = False, provider: str = CPU
) -> tuple[float, int]:
    """(perplexity, number of predicted tokens) of `directory/model.onnx` on windows int64 [n, length].

    Every window is its own run from an empty cache: its first token is context only, the other length − 1 are predicted. Batch 1,
    because kernels with int8 activations per tensor would let windows of a batch change each other. infinity if some token had no
    probability at all; InputError for a graph that is no decoder or windows that do not fit its vocabulary.
    stepwise: token by token, as generated text is made: what a package that prefills with other kernels must be judged by.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"expected token windows [n, length] with n >= 1 and length >= 2, got {list(windows.shape)}")
    session = open_session(directory, threads, provider)
    logits = next((item for item in session.get_outputs() if item.name == "logits"), None)
    if logits is None:
        raise InputError(f"expected a decoder with an output named logits in {directory}, got none", "encoders: use fidelity")
    if isinstance(logits.shape[-1], int) and not 0 <= windows.min() <= windows.max() < logits.shape[-1]:
        raise InputError(f"expected token ids from 0 to {logits.shape[-1] - 1}, got {windows.min()} to {windows.max()}")
    empty = {slot.past: slot.zeros(0) for slot in cache_slots(session)}
    decoder = Decoder(directory, threads, windows.shape[1], provider=provider) if stepwise else None
    total = 0.0
    for row in track(windows, len(windows), "perplexity"):
        if decoder:
            scores = np.stack([decoder.prefill(row[:1]), *(decoder.step(int(token)) for token in row[1:])])
        else:
            scores = session.run(["logits"], {**token_feeds(session, row[None], every_position=True), **empty})[0][0]
        total += _negative_log_likelihood(scores[:-1], row[1:])
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    mean = total / predicted
    return (math.exp(mean) if mean < 700 else math.inf), predicted


def _negative_log_likelihood(scores: np.ndarray, targets: np.ndarray) -> float:
    """Sum over T positions of −log softmax(scores [T, V])[target], in float64."""
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        block = scores[start : start + _ROWS].astype(np.float64)
        target = targets[start : start + _ROWS]
        peak = block.max(-1)
        log_sum = peak + np.log(np.exp(block - peak[:, None]).sum(-1))
        total += float((log_sum - block[np.arange(len(target)), target]).sum())
    return total
