"""Which ops a graph file holds, read from its bytes: what is run of a stranger's graph is a model, not a program.

A graph runs in onnxruntime, which opens no file outside the graph's folder and no library that it was not given. But `Loop` runs for as
long as its file says, a function may hide one, and other domains are code that somebody registered. A model that we or the exporters
that we know wrote has none of these.
By hand, since a device has onnxruntime, which does not tell what is in a file, and not onnx: five message types of protobuf's wire
format, their fields' numbers as in onnx.proto. Weights are skipped, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Of the ops that are run: ONNX's own, under both of its names, and onnxruntime's."""
UNBOUNDED = ("Loop", "Scan", "SequenceMap")
"""Control flow that repeats. `If` does not, and is how a package takes one kernel for a prompt and another for a token."""
_DEEPEST = 16
"""Branches inside branches; ours have one."""
_GRAPH, _FUNCTION = 7, 25  # ModelProto
_NODE = 1  # GraphProto
_OP_TYPE, _ATTRIBUTE, _DOMAIN = 4, 5, 7  # NodeProto
_BRANCH, _BRANCHES = 6, 11  # AttributeProto

Span = tuple[int, int]


def refusal(path: Path) -> str:
    """What the graph file holds that is not run, "" if nothing. Raises OSError; ValueError for what is no ONNX graph."""
    with open(path, "rb") as stream:
        if not path.stat().st_size:
            raise ValueError("an empty file")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _refusal(data)


def _refusal(data: mmap.mmap) -> str:
    for field, span in _fields(data, (0, len(data))):
        if field == _FUNCTION:
            return "a function of its own"
        if field == _GRAPH:
            for domain, op in _ops(data, span, 0):
                if domain not in DOMAINS:
                    return f"the op {op[:80]!r} of the domain {domain[:80]!r}"
                if op in UNBOUNDED:
                    return f"the op {op!r}"
    return ""


def _ops(data: mmap.mmap, graph: Span, depth: int) -> Iterator[tuple[str, str]]:
    """(domain, op) of every node, those in branches included."""
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} branches inside each other")
    for field, node in _fields(data, graph):
        if field != _NODE:
            continue
        domain = op = ""
        for part, span in _fields(data, node):
            if part == _OP_TYPE:
                op = _text(data, span)
            elif part == _DOMAIN:
                domain = _text(data, span)
            elif part == _ATTRIBUTE:
                for kind, inner in _fields(data, span):
                    if kind in (_BRANCH, _BRANCHES):
                        yield from _ops(data, inner, depth + 1)
        yield domain, op


def _text(data: mmap.mmap, span: Span) -> str:
    return data[span[0] : span[1]].decode("utf-8", "replace")


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span]]:
    """(number, where its bytes are) of a message's fields that have bytes; numbers are passed over."""
    place, end = span
    while place < end:
        tag, place = _varint(data, place, end)
        match tag & 7:
            case 0:
                _, place = _varint(data, place, end)
            case 1:
                place += 8
            case 2:
                length, place = _varint(data, place, end)
                if length > end - place:
                    raise ValueError("a field that is longer than its message")
                yield tag >> 3, (place, place + length)
                place += length
            case 5:
                place += 4
            case other:
                raise ValueError(f"a field of wire type {other}")
    if place > end:
        raise ValueError("a field that is longer than its message")


def _varint(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, place
    raise ValueError("a number without an end")
