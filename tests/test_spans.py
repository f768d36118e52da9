"""Questions answered by a span: SQuAD's file, the likeliest span against trying all, the metrics by hand, a folder's answers."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import copied
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import InputError
from toolchain.evaluate.outputs import answers, asked
from toolchain.evaluate.spans import Question, read_squad, score, span

CONTEXT = "It rose in 1973 and fell in 1974."


def _file(folder: Path, answer: str = "1973", start: int = 11, **changes: Any) -> Path:
    question = {"question": "When did it rise?", "answers": [{"text": answer, "answer_start": start}, {"text": "in 1973"}]}
    articles = [{"title": title, "paragraphs": [{"context": CONTEXT, "qas": [question | changes]}]} for title in ("Oil", "Sea")]
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return path


def test_questions_are_read_of_all_articles_or_of_those_named(tmp_path: Path) -> None:
    path = _file(tmp_path)
    expected = Question("When did it rise?", CONTEXT, ("1973", "in 1973"), 11)
    assert read_squad(path) == [expected] * 2
    assert read_squad(path, ["Sea"]) == [expected]
    packed = tmp_path / "squad.json.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    assert read_squad(packed) == [expected] * 2
    with pytest.raises(InputError, match="got none of these articles"):
        read_squad(path, ["Land"])


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 12},
        {"start": -1},
        {"start": "11"},
        {"answers": []},
        {"question": 7},
        {"answers": [{"text": None, "answer_start": 11}]},
    ],
)
def test_what_is_no_question_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SQuAD's form in .*squad\.json"):
        read_squad(_file(tmp_path, **changes))


def test_what_is_no_file_of_questions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in (("a.json", b"{"), ("b.json", b"[]"), ("c.json.xz", b"no"), ("d.json", b'{"data": [{"title": "a"}]}')):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            read_squad(tmp_path / name)
    whole = _file(tmp_path)
    (tmp_path / "cut.json.xz").write_bytes(lzma.compress(whole.read_bytes())[:-20])
    with pytest.raises(InputError, match=r"cut\.json\.xz.*EOFError"):
        read_squad(tmp_path / "cut.json.xz")
    bomb = tmp_path / "e.json.xz"
    bomb.write_bytes(lzma.compress(b" " * 4096))
    monkeypatch.setattr("toolchain.evaluate.spans.MOST_BYTES", 1024)
    (tmp_path / "f.json").write_bytes(b" " * 4096)
    for path in (bomb, tmp_path / "f.json"):
        with pytest.raises(InputError, match=f"{path.name}.*more than"):
            read_squad(path)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_the_likeliest_span_is_the_best_of_all(seed: int, tokens: int, longest: int) -> None:
    rng = np.random.default_rng(seed)
    starts, ends, allowed = rng.standard_normal(tokens), rng.standard_normal(tokens), rng.random(tokens) < 0.7
    possible = {
        (first, last): starts[first] + ends[last]
        for first in range(tokens)
        for last in range(first, min(first + longest, tokens))
        if allowed[first] and allowed[last]
    }
    if possible:
        assert span(starts, ends, allowed, longest) == max(possible, key=possible.__getitem__)
    else:
        with pytest.raises(InputError, match="got none"):
            span(starts, ends, allowed, longest)


def test_logits_that_are_no_numbers_are_refused() -> None:
    nothing = np.full(3, np.nan)
    with pytest.raises(InputError, match="finite"):
        span(nothing, nothing, np.ones(3, bool))
    half = np.array([np.nan, 1.0, 0.0])
    assert span(half, half, np.ones(3, bool)) == (1, 1)


def test_metrics_are_of_the_best_right_answer() -> None:
    """By hand: case, articles and full stops do not count; one of two words in each gives an F1 of ½."""
    pytest.importorskip("transformers")
    asked_for = [Question("", "", ("in 1973", "1973"), 0), Question("", "", ("The Sea.",), 0), Question("", "", ("red sea",), 0)]
    found = score(asked_for, ["1973", "sea", "blue sea"])
    assert found == {"f1": pytest.approx((1 + 1 + 0.5) / 3), "exact_match": pytest.approx(2 / 3)}
    with pytest.raises(InputError, match="each of 3 questions, got 1"):
        score(asked_for, ["1973"])


@pytest.fixture
def reader(graphs: Callable[..., Any], tmp_path: Path) -> Path:
    """A random BERT that marks a span, and the tokenizer of words."""
    random_models = pytest.importorskip("random_models")
    folder = copied(graphs("bert", "BertForQuestionAnswering").directory, tmp_path / "model")
    random_models.save_word_tokenizer(folder)
    return folder


QUESTIONS = [("a b", "c d e f"), ("g", "a b c d e f g " * 4), ("b", "a")]


def test_a_folder_answers_with_the_models_own_span(reader: Path, models: Callable[..., Path]) -> None:
    import torch

    from toolchain.supernet.loading import load_model

    model, read = load_model(models("bert", "BertForQuestionAnswering")), asked(reader, QUESTIONS, most=16)
    assert [len(one.ids) for one in read] == [9, 16, 5]
    with torch.no_grad():
        said = [model(input_ids=torch.tensor([one.ids])) for one in read]
    expected = [
        one.answer(*(x[0].numpy() for x in (out.start_logits, out.end_logits))) for one, out in zip(read, said, strict=True)
    ]
    assert answers(reader, QUESTIONS, most=16, threads=1) == answers(reader, QUESTIONS, most=16, threads=3) == expected
    assert all(answer and answer in context for answer, (_, context) in zip(expected, QUESTIONS, strict=True))
    assert read[0].token_of(4) == 6  # [CLS] a b [SEP] c d e
    assert read[1].token_of(55) is None  # cut away


def test_a_question_that_leaves_no_room_and_a_folder_without_the_head_are_refused(
    reader: Path, graphs: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="fewer than 8 tokens"):
        asked(reader, [("a " * 20, "b")], most=8)
    folder = copied(graphs("bert").directory, tmp_path / "none")
    (folder / "tokenizer.json").write_bytes((reader / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="head for spans"):
        answers(folder, QUESTIONS)
