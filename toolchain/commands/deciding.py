"""Measure until it is decided: look after six processes, and while a limit is open measure half as many again and look again.

Knows neither packages nor devices: what measures a process and what judges them are arguments, so that recorded processes go through the
very decision that a check makes (`benchmarks/gate.py --replay`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.blocks import Block
from toolchain.check import COULD_NOT_TELL, LEAST_BLOCKS
from toolchain.progress import track
from toolchain.spec import Verdict

LOOKS = (6, 9, 14, 21, 32, 48, 72)
"""After so many processes it is looked; after the last it stays open. Six: Student's t of five degrees of freedom is not yet absurd."""


@dataclass(frozen=True)
class Patience:
    """Seconds of measuring: at least `least_s` (a report that is to be a baseline), and `most_s`, after which what is open stays open."""

    least_s: float = 0.0
    most_s: float = 120.0


@dataclass(frozen=True)
class Decided:
    """All processes, the last look's verdicts, how many looks and seconds it took."""

    blocks: tuple[Block, ...]
    verdicts: tuple[Verdict, ...]
    looks: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"processes": len(self.blocks), "looks": self.looks, "seconds": round(self.seconds, 3)}


def decide_in_looks(
    measure: Callable[[], Block],
    judge: Callable[[Sequence[Block], int], Sequence[Verdict]],
    patience: Patience,
    clock: Callable[[], float] = time.monotonic,
) -> Decided:
    """Measure processes until no verdict of a look (1, 2, ...) is open and least_s are over, or the next process would end after most_s:
    at least LEAST_BLOCKS, however long they take."""
    start = clock()
    blocks: list[Block] = []
    verdicts: tuple[Verdict, ...] = ()
    look, late = 0, False
    for look, wanted in enumerate(LOOKS, 1):
        for _ in track(range(wanted - len(blocks)), wanted - len(blocks), f"processes, look {look}"):
            blocks.append(measure())
            late = (clock() - start) * (len(blocks) + 1) / len(blocks) > patience.most_s
            if late and len(blocks) >= LEAST_BLOCKS:
                break
        if clock() - start < patience.least_s and wanted < LOOKS[-1] and not late:
            continue  # an unused look spends its share all the same
        verdicts = tuple(judge(blocks, look))
        if late or all(verdict.verdict != COULD_NOT_TELL for verdict in verdicts):
            break
    return Decided(tuple(blocks), verdicts, look, clock() - start)
