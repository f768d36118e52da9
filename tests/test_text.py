import lzma

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_graphs import POCKET
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from toolchain import text
from toolchain.errors import DamagedFileError, InputError


def _words(framed: bool = False) -> Tokenizer:
    """Words "0" to "99" are tokens 0 to 99; 100 and 101 are [CLS] and [SEP]."""
    tokenizer = Tokenizer(WordLevel({**{str(i): i for i in range(100)}, "[CLS]": 100, "[SEP]": 101}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if framed:
        tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 100), ("[SEP]", 101)])
    return tokenizer


def test_documents_split_at_separator_lines_only(tmp_path):
    (tmp_path / "a.txt").write_text("<|doc|>\nfirst\nline\n<|doc|>\r\n\n<|doc|>  \nan inline <|doc|> stays\n", encoding="utf-8-sig")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress("zwölf".encode()))
    found = text.documents([tmp_path / "a.txt", tmp_path / "b.txt.xz"])
    assert found == ["first\nline", "an inline <|doc|> stays", "zwölf"]


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("absent.txt", None, InputError, "No such file"),
        ("empty.txt", b" \n<|doc|>\n", InputError, "got none"),
        ("latin.txt", b"caf\xe9", InputError, "0xe9 at offset 3"),
        ("binary.txt", b"a\0b", InputError, "zero byte"),
        ("broken.xz", lzma.compress(b"text" * 99)[:-20], DamagedFileError, "xz"),
    ],
)
def test_files_that_are_no_text_are_refused_by_name(tmp_path, name, content, error, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        text.documents([tmp_path / name])
    assert name in str(caught.value)


def test_a_folder_or_no_file_at_all_is_refused(tmp_path):
    for paths in ([tmp_path], []):
        with pytest.raises(InputError):
            text.documents(paths)


def test_the_prose_of_cpython_is_prose_and_no_paragraph_comes_twice():
    found = text.pydoc_documents()
    whole = "\n\n".join(found)
    paragraphs = whole.split("\n\n")
    assert len(whole) > 100_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert not [mark for mark in ("::=", ">>> ", "+---", "\n==", "****") if mark in whole]
    assert "non- " not in whole
    assert sum(paragraph[0].isupper() for paragraph in paragraphs) > 0.6 * len(paragraphs)
    assert found == text.pydoc_documents()


@given(st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=30), min_size=1, max_size=8), st.integers(2, 9), st.booleans())
def test_windows_are_the_stream_of_documents_cut_without_overlap(documents, length, separated):
    stream = [token for ids in documents for token in ([99] if separated else []) + ids]
    joined = [" ".join(map(str, ids)) for ids in documents]
    if len(stream) < length:
        with pytest.raises(InputError, match=f"at least {length} tokens"):
            text.windows(_words(), joined, length, 99 if separated else None)
        return
    cut = text.windows(_words(), joined, length, 99 if separated else None)
    assert cut.dtype == np.int64
    assert cut.shape == (len(stream) // length, length)
    assert cut.ravel().tolist() == stream[: cut.size]


def test_framed_windows_carry_the_special_tokens_of_a_sentence():
    cut = text.windows(_words(framed=True), [" ".join(map(str, range(11)))], length=5, framed=True)
    assert cut.tolist() == [[100, 0, 1, 2, 101], [100, 3, 4, 5, 101], [100, 6, 7, 8, 101]]
    plain = text.windows(_words(framed=True), [" ".join(map(str, range(11)))], length=5)
    assert plain.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    with pytest.raises(InputError, match="at least 4 tokens"):
        text.windows(_words(framed=True), ["1 2 3"], length=3, framed=True)


@given(st.integers(2, 200), st.floats(0.001, 0.999), st.integers(0, 9))
def test_split_is_a_partition_that_depends_on_the_seed_only(n, heldout, seed):
    windows = np.arange(2 * n).reshape(n, 2)
    train, kept = text.split(windows, heldout, seed)
    assert len(train) >= 1
    assert abs(len(kept) - n * heldout) <= 1
    assert sorted([*train[:, 0], *kept[:, 0]]) == windows[:, 0].tolist()
    assert (text.split(windows, heldout, seed)[1] == kept).all()


def test_split_refuses_what_it_cannot_cut():
    with pytest.raises(InputError, match="at least 2 windows"):
        text.split(np.zeros((1, 4)), 0.5, 0)
    with pytest.raises(InputError, match="between 0 and 1"):
        text.split(np.zeros((4, 4)), 1.0, 0)


def test_the_separator_is_what_the_model_calls_end_of_text(tmp_path):
    assert text.separator_id(POCKET) == 0
    _words().save(str(tmp_path / "tokenizer.json"))
    assert text.separator_id(tmp_path) == 101  # no configuration: by its usual name
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "42"}, "sep_token": "[SEP]"}')
    assert text.separator_id(tmp_path) == 42
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert text.separator_id(tmp_path) == 101
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DamagedFileError, match="tokenizer_config"):
        text.separator_id(tmp_path)


def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json, got none"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedFileError, match=r"tokenizer\.json"):
        text.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_a_link_out_of_its_folder_is_not_read(tmp_path, name):
    folder = tmp_path / "package"
    folder.mkdir()
    for each in ("tokenizer.json", "tokenizer_config.json"):
        (folder / each).write_bytes((POCKET / each).read_bytes())
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to("../secret")
    with pytest.raises(InputError, match="inside"):
        text.separator_id(folder)


def test_the_record_tells_one_text_from_another():
    windows = np.zeros((3, 5), np.int64)
    one, other = (text.record("mine", documents, windows) for documents in (["ab", "c"], ["a", "bc"]))
    assert (one.documents, one.tokens) == (2, 15)
    assert one.sha256 != other.sha256
    assert one == text.record("mine", ["ab", "c"], windows)


def test_long_text_is_not_truncated_by_the_tokenizers_own_settings(tmp_path):
    tokenizer = _words()
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert text.windows(text.load_tokenizer(tmp_path), ["1 " * 40], length=20).shape == (2, 20)
