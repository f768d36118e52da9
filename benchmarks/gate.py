"""How often does `check` err? Its operating curve from 10% inside the limit to 10% outside, and what `--baseline` notices.

    python benchmarks/gate.py curve PACKAGE --work WORK --repeats 20 [--distances -10 10]        real checks, each its own command
    python benchmarks/gate.py baseline PACKAGE --graph GRAPH --work WORK --repeats 20             real checks against a real report
    python benchmarks/gate.py record PACKAGE --work WORK --processes 200                          processes, for replay
    python benchmarks/gate.py replay PACKAGE --work WORK --repeats 2000                           NOT real checks: see below
    python benchmarks/gate.py report --work WORK [--json]

In half of the runs another process loads one core. What is in WORK is not done again; --repeats says how many there are to be of each kind.

curve: `bittailor check --json` on a copy of PACKAGE whose limit is truth / (1 + distance), a budget derived from this machine at the speed
it had while the truth was first measured. The truth moves with the machine even at one speed: two undisturbed processes of the package are
measured before each check, and the middle of the last ANCHORS of all, brought to that speed as `check` brings its own, sets its limit; when
the runs are over the distance that counts is that to the middle of ANCHORS on both sides of the run. A run is wrong if it says "within"
and the package was over by that, or the reverse.
baseline: two copies of PACKAGE that differ in one unit's kernel and are 8% apart, chosen by processes in turn (`gate_pair.py`). The report
of the faster one is made once, with --least-seconds; then both are checked against it, and a process of each is measured in every turn,
so that the report can say how far apart they were meanwhile. Their limits are far away.
replay: recorded processes, in blocks of BLOCK consecutive ones from random places, are handed to the very decision that a check
makes, at each distance from their own middle. It repeats what was seen once, so drift of more than WORK's hour is not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from gate_pair import pair_of
from gate_report import ANCHORS, level_of, report, rows_of

from toolchain import hardware
from toolchain.blocks import PRIOR, Block, Share, Speed, at_speed, middle
from toolchain.check import hold_latency
from toolchain.commands.deciding import Patience, decide_in_looks
from toolchain.files import write_atomic
from toolchain.graph.model import Graph
from toolchain.package.manifest import Package, open_package, write_manifest
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import measure_block
from toolchain.spec import FINER, TOKEN, TOKENS, Verdict

DISTANCES = (-10, -7, -5, -3, -1, 1, 3, 5, 7, 10)
BLOCK = 6
FAR_MS = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (curve, baseline, record, replay, report):
        sub = commands.add_parser(run.__name__)
        sub.set_defaults(run=run)
        sub.add_argument("--work", type=Path, required=True)
        if run is report:
            sub.add_argument("--json", action="store_true")
            continue
        sub.add_argument("package", type=Path)
        if run is record:
            sub.add_argument("--processes", type=int, default=200)
            continue
        sub.add_argument("--repeats", type=int, default=20, help="runs per distance, or per package")
        sub.add_argument("--most-seconds", type=float, default=120.0)
        if run is baseline:
            sub.add_argument("--graph", type=Path, required=True, help="the package's fp32 graph, SUPERNET/graph")
            sub.add_argument("--least-seconds", type=float, default=60.0, help="of the report that is the baseline")
        else:
            sub.add_argument("--distances", type=int, nargs="+", default=DISTANCES, help="percent; negative: inside the limit")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.run(arguments)


class Bench:
    """This machine, a package, and the kind of work that brings its latency to one speed."""

    def __init__(self, package: Path, work: Path) -> None:
        self.package, self.work = open_package(package), work
        self.host = Host.of(hardware.load("local"))
        self.bound = FINER[TOKEN if self.package.workload.kind == "generate" else TOKENS]

    def block(self, package: Package | None = None) -> Block:
        package = package or self.package
        return measure_block(package.directory, package.workload, self.host, package.vocabulary)

    def undisturbed(self) -> Block:
        while not (block := self.block()).valid:
            print("others use the CPU: the process is measured again", file=sys.stderr)
        return block

    def speed(self) -> Speed:
        """The speed that all of WORK is brought to, and how the package is known to follow it. The reference's time is the middle of the
        first ANCHORS processes ever measured for it, since a profile, too, takes what the machine does most of the time."""
        path = self.work / "speed.json"
        if not path.is_file():
            write_atomic(path, json.dumps(median(median(self.undisturbed().reference_ns[self.bound]) for _ in range(ANCHORS))))
        known = self.follows().get("latency_ms")
        share = Share(known["share"], known["unknown"]) if known else PRIOR
        return Speed(self.bound, float(json.loads(path.read_text())), share)

    def follows(self) -> dict[str, Any]:
        """What the package says of that kind of work, as its manifest says it."""
        known = self.package.speeds.get("latency_ms")
        found = self.package.data.get("follows") or {}
        return {"latency_ms": found["latency_ms"]} if known and known.work == self.bound and "latency_ms" in found else {}


@contextmanager
def loaded(yes: bool) -> Iterator[None]:
    """Another process that takes one core, or none. It ends with this one, also if this one is killed."""
    if not yes:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def add(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def checked(package: Path, *words: str) -> tuple[dict[str, Any], float]:
    """(what the real command says, its seconds)."""
    start = time.time()
    command = [sys.executable, "-m", "toolchain.cli", "check", str(package), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 3):
        raise SystemExit(done.stderr)
    return json.loads(done.stdout), time.time() - start


def copy_of(package: Package, to: Path, **changes: Any) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(package.directory, to)
    kept = {name: value for name, value in package.data.items() if name not in ("format", "files")}
    write_manifest(to, {**kept, **changes}, tuple(package.units.values()))
    return to


def curve(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments.package, arguments.work)
    speed = bench.speed()
    here = bench.host.identify()
    machine = {name: here[name] for name in ("cpu", "runtime", "protocol")}
    machine |= {"threads": bench.host.threads, "provider": bench.package.provider}
    anchors, runs = arguments.work / "anchors.jsonl", arguments.work / "curve.jsonl"
    order = [(distance, turn) for turn in range(arguments.repeats) for distance in arguments.distances]
    random.Random(0).shuffle(order)
    done = {(row["distance"], row["turn"]) for row in rows_of(runs)}
    todo = [one for one in order if one not in done]
    for distance, turn in todo:
        while len(rows_of(anchors)) < ANCHORS:
            anchor(bench, anchors)
        for _ in range(2):
            anchor(bench, anchors)
        truth = level_of(rows_of(anchors)[-ANCHORS:], speed)
        budget = {"name": "promise", "latency_ms": truth / (1 + distance / 100)}
        reference = {"latency_ms": {speed.work: speed.ns}}
        changes = {"budget": budget, "reference_ns": reference, "follows": bench.follows(), "measured_on": machine}
        package = copy_of(bench.package, arguments.work / "copy", **changes)
        start = time.time()
        with loaded(bool(turn % 2)):
            said, seconds = checked(package, "--most-seconds", str(arguments.most_seconds))
        (verdict,) = said["limits"]
        row = {"distance": distance, "turn": turn, "load": bool(turn % 2), "t": start, "seconds": seconds, **said["decision"]}
        row |= {"work": speed.work, "speed_ns": speed.ns, "share": [speed.share.value, speed.share.unknown]}
        keep = {name: verdict[name] for name in ("verdict", "measured", "low", "high", "limit", "reason")}
        disturbed = sum(not block["valid"] for block in said["blocks"])
        add(runs, {**row, **keep, "disturbed": disturbed, "slowness": said["slowness"]["latency_ms"]})
        print(
            f"{distance:+d}% {'load' if turn % 2 else 'idle'}: {verdict['verdict']} in {seconds:.0f} s", file=sys.stderr, flush=True
        )
    for _ in range(ANCHORS // 2 if todo else 0):
        anchor(bench, anchors)


def anchor(bench: Bench, path: Path) -> None:
    """One more undisturbed process of the package itself."""
    add(path, {"t": time.time(), "block": bench.undisturbed().to_json()})


def baseline(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments.package, arguments.work)
    far = {"budget": {"name": "custom", "latency_ms": FAR_MS}}
    plain, slowed = pair_of(bench.package, Graph.open(arguments.graph), arguments.work, bench.block, far)
    first = arguments.work / "baseline.json"
    if not first.is_file():
        said, _ = checked(plain, "--least-seconds", str(arguments.least_seconds))
        write_atomic(first, json.dumps(said))
    runs = arguments.work / "baseline.jsonl"
    done = {(row["package"], row["turn"]) for row in rows_of(runs)}
    for turn in range(arguments.repeats):
        if len(rows_of(arguments.work / "pair.jsonl")) <= turn:  # how far apart they are moves with what the neighbours do
            both = {place.name: bench.block(open_package(place)).to_json() for place in (plain, slowed)}
            add(arguments.work / "pair.jsonl", both)
        for package in (plain, slowed):
            if (package.name, turn) in done:
                continue
            with loaded(bool(turn % 2)):
                said, seconds = checked(package, "--baseline", str(first), "--most-seconds", str(arguments.most_seconds))
            verdict = next(one for one in said["limits"] if one["name"] == "latency_ms / baseline")
            row = {"package": package.name, "turn": turn, "load": bool(turn % 2), "seconds": seconds, **said["decision"]}
            add(runs, {**row, **{name: verdict[name] for name in ("verdict", "measured", "low", "high", "reason")}})
            print(
                f"{package.name}: {verdict['verdict']} ({verdict['measured']:.3f}) in {seconds:.0f} s", file=sys.stderr, flush=True
            )


def record(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments.package, arguments.work)
    bench.speed()
    path = arguments.work / "processes.jsonl"
    for turn in range(len(rows_of(path)), arguments.processes):
        load = bool(turn // BLOCK % 2)
        with loaded(load):
            start = time.time()
            block = bench.block()
        add(path, {"t": start, "seconds": time.time() - start, "load": load, **block.to_json()})


class Replayed:
    """Recorded processes of one condition, handed out in runs of BLOCK consecutive ones from random places; time goes by as it did."""

    def __init__(self, rows: Sequence[dict[str, Any]], rng: random.Random) -> None:
        self._rows, self._rng, self.now, self._left = rows, rng, 0.0, []

    def measure(self) -> Block:
        if not self._left:
            start = self._rng.randrange(len(self._rows))
            self._left = [self._rows[(start + place) % len(self._rows)] for place in range(BLOCK)]
        row = self._left.pop(0)
        self.now += row["seconds"]
        return Block.from_json(row)


def replay(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments.package, arguments.work)
    speed = bench.speed()
    rows, rng = rows_of(arguments.work / "processes.jsonl"), random.Random(0)
    truth = middle(at_speed([block for block in map(Block.from_json, rows) if block.valid], "latency_ms", speed)[0])
    path = arguments.work / "replay.jsonl"
    path.unlink(missing_ok=True)
    for distance in arguments.distances:
        for turn in range(arguments.repeats):
            load = bool(turn % 2)
            source = Replayed([row for row in rows if row["load"] == load], rng)
            limit = truth / (1 + distance / 100)

            def judge(blocks: Sequence[Block], look: int, limit: float = limit) -> list[Verdict]:
                return [hold_latency("latency_ms", limit, blocks, look, speed)]

            with contextlib.redirect_stderr(io.StringIO()):
                found = decide_in_looks(source.measure, judge, Patience(0, arguments.most_seconds), lambda s=source: s.now)
            row = {"distance": distance, "turn": turn, "load": load, "verdict": found.verdicts[0].verdict, **found.to_json()}
            add(path, row)


if __name__ == "__main__":
    main()
