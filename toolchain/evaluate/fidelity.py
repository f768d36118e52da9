"""How far an encoder's outputs are from those of the fp32 graph that it was cut from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.errors import InputError
from toolchain.progress import track
from toolchain.session import cache_slots, open_session, token_feeds
from toolchain.spec import CPU


@dataclass(frozen=True)
class Fidelity:
    """cosine: mean over output vectors of cos(output, reference); relative_mse: Σ‖difference‖² / Σ‖reference‖²; tokens read.

    An output vector is a token's hidden state or logits, or a window's where the model answers once per sequence.
    """

    cosine: float
    relative_mse: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fidelity(directory: Path, reference_directory: Path, windows: np.ndarray, threads: int = 0, provider: str = CPU) -> Fidelity:
    """Compare the first outputs ([1, T, width] or [1, width]) of two encoder folders on windows int64 [n, T], each window alone.
    provider: what the first one runs on; the reference runs on the CPU.

    A token whose vector is zero in both counts as cosine 1, in one only as 0. Raises InputError for graphs that have a cache
    (decoders: use perplexity) or whose outputs differ in shape.
    """
    if windows.ndim != 2 or windows.size == 0:
        raise InputError(f"expected token windows [n, length], got {list(windows.shape)}")
    sessions = [open_session(directory, threads, provider), open_session(reference_directory, threads)]
    for session, folder in zip(sessions, (directory, reference_directory), strict=True):
        if cache_slots(session):
            raise InputError(f"expected an encoder in {folder}, got a decoder (it has a cache)", "decoders: use perplexity")
    cosines, vectors, error, power = 0.0, 0, 0.0, 0.0
    for row in track(windows, len(windows), "fidelity"):
        ours, reference = (session.run(None, token_feeds(session, row[None]))[0][0].astype(np.float64) for session in sessions)
        if ours.shape != reference.shape:
            raise InputError(f"expected outputs of the same shape, got {list(ours.shape)} and {list(reference.shape)}")
        norms = np.linalg.norm(ours, axis=-1), np.linalg.norm(reference, axis=-1)
        dots, scale = (ours * reference).sum(-1), norms[0] * norms[1]
        vectors += norms[0].size
        both_zero = (norms[0] == 0) & (norms[1] == 0)
        cosines += float(np.where(both_zero, 1.0, dots / np.where(scale > 0, scale, 1.0)).sum())
        error += float(((ours - reference) ** 2).sum())
        power += float((reference**2).sum())
    relative = error / power if power else (0.0 if error == 0 else float("inf"))
    return Fidelity(cosines / vectors, relative, int(windows.size))
