"""Text, JSON, YAML and xz that strangers wrote, within bounds: how long, how deep, how much an alias stands for, which numbers there are.

Everything that is wrong is a ValueError of one line, or the OSError of opening; which file it was, and what to do, its reader says.
By hand, because neither json nor PyYAML bounds anything: 100,000 brackets end in a RecursionError, nine aliases of nine aliases nine times
over are gigabytes once somebody prints them, 1e400 is infinity, and of two equal keys the last one silently counts.
Refuses to know what the data mean.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import yaml

MOST_BYTES = 64 << 20
"""Of a text. The longest that we write, a cost table, has 300 bytes a row: room for 200,000 rows, some 400 models of one device."""
MOST_YAML_BYTES = 1 << 20
"""A supernet's description has about 600 bytes a unit: room for 1,700 units, where a model of 405 billion parameters has 884."""
DEEPEST = 64
"""Lists and mappings inside each other; ours have five."""
MOST_NODES = 50_000
"""Of a YAML document, every alias counted as what it stands for; PyYAML needs two seconds for so many. A unit of a supernet has 27."""
_TOO_MANY = f"expected at most {MOST_NODES} values, aliases counted as what they stand for, got more"
_XZ_MEMORY_BYTES = 96 << 20
"""`xz -9` needs 65 MiB to unpack."""
_MOST_STREAMS = 100
"""In one file: what is behind a stream is copied for each."""
_LARGEST = 1 << 1000
"""Of whole numbers: what is larger is no float."""


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """UTF-8 text of at most so many bytes. Raises OSError, ValueError."""
    with open(path, "rb") as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"more than {most_bytes >> 20} MiB")
    return data.decode("utf-8")


def xz_of(packed: bytes, most: int) -> bytes:
    """What `.xz` data hold. Raises LZMAError, also for a header that asks for more memory than any of xz's presets; EOFError; ValueError
    for more than `most` bytes."""
    import lzma

    made = bytearray()
    place, streams = 0, 0
    while place < len(packed):  # several streams may follow each other
        streams += 1
        if streams > _MOST_STREAMS:
            raise ValueError(f"more than {_MOST_STREAMS} streams")
        unpacking = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
        made += unpacking.decompress(memoryview(packed)[place:], most + 1 - len(made))
        if len(made) > most:
            raise ValueError(f"{len(packed)} bytes that become more than {most >> 20} MiB")
        if not unpacking.eof:
            raise EOFError("the end is missing")
        left = unpacking.unused_data
        place = len(packed) - len(left.lstrip(b"\0"))  # padding
    return bytes(made)


def read_json(path: Path) -> Any:
    """`json_of` a file. Raises OSError, ValueError."""
    return json_of(read_text(path))


def json_of(text: str | bytes) -> Any:
    """The value, all of its numbers finite, no key twice. Raises ValueError."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, parse_float=_float, parse_int=_int, parse_constant=_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    if "\\u" in text or text.count("[") + text.count("{") > DEEPEST:  # else there is nothing that the parser let through
        _sane(value)
    return value


def read_yaml(path: Path) -> Any:
    """The value of a YAML file: mappings, lists, text, finite numbers, true, false and null alone. Raises OSError, ValueError."""
    return plain_yaml_of(read_text(path, MOST_YAML_BYTES))


def plain_yaml_of(text: str) -> Any:
    """`read_yaml` of a text. Raises ValueError."""
    value = yaml_of(text)[0]
    _sane(value)
    return value


def yaml_of(text: str) -> tuple[Any, yaml.Node | None]:
    """(value, the nodes it was made of, which know their lines). Raises ValueError, with the line where that is known."""
    import yaml

    loader = None
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _measure(node, {}, 0)
        try:
            return loader.construct_document(node), node
        except ValueError as error:  # 5000 digits, 30 February
            raise ValueError(f"expected YAML, got a value that is none: {str(error)[:80]}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}expected YAML, got: {getattr(error, 'problem', None) or error}") from error
    except RecursionError:
        raise ValueError(_too_deep()) from None
    except (AttributeError, LookupError, TypeError, ArithmeticError) as error:  # a tag that its text does not fit, as in !!bool x
        raise ValueError(f"expected YAML, got a value that is not of its tag ({type(error).__name__})") from error
    finally:
        if loader:
            loader.dispose()


@cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Bounded(yaml.SafeLoader):
        """Stops at the node that is one too many, or too deep, before the rest is read."""

        count = depth = 0

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            self.count += 1
            self.depth += 1
            if self.count > MOST_NODES or self.depth > DEEPEST + 1:
                raise ValueError(f"line {self.line + 1}: {_TOO_MANY if self.count > MOST_NODES else _too_deep()}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Bounded


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """(nodes, levels) of a node and what is in it, aliases counted out. Raises ValueError for too many, and for a key that stands twice."""
    import yaml

    if depth > DEEPEST:  # an alias inside what it stands for gets here too
        raise ValueError(f"line {node.start_mark.line + 1}: {_too_deep()}")
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, Any]] = set()
            for key, value in node.value:
                parts += (key, value)
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in keys:
                        raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value[:80]!r} stands here twice")
                    keys.add((key.tag, key.value))
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        inner = [_measure(part, known, depth + 1) for part in parts]
        known[id(node)] = 1 + sum(size for size, _ in inner), 1 + max((levels for _, levels in inner), default=0)
    size, levels = known[id(node)]
    if size > MOST_NODES:
        raise ValueError(f"line {node.start_mark.line + 1}: {_TOO_MANY}")
    if depth + levels > DEEPEST + 1:
        raise ValueError(f"line {node.start_mark.line + 1}: {_too_deep()}")
    return size, levels


def _sane(value: Any, depth: int = 0) -> None:
    """ValueError for what is nested too deep, no finite number, text that cannot be written, or of no type that JSON has."""
    if isinstance(value, dict | list):
        if depth == DEEPEST:
            raise ValueError(_too_deep())
        for item in value:
            _sane(item, depth + 1)
        if isinstance(value, dict):
            for item in value.values():
                _sane(item, depth + 1)
    elif isinstance(value, str):
        value.encode()  # half a surrogate pair is a UnicodeEncodeError, a kind of ValueError
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {value}")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError("expected numbers below 1e300, got a larger one")
    elif not isinstance(value, float | int | None):
        raise ValueError(f"expected text, a number, true, false or null, got a {type(value).__name__}")


def _too_deep() -> str:
    return f"expected at most {DEEPEST} levels inside each other, got more"


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"expected finite numbers, got {text[:20]}")
    return value


def _int(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"expected numbers below 1e300, got one of {len(text)} digits")
    return int(text)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {text}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands there twice")
    return made
