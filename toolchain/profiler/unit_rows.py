"""Rows of one unit shape: every kernel's time over a grid of token counts, and its memory.

Owns which one-unit graphs are built, at how many tokens in flight, and how many copies are in rotation. Refuses to know tables' files
and whole models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import mean, median
from typing import Any

from toolchain.costs.bounds import bound_of_unit
from toolchain.costs.operations import tokens_in_flight, working_set
from toolchain.costs.rows import MemoryRow, Row, UnitRow, with_interpolation_errors
from toolchain.costs.table import CostTable
from toolchain.files import scratch
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import random_weights, write_one_unit
from toolchain.kernels import CATALOGUE, candidates, runs_as
from toolchain.profiler.ask import Host, References
from toolchain.profiler.measure import levelled, summarise
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import Unit, Workload

GRID = (16, 64, 256, 1024)
"""Tokens in flight that are measured beside the workload's own, so that others can be interpolated."""
MAX_COPIES = 256
WINDOWS = 7


@dataclass(frozen=True)
class Case:
    """One row to measure: a kernel at so many tokens in flight, `copies` of the unit in rotation."""

    kernel: str
    tokens: int
    working_set: str
    copies: int

    @property
    def label(self) -> str:
        return f"{self.kernel}@{self.tokens}"


def grid(tokens: int, most: int) -> list[int]:
    """The token counts measured for a workload that has `tokens` in flight: its own and those around it, at most `most`."""
    reach = max(256, 2 * tokens)
    return sorted({tokens, *(count for count in GRID if count <= min(reach, most))})


def token_counts(graph: Graph, shape: tuple[str, int, int], workload: Workload) -> list[int]:
    """Tokens in flight at which units of this shape are measured. One token is decoding: a kernel of its own, never interpolated."""
    counts: set[int] = set()
    for unit in graph.units:
        for phase in workload.phases if unit.shape == shape else ():
            tokens = tokens_in_flight(unit, phase)
            if tokens:
                counts.update([1] if tokens == 1 else grid(tokens, phase.batch * graph.context))
    return sorted(counts)


def working_sets(graph: Graph, unit: Unit, table: CostTable) -> dict[str, str]:
    """Every kernel that this shape is measured under → its working set."""
    names = dict.fromkeys(runs_as(name) for name in candidates(unit, table.header.kernels))
    return {name: working_set(graph.units, name, table.header.cache_bytes) for name in names}


def cases(graph: Graph, unit: Unit, sets: Mapping[str, str], workload: Workload, cache_bytes: int) -> list[Case]:
    """Every time row of this shape; sets: kernel → working set. The kernels are of one provider."""
    return [
        Case(kernel, tokens, kind, _copies(graph, unit, kernel, tokens, kind, cache_bytes))
        for kernel, kind in sets.items()
        for tokens in token_counts(graph, unit.shape, workload)
    ]


def _copies(graph: Graph, unit: Unit, kernel: str, tokens: int, kind: str, cache_bytes: int) -> int:
    """Copies in rotation: enough to stream what the whole model streams between two uses of one unit.

    Fewer the more tokens share a weight's way from memory: arithmetic hides it, and the trial stays short.
    """
    target = 2 * cache_bytes if kind == "streamed" else _mixed_bytes(graph, CATALOGUE[kernel].provider)
    most = MAX_COPIES if tokens == 1 else max(2, 512 // tokens)
    return max(2, min(most, ceil(target / packed_bytes(unit, CATALOGUE[kernel]))))


def _mixed_bytes(graph: Graph, provider: str) -> float:
    """Bytes of the linears under a mixed policy, on average: among these neighbours a unit finds the caches, whatever its own kernel."""
    quantised = [kernel for kernel in CATALOGUE.values() if kernel.quantised and kernel.provider == provider]
    return mean(sum(packed_bytes(unit, kernel) for unit in graph.units if unit.op != "Gather") for kernel in quantised)


def missing(unit: Unit, wanted: Sequence[Case], table: CostTable, workload: Workload) -> tuple[list[Case], list[Case]]:
    """(time rows, memory rows) that the table lacks or holds as not valid.

    Memory of a linear is measured at the fewest tokens, so that activations do not count as weights; of an embedding at the workload's:
    its file is mapped, and only the rows that were asked for are resident.
    """
    times = [
        case
        for case in wanted
        if not getattr(table.rows.get(("unit", *unit.shape, case.working_set, case.tokens, case.kernel)), "valid", False)
    ]
    tokens = workload.phases[0].in_flight if unit.op == "Gather" else min(case.tokens for case in wanted)
    memory = [case for case in wanted if case.tokens == tokens and ("memory", *unit.shape, case.kernel) not in table.rows]
    return times, memory


def with_errors(table: CostTable, unit: Unit) -> CostTable:
    """The table with what interpolation gets wrong between this shape's rows."""
    kinds: dict[tuple[str, str], list[UnitRow]] = {}
    for row in table.of(UnitRow):
        if (row.op, row.K, row.N) == unit.shape:
            kinds.setdefault((row.kernel, row.working_set), []).append(row)
    return table.adding(row for rows in kinds.values() for row in with_interpolation_errors(rows))


def measure(host: Host, unit: Unit, times: Sequence[Case], memory: Sequence[Case]) -> tuple[list[Row], References]:
    """(rows not yet corrected for drift, the references' times meanwhile)."""
    rows: list[Row] = []
    references: References = {}
    with scratch() as folder:
        subjects = {case.label: subject(unit, case, folder) for case in {**dict.fromkeys(times), **dict.fromkeys(memory)}}
        if times:
            answer = host.time([subjects[case.label] for case in times], WINDOWS)
            references, levels = answer["reference_ns"], levelled(answer["trials"])
            for case in times:
                seen = summarise((trial["run_ns"] / 1e6 / case.copies for trial in levels[case.label]), answer["valid"])
                assert seen.value is not None
                assert seen.spread is not None
                rows.append(
                    UnitRow(
                        *unit.shape,
                        kernel=case.kernel,
                        tokens=case.tokens,
                        working_set=case.working_set,
                        latency_ms=seen.value,
                        spread_ms=seen.spread,
                        n=seen.n,
                        valid=seen.valid,
                        bound=bound(unit, case, seen.value, references, host),
                    )
                )
        for case in memory:
            peak = host.peak(subjects[case.label])["peak_bytes"]
            rows.append(
                MemoryRow(*unit.shape, case.kernel, peak / case.copies, packed_bytes(unit, CATALOGUE[case.kernel]), case.copies)
            )
    return rows, references


def bound(unit: Unit, case: Case, run_ms: float, references: References, host: Host) -> str:
    """What bounds one execution that took so long while the references took theirs."""
    meanwhile = {work: median(times) for work, times in references.items()}
    return bound_of_unit(unit, case.kernel, case.tokens, case.working_set, run_ms, meanwhile, host.device.provider)


def subject(unit: Unit, case: Case, folder: Path) -> dict[str, Any]:
    """The agent's description of a case, its one-unit graph written below the folder."""
    place = folder / f"{case.kernel}-{case.copies}"
    if not place.exists():
        place.mkdir()
        kernel = CATALOGUE[case.kernel]
        write_one_unit(unit, kernel, random_weights(unit, kernel), case.copies, place)
    return {"name": case.label, "kind": "unit", "folder": str(place), "tokens": case.tokens, "rows": unit.N}
