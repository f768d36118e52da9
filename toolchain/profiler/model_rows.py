"""Rows of whole models ("anchors"): a few policies measured end to end, so that what the units' sum leaves over becomes known.

Owns which policies those are, at which points of (tokens, past), and how deep the model is cut. A deep model is cut to its first layers,
as many as it takes to stream from memory what the whole one streams: the time of a profile grows with shapes, not with layers.
Weights are drawn: their values do not change a kernel's time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.costs.operations import working_set_of
from toolchain.costs.rows import ModelMemoryRow, ModelRow, Row
from toolchain.costs.table import CostTable
from toolchain.files import scratch
from toolchain.graph.assemble import assemble
from toolchain.graph.layers import layer_of, units_within
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import drawn
from toolchain.kernels import CATALOGUE, candidates, runs_as, uniform
from toolchain.profiler.ask import Host, References
from toolchain.profiler.measure import levelled, summarise
from toolchain.profiler.unit_rows import GRID, grid
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import Phase, Policy, Workload

MIXED = 16
WEIGHED_WHOLE = ("mixed-0", "mixed-1")
FEWEST_LAYERS = 4
WINDOWS = 11
EVERYWHERE = ("w8g32", "w4g32", "fp32")
"""The first of these that the device has is measured at all points, the other policies at the workload's own."""
_PASTS = (16, 128, 512, 2048)
_LAST_STEPS = 8
"""Positions at the end of the context that are left to the steps timed around a point."""


@dataclass(frozen=True)
class Anchor:
    """A policy of the first `layers` layers, embedding and head. timed: False where only its memory is wanted."""

    name: str
    policy: Policy
    layers: int
    timed: bool = True


def anchors(graph: Graph, available: Iterable[str], cache_bytes: int) -> list[Anchor]:
    """Every kernel on all units, and mixed policies drawn with a fixed seed, each as deep as it must be.

    Where that is not the whole depth, two mixed ones also whole, for their memory: an error in what few layers add is multiplied on the
    way to many, and a fresh process takes a moment where timing would take minutes.
    """
    available = tuple(available)
    names = [name for name in CATALOGUE if name in available and runs_as(name) == name]
    policies = {name: uniform(name, graph.units, available) for name in names}
    rng = random.Random(0)
    for number in range(MIXED):
        choice = {unit.name: rng.choice([name for name in candidates(unit, available) if name in names]) for unit in graph.units}
        policies[f"mixed-{number}"] = Policy.of(choice)
    made = []
    for place, (name, policy) in enumerate(policies.items()):
        layers = _depth(graph, policy, cache_bytes, stretch=1 + place % 2 / 2)
        kept = {unit.name for unit in units_within(graph.units, layers)}
        made.append(Anchor(name, Policy.of({unit: kernel for unit, kernel in policy.items() if unit in kept}), layers))
        if name in WEIGHED_WHOLE and layers < graph.layers:
            made.append(Anchor(name, policy, graph.layers, timed=False))
    return made


def _depth(graph: Graph, policy: Policy, cache_bytes: int, stretch: float) -> int:
    """Layers whose weights are twice the last-level cache, times `stretch` (differing depths tell a layer's part of the remainder).

    An encoder-decoder is measured whole: its two stacks would have to be cut alike, and `keep_layers` cuts one.
    """
    if graph.kind == "encoder-decoder":
        return graph.layers
    sizes = {unit.name: packed_bytes(unit, CATALOGUE[policy[unit.name]]) for unit in graph.units if unit.op != "Gather"}
    if sum(sizes.values()) <= cache_bytes:
        return graph.layers
    inside = sum(sizes[unit.name] for unit in graph.units if unit.name in sizes and layer_of(unit) is not None)
    outside = sum(sizes.values()) - inside
    wanted = max(FEWEST_LAYERS, (2 * cache_bytes - outside) / (inside / graph.layers)) * stretch
    return min(graph.layers, int(np.ceil(wanted)))


def points(graph: Graph, workload: Workload, everywhere: bool) -> list[Phase]:
    """The phases to time: the workload's, or also those around them that show how the remainder grows with tokens and context."""
    if not everywhere:
        return list(workload.phases)
    found = []
    for phase in workload.phases:
        if phase.name == "decode":
            furthest = min(graph.context - _LAST_STEPS, max(512, 4 * phase.past))
            pasts = {phase.past, furthest, *(past for past in _PASTS if past < furthest)}
            # Elsewhere the prompt has the same share of the past as in the workload.
            shares = {past: max(1, phase.prompt * past // phase.past) for past in sorted(pasts) if past > 0}
            found += [Phase("decode", 1, 1, past, prompt) for past, prompt in shares.items()]
        else:
            most = max(grid(phase.in_flight, phase.batch * graph.context)) // phase.batch
            counts = {count for count in GRID if count <= min(most, graph.context) and phase.batch * count >= min(GRID)}
            found += [Phase(phase.name, phase.batch, count) for count in sorted({phase.tokens, *counts})]
    return found


@dataclass(frozen=True)
class Wanted:
    """What one anchor lacks in the table: points to time, token counts to weigh."""

    anchor: Anchor
    times: tuple[Phase, ...]
    memory: tuple[int, ...]


def missing(graph: Graph, workload: Workload, table: CostTable) -> list[Wanted]:
    """The anchors with rows that the table lacks or holds as not valid."""
    available = table.header.kernels
    everywhere = next((name for name in EVERYWHERE if name in available), "")
    wanted = []
    for anchor in anchors(graph, available, table.header.cache_bytes):
        phases = points(graph, workload, anchor.name == everywhere)
        timed = phases if anchor.timed else []
        times = [phase for phase in timed if not getattr(table.rows.get(_key(graph, anchor, phase)), "valid", False)]
        counts = sorted({phase.tokens for phase in phases if phase.name != "decode"})
        memory = [count for count in counts if _memory_key(graph, anchor, workload, count) not in table.rows]
        if times or memory:
            wanted.append(Wanted(anchor, tuple(times), tuple(memory)))
    return wanted


def _key(graph: Graph, anchor: Anchor, phase: Phase) -> tuple[Any, ...]:
    return ("model", graph.fingerprint, phase.name, phase.batch, phase.tokens, phase.past, anchor.layers, anchor.name)


def _memory_key(graph: Graph, anchor: Anchor, workload: Workload, tokens: int) -> tuple[Any, ...]:
    capacity = tokens + workload.new_tokens
    return ("model memory", graph.fingerprint, workload.batch, tokens, capacity, anchor.layers, anchor.name)


def time(host: Host, graph: Graph, cache_bytes: int, wanted: Sequence[Wanted]) -> tuple[list[Row], References]:
    """(rows not yet corrected for drift, the references' times meanwhile): all anchors in rotation in one process."""
    rows: list[Row] = []
    with _packages(graph, wanted) as folders:
        subjects = [subject(graph, item.anchor.name, folders[item.anchor.name], item.times) for item in wanted]
        answer = host.time(subjects, WINDOWS)
    trials = levelled(answer["trials"])
    for item in wanted:
        kind = working_set_of(units_within(graph.units, item.anchor.layers), item.anchor.policy, cache_bytes)
        for phase in item.times:
            seen = summarise((trial[label(phase)] / 1e6 for trial in trials[item.anchor.name]), answer["valid"])
            assert seen.value is not None
            assert seen.spread is not None
            rows.append(
                ModelRow(
                    model=graph.fingerprint,
                    phase=phase.name,
                    batch=phase.batch,
                    tokens=phase.tokens,
                    past=phase.past,
                    layers=item.anchor.layers,
                    policy=item.anchor.name,
                    units=dict(item.anchor.policy),
                    working_set=kind,
                    latency_ms=seen.value,
                    spread_ms=seen.spread,
                    n=seen.n,
                    valid=seen.valid,
                )
            )
    return rows, answer["reference_ns"]


def weigh(host: Host, graph: Graph, workload: Workload, wanted: Wanted) -> list[Row]:
    """Memory rows of one anchor, each from a fresh process."""
    rows: list[Row] = []
    anchor = wanted.anchor
    with _packages(graph, [wanted]) as folders:
        for tokens in wanted.memory:
            capacity = tokens + workload.new_tokens
            phases = [Phase("encode" if graph.kind == "encoder" else "prefill", workload.batch, tokens)]
            if graph.kind == "decoder":  # decoding has buffers of its own: 3% of the pocket model's peak
                past = max(1, min(tokens + workload.new_tokens // 2, graph.context - _LAST_STEPS))
                phases.append(Phase("decode", 1, 1, past, min(tokens, past)))
            seen = host.peak({**subject(graph, anchor.name, folders[anchor.name], phases), "capacity": capacity})
            row = ModelMemoryRow(
                model=graph.fingerprint,
                batch=workload.batch,
                tokens=tokens,
                capacity=capacity,
                layers=anchor.layers,
                policy=anchor.name,
                units=dict(anchor.policy),
                peak_bytes=float(seen["peak_bytes"]),
                running_bytes=float(seen["running_bytes"]),
            )
            rows.append(row)
    return rows


def label(phase: Phase) -> str:
    return f"{phase.name}@{phase.tokens}+{phase.past}"


def subject(graph: Graph, name: str, folder: Path, phases: Iterable[Phase]) -> dict[str, Any]:
    """The agent's description of a model and the phases to run it in."""
    described = [
        {"label": label(phase), "batch": phase.batch, "tokens": phase.tokens, "past": phase.past, "prompt": phase.prompt}
        for phase in phases
    ]
    return {"name": name, "kind": f"{graph.kind} phases", "folder": str(folder), "phases": described, "rows": graph.vocabulary}


@contextmanager
def _packages(graph: Graph, wanted: Iterable[Wanted]) -> Iterator[dict[str, Path]]:
    with scratch() as folder:
        folders = {}
        for item in wanted:
            place = folders[item.anchor.name] = folder / item.anchor.name
            place.mkdir()
            assemble(graph, item.anchor.policy, drawn, place, item.anchor.layers, sync=False)
        yield folders
