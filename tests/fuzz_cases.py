"""Cases of a seed: one file of a reader's valid folder, mutated, or a link in its place."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

from fuzz_mutation import mutated
from fuzz_sandbox import Reader

FORMS = {".json": "json", ".yaml": "yaml", ".jsonl": "table", ".safetensors": "safetensors", ".onnx": "onnx", ".npy": "npy"}


def cases(reader: Reader, seeds: Path, seed: int, start: int, count: int) -> Iterator[bytes]:
    """Cases number `start` to `start + count` of a seed, each by itself: the same whichever went before."""
    for number in range(start, start + count):
        yield case(reader, seeds, random.Random(f"{reader.name} {seed} {number}"))


def case(reader: Reader, seeds: Path, rng: random.Random, earlier: bytes = b"") -> bytes:
    """One case. earlier: a case to go on from instead of a valid file."""
    names = reader.names(seeds)
    name = rng.choice(names)
    if reader.links and rng.random() < 0.01:
        return (
            b"@link "
            + os.fsencode(name)
            + b"\n"
            + rng.choice((b"../secret", b"/dev/zero", b".", b"nowhere", os.fsencode(name), b"/proc/self/mem"))
        )
    first, _, content = earlier.partition(b"\n")
    if first and os.fsdecode(first) in names:
        name = os.fsdecode(first)
    else:
        content = (seeds / reader.folder / name).read_bytes()
    return os.fsencode(name) + b"\n" + mutated(rng, content, FORMS.get(Path(name).suffix, "bytes"))
