"""Greedy text from a decoder folder on stock onnxruntime: one buffer per KV tensor, bound as past and as present.

numpy and onnxruntime only (tokenizers where there is a prompt as text). The buffer is shared because copying the cache every step
costs more than the attention does; GroupQueryAttention writes the new position in place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.decoding import DEFAULT_CONTEXT, Decoder
from toolchain.errors import DamagedFileError, InputError
from toolchain.text import load_tokenizer


@dataclass(frozen=True)
class Generation:
    """What was written: text (without the prompt), token ids, and wall times: an observation of one run, not a measurement.

    ms_per_token is the median over the steps after the first token, None if there was only one.
    """

    text: str
    tokens: tuple[int, ...]
    first_token_ms: float
    ms_per_token: float | None
    stopped: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens": list(self.tokens)}


def generate(directory: Path, prompt: str, new_tokens: int, threads: int = 0) -> Generation:
    """Continue `prompt` greedily; stops at an end-of-text token, after `new_tokens`, or when the model's context is full.

    Raises InputError for an empty prompt, one that leaves no room in the context, or a folder without decoder or tokenizer.
    """
    if new_tokens < 1:
        raise InputError(f"expected at least 1 new token, got {new_tokens}")
    tokenizer = load_tokenizer(directory)
    context, stop = _limits(directory)
    ids = tokenizer.encode(prompt).ids
    if not 1 <= len(ids) < context:
        raise InputError(f"expected a prompt of 1 to {context - 1} tokens, got {len(ids)}")
    decoder = Decoder(directory, threads, capacity=min(context, len(ids) + new_tokens))
    tokens: list[int] = []
    times: list[float] = []
    stopped = "new_tokens" if len(ids) + new_tokens <= context else "context"
    for token, elapsed_ms in _greedy(decoder, np.asarray(ids, np.int64), min(new_tokens, context - len(ids))):
        times.append(elapsed_ms)
        if token in stop:
            stopped = "end_of_text"
            break
        tokens.append(token)
    pace = float(np.median(times[1:])) if len(times) > 1 else None
    # Decoded together with the prompt, because some tokenizers drop the space in front of a text's first word.
    whole = tokenizer.decode([*ids, *tokens])
    text = whole[len(tokenizer.decode(ids)) :]
    return Generation(text, tuple(tokens), times[0], pace, stopped)


def _greedy(decoder: Decoder, ids: np.ndarray, new_tokens: int) -> Iterator[tuple[int, float]]:
    """(next token, milliseconds it took), `new_tokens` times."""
    start = time.perf_counter_ns()
    logits = decoder.prefill(ids)
    for count in range(1, new_tokens + 1):
        token = int(logits.argmax())
        yield token, (time.perf_counter_ns() - start) / 1e6
        if count < new_tokens:
            start = time.perf_counter_ns()
            logits = decoder.step(token)


def _limits(directory: Path) -> tuple[int, frozenset[int]]:
    """(context length, end-of-text ids) that genai_config.json states; defaults where there is none."""
    path = Path(directory) / "genai_config.json"
    if not path.is_file():
        return DEFAULT_CONTEXT, frozenset()
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        end = model.get("eos_token_id", [])
        return int(model["context_length"]), frozenset(end if isinstance(end, list) else [end])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"expected context_length and eos_token_id in {path}, got: {error!r}") from error
