"""The sources' tasks of sentences and pairs (GLUE's form): local files → examples, outputs → the standard metrics.

Owns the public files' formats and which metric a task has (scikit-learn and SciPy compute them). Refuses to know models.

    sst2    train.tsv dev.tsv                         sentence TAB label                      accuracy
    cola    in_domain_train.tsv in_domain_dev.tsv     source TAB label TAB mark TAB sentence  Matthews correlation
    mrpc    msr_paraphrase_{train,test}.txt           label TAB id TAB id TAB two sentences   F1, accuracy    (with a header)
    stsb    sts-train.csv sts-dev.csv                 tabs; columns 5 to 7: score, two sentences   Pearson, Spearman

These are the data sets as their makers hand them out. GLUE's own evaluation differs: of CoLA its dev set is this one and the out-of-domain
sentences, of MRPC it is another part of the corpus (here the test file). Numbers of these files stand beside each other, not beside its
board.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from toolchain.errors import InputError, require

MOST_BYTES, MOST_LINE, MOST_EXAMPLES = 256 * 2**20, 2**20, 2**20
GLUES_HEADER = "sentence\tlabel"
"""First line of SST-2 as GLUE hands it out; others leave it away."""


@dataclass(frozen=True)
class Example:
    """A sentence, or a pair of them, with its label: a class from 0, or a number."""

    text: str
    label: float
    pair: str = ""


@dataclass(frozen=True)
class Task:
    """files: of training, of evaluation. labels: how many a head has; 1: a number. columns: where label, sentence and pair stand in a line
    of `width` columns or more; pair −1: there is none. largest: of the labels."""

    name: str
    files: tuple[str, str]
    labels: int
    columns: tuple[int, int, int]
    width: int
    metrics: tuple[str, ...]
    header: bool = False
    largest: float = 1.0

    def examples(self, folder: Path, training: bool = False) -> list[Example]:
        """The task's examples from its files in a folder. Raises InputError for a missing file or a line that is none, with its number."""
        return _read(self, folder / self.files[0 if training else 1])

    def score(self, labels: Sequence[float], outputs: np.ndarray) -> dict[str, float]:
        """Metric → value of outputs [n, labels] (logits, or numbers) for as many labels. Raises InputError for another shape."""
        if outputs.shape != (len(labels), self.labels):
            raise InputError(f"expected outputs [{len(labels)}, {self.labels}] for {self.name}, got {list(outputs.shape)}")
        if len(wrong := np.flatnonzero(~np.isfinite(outputs).all(-1))):
            raise InputError(f"expected finite outputs for {self.name}, got {outputs[wrong[0]].tolist()} for example {wrong[0]}")
        said = outputs[:, 0] if self.labels == 1 else outputs.argmax(-1)
        return {name: METRICS[name](np.asarray(labels), said) for name in self.metrics}


TASKS = {
    task.name: task
    for task in (
        Task("sst2", ("train.tsv", "dev.tsv"), 2, (1, 0, -1), 2, ("accuracy",)),
        Task("cola", ("in_domain_train.tsv", "in_domain_dev.tsv"), 2, (1, 3, -1), 4, ("matthews",)),
        Task("mrpc", ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"), 2, (0, 3, 4), 5, ("f1", "accuracy"), header=True),
        Task("stsb", ("sts-train.csv", "sts-dev.csv"), 1, (4, 5, 6), 7, ("pearson", "spearman"), largest=5.0),
    )
}


def _read(task: Task, path: Path) -> list[Example]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"expected {task.name}'s examples in {path}, got more than {MOST_BYTES >> 20} MiB")
        with path.open("rb") as file:
            found = _examples(task, path, file)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"expected {task.name}'s examples in {path}, got: {error}", f"it needs {' and '.join(task.files)}"
        ) from error
    if not found:
        raise InputError(f"expected {task.name}'s examples in {path}, got none")
    return found


def _examples(task: Task, path: Path, file: BinaryIO) -> list[Example]:
    """Line by line: a file of nothing but line breaks, or of no line break, would take ten times its size at once."""
    label, text, pair = task.columns
    found: list[Example] = []
    lines = iter(lambda: file.readline(MOST_LINE + 1), b"")  # no other line break counts: sentences hold some
    for number, raw in enumerate(lines, 1):
        if len(raw) > MOST_LINE:
            raise InputError(f"expected lines of {MOST_LINE >> 20} MiB at most in {path}, got a longer one: number {number}")
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n")
        if not line.strip() or (number == 1 and (task.header or line.rstrip("\r") == GLUES_HEADER)):
            continue
        cells = line.rstrip("\r").split("\t")
        try:
            value = float(cells[label])
            right = len(cells) >= task.width and 0 <= value <= task.largest and (task.labels == 1 or value.is_integer())
        except (ValueError, IndexError):
            right = False
        if not right:
            what = f"{task.width} columns with a label from 0 to {task.largest:g} in column {label + 1}"
            raise InputError(f"expected {what} in line {number} of {path}, got {line[:80]!r}")
        found.append(Example(cells[text].strip(), value, cells[pair].strip() if pair >= 0 else ""))
        if len(found) > MOST_EXAMPLES:
            raise InputError(f"expected {MOST_EXAMPLES} examples of {task.name} at most in {path}, got more")
    return found


def _accuracy(labels: np.ndarray, said: np.ndarray) -> float:
    return float(require("sklearn.metrics").accuracy_score(labels, said))


def _f1(labels: np.ndarray, said: np.ndarray) -> float:
    return float(require("sklearn.metrics").f1_score(labels, said, zero_division=0.0))


def _matthews(labels: np.ndarray, said: np.ndarray) -> float:
    return float(require("sklearn.metrics").matthews_corrcoef(labels, said))


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(labels: np.ndarray, said: np.ndarray) -> float:
        if np.ptp(said) == 0 or np.ptp(labels) == 0:
            return 0.0  # what never changes goes along with nothing
        return float(getattr(require("scipy.stats"), f"{name}r")(labels, said).statistic)

    return correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _correlation("pearson"),
    "spearman": _correlation("spearman"),
}
