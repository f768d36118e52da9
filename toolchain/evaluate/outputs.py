"""What an encoder folder with a head says of sentences and pairs, on stock onnxruntime. Refuses to know tasks and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toolchain.errors import InputError
from toolchain.progress import track
from toolchain.session import cache_slots, open_session, token_feeds
from toolchain.spec import CPU
from toolchain.text import load_tokenizer


def token_ids(directory: Path, sentences: Sequence[tuple[str, str]], most: int = 128) -> list[list[int]]:
    """Token ids of each sentence or pair (second part "" where there is none) with what the tokenizer puts around them, `most` at most: the
    longer part of a pair is cut first."""
    tokenizer = load_tokenizer(directory)
    tokenizer.enable_truncation(most, strategy="longest_first")
    return [tokenizer.encode(text, pair or None).ids for text, pair in sentences]


def outputs(
    directory: Path, sentences: Sequence[tuple[str, str]], most: int = 128, threads: int = 0, provider: str = CPU
) -> np.ndarray:
    """float64 [n, L]: the folder's first output for each sentence or pair, each alone and at its own length.

    Raises InputError for a decoder, and for an encoder that answers for every token: it has no head for sentences.
    """
    session = open_session(directory, threads, provider)
    if cache_slots(session):
        raise InputError(f"expected an encoder with a head in {directory}, got a decoder (it has a cache)")
    answer = session.get_outputs()[0].shape
    if len(answer) != 2 or not isinstance(answer[1], int):
        raise InputError(f"expected one answer a sentence from {directory}, got {answer}: it has no head for sentences")
    every = token_ids(directory, sentences, most)
    made = [
        session.run(None, token_feeds(session, np.asarray([ids], np.int64)))[0][0].astype(np.float64)
        for ids in track(every, len(every), "sentences")
    ]
    return np.stack(made) if made else np.zeros((0, answer[1]))
