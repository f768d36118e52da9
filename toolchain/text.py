"""Text in, token windows out: files, the prose every CPython carries, and how documents are cut.

Knows tokenizers and numpy, refuses to know models and training. Every result that used text carries a `TextRecord` of it.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain.errors import DamagedFileError, InputError, require
from toolchain.files import inside
from toolchain.quiet import STDERR, to_nowhere
from toolchain.reading import read_json, xz_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEPARATOR = "<|doc|>"
"""A line that is only this starts a new document."""

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""Names under which tokenizers carry their end-of-text token, tried in this order when tokenizer_config.json names none."""


@dataclass(frozen=True)
class TextRecord:
    """Which text a result rests on. `description` is for people; `sha256` is of the documents, so that two results can be compared."""

    description: str
    documents: int
    tokens: int
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def record(description: str, documents: Sequence[str], windows: np.ndarray) -> TextRecord:
    """The record of `documents` as cut into `windows` [n, length]: tokens counted are those inside the windows."""
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    return TextRecord(description, len(documents), int(windows.size), digest)


def documents(paths: Sequence[Path]) -> list[str]:
    """The documents of some UTF-8 text files (`.xz` is unpacked), split at lines that are only `<|doc|>`; blank ones are dropped.

    Raises InputError for a missing, unreadable, empty or binary file, DamagedFileError for a broken `.xz`.
    """
    found: list[str] = []
    for path in map(Path, paths):
        try:
            with path.open("rb") as stream:
                raw = stream.read(_MOST_BYTES + 1)
        except OSError as error:
            raise InputError(f"expected a text file, got {path} ({error.strerror or error})") from error
        if len(raw) > _MOST_BYTES:
            raise InputError(
                f"expected at most {_MOST_BYTES >> 20} MiB in a text file, got more in {path}", "split it, and name the parts"
            )
        if path.suffix == ".xz":
            try:
                raw = xz_of(raw, max(_MOST_UNPACKED, _MOST_RATIO * len(raw)))
            except (lzma.LZMAError, EOFError, ValueError) as error:
                raise DamagedFileError(f"expected xz data in {path}, got {error}", f"make it again: xz {path.stem}") from error
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"expected UTF-8 text in {path}, got the byte 0x{raw[error.start]:02x} at offset {error.start}"
            ) from error
        if "\0" in text:
            raise InputError(f"expected text in {path}, got binary data (a zero byte)")
        pieces = re.split(rf"^{re.escape(SEPARATOR)}[ \t]*\r?$", text, flags=re.MULTILINE)
        kept = [piece.strip() for piece in pieces if piece.strip()]
        if not kept:
            raise InputError(f"expected text in {path}, got none")
        found += kept
    if not found:
        raise InputError("expected at least one text file, got none", "type for example: --text book.txt")
    return found


_MOST_BYTES = 256 << 20
"""Of one file: some sixty million tokens, more than a run here reads in days."""
_MOST_UNPACKED, _MOST_RATIO = 64 << 20, 100
"""Bytes that any `.xz` may become, and how many times as long a larger one: prose becomes four times as long, zeros seven thousand."""


def pydoc_documents() -> list[str]:
    """English prose that every CPython carries (`pydoc_data.topics`), one document per topic, in alphabetical order.

    Tables, code, grammar and underlines are left out and lines are joined to paragraphs: what remains reads as prose. The text
    differs between Python versions; its sha256 in the TextRecord says which one it was. Raises InputError where a
    distribution has stripped the module.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(f"this Python carries no pydoc_data.topics ({error})", "give text of your own: --text FILE") from error
    seen: set[str] = set()  # topics quote each other: a paragraph counts once, or held-out windows would not be held out
    found = []
    for name in sorted(topics):
        paragraphs = [paragraph for paragraph in dict.fromkeys(_prose(topics[name])) if paragraph not in seen]
        seen.update(paragraphs)
        if paragraphs:
            found.append("\n\n".join(paragraphs))
    return found


def pydoc_description() -> str:
    """What outputs say when `pydoc_documents` was the text."""
    return f"prose of CPython {sys.version_info.major}.{sys.version_info.minor} (pydoc_data.topics)"


def _prose(topic: str) -> list[str]:
    """Paragraphs of one reStructuredText-like topic: unindented or list-indented blocks of words."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", topic):
        lines = [line for line in block.splitlines() if not re.fullmatch(r"\s*([*=~\-^\"'+|#.])\1{2,}\s*", line)]
        joined = re.sub(r"\s+", " ", re.sub(r"(?<=[a-z])-\s*\n\s*(?=[a-z])", "-", "\n".join(lines))).strip().removeprefix("* ")
        joined = re.sub(r"(?<!\w)\*\*?([^*\s][^*]*)\*\*?(?!\w)", r"\1", joined)
        words = sum(bool(re.fullmatch(r"[\"'(]*[A-Za-z][a-z]*[\"'),.;:]*", word)) for word in joined.split())
        code_like = "::=" in joined or joined.startswith((">>>", "+-", "|", "...", "def ", "class ", "import ", "from "))
        if not code_like and words >= 8 and words >= 0.6 * len(joined.split()):
            paragraphs.append(joined)
    return paragraphs


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a graph or package folder. Raises InputError if it has no readable `tokenizer.json`, or a link out of the folder."""
    path = inside(Path(directory), "tokenizer.json")
    if not path.is_file():
        raise InputError(f"expected a tokenizer at {path}, got none", "use a model folder that has tokenizer.json")
    tokenizers = require("tokenizers", "text")
    try:
        with to_nowhere(STDERR):  # a panic of Rust's writes where it was, and the way there
            loaded = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # what the Rust side raises; its panics are no Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DamagedFileError(f"expected a tokenizer in {path}, got: {error}") from error
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def separator_id(directory: Path) -> int | None:
    """Token id that separates documents: what tokenizer_config.json calls eos (else sep), else a usual name; None if there is none."""
    tokenizer = load_tokenizer(directory)
    names: list[str] = []
    config = inside(Path(directory), "tokenizer_config.json")
    if config.is_file():
        try:
            settings = read_json(config)
            if not isinstance(settings, dict):
                raise ValueError(f"a {type(settings).__name__}")
        except (OSError, ValueError) as error:
            raise DamagedFileError(f"expected JSON in {config}, got: {error}") from error
        for key in ("eos_token", "sep_token"):
            named = settings.get(key)
            names.append(named.get("content", "") if isinstance(named, dict) else named or "")
    ids = (tokenizer.token_to_id(name) for name in (*names, *END_OF_TEXT) if name and isinstance(name, str))
    return next((found for found in ids if found is not None), None)


def windows(
    tokenizer: Tokenizer, documents: Sequence[str], length: int = 256, separator_id: int | None = None, framed: bool = False
) -> np.ndarray:
    """Token ids int64 [n, length]: documents joined with the separator before each, cut in non-overlapping windows, the rest dropped.

    framed    give every window what the tokenizer puts around a sentence ([CLS] … [SEP]): what encoders were trained on.
              Otherwise no special tokens but the separator: what decoders are scored on.
    Raises InputError when the text is shorter than one window.
    """
    before, after = _frame(tokenizer) if framed else ([], [])
    room = length - len(before) - len(after)
    if room < 2:
        raise InputError(f"expected windows of at least {2 + length - room} tokens, got {length}")
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        if separator_id is not None:
            stream.append(separator_id)
        stream += encoding.ids
    n = len(stream) // room
    if n == 0:
        raise InputError(f"expected at least {room} tokens of text, got {len(stream)}", "give more text: --text FILE")
    cut = np.asarray(stream[: n * room], np.int64).reshape(n, room)
    return np.concatenate(
        [np.tile(np.asarray(before, np.int64), (n, 1)), cut, np.tile(np.asarray(after, np.int64), (n, 1))], axis=1
    )


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds before and after a text."""
    plain, framed = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    return framed[:start], framed[start + len(plain) :]


def split(windows: np.ndarray, heldout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) rows of `windows`, at least one each, chosen by `seed` and kept in their order.

    The held-out part is windows, not documents: a document may reach into both. Raises InputError for fewer than two windows or
    a fraction outside (0, 1).
    """
    if not 0 < heldout < 1:
        raise InputError(f"expected a held-out fraction between 0 and 1, got {heldout}")
    n = len(windows)
    if n < 2:
        raise InputError(f"expected at least 2 windows to split, got {n}", "give more text: --text FILE")
    count = min(max(round(n * heldout), 1), n - 1)
    mask = np.zeros(n, bool)
    mask[np.random.default_rng(seed).permutation(n)[:count]] = True
    return windows[~mask], windows[mask]
