"""Fuzzes every reader of what strangers write: how many cases, how many were accepted, refused, and what crashed.

    python tests/fuzz.py --cases 100000 [--seed 0] [--only READER] [--work DIR]

Valid inputs are made first (`fuzz_seeds.py`), mutated by structure (`fuzz_mutation.py`), and given to the readers in a sandbox, with time
and memory bounded (`fuzz_sandbox.py`). Each reader has a process of its own: one that dies is a crash, and the next case goes on.
Guided: atheris (not among the project's dependencies: pip install atheris) chooses which cases to mutate further by the lines of ours
that they reached; one case in two begins anew, from a valid file. Without atheris, or with --plain, all do, and a seed then names its
cases for good. Resumable: the same --work DIR goes on where it was stopped; crashes/ there holds one case of each kind, for --replay.

Prints a table; exit code 1 if anything crashed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LOOK_SECONDS, HUNG_SECONDS = 0.2, 60.0
"""Without a case: stuck in native code, where no signal reaches it."""
BAD_SEED = 97
STOPS = 40
"""Deaths of one reader's process after which it is given up."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="over all readers together, by their weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="READER", help="readers whose names begin so")
    parser.add_argument("--work", type=Path, help="kept, and gone on with (default: a temporary folder)")
    parser.add_argument("--plain", action="store_true", help="without atheris")
    parser.add_argument("--replay", nargs=2, metavar=("READER", "FILE"), help="run one case again, and show what happens")
    words = parser.parse_args()
    work = (words.work or Path(tempfile.mkdtemp(prefix="fuzz-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    guide = None if words.plain else _guide()
    seeds = _seeds(work)
    import fuzz_cases  # noqa: F401 - as below
    import fuzz_readers
    import torch

    import toolchain.train.checkpoint  # noqa: F401 - what takes seconds to import, once for all

    torch.set_num_threads(1)
    readers = fuzz_readers.readers(seeds)
    if words.replay:
        return _replay(work, readers[words.replay[0]], Path(words.replay[1]))
    chosen = [reader for reader in readers.values() if not words.only or reader.name.startswith(tuple(words.only))]
    total = sum(reader.weight for reader in chosen)
    print(f"work {work}, seed {words.seed}, {'guided by atheris' if guide else 'plain'}", file=sys.stderr)
    rows = []
    for reader in chosen:
        start = time.monotonic()
        state = _reader(work, reader, round(words.cases * reader.weight / total), words.seed, guide)
        rows.append((reader.name, state))
        print(f"{reader.name}: {state['cases']} cases, {time.monotonic() - start:.0f} s", file=sys.stderr)
    _print(rows)
    return int(any(state["crashes"] for _, state in rows))


def _guide() -> Any:
    """atheris, with our modules instrumented as they are imported; None where it is not installed."""
    try:
        import atheris
    except ImportError:
        return None
    with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["toolchain"]):  # which names each module
        import fuzz_readers  # noqa: F401

        import toolchain.train.checkpoint  # noqa: F401
    return atheris


def _seeds(work: Path) -> Path:
    """The valid inputs, made once for a work folder."""
    seeds = work / "seeds"
    if not (seeds / "talk").is_dir():
        import fuzz_readers
        import fuzz_seeds

        shutil.rmtree(seeds, ignore_errors=True)
        fuzz_readers.readers(fuzz_seeds.make(seeds))  # which adds to them
    return seeds


def _file_name(reader: str) -> str:
    return "".join(one if one.isalnum() else "-" for one in reader)


def _state(work: Path, name: str) -> tuple[Path, dict[str, Any]]:
    path = work / f"{name}.json"
    empty = {"cases": 0, "accepted": 0, "refused": 0, "crashes": {}, "slowest_s": 0.0, "most_mb": 0}
    return path, json.loads(path.read_text()) if path.is_file() else empty


def _save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: its process may end at any time."""
    path.with_suffix(".new").write_text(json.dumps(state))
    os.replace(path.with_suffix(".new"), path)


def _reader(work: Path, reader: Any, cases: int, seed: int, guide: Any) -> dict[str, Any]:
    """One reader's state after so many cases: processes, one after the other, until they are done."""
    name = _file_name(reader.name)
    path, state = _state(work, name)
    last = work / f"{name}.last"
    for _ in range(STOPS):
        if state["cases"] >= cases:
            break
        last.unlink(missing_ok=True)
        child = multiprocessing.get_context("fork").Process(target=_child, args=(work, reader, cases, seed, guide))
        child.start()
        code = _watched(child, last)
        _, state = _state(work, name)
        if code == BAD_SEED:
            raise SystemExit(f"{reader.name}: the valid input itself is refused, see {work / f'{name}.log'}")
        if code:
            what = f"its process ended with {code}" if code != -signal.SIGKILL else "hangs, or was killed"
            state["cases"] += 1
            _keep(work, name, state, what, last.read_bytes() if last.is_file() else b"")
            _save(path, state)
    return state


def _watched(child: Any, last: Path) -> int:
    """Its exit code; killed where it began no case for a minute. last: the case that it began last."""
    still, seen = 0.0, 0
    try:
        while child.is_alive():
            child.join(LOOK_SECONDS)
            now = last.stat().st_mtime_ns if last.is_file() else 0
            still, seen = (still + LOOK_SECONDS if now == seen else 0.0), now
            if still > HUNG_SECONDS:
                child.kill()
    finally:
        if child.is_alive():
            child.kill()
    return child.exitcode


def _keep(work: Path, name: str, state: dict[str, Any], what: str, case: bytes) -> None:
    """Count a crash, and keep the first case of its kind."""
    if what not in state["crashes"]:
        folder = work / "crashes" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(len(state["crashes"]))).write_bytes(case)
    state["crashes"][what] = state["crashes"].get(what, 0) + 1


def _child(work: Path, reader: Any, cases: int, seed: int, guide: Any) -> None:
    """Run a reader's cases from where it was until there are so many; the state is written after each."""
    import fuzz_cases
    import fuzz_sandbox

    name, seeds = _file_name(reader.name), work / "seeds"
    log = os.open(work / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    box_root = work / "box" / name
    shutil.rmtree(box_root, ignore_errors=True)
    box = fuzz_sandbox.Sandbox(box_root, seeds, reader)
    if (valid := box.valid()) != "accepted":
        print(f"the valid input: {valid}", file=sys.stderr)
        os._exit(BAD_SEED)
    path, state = _state(work, name)
    last = work / f"{name}.last"
    begun = state["cases"]

    def one(case: bytes) -> None:
        if state["cases"] >= cases:
            os._exit(0)
        last.write_bytes(case)
        start = time.monotonic()
        outcome = box.run(case)
        state["slowest_s"] = max(state["slowest_s"], time.monotonic() - start)
        state["most_mb"] = max(state["most_mb"], box.risen >> 20)
        state["cases"] += 1
        if outcome in ("accepted", "refused"):
            state[outcome] += 1
        else:
            _keep(work, name, state, outcome, case)
        _save(path, state)

    def next_case(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(f"{name} {seed} {begun} {number}")
        return fuzz_cases.case(reader, seeds, rng, data if rng.random() < 0.5 else b"")[:most]

    with fuzz_sandbox.limited():
        if guide is None:
            for case in fuzz_cases.cases(reader, seeds, seed, state["cases"], cases - state["cases"]):
                one(case)
            return
        corpus = work / "corpus" / name
        corpus.mkdir(parents=True, exist_ok=True)
        for file in reader.names(seeds):
            (corpus / f"seed-{_file_name(file)}").write_bytes(
                os.fsencode(file) + b"\n" + (seeds / reader.folder / file).read_bytes()
            )
        options = [
            f"-seed={seed + begun + 1}",
            "-timeout=100000",
            "-rss_limit_mb=0",
            "-malloc_limit_mb=0",
            f"-max_len={1 << 21}",
            "-len_control=0",
        ]
        guide.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=next_case)
        guide.Fuzz()


def _replay(work: Path, reader: Any, case: Path) -> int:
    import fuzz_sandbox

    box = work / "box" / "replay"
    shutil.rmtree(box, ignore_errors=True)
    with fuzz_sandbox.limited():
        print(fuzz_sandbox.Sandbox(box, work / "seeds", reader).run(case.read_bytes(), show=True))
    return 0


def _print(rows: list[tuple[str, dict[str, Any]]]) -> None:
    keys = ("cases", "accepted", "refused")
    print("| reader | cases | accepted | refused | crashes | slowest s | most MB more |\n|---|---|---|---|---|---|---|")
    for name, state in rows:
        counts = " | ".join(str(state[key]) for key in keys)
        print(f"| {name} | {counts} | {sum(state['crashes'].values())} | {state['slowest_s']:.1f} | {state['most_mb']} |")
    whole = " | ".join(str(sum(state[key] for _, state in rows)) for key in keys)
    print(f"| all | {whole} | {sum(sum(state['crashes'].values()) for _, state in rows)} | | |")
    for name, state in rows:
        for what, count in state["crashes"].items():
            print(f"{name}: {count} times {what}")


if __name__ == "__main__":
    sys.exit(main())
