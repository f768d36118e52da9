"""Rows of whole models ("anchors"): a few policies measured end to end, so that what the units' sum leaves over becomes known.

Owns which policies those are, at which points of (tokens, past), and how deep the model is cut. A deep model is cut to its first layers,
as many as it takes to stream from memory as the whole one does, so that the time of a profile grows with shapes, hardly with layers; a few
stay whole and tell the level. Weights are drawn: their values do not change a kernel's time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from toolchain.costs.bounds import bound_of_phase
from toolchain.costs.operations import working_set_of
from toolchain.costs.rows import ModelMemoryRow, ModelRow, Row
from toolchain.costs.table import CostTable
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
WHOLE = ("mixed-0", "mixed-1", "mixed-2")
FEWEST_LAYERS = 4
SESSIONS, WINDOWS = 3, 5
EVERYWHERE = ("w8g32", "w4g32", "fp32", "w8g32-fp16", "w4g32-fp16", "fp16")
"""The first of these that the device has is measured at all points, the other policies at the workload's own."""
_PASTS = (16, 128, 512, 2048)
_LAST_STEPS = 8
"""Positions at the end of the context that are left to the steps timed around a point."""


@dataclass(frozen=True)
class Anchor:
    """A policy of the first `layers` layers, embedding and head."""

    name: str
    policy: Policy
    layers: int

    @property
    def label(self) -> str:
        return f"{self.name} of {self.layers} layers"


def anchors(graph: Graph, available: Iterable[str], cache_bytes: int) -> list[Anchor]:
    """Every kernel on all units, and mixed policies drawn with a fixed seed, each as deep as it must be.

    Where that is not the whole depth, a few mixed ones also whole: an error in what a layer adds is multiplied on the way from few to many.
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
        if name in WHOLE and layers < graph.layers:
            made.append(Anchor(name, policy, graph.layers))
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
        times = [phase for phase in phases if not getattr(table.rows.get(_key(graph, anchor, phase)), "valid", False)]
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


class Packages:
    """The anchors' packages below a folder, each made when it is first asked for."""

    def __init__(self, graph: Graph, folder: Path) -> None:
        self.graph, self.folder = graph, folder

    def of(self, anchor: Anchor) -> Path:
        place = self.folder / anchor.label
        if not place.exists():
            place.mkdir(parents=True)
            assemble(self.graph, anchor.policy, drawn, place, anchor.layers, sync=False)
        return place


class Sessions:
    """The time of whole models, from SESSIONS processes that lie apart: windows of one process agree with each other, two processes do not.

    Where a model's memory comes to lie, who runs before it, what the neighbours of this machine are up to: that stays as it is while a
    process lives (`benchmarks/sessions.py`). Sessions that others disturbed are left out where two are left.
    """

    def __init__(self, host: Host, graph: Graph, cache_bytes: int, wanted: Sequence[Wanted], packages: Packages) -> None:
        self.host, self.graph, self.cache_bytes, self.packages = host, graph, cache_bytes, packages
        self.wanted = list(wanted)
        self.answers: list[dict[str, Any]] = []

    def time(self) -> tuple[list[Row], References]:
        """One more session: all models in rotation, in another order. (rows at the speed of the first session, its references) after the
        last one, nothing before."""
        order = list(self.wanted)
        random.Random(len(self.answers)).shuffle(order)
        subjects = [subject(self.graph, item.anchor.label, self.packages.of(item.anchor), item.times) for item in order]
        answer = self.host.time(subjects, WINDOWS)
        self.answers.append({**answer, "trials": levelled(answer["trials"])})
        if len(self.answers) < SESSIONS:
            return [], {}
        clean = [answer for answer in self.answers if answer["valid"]]
        valid = len(clean) >= min(2, SESSIONS)
        used = clean if valid else self.answers
        return self._rows(used, valid), used[0]["reference_ns"]

    def _rows(self, answers: Sequence[dict[str, Any]], valid: bool) -> list[Row]:
        rows: list[Row] = []
        first = answers[0]["reference_ns"]
        for item in self.wanted:
            for phase in item.times:
                run_ms = median(trial[label(phase)] for trial in answers[0]["trials"][item.anchor.label]) / 1e6
                kind, bound = bound_of_model(self.host, self.graph, item.anchor, phase, self.cache_bytes, run_ms, first)
                sessions = []
                for answer in answers:
                    speed = median(first[bound]) / median(answer["reference_ns"][bound]) / 1e6
                    sessions.append([trial[label(phase)] * speed for trial in answer["trials"][item.anchor.label]])
                seen = summarise((trial for trials in sessions for trial in trials), valid)
                assert seen.spread is not None
                rows.append(
                    ModelRow(
                        model=self.graph.fingerprint,
                        phase=phase.name,
                        batch=phase.batch,
                        tokens=phase.tokens,
                        past=phase.past,
                        layers=item.anchor.layers,
                        policy=item.anchor.name,
                        units=dict(item.anchor.policy),
                        working_set=kind,
                        latency_ms=mean(median(trials) for trials in sessions),
                        spread_ms=seen.spread,
                        n=seen.n,
                        valid=seen.valid,
                        bound=bound,
                    )
                )
        return rows


def bound_of_model(
    host: Host, graph: Graph, anchor: Anchor, phase: Phase, cache_bytes: int, run_ms: float, references: References
) -> tuple[str, str]:
    """(its working set, what bounds one run of the phase that took so long while the references took theirs)."""
    units = units_within(graph.units, anchor.layers)
    kind = working_set_of(units, anchor.policy, cache_bytes)
    meanwhile = {work: median(times) for work, times in references.items()}
    return kind, bound_of_phase(units, anchor.policy, phase, kind, run_ms, meanwhile, host.device.provider)


def weigh(host: Host, graph: Graph, workload: Workload, wanted: Wanted, packages: Packages) -> list[Row]:
    """Memory rows of one anchor, each from a fresh process."""
    rows: list[Row] = []
    anchor = wanted.anchor
    for tokens in wanted.memory:
        capacity = tokens + workload.new_tokens
        phases = [Phase("encode" if graph.kind == "encoder" else "prefill", workload.batch, tokens)]
        if graph.kind == "decoder":  # decoding has buffers of its own: 3% of the pocket model's peak
            past = max(1, min(tokens + workload.new_tokens // 2, graph.context - _LAST_STEPS))
            phases.append(Phase("decode", 1, 1, past, min(tokens, past)))
        seen = host.peak({**subject(graph, anchor.label, packages.of(anchor), phases), "capacity": capacity})
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
