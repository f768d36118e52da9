"""Tasks of sentences and pairs: the public files' formats, the metrics against their definitions, what a package says of sentences."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import copied
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import InputError
from toolchain.evaluate.outputs import outputs, token_ids
from toolchain.evaluate.tasks import TASKS, Example

FILES = {
    "sst2": (
        "dev.tsv",
        'a film of "parts"\t1\nnot \r this \x85 one\t0\n',
        [Example('a film of "parts"', 1), Example("not \r this \x85 one", 0)],
    ),
    "cola": ("in_domain_dev.tsv", "gj04\t0\t*\tThey rode breeze the.\r\n", [Example("They rode breeze the.", 0)]),
    "mrpc": (
        "msr_paraphrase_test.txt",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tIt rose.\tIt went up.\n",
        [Example("It rose.", 1, "It went up.")],
    ),
    "stsb": ("sts-dev.csv", 'a\tb\tc\t0\t2.750\tA "man".\tA cat.\tmore\n', [Example('A "man".', 2.75, "A cat.")]),
}


@pytest.mark.parametrize("name", FILES)
def test_the_public_formats_are_read(name: str, tmp_path: Path) -> None:
    file, text, expected = FILES[name]
    (tmp_path / file).write_text(text, newline="")
    assert TASKS[name].examples(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sst2", "no label"),
        ("sst2", "a label of nobody\t2"),
        ("sst2", "half\t0.5"),
        ("sst2", "none\tnan"),
        ("cola", "gj04\t1\tthree columns"),
        ("stsb", "a\tb\tc\t0\t5.1\tone\tother"),
        ("mrpc", "1\t7\t8\tone sentence"),
    ],
)
def test_a_line_that_is_no_example_is_named(name: str, line: str, tmp_path: Path) -> None:
    file, text, _ = FILES[name]
    (tmp_path / file).write_text(f"{text}{line}\n", newline="")
    with pytest.raises(InputError, match=rf"line {text.count(chr(10)) + 1} of .*{file}"):
        TASKS[name].examples(tmp_path)


def test_a_folder_without_the_files_is_told_which(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.tsv") as caught:
        TASKS["sst2"].examples(tmp_path, training=True)
    assert "dev.tsv" in str(caught.value.remedy)
    (tmp_path / "dev.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"dev\.tsv"):
        TASKS["sst2"].examples(tmp_path)


@pytest.mark.filterwarnings("ignore:A single label")  # it is meant: a metric of what says one thing only
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_metrics_of_classes_are_their_definitions(pairs: list[tuple[bool, bool]]) -> None:
    labels = np.array([label for label, _ in pairs], float)
    logits = np.array([[0.0, 1.0] if said else [1.0, 0.0] for _, said in pairs])
    both = sum(label and said for label, said in pairs)
    neither = sum(not label and not said for label, said in pairs)
    only_said, only_label = sum(said and not label for label, said in pairs), sum(label and not said for label, said in pairs)
    assert TASKS["sst2"].score(labels, logits) == {"accuracy": pytest.approx((both + neither) / len(pairs))}
    f1 = 2 * both / (2 * both + only_said + only_label) if both else 0.0
    assert TASKS["mrpc"].score(labels, logits)["f1"] == pytest.approx(f1)
    sides = (both + only_said) * (both + only_label) * (neither + only_said) * (neither + only_label)
    matthews = (both * neither - only_said * only_label) / sides**0.5 if sides else 0.0
    assert TASKS["cola"].score(labels, logits)["matthews"] == pytest.approx(matthews)


def test_a_file_is_read_line_by_line_and_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nothing but line breaks, all at once was ten times its size."""
    (tmp_path / "dev.tsv").write_bytes(b"\n" * 2**22 + b"a film\t1\n")
    tracemalloc.start()
    assert TASKS["sst2"].examples(tmp_path) == [Example("a film", 1)]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    (tmp_path / "dev.tsv").write_bytes(bytes(2**25))
    tracemalloc.reset_peak()
    with pytest.raises(InputError, match=r"lines of 1 MiB at most .* number 1"):
        TASKS["sst2"].examples(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    monkeypatch.setattr("toolchain.evaluate.tasks.MOST_EXAMPLES", 2)
    (tmp_path / "dev.tsv").write_text("a film\t1\n" * 3)
    with pytest.raises(InputError, match="2 examples"):
        TASKS["sst2"].examples(tmp_path)


def test_metrics_of_numbers() -> None:
    task = TASKS["stsb"]
    labels = [0.0, 1.0, 2.0, 4.0]
    assert task.score(labels, np.array([[1.0], [3.0], [5.0], [9.0]])) == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}
    bent = task.score(labels, np.array([[0.0], [1.0], [2.0], [100.0]]))
    assert bent["spearman"] == pytest.approx(1)
    assert bent["pearson"] < 0.99
    assert task.score(labels, np.ones((4, 1))) == {"pearson": 0.0, "spearman": 0.0}
    with pytest.raises(InputError, match="example 2"):
        task.score(labels, np.array([[0.0], [1.0], [np.nan], [2.0]]))
    with pytest.raises(InputError, match=r"\[4, 1\] for stsb, got \[4, 2\]"):
        task.score(labels, np.ones((4, 2)))


@pytest.fixture
def classifier(graphs: Callable[..., Any], tmp_path: Path) -> Path:
    """A random BERT with a head of three labels, and a tokenizer of words that frames sentences and pairs."""
    random_models = pytest.importorskip("random_models")
    folder = copied(graphs("bert", "BertForSequenceClassification", num_labels=3).directory, tmp_path / "model")
    random_models.save_word_tokenizer(folder)
    return folder


SENTENCES = [("a b c", ""), ("d e", "f"), ("g " * 40, "a b")]


def test_a_pair_is_framed_and_its_longer_part_is_cut(classifier: Path) -> None:
    assert token_ids(classifier, SENTENCES, most=12) == [[1, 3, 4, 5, 2], [1, 6, 7, 2, 8, 2], [1, *[9] * 7, 2, 3, 4, 2]]


def test_each_sentence_gets_the_models_own_answer(classifier: Path, models: Callable[..., Path]) -> None:
    """Kernels of fp32 on both sides: what is left is the order of sums."""
    import torch

    from toolchain.supernet.loading import load_model

    model = load_model(models("bert", "BertForSequenceClassification", num_labels=3))
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in token_ids(classifier, SENTENCES, most=12)]
    made = outputs(classifier, SENTENCES, most=12, threads=1)
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)
    # Side by side they say what they say one after the other, in their order.
    np.testing.assert_array_equal(outputs(classifier, SENTENCES * 20, most=12, threads=3), np.tile(made, (20, 1)))


def test_what_has_no_head_for_sentences_is_refused(graphs: Callable[..., Any], classifier: Path, tmp_path: Path) -> None:
    for name, head in (("llama", ""), ("bert", ""), ("bert", "BertForQuestionAnswering")):
        folder = copied(graphs(name, head).directory, tmp_path / f"{name}{head}")
        (folder / "tokenizer.json").write_bytes((classifier / "tokenizer.json").read_bytes())
        with pytest.raises(InputError, match="head"):
            outputs(folder, SENTENCES[:1])
