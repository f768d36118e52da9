"""Greedy text from a folder on stock onnxruntime: a decoder continues the prompt, an encoder-decoder answers it.

numpy and onnxruntime only (tokenizers where there is a prompt as text). How a token is made is `decoding.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.decoding import DEFAULT_CONTEXT, Generator, open_generator
from toolchain.errors import DamagedFileError, InputError
from toolchain.files import inside
from toolchain.reading import read_json
from toolchain.session import ENCODER_DECODER_CONTEXT, is_encoder_decoder
from toolchain.spec import CPU
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


def generate(directory: Path, prompt: str, new_tokens: int, threads: int = 0, provider: str = CPU) -> Generation:
    """Continue or answer `prompt` greedily; stops at an end-of-text token, after `new_tokens`, or when the model's context is full.

    The context holds a decoder's prompt and text together, an encoder-decoder's source and target each.
    Raises InputError for an empty prompt, one that leaves no room in the context, or a folder without decoder or tokenizer.
    """
    if new_tokens < 1:
        raise InputError(f"expected at least 1 new token, got {new_tokens}")
    tokenizer = load_tokenizer(directory)
    settings = _encoder_decoder_settings(directory) if is_encoder_decoder(directory) else _settings(directory)
    ids = tokenizer.encode(prompt).ids
    longest = settings.context - settings.continues
    if not 1 <= len(ids) <= longest:
        raise InputError(f"expected a prompt of 1 to {longest} tokens, got {len(ids)}")
    room = min(new_tokens, settings.context - len(ids) * settings.continues)
    generator = open_generator(directory, threads, len(ids), room, start=settings.start, provider=provider)
    tokens: list[int] = []
    times: list[float] = []
    stopped = "new_tokens" if new_tokens == room else "context"
    for token, elapsed_ms in _greedy(generator, np.asarray(ids, np.int64), room):
        times.append(elapsed_ms)
        if token in settings.stop:
            stopped = "end_of_text"
            break
        tokens.append(token)
    pace = float(np.median(times[1:])) if len(times) > 1 else None
    if settings.continues:
        # Decoded together with the prompt, because some tokenizers drop the space in front of a text's first word.
        text = tokenizer.decode([*ids, *tokens])[len(tokenizer.decode(ids)) :]
    else:
        text = tokenizer.decode(tokens)
    return Generation(text, tuple(tokens), times[0], pace, stopped)


def _greedy(generator: Generator, ids: np.ndarray, new_tokens: int) -> Iterator[tuple[int, float]]:
    """(next token, milliseconds it took), `new_tokens` times."""
    start = time.perf_counter_ns()
    logits = generator.prefill(ids)
    for count in range(1, new_tokens + 1):
        token = int(logits.argmax())
        yield token, (time.perf_counter_ns() - start) / 1e6
        if count < new_tokens:
            start = time.perf_counter_ns()
            logits = generator.step(token)


@dataclass(frozen=True)
class _Settings:
    """What a folder says of its model: longest sequence, end-of-text ids, an encoder-decoder's first target token.

    continues: whether the text goes on with the prompt, and shares the context with it.
    """

    context: int
    stop: frozenset[int] = frozenset()
    start: int = 0
    continues: bool = True


def _settings(directory: Path) -> _Settings:
    """As genai_config.json states them; defaults where there is none."""
    path = Path(directory) / "genai_config.json"
    if not path.is_file():
        return _Settings(DEFAULT_CONTEXT)
    try:
        model = read_json(inside(Path(directory), path.name))["model"]
        return _Settings(int(model["context_length"]), _ids(model.get("eos_token_id", [])))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedFileError(f"expected context_length and eos_token_id in {path}, got: {error!r}") from error


def _encoder_decoder_settings(directory: Path) -> _Settings:
    """As config.json states them, and generation_config.json above it, which is where transformers looks."""
    try:
        found: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            if (Path(directory) / name).is_file():
                found |= {key: value for key, value in read_json(inside(Path(directory), name)).items() if value is not None}
        context = int(found.get("n_positions", ENCODER_DECODER_CONTEXT))
        return _Settings(context, _ids(found.get("eos_token_id", [])), int(found["decoder_start_token_id"]), continues=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedFileError(
            f"expected decoder_start_token_id and eos_token_id in config.json of {directory}, got: {error!r}"
        ) from error


def _ids(value: int | list[int]) -> frozenset[int]:
    return frozenset(value if isinstance(value, list) else [value])
