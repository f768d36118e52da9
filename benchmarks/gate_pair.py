"""Two copies of a package that differ in one unit's kernel and are 8% apart, for `gate.py baseline`.

How far apart two graphs are is known only by many processes: where a process puts its memory moves a model of a megabyte by several
percent, whatever is timed within it. So every kernel of the unit with most multiplications is measured in processes in turn, ROUNDS[0] of
each; the kernels of the SHORTLIST of pairs nearest to 8% go on to ROUNDS[1]. Then the nearest pair is measured anew, since luck chose it,
too: ROUNDS[2] of each in turn. If its ratio is not within NEAR of 8%, or its interval is wider than WIDE on either side, it is put aside
for the next; no pair left: the next shape.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gate_report import slower

from toolchain.blocks import Block
from toolchain.files import write_atomic
from toolchain.graph.assemble import Weights, assemble, round_to_nearest
from toolchain.graph.model import Graph
from toolchain.kernels import candidates
from toolchain.package.manifest import Package, open_package, write_manifest
from toolchain.profiler.probe import working_kernels
from toolchain.spec import Policy, Unit

SLOWER, NEAR, WIDE = 0.08, 0.02, 0.05
ROUNDS = (8, 24, 48)
"""Processes of each kernel: of all of them, of the shortlist, of the pair."""
SHORTLIST = 4


@dataclass(frozen=True)
class Apart:
    """How many times as long the slowed one takes, with its interval."""

    plain: str
    slowed: str
    ratio: float
    low: float
    high: float

    @property
    def off(self) -> float:
        return abs(self.ratio - 1 - SLOWER)


def pair_of(
    package: Package, graph: Graph, work: Path, measure: Callable[[Package], Block], changes: Mapping[str, Any]
) -> tuple[Path, Path]:
    """(plain, slowed), kept in `work`. Weights are the graph's, rounded to nearest; the manifest is the package's but for `changes`.

    Raises SystemExit where no swap of one unit comes near.
    """
    places, note = (work / "plain", work / "slowed"), work / "slowed.json"
    if note.is_file():
        return places
    shapes = {(unit.K, unit.N): unit for unit in graph.units if unit.op == "MatMul"}
    weights = round_to_nearest(graph)
    for unit in sorted(shapes.values(), key=lambda unit: unit.parameters, reverse=True):
        tries = {
            kernel: _made(package, graph, weights, unit, kernel, work, changes) for kernel in candidates(unit, working_kernels())
        }
        found, processes = _race(tries, measure)
        if found is not None:
            for place, name in zip(places, (found.plain, found.slowed), strict=True):
                shutil.rmtree(place, ignore_errors=True)
                tries[name].directory.rename(place)
            row = {"unit": unit.name, "from": found.plain, "to": found.slowed, "ratio": found.ratio, "low": found.low}
            write_atomic(note, json.dumps({**row, "high": found.high, "processes": processes}))
            shutil.rmtree(work / "tries")
            return places
        print(f"no swap of {unit.name}'s kernel makes this package about 8% slower", file=sys.stderr)
    raise SystemExit("no swap of one unit's kernel makes this package about 8% slower")


def _made(
    package: Package, graph: Graph, weights: Weights, unit: Unit, kernel: str, work: Path, changes: Mapping[str, Any]
) -> Package:
    folder = work / "tries" / kernel
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    swapped = Policy.of({**dict(package.policy), unit.name: kernel})
    assemble(graph, swapped, weights, folder, sync=False)
    for path in graph.companions():
        shutil.copyfile(path, folder / path.name)
    kept = {name: value for name, value in package.data.items() if name not in ("format", "files")}
    write_manifest(folder, {**kept, **changes, "policy": dict(swapped.items())}, graph.units)
    return open_package(folder)


Blocks = dict[str, list[Block]]
"""Of each kernel the processes so far."""


def _race(tries: Mapping[str, Package], measure: Callable[[Package], Block]) -> tuple[Apart | None, int]:
    """(the pair, or none, processes of each of the two)."""

    def measured(blocks: Blocks, names: Collection[str], rounds: int) -> None:
        while any(len(blocks[name]) < rounds for name in names):
            for name in names:
                if len(blocks[name]) < rounds:
                    blocks[name].append(measure(tries[name]))

    chosen: Blocks = {name: [] for name in tries}
    measured(chosen, tries, ROUNDS[0])
    left = sorted((_apart(pair, chosen) for pair in itertools.permutations(tries, 2)), key=lambda pair: pair.off)[:SHORTLIST]
    measured(chosen, {name for pair in left for name in (pair.plain, pair.slowed)}, ROUNDS[1])
    for pair in sorted((_apart((pair.plain, pair.slowed), chosen) for pair in left), key=lambda pair: pair.off):
        anew: Blocks = {pair.plain: [], pair.slowed: []}
        measured(anew, anew, ROUNDS[2])
        found = _apart((pair.plain, pair.slowed), anew)
        line = f"{found.plain} to {found.slowed}: {found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}] in {ROUNDS[2]} processes of each"
        print(f"{line}, {pair.ratio:.3f} when it was chosen", file=sys.stderr, flush=True)
        if found.off < NEAR and max(found.ratio - found.low, found.high - found.ratio) < WIDE:
            return found, ROUNDS[2]
    return None, 0


def _apart(pair: tuple[str, str], blocks: Blocks) -> Apart:
    plain, slowed = pair
    return Apart(plain, slowed, *slower(blocks[slowed], blocks[plain]))
