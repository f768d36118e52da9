"""From a valid file to a hostile one: edits of the parsed tree (JSON, YAML, tables, safetensors headers, ONNX) or of the bytes.

`mutated(rng, data, form)` is a function of its arguments alone, so that a seed names a case for good. Twenty lines for each form, by hand:
atheris and hypothesis mutate bytes or draw values, and neither knows what a strange ONNX graph or a YAML bomb looks like.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import onnx
import yaml
from google.protobuf.descriptor import FieldDescriptor

_MOST_BYTES = 1 << 21
_STRINGS = (
    "",
    "x",
    "\0",
    "a\nb",
    "a" * 5000,
    "../../secret",
    "/secret",
    "..",
    ".",
    "inner/../../secret",
    "link",
    "\x1b[31m",
    "\u202e",
    "\U0001f4a5",
    "\ud800",
    "-1",
    "0x10",
    "1e400",
    "9" * 5000,
    "nan",
    "%n%s",
    "fp32",
    "w3g32",
    "w4g32",
    "w8a8",
    "w4g32+w8a8",
    "!!python/object/apply:os.system [id]",
    "generate:0+0",
    "generate:99999999999+1",
    "encode:1x" + "9" * 5000,
    "encode:\u0661x\u0662",
    "\u00b2",
    "CUDAExecutionProvider",
    "a: b",
)
_NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    255,
    2**31,
    -(2**31),
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**400),
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)
_OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": {"c": {}}}},
    "@deep@",
    "@bomb@",
    "@loop@",
)
_BYTES = (
    b"\0",
    b"\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"[",
    b"]" * 50,
    b"{" * 2000,
    b'"',
    b"9" * 5000,
    b"-",
    b"1e999",
    b"NaN",
    b"&a ",
    b"*a",
    b"!!binary ",
    b"!!timestamp x",
    b"!!int ''",
    b"!!bool x",
    b"<<: ",
    b"? ",
    b"%TAG ! x",
    b"\xe2\x80\xa8",
    b"../",
    b"\xed\xa0\x80",
)


def mutated(rng: random.Random, data: bytes, form: str) -> bytes:
    """Hostile bytes from valid ones (or from what an earlier mutation made). form: a key of `_FORMS`; others are edited as bytes."""
    edit = _FORMS.get(form)
    if edit and rng.random() < 0.8:
        try:
            made = edit(rng, data)
            return _of_bytes(rng, made)[:_MOST_BYTES] if rng.random() < 0.05 else made[:_MOST_BYTES]
        except Exception:  # noqa: BLE001 - no longer parses, or cannot be written as edited
            pass
    return _of_bytes(rng, data)[:_MOST_BYTES]


def _of_bytes(rng: random.Random, data: bytes) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, other = rng.randint(0, len(made)), rng.randint(0, len(made))
        low, high = sorted((place, other))
        match rng.randrange(8):
            case 0 if made:
                made[place % len(made)] ^= 1 << rng.randrange(8)
            case 1:
                made[place:place] = rng.choice(_BYTES)
            case 2:
                del made[place:]
            case 3:
                del made[low : min(high, low + 64)]
            case 4:
                made[place:place] = made[low : min(high, low + 256)]
            case 5:
                made[place:place] = rng.randbytes(rng.randint(1, 32))
            case 6:
                made[place : place + 8] = rng.choice(
                    (b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little"), (10**10).to_bytes(8, "little"))
                )
            case _:
                lines = bytes(made).split(b"\n")
                lines.insert(rng.randint(0, len(lines)), rng.choice(lines))
                made = bytearray(b"\n".join(lines))
    return bytes(made)


# ---- trees


def _value(rng: random.Random) -> Any:
    return rng.choice(rng.choice((_STRINGS, _NUMBERS, _OTHERS)))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, item in items:
        yield tree, key
        yield from _places(item)


def _edited(rng: random.Random, tree: Any) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(islice(_places(tree), 3000))  # of a bomb not all
        if not places or rng.random() < 0.02:
            tree = _value(rng)
            continue
        container, key = rng.choice(places)
        match rng.randrange(7):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[str(rng.choice(_STRINGS)) if rng.random() < 0.8 else rng.choice((0, None, 1.5, True))] = container.pop(
                    key
                )
            case 2 if isinstance(container, list):
                container.insert(key, _value(rng))
            case 3:
                other, its = rng.choice(places)
                if isinstance(other[its], str | int | float | None):
                    container[key] = other[its]
            case 4 if isinstance(container[key], int | float) and not isinstance(container[key], bool):
                container[key] = rng.choice(
                    (-container[key], container[key] + 1, container[key] * 10**9, str(container[key]), [container[key]])
                )
            case _:
                container[key] = _value(rng)
    return tree


def _expanded(rng: random.Random, text: str) -> str:
    """What no writer writes: deep nesting, alias bombs and loops, in the place of their marks; a key that stands there twice."""
    depth, wide = rng.choice((50, 300, 3000, 100_000)), rng.choice((3, 9))
    names = [f"b{index}" for index in range(12)]
    bomb = ", ".join(
        f"&{name} [{', '.join([f'*{before}' if before else 'x'] * wide)}]"
        for before, name in zip(["", *names], names, strict=False)
    )
    for mark, made in (
        ("deep", "[" * depth + "]" * depth),
        ("bomb", f"[{bomb}]"),
        ("loop", rng.choice(("&z [*z]", "&z {a: *z}", "&z {? *z : 1}"))),
    ):
        for quoted in (f'"@{mark}@"', f"'@{mark}@'"):
            text = text.replace(quoted, made)
    if rng.random() < 0.05:
        lines = text.split("\n")
        lines.insert(rng.randint(0, len(lines)), rng.choice(lines))
        text = "\n".join(lines)
    return text


def _json(rng: random.Random, data: bytes) -> bytes:
    tree = _edited(rng, json.loads(data))
    return _expanded(rng, json.dumps(tree, indent=rng.choice((None, 1)))).encode()


def _yaml(rng: random.Random, data: bytes) -> bytes:
    tree = _edited(rng, yaml.load(data, Loader=yaml.CSafeLoader))
    return _expanded(rng, yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=False)).encode(
        "utf-8", "surrogatepass"
    )


def _lines(rng: random.Random, data: bytes) -> bytes:
    """A table: some of its lines edited, dropped, repeated."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.choice((0, rng.randrange(len(lines))))
        match rng.randrange(8):
            case 0:
                del lines[place]
            case 1:
                lines.insert(place, rng.choice(lines))
            case _:
                lines[place] = _json(rng, lines[place]).replace(b"\n", b" ")
    return b"\n".join(lines)


def _safetensors(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    if metadata and rng.random() < 0.5:  # JSON inside JSON
        key = rng.choice(list(metadata))
        metadata[key] = _json(rng, metadata[key].encode()).decode()
    else:
        header = _edited(rng, header)
    made = _expanded(rng, json.dumps(header)).encode()
    size = len(made) if rng.random() < 0.9 else rng.choice((0, len(made) - 1, len(made) + len(body), 1 << 40, (1 << 64) - 1))
    return size.to_bytes(8, "little") + made + body


def _npy(rng: random.Random, data: bytes) -> bytes:
    head, _, body = data.partition(b"\n")
    text = head[10:].decode("latin1")
    edits = (
        ("(", "(99999999999, "),
        ("'<f4'", "'|O'"),
        ("'<f4'", "'<f8'"),
        ("'<i8'", "'|O'"),
        ("False", "True"),
        ("{", "{'a': 1, "),
        ("(", "(-"),
        ("'descr'", "'x'"),
    )
    text = text.replace(*rng.choice(edits)).rstrip()
    made = text.encode("latin1") + b"\n"
    return head[:8] + len(made).to_bytes(2, "little") + made + body


# ---- ONNX


def _messages(message: Any, depth: int = 0) -> Iterator[Any]:
    """A message and those inside it; of long lists some."""
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE and depth < 12:
            for item in list(value)[:200] if _repeated(field) else [value]:
                yield from _messages(item, depth + 1)


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated)


_ONNX_STRINGS = (
    "",
    "evil",
    "com.microsoft",
    "ai.onnx",
    "ai.onnx.ml",
    "Loop",
    "If",
    "Scan",
    "ConstantOfShape",
    "Expand",
    "Tile",
    "EPContext",
    "logits",
    "input_ids",
    *_STRINGS,
)


def _onnx(rng: random.Random, data: bytes) -> bytes:
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        message = rng.choice(list(_messages(model)))
        field = rng.choice([field for field, _ in message.ListFields()] or list(message.DESCRIPTOR.fields))
        if rng.random() < 0.15:
            field = rng.choice(list(message.DESCRIPTOR.fields))
        _edit_field(rng, model, message, field)
    return model.SerializeToString()


def _edit_field(rng: random.Random, model: onnx.ModelProto, message: Any, field: Any) -> None:
    drawn: dict[int, Callable[[], Any]] = {
        FieldDescriptor.TYPE_STRING: lambda: rng.choice([text for text in _ONNX_STRINGS if "\ud800" not in text]),
        FieldDescriptor.TYPE_BYTES: lambda: rng.choice((b"", b"\0" * 4, rng.randbytes(16), b"../../secret", b"\xff" * 8)),
        FieldDescriptor.TYPE_INT64: lambda: rng.choice(
            (0, 1, -1, 7, 16, 2**31, 2**32, 2**62, -(2**63), 10_000_000_000, 2_500_000_000)
        ),
        FieldDescriptor.TYPE_UINT64: lambda: rng.choice((0, 1, 2**63, 2**64 - 1)),
        FieldDescriptor.TYPE_INT32: lambda: rng.choice((0, 1, 2, 6, 7, 8, 16, 21, 22, 23, 99, 2**31 - 1, -1)),
        FieldDescriptor.TYPE_FLOAT: lambda: rng.choice((0.0, float("nan"), float("inf"), 1e38)),
        FieldDescriptor.TYPE_DOUBLE: lambda: rng.choice((0.0, float("nan"), float("inf"), 1e308)),
        FieldDescriptor.TYPE_ENUM: lambda: rng.choice([value.number for value in field.enum_type.values]),
    }
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if not _repeated(field):
            message.ClearField(field.name) if rng.random() < 0.5 else getattr(message, field.name).SetInParent()
            return
        values = getattr(message, field.name)
        alike = [other for other in _messages(model) if field.message_type == other.DESCRIPTOR]
        if len(values) and rng.random() < 0.5:
            del values[rng.randrange(len(values))]
        elif alike:
            values.add().MergeFromString(rng.choice(alike).SerializeToString())  # a node twice, a graph inside itself
        else:
            values.add()
    elif _repeated(field):
        values = getattr(message, field.name)
        match rng.randrange(3):
            case 0 if len(values):
                del values[rng.randrange(len(values))]
            case 1 if len(values):
                values[rng.randrange(len(values))] = drawn[field.type]()
            case _:
                values.append(drawn[field.type]())
    else:
        setattr(message, field.name, drawn[field.type]())


_FORMS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "json": _json,
    "yaml": _yaml,
    "table": _lines,
    "safetensors": _safetensors,
    "npy": _npy,
    "onnx": _onnx,
}
