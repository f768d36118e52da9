"""Questions answered by a span of a text (SQuAD's form): local files → questions, logits per token → answers, the standard metrics.

Owns the public file's format and how two logits a token become words. Exact match and F1 are those of transformers (`squad_metrics`, which
follows the official script). Refuses to know models.
"""

from __future__ import annotations

import lzma
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from toolchain.errors import InputError, require
from toolchain.reading import json_of, xz_of

MOST_BYTES = 64 * 2**20
LONGEST_ANSWER = 30
"""Tokens, as in the official baselines."""


@dataclass(frozen=True)
class Question:
    """answers: what counts as right, one of each annotator; start: the first one's first character in the context."""

    text: str
    context: str
    answers: tuple[str, ...]
    start: int


def read_squad(path: Path, titles: Collection[str] | None = None) -> list[Question]:
    """The questions of a SQuAD 1.1 file (JSON, or JSON in .xz), of the named articles alone if `titles` are given.

    Raises InputError for what is no such file, for a question without an answer, for a first answer that does not stand where it says, and
    where no question is left.
    """
    try:
        articles = json_of(_bytes_of(path))["data"]
        found = [
            _question(question, paragraph["context"])
            for article in articles
            if titles is None or article["title"] in titles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"expected questions in SQuAD's form in {path}, got {type(error).__name__}: {error}") from error
    if not found:
        raise InputError(f"expected questions in {path}, got none{' of these articles' if titles is not None else ''}")
    return found


def _bytes_of(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
    return xz_of(raw, MOST_BYTES) if path.suffix == ".xz" else raw


def _question(said: Mapping[str, Any], context: str) -> Question:
    answers = tuple(answer["text"] for answer in said["answers"])
    if not answers:
        raise ValueError(f"no answer to {str(said['question'])[:60]!r}")
    start = said["answers"][0]["answer_start"]
    if not all(isinstance(text, str) for text in (said["question"], context, *answers)) or type(start) is not int:
        raise ValueError(f"question {str(said)[:80]}")
    if start < 0 or context[start : start + len(answers[0])] != answers[0]:
        raise ValueError(f"{answers[0][:40]!r} is not at {start} of its context")
    return Question(said["question"], context, answers, start)


def span(starts: np.ndarray, ends: np.ndarray, allowed: np.ndarray, longest: int = LONGEST_ANSWER) -> tuple[int, int]:
    """(first, last) token of the likeliest answer: largest starts[i] + ends[j], i <= j < i + longest, both allowed. logits [T], bool [T].

    Raises InputError where no token is allowed or no sum of them is finite.
    """
    if not allowed.any():
        raise InputError(f"expected a token of the context among {len(starts)}, got none")
    scores = np.where(allowed[:, None] & allowed[None, :], starts[:, None] + ends[None, :], -np.inf)
    scores[np.tril_indices(len(starts), -1)] = -np.inf
    scores[np.triu_indices(len(starts), longest)] = -np.inf
    first, last = divmod(int(np.where(np.isnan(scores), -np.inf, scores).argmax()), len(starts))
    if not np.isfinite(scores[first, last]):
        raise InputError(f"expected finite logits of an answer's start and end in {len(starts)} tokens, got none")
    return first, last


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """{"f1", "exact_match"} from 0 to 1: of each question the best over its right answers. Raises InputError for another number of them."""
    if len(questions) != len(answers) or not questions:
        raise InputError(f"expected an answer to each of {max(len(questions), 1)} questions, got {len(answers)}")
    metrics = require("transformers.data.metrics.squad_metrics")
    of = {"f1": metrics.compute_f1, "exact_match": metrics.compute_exact}
    return {
        name: fmean(
            max(measured(right, said) for right in question.answers) for question, said in zip(questions, answers, strict=True)
        )
        for name, measured in of.items()
    }
