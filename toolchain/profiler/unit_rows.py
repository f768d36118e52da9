"""Rows of one unit shape: every kernel's time at the workload's token counts, and its memory.

Owns which one-unit graphs are built and how many copies are in rotation. Refuses to know tables' files and whole models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.costs.table import CostTable, MemoryRow, Row, UnitRow
from toolchain.files import scratch
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import random_weights, write_one_unit
from toolchain.kernels import CATALOGUE
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import summarise
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import Unit, Workload

MAX_COPIES = 256
PREFILL_COPIES = 6
WINDOWS = 7


@dataclass(frozen=True)
class Case:
    """One row to measure: a kernel at so many tokens in flight, `copies` of the unit in rotation. The memory row has tokens 0."""

    kernel: str
    tokens: int
    working_set: str
    copies: int

    @property
    def label(self) -> str:
        return f"{self.kernel}@{self.tokens}"


def cases(graph: Graph, unit: Unit, sets: Mapping[str, str], workload: Workload, cache_bytes: int) -> list[Case]:
    """Every time row of this shape; sets: kernel → working set."""
    return [
        Case(kernel, tokens, kind, _copies(graph, unit, kernel, tokens, kind, cache_bytes))
        for kernel, kind in sets.items()
        for tokens in sorted(set(workload.phases.values()))
    ]


def _copies(graph: Graph, unit: Unit, kernel: str, tokens: int, kind: str, cache_bytes: int) -> int:
    """Copies in rotation: enough to stream what the whole model streams between two uses of one unit."""
    if tokens > 1:
        return PREFILL_COPIES  # bound by arithmetic: a few copies keep the trial short
    if kind == "streamed":
        target = 2 * cache_bytes
    else:
        target = sum(packed_bytes(other, CATALOGUE[kernel]) for other in graph.units if other.op != "Gather")
    return max(2, min(MAX_COPIES, -(-target // packed_bytes(unit, CATALOGUE[kernel]))))


def missing(unit: Unit, wanted: list[Case], table: CostTable) -> tuple[list[Case], list[Case]]:
    """(time rows, memory rows) that the table lacks or holds as not valid. Memory is measured on the case of fewest tokens."""
    times = [
        case
        for case in wanted
        if not getattr(table.rows.get(("unit", *unit.shape, case.working_set, case.tokens, case.kernel)), "valid", False)
    ]
    fewest = min(case.tokens for case in wanted)
    memory = [case for case in wanted if case.tokens == fewest and ("memory", *unit.shape, case.kernel) not in table.rows]
    return times, memory


def measure(host: Host, unit: Unit, times: list[Case], memory: list[Case]) -> tuple[list[Row], list[float]]:
    """(rows not yet corrected for drift, the reference's times meanwhile)."""
    rows: list[Row] = []
    references: list[float] = []
    with scratch() as folder:
        subjects = {case.label: _subject(unit, case, folder) for case in {**dict.fromkeys(times), **dict.fromkeys(memory)}}
        if times:
            answer = host.time([subjects[case.label] for case in times], WINDOWS)
            references = answer["reference_ns"]
            for case in times:
                trials = answer["trials"][case.label]
                seen = summarise((trial["run_ns"] / 1e6 / case.copies for trial in trials), answer["valid"])
                assert seen.value is not None
                assert seen.spread is not None
                rows.append(
                    UnitRow(*unit.shape, case.kernel, case.tokens, case.working_set, seen.value, seen.spread, seen.n, seen.valid)
                )
        for case in memory:
            peak = host.peak(subjects[case.label])
            rows.append(
                MemoryRow(*unit.shape, case.kernel, peak / case.copies, packed_bytes(unit, CATALOGUE[case.kernel]), case.copies)
            )
    return rows, references


def _subject(unit: Unit, case: Case, folder: Path) -> dict[str, Any]:
    place = folder / f"{case.kernel}-{case.copies}"
    if not place.exists():
        place.mkdir()
        kernel = CATALOGUE[case.kernel]
        write_one_unit(unit, kernel, random_weights(unit, kernel), case.copies, place)
    return {"name": case.label, "kind": "unit", "folder": str(place), "tokens": case.tokens, "rows": unit.N}
