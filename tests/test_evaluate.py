import itertools
import math

import numpy as np
import pytest
from tiny_graphs import attention, bigram, classifier, encoder

from toolchain.errors import DamagedFileError, InputError
from toolchain.evaluate import fidelity, perplexity


def _log_softmax(table):
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def test_perplexity_is_that_of_the_tokens_after_the_first_of_every_window(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((7, 7)).astype(np.float32)
    windows = rng.integers(0, 7, (5, 150))  # longer than one block of rows
    scores = _log_softmax(table.astype(np.float64))
    expected = math.exp(-np.mean([scores[a, b] for row in windows for a, b in itertools.pairwise(row)]))
    value, tokens = perplexity(bigram(tmp_path, table), windows, threads=1)
    assert tokens == 5 * 149
    assert value == pytest.approx(expected, rel=1e-6)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tmp_path):
    value, _ = perplexity(bigram(tmp_path, np.full((50, 50), 3.0, np.float32)), np.arange(20).reshape(2, 10))
    assert value == pytest.approx(50, rel=1e-9)


def test_large_logits_do_not_overflow_and_impossible_tokens_give_infinity(tmp_path):
    table = np.full((4, 4), -np.inf, np.float32)
    table[:, 1] = 1e4
    assert perplexity(bigram(tmp_path, table), np.ones((1, 8), np.int64))[0] == pytest.approx(1)
    assert perplexity(tmp_path, np.array([[1, 2, 1]]))[0] == math.inf


def test_windows_do_not_see_each_other(tmp_path):
    directory = attention(tmp_path, vocabulary=64)
    windows = np.random.default_rng(1).integers(0, 64, (4, 12))
    alone = [math.log(perplexity(directory, row[None])[0]) for row in windows]
    assert math.log(perplexity(directory, windows)[0]) == pytest.approx(np.mean(alone), rel=1e-9)


@pytest.mark.parametrize(
    "windows", [np.zeros((0, 8), np.int64), np.zeros((2, 1), np.int64), np.zeros(8, np.int64), np.array([[0, 9]])]
)
def test_windows_that_cannot_be_scored_are_refused(tmp_path, windows):
    with pytest.raises(InputError, match="expected token"):
        perplexity(bigram(tmp_path, np.zeros((9, 9), np.float32)), windows)


def test_folders_that_are_no_decoders_are_refused(tmp_path):
    windows = np.zeros((1, 4), np.int64)
    with pytest.raises(InputError, match=r"model\.onnx"):
        perplexity(tmp_path / "absent", windows)
    with pytest.raises(InputError, match="use fidelity"):
        perplexity(encoder(tmp_path / "encoder", np.zeros((4, 4), np.float32)), windows)
    (tmp_path / "model.onnx").write_bytes(b"not a protobuf")
    with pytest.raises(DamagedFileError, match="expected an ONNX graph in"):
        perplexity(tmp_path, windows)
    with pytest.raises(InputError, match="'surprise'"):
        fidelity(*[encoder(tmp_path / "strange", np.zeros((4, 4), np.float32), extra_input="surprise")] * 2, windows)


def test_fidelity_of_a_graph_with_itself_is_perfect(tmp_path):
    table = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    table[3] = 0  # a zero vector in both agrees
    found = fidelity(encoder(tmp_path, table), tmp_path, np.arange(9).reshape(3, 3))
    assert found.cosine == pytest.approx(1)
    assert (found.relative_mse, found.tokens) == (0, 9)


def test_fidelity_is_mean_cosine_and_error_relative_to_the_reference(tmp_path):
    rng = np.random.default_rng(0)
    reference, ours = rng.standard_normal((2, 9, 6)).astype(np.float32)
    ids = np.array([[0, 4, 4], [8, 1, 2]])
    found = fidelity(encoder(tmp_path / "ours", ours), encoder(tmp_path / "reference", reference), ids)
    a, b = ours[ids.ravel()].astype(float), reference[ids.ravel()].astype(float)
    assert found.cosine == pytest.approx(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)), rel=1e-6)
    assert found.relative_mse == pytest.approx(((a - b) ** 2).sum() / (b**2).sum(), rel=1e-6)


def test_fidelity_of_one_answer_per_sequence_counts_answers_not_tokens(tmp_path):
    table = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    found = fidelity(classifier(tmp_path, table), tmp_path, np.arange(8).reshape(2, 4))
    assert found.cosine == pytest.approx(1)


def test_fidelity_refuses_decoders_and_outputs_of_other_shapes(tmp_path):
    small, large = (encoder(tmp_path / str(width), np.ones((9, width), np.float32)) for width in (4, 6))
    with pytest.raises(InputError, match="same shape"):
        fidelity(small, large, np.zeros((1, 2), np.int64))
    with pytest.raises(InputError, match="use perplexity"):
        fidelity(attention(tmp_path / "decoder"), small, np.zeros((1, 2), np.int64))
