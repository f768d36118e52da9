"""What a model is fed and what it says, by its kind; and how far two answers are apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("random_models")

import torch
from conftest import copied
from random_models import VOCABULARY, random_model

from toolchain.errors import InputError, UnknownArchitectureError
from toolchain.graph.model import Graph
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.passes import Headed, Pass
from toolchain.train.losses import Target, divergence_of

pytestmark = pytest.mark.usefixtures("one_thread")
Graphs = Callable[..., Graph]
Models = Callable[..., Path]
LABELS = {"num_labels": 3}
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
CLASSIFIER: tuple[str, str, dict[str, Any]] = ("bert", "BertForSequenceClassification", LABELS)


def windows(count: int, length: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (count, length))


# ---- what a pass is fed and what it says


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("name", "family"), [("bert", "Bert"), ("roberta", "Roberta"), ("distilbert", "DistilBert")])
def test_an_encoder_with_a_head_says_hidden_states_and_logits(name: str, family: str, head: str, models: Models) -> None:
    folder, ids = models(name, family + head), torch.from_numpy(windows(2))
    model = load_model(folder)
    assert type(model).__name__ == family + head
    passes = Pass.of(model)
    assert passes.kind == "encoder"
    with torch.no_grad():
        said, plain = passes.output(model(**passes.arguments(ids))), model(input_ids=ids)
        hidden = model.base_model(input_ids=ids).last_hidden_state
    assert isinstance(said, Headed)
    torch.testing.assert_close(said.hidden, hidden)
    if head == "ForQuestionAnswering":
        assert said.task == "span"
        torch.testing.assert_close(said.logits[..., 0], plain.start_logits)
        torch.testing.assert_close(said.logits[..., 1], plain.end_logits)
    else:
        assert said.task == "classification"
        torch.testing.assert_close(said.logits, plain.logits)


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 3, "problem_type": "regression"}, "regression"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi-label"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "classification"),
    ],
)
def test_the_config_says_what_a_classifiers_logits_are(changes: dict[str, Any], task: str) -> None:
    model = random_model("bert", "BertForSequenceClassification", **changes)
    passes = Pass.of(model)
    with torch.no_grad():
        assert passes.output(model(**passes.arguments(torch.from_numpy(windows(2))))).task == task


@pytest.mark.parametrize("length", [12, 13])
def test_a_pair_is_a_text_and_its_continuation(length: int) -> None:
    """What transformers itself makes of the second half as labels; the last token is only a label, so nothing depends on it."""
    model, ids = random_model("t5"), torch.from_numpy(windows(2, length))
    supernet = Supernet(model, (), ("fp32", "w2g32"))
    assert supernet.kind == "encoder-decoder"
    said = supernet.teacher(ids)
    with torch.no_grad():
        expected = model(input_ids=ids[:, : length // 2], labels=ids[:, length // 2 :].contiguous()).logits
    assert said.shape == (2, length - length // 2, VOCABULARY)
    torch.testing.assert_close(said, expected)
    other = ids.clone()
    other[:, -1] += 1
    assert torch.equal(supernet.teacher(other), said)


def test_an_encoder_decoder_is_refused_what_it_cannot_use() -> None:
    passes, ids = Pass.of(random_model("t5")), torch.from_numpy(windows(2))
    with pytest.raises(InputError, match="a mask"):
        passes.arguments(ids, torch.ones_like(ids))
    with pytest.raises(InputError, match="windows of 1"):
        passes.arguments(ids[:, :1])
    with pytest.raises(InputError, match="decoder_start_token_id"):
        Pass.of(random_model("t5", decoder_start_token_id=None))


def test_a_model_is_of_a_class_of_transformers_that_fits_its_config(models: Models, tmp_path: Path) -> None:
    for architecture, error in (("BertForNothing", UnknownArchitectureError), ("BertTokenizer", UnknownArchitectureError),
                                ("RobertaModel", InputError), ("GPT2LMHeadModel", UnknownArchitectureError)):  # fmt: skip
        folder = copied(models("bert"), tmp_path / architecture)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        with pytest.raises(error, match=architecture):
            load_model(folder)


# ---- distances


def headed(logits: torch.Tensor, task: str, hidden: torch.Tensor | None = None) -> Headed:
    return Headed(torch.ones(len(logits), 4, 8) if hidden is None else hidden, logits, task)


def far(task: str, teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Between two heads on the same hidden states."""
    return float(divergence_of("encoder", headed(teacher, task), headed(student, task), mask))


def test_each_task_has_its_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 5, generator=generator) for _ in range(2))
    kl = float((teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean())
    assert far("classification", teacher, student) == pytest.approx(kl, rel=1e-5)
    assert far("classification", teacher, teacher + 3) == pytest.approx(0, abs=1e-6)  # the same probabilities
    p, q = teacher.sigmoid(), student.sigmoid()
    flags = float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean())
    assert far("multi-label", teacher, student) == pytest.approx(flags, rel=1e-5)
    assert far("multi-label", teacher, teacher + 3) > 1  # here every label has moved
    # A small number is off by its square, a large one in proportion, and neither by more than the number's own size.
    assert far("regression", torch.tensor([[0.0]]), torch.tensor([[0.1]])) == pytest.approx(0.01, rel=1e-4)
    assert far("regression", torch.tensor([[300.0]]), torch.tensor([[330.0]])) == pytest.approx(0.01, rel=1e-4)


def test_a_span_is_chosen_among_the_tokens_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(1, 4, 2, generator=generator) for _ in range(2))
    p, q = teacher.softmax(1), student.softmax(1)
    assert far("span", teacher, student) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    mask = torch.tensor([[1, 1, 1, 0]])
    p, q = teacher[:, :3].softmax(1), student[:, :3].softmax(1)
    assert far("span", teacher, student, mask) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_a_windows_answer_counts_for_each_of_its_tokens() -> None:
    """So micro-batches add up: one window of 4 tokens and one of 1 weigh 4 to 1, in hidden states and in logits."""
    hidden, logits = torch.ones(2, 4, 8), torch.zeros(2, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    moved_logits, moved_hidden = logits.clone(), hidden.clone()
    moved_logits[1, 0], moved_hidden[1] = 2.0, 3.0
    teacher = headed(logits, "classification", hidden)
    alone = float(divergence_of("encoder", headed(logits[1:], "classification"), headed(moved_logits[1:], "classification")))
    both = float(divergence_of("encoder", teacher, headed(moved_logits, "classification", hidden), mask))
    assert both == pytest.approx(alone / 5, rel=1e-5)
    assert float(Target("encoder", teacher, mask).squared(headed(moved_logits, "classification", hidden))) == pytest.approx(
        4 / 3 / 5
    )
    further = float(divergence_of("encoder", teacher, headed(moved_logits, "classification", moved_hidden), mask))
    assert further == pytest.approx(both + 4 / 5, rel=1e-5)
