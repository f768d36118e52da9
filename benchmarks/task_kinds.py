"""What a task is to `finetune.py` and `tasks_at_budget.py`: rows of tokens with labels, a loss, and the score of a model or a package.

Sentences and pairs are fed as a package feeds them: both parts in one row, all token types 0; questions likewise, the question first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from toolchain.evaluate import spans
from toolchain.evaluate.outputs import answers, asked, outputs, token_ids
from toolchain.evaluate.tasks import TASKS

FULL, SQUAD = "fp32", "squad"
NAMES = (*TASKS, SQUAD)
LONGEST, LONGEST_QUESTION = 128, 256
TOGETHER = 128  # rows of one pass of scoring
One = TypeVar("One")


class Kind(Protocol):
    """rows: token ids of each training example; labels: a tensor with a row for each. auto, head: which class of transformers, made how."""

    auto: str
    head: Mapping[str, Any]
    rows: list[list[int]]
    labels: torch.Tensor

    def loss(self, result: Any, labels: torch.Tensor) -> torch.Tensor: ...

    def of_package(self, folder: Path, threads: int) -> dict[str, float]: ...

    def of_model(self, model: nn.Module, device: str) -> dict[str, float]: ...


def kind_of(name: str, data: Path, folder: Path, most: int = 0) -> Kind:
    """A task of NAMES, its files in data/name, as the tokenizer of `folder` reads them. most: of its examples of evaluation; 0: all."""
    return Spans(data / name, folder, most) if name == SQUAD else Sentences(name, data / name, folder, most)


def headline(scores: Mapping[str, float]) -> float:
    """One number of a task: the mean of its metrics."""
    return fmean(scores.values())


class Sentences:
    """A task of GLUE's form."""

    auto = "AutoModelForSequenceClassification"

    def __init__(self, name: str, data: Path, folder: Path, most: int) -> None:
        self.task, self.folder = TASKS[name], folder
        kind = "regression" if self.task.labels == 1 else "single_label_classification"
        self.head = {"num_labels": self.task.labels, "problem_type": kind}
        train, dev = (self.task.examples(data, training) for training in (True, False))
        self.dev = spread_over(dev, most)
        self.rows = token_ids(folder, [(one.text, one.pair) for one in train], LONGEST)
        self.labels = torch.tensor([one.label for one in train])

    def loss(self, result: Any, labels: torch.Tensor) -> torch.Tensor:
        logits = result.logits.float()
        if self.task.labels == 1:
            return nn.functional.mse_loss(logits[:, 0], labels.float())
        return nn.functional.cross_entropy(logits, labels.long())

    def of_package(self, folder: Path, threads: int) -> dict[str, float]:
        return self._score(outputs(folder, [(one.text, one.pair) for one in self.dev], LONGEST, threads))

    def of_model(self, model: nn.Module, device: str) -> dict[str, float]:
        rows = token_ids(self.folder, [(one.text, one.pair) for one in self.dev], LONGEST)
        return self._score(np.stack([row for (row,) in said(model, rows, device, ("logits",))]))

    def _score(self, made: np.ndarray) -> dict[str, float]:
        return self.task.score([one.label for one in self.dev], made)


class Spans:
    """SQuAD's form: data/*.json.xz and article_split.json, which names the articles to fit on and those to evaluate on."""

    auto, head = "AutoModelForQuestionAnswering", {}

    def __init__(self, data: Path, folder: Path, most: int) -> None:
        self.folder = folder
        split = json.loads((data / "article_split.json").read_text())
        (file,) = data.glob("*.json.xz")
        train, dev = (spans.read_squad(file, split[part]) for part in ("fit", "eval"))
        self.dev = spread_over(dev, most)
        read = asked(folder, [(one.text, one.context) for one in train], LONGEST_QUESTION)
        ends = [
            (seen.token_of(one.start), seen.token_of(one.start + max(len(one.answers[0]) - 1, 0)))
            for seen, one in zip(read, train, strict=True)
        ]
        kept = [place for place, (first, last) in enumerate(ends) if first is not None and last is not None]  # others were cut away
        self.rows = [read[place].ids for place in kept]
        self.labels = torch.tensor([ends[place] for place in kept])

    def loss(self, result: Any, labels: torch.Tensor) -> torch.Tensor:
        heads = (result.start_logits, result.end_logits)
        return torch.stack(
            [nn.functional.cross_entropy(logits.float(), labels[:, place].long()) for place, logits in enumerate(heads)]
        ).mean()

    def of_package(self, folder: Path, threads: int) -> dict[str, float]:
        return spans.score(self.dev, answers(folder, self._asked(), LONGEST_QUESTION, threads))

    def of_model(self, model: nn.Module, device: str) -> dict[str, float]:
        read = asked(self.folder, self._asked(), LONGEST_QUESTION)
        logits = said(model, [one.ids for one in read], device, ("start_logits", "end_logits"))
        made = [one.answer(*(part[: len(one.ids)] for part in parts)) for one, parts in zip(read, logits, strict=True)]
        return spans.score(self.dev, made)

    def _asked(self) -> list[tuple[str, str]]:
        return [(one.text, one.context) for one in self.dev]


def spread_over(examples: Sequence[One], most: int) -> list[One]:
    """`most` of them from all over the list; all of them for 0."""
    if not 0 < most < len(examples):
        return list(examples)
    return [examples[place * len(examples) // most] for place in range(most)]


def padded(rows: list[list[int]], device: str) -> dict[str, torch.Tensor]:
    """ids and mask [B, T] of rows of token ids."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def said(model: nn.Module, rows: list[list[int]], device: str, outputs: Sequence[str]) -> list[tuple[np.ndarray, ...]]:
    """For each row what the model's named outputs are of it, in float64."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    made: dict[int, tuple[np.ndarray, ...]] = {}
    for start in range(0, len(order), TOGETHER):
        places = order[start : start + TOGETHER]
        result = model(**padded([rows[place] for place in places], device))
        parts = [getattr(result, name).double().cpu().numpy() for name in outputs]
        made |= {place: tuple(part[at] for part in parts) for at, place in enumerate(places)}
    return [made[place] for place in range(len(rows))]
