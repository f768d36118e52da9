"""A slice of the fuzzing of every reader (`fuzz.py` runs as many cases as one likes): no traceback, nothing outside, no memory, no hang."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import fuzz_cases
import fuzz_readers
import fuzz_sandbox

from toolchain.errors import BittailorError

NAMES = tuple(reader.name for reader in fuzz_readers.EVERY)


def _crashes(name: str, seeds: Path, root: Path, seed: int, count: int) -> dict[str, int]:
    """How it crashed → the number of the first case that did."""
    reader = fuzz_readers.readers(seeds)[name]
    box = fuzz_sandbox.Sandbox(root / "box", seeds, reader)
    assert box.valid() == "accepted"
    found: dict[str, int] = {}
    with fuzz_sandbox.limited():
        for number, case in enumerate(fuzz_cases.cases(reader, seeds, seed, 0, count)):
            outcome = box.run(case)
            if outcome not in ("accepted", "refused"):
                found.setdefault(outcome, number)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
@pytest.mark.parametrize("name", NAMES)
def test_hostile_input_is_refused_in_one_line(name: str, strangers: Path, tmp_path: Path) -> None:
    assert not _crashes(name, strangers, tmp_path, 1, 15 if "transformers" not in name else 2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
@pytest.mark.parametrize("name", NAMES)
def test_much_hostile_input_is_refused_in_one_line(name: str, strangers: Path, tmp_path: Path) -> None:
    assert not _crashes(name, strangers, tmp_path, 2, 200)


def test_the_sandbox_sees_what_it_is_there_for(strangers: Path, tmp_path: Path) -> None:
    """A reader with a fault of every kind: each is called a crash, by its name."""
    faults = {
        "KeyError": lambda folder: {}["x"],
        "reads": lambda folder: (folder.parent / "secret").read_bytes(),
        "writes": lambda folder: (folder.parent.parent / "mark").write_text(""),
        "too slow": lambda folder: any(_ for _ in iter(int, 1)),  # a list would outgrow the memory first on a fast machine
        "MemoryError": lambda folder: bytes(1 << 36),
        "refuses": lambda folder: (_ for _ in ()).throw(BittailorError("")),
        "MB more": lambda folder: len(b"x" * (500 << 20)),
    }
    for number, (word, call) in enumerate(faults.items()):
        reader = fuzz_sandbox.Reader(word, "other", ("budget.yaml",), call)
        box = fuzz_sandbox.Sandbox(tmp_path / str(number), strangers, reader, most_seconds=1.0)
        with fuzz_sandbox.limited():
            assert word in box.run(b"budget.yaml\nx")
