"""What an encoder folder with a head says of sentences, pairs and questions, on stock onnxruntime. Refuses to know tasks and metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toolchain.errors import InputError
from toolchain.evaluate.spans import span
from toolchain.progress import track
from toolchain.session import cache_slots, open_session, token_feeds
from toolchain.text import load_tokenizer

if TYPE_CHECKING:
    import onnxruntime


def token_ids(directory: Path, sentences: Sequence[tuple[str, str]], most: int = 128) -> list[list[int]]:
    """Token ids of each sentence or pair (second part "" where there is none) with what the tokenizer puts around them, `most` at most: the
    longer part of a pair is cut first."""
    tokenizer = load_tokenizer(directory)
    tokenizer.enable_truncation(most, strategy="longest_first")
    return [tokenizer.encode(text, pair or None).ids for text, pair in sentences]


def outputs(directory: Path, sentences: Sequence[tuple[str, str]], most: int = 128, threads: int = 1) -> np.ndarray:
    """float64 [n, L]: the folder's first output for each sentence or pair, each alone and at its own length.

    threads: so many sentences at a time, one core each.

    Raises InputError for a decoder, and for an encoder that answers for every token: it has no head for sentences.
    """
    session = open_session(directory, threads=1)
    if cache_slots(session):
        raise InputError(f"expected an encoder with a head in {directory}, got a decoder (it has a cache)")
    answer = session.get_outputs()[0].shape
    if len(answer) != 2 or not isinstance(answer[1], int):
        raise InputError(f"expected one answer a sentence from {directory}, got {answer}: it has no head for sentences")
    every = token_ids(directory, sentences, most)
    said = _each(session, [session.get_outputs()[0].name], every, threads)
    made = [first[0].astype(np.float64) for (first,) in track(said, len(every), "sentences")]
    return np.stack(made) if made else np.zeros((0, answer[1]))


@dataclass(frozen=True)
class Asked:
    """A question and its context as a model reads them: ids, which of them are of the context, and where in it each begins and ends."""

    ids: list[int]
    allowed: np.ndarray
    offsets: tuple[tuple[int, int], ...]
    context: str

    def answer(self, starts: np.ndarray, ends: np.ndarray) -> str:
        """The words of the likeliest span; logits [T] of this question's own tokens."""
        first, last = span(starts, ends, self.allowed)
        return self.context[self.offsets[first][0] : self.offsets[last][1]]

    def token_of(self, character: int) -> int | None:
        """The context's token that holds a character; None where it was cut away."""
        places = (place for place, (first, last) in enumerate(self.offsets) if self.allowed[place] and first <= character < last)
        return next(places, None)


def asked(directory: Path, questions: Sequence[tuple[str, str]], most: int = 256) -> list[Asked]:
    """Each (question, context) with what the tokenizer puts around them, `most` tokens at most: the context's end is cut.

    Raises InputError for a question that leaves no room."""
    tokenizer = load_tokenizer(directory)
    tokenizer.enable_truncation(most, strategy="only_second")
    made = []
    for text, context in questions:
        try:
            seen = tokenizer.encode(text, context)
        except Exception as error:  # what the Rust side raises
            raise InputError(f"expected a question of fewer than {most} tokens, got {text[:60]!r}: {error}") from error
        allowed = np.array([part == 1 for part in seen.sequence_ids])
        made.append(Asked(seen.ids, allowed, tuple(seen.offsets), context))
    return made


def answers(directory: Path, questions: Sequence[tuple[str, str]], most: int = 256, threads: int = 1) -> list[str]:
    """What the folder answers to each (question, context), in the context's own words, each question alone; `threads` as in `outputs`.

    Raises InputError for a folder without a head for spans."""
    session = open_session(directory, threads=1)
    names = [output.name for output in session.get_outputs()]
    if names[:2] != ["start_logits", "end_logits"]:
        raise InputError(f"expected an encoder with a head for spans in {directory}, got one that says {', '.join(names)}")
    every = asked(directory, questions, most)
    said = track(_each(session, names[:2], [one.ids for one in every], threads), len(every), "questions")
    return [
        one.answer(starts[0].astype(np.float64), ends[0].astype(np.float64))
        for one, (starts, ends) in zip(every, said, strict=True)
    ]


def _each(
    session: onnxruntime.InferenceSession, names: Sequence[str], rows: Sequence[Sequence[int]], threads: int
) -> Iterator[list[np.ndarray]]:
    """The outputs `names` of each row of ids alone, in the rows' order. Side by side they give what they give one after the other."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda ids: session.run(names, token_feeds(session, np.asarray([ids], np.int64))), rows)
