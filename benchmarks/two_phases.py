"""What does a kernel of two phases gain, and what does it cost? `w4g32+w8a8` decodes with 4 bits, prefills with int8, and stores both.

    python benchmarks/two_phases.py [--work DIR] [--rounds 10] [--model FOLDER]

* whole model: packages of a random Llama of 336M parameters (weights do not change the time), or of --model. Every linear has the kernel
  named; embedding and head, which see one token at a time, have the one it decodes with (under w8a8 the embedding has w8g32). First
  token of a prompt of 64 and of 256 tokens, decode around position 80, peak memory of a fresh process (its rise over a bare runtime),
  bytes of the package.
* one unit: a 1024 × 2816 linear at 1 and at 64 tokens, with as many copies as it takes to stream far more than the last-level cache. What
  the `If` costs is the time of the kernel of two phases less that of the part that runs.

The profiler's own agent measures: all packages take turns in one process and on one thread pool, windows in which others used the CPU
are dropped and repeated, memory is the median of three fresh processes. A round is one clean window; fewer than five are made five.
Printed are medians, and in brackets the 10th to 90th percentile of the rounds; ratios are to w4g32 in the same round, below 1 is less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from decode_speed import random_llama
from roofline_subjects import UNIT, far_beyond_cache

from toolchain import hardware
from toolchain.commands.workflow import opened
from toolchain.files import scratch
from toolchain.graph.assemble import assemble, package_bytes
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import drawn, random_weights, write_one_unit
from toolchain.hardware import thread_count
from toolchain.kernels import CATALOGUE, parts, uniform
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import MEMORY_TRIALS
from toolchain.profiler.model_rows import label, subject
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import TOKEN, Phase, Policy

BASE = "w4g32"
POLICIES = (BASE, "w4g128", "w8a8", "w4g32+w8a8", "w4g128+w8a8")
PHASES = {
    "first token of 64, ms": Phase("prefill", 1, 64),
    "first token of 256, ms": Phase("prefill", 1, 256),
    "decode, ms per token": Phase("decode", 1, 1, past=80, prompt=64),
}
ONE_UNIT, TOKENS = (BASE, "w8a8", "w4g32+w8a8"), (1, 64)


@contextlib.contextmanager
def opened_graph(folder: Path) -> Iterator[Graph]:
    """The graph of a checkpoint, or of a folder that is one already."""
    with contextlib.nullcontext() if (folder / "graph.json").is_file() else opened(str(folder)) as source:
        yield source.graph if source else Graph.open(folder)


def llama(work: Path) -> Path:
    """The random checkpoint: the folder `llama` in the work folder is taken as it is, if there is one."""
    if not (work / "llama").exists():
        work.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()):
            random_llama(work / "llama")
    return work / "llama"


def cell(values: np.ndarray, digits: str = ".1f") -> str:
    """Median (10th to 90th percentile)."""
    low, high = np.percentile(values, [10, 90])
    return f"{np.median(values):{digits}} ({low:{digits}} to {high:{digits}})"


def table(*rows: tuple[object, ...]) -> str:
    """Markdown; the first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def policy(name: str, graph: Graph) -> Policy:
    """`name` on the linears; embedding and head as if it had one phase."""
    rest = uniform(parts(CATALOGUE[name])[0].name, graph.units)
    return Policy.of({unit.name: name if unit.role == "linear" else rest[unit.name] for unit in graph.units})


def packages(graph: Graph, host: Host, rounds: int) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """({package: {what: one value per round, memory and bytes one in all}}, how disturbed it was)."""
    seen: dict[str, dict[str, np.ndarray]] = {}
    with scratch() as folder:
        subjects = {}
        for name in POLICIES:
            (folder / name).mkdir()
            assemble(graph, policy(name, graph), drawn, folder / name, sync=False)
            subjects[name] = subject(graph, name, folder / name, PHASES.values())
        answer = host.time(list(subjects.values()), rounds)
        for name, what in subjects.items():
            trials = answer["trials"][name]
            seen[name] = {head: np.array([trial[label(phase)] for trial in trials]) / 1e6 for head, phase in PHASES.items()}
            peaks = [host.peak(what)["peak_bytes"] for _ in range(MEMORY_TRIALS)]
            seen[name]["peak MB"] = np.array([np.median(peaks)]) / 1e6
            seen[name]["package MB"] = np.array([package_bytes(graph, policy(name, graph))]) / 1e6
    return seen, disturbance(answer)


def disturbance(answer: dict[str, Any]) -> str:
    state = "" if answer["valid"] else "; NOT VALID: others used the CPU"
    return f"{len(answer['reference_ns'][TOKEN])} interleaved rounds, {answer['dropped']} more dropped{state}"


def one_unit(host: Host, rounds: int) -> tuple[dict[tuple[str, int], np.ndarray], int, str]:
    """({(kernel, tokens): µs per unit in each round}, copies, how disturbed it was)."""
    copies = ceil(far_beyond_cache() / packed_bytes(UNIT, CATALOGUE[BASE]))
    with scratch() as folder:
        subjects = []
        for name in ONE_UNIT:
            (folder / name).mkdir()
            write_one_unit(UNIT, CATALOGUE[name], random_weights(UNIT, CATALOGUE[name]), copies, folder / name)
            what = {"kind": "unit", "folder": str(folder / name), "rows": UNIT.N}
            subjects += [{**what, "name": f"{name}@{tokens}", "tokens": tokens} for tokens in TOKENS]
        answer = host.time(subjects, rounds)
    pairs = [(name, tokens) for tokens in TOKENS for name in ONE_UNIT]
    trials = {pair: answer["trials"][f"{pair[0]}@{pair[1]}"] for pair in pairs}
    return (
        {pair: np.array([trial["run_ns"] for trial in seen]) / copies / 1e3 for pair, seen in trials.items()},
        copies,
        disturbance(answer),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep the random checkpoint here (0.7 GB) instead of in a temporary folder")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a decoder instead of the random Llama")
    arguments = parser.parse_args()
    device = hardware.load("local")
    host = Host(device, thread_count(device))
    about = host.identify()
    with (
        tempfile.TemporaryDirectory() as temporary,
        opened_graph(arguments.model or llama(arguments.work or Path(temporary))) as graph,
    ):
        seen, state = packages(graph, host, arguments.rounds)
        model = f"{graph.architecture} of {sum(unit.parameters for unit in graph.units if not unit.tied_to) / 1e6:.0f}M parameters"
    print(f"{about['cpu']}, {host.threads} threads, {about['runtime']}\n\n{model}: {state}\n")
    heads = list(seen[BASE])

    def shown(values: np.ndarray, digits: str) -> str:
        return cell(values, digits) if len(values) > 1 else f"{values[0]:{digits}}"

    print(table(("package", *heads), *((name, *(shown(row[head], ".4g") for head in heads)) for name, row in seen.items())))
    ratios = ((name, *(shown(row[head] / seen[BASE][head], ".3f") for head in heads)) for name, row in seen.items() if name != BASE)
    print(table((f"ratio to {BASE}", *heads), *ratios))

    times, copies, state = one_unit(host, arguments.rounds)
    print(f"one unit of {UNIT.K} × {UNIT.N}, {copies} copies: {state}\n")
    rows = [(name, tokens, cell(took), cell(took / times[BASE, tokens], ".3f")) for (name, tokens), took in times.items()]
    print(table(("unit", "tokens", "µs", f"ratio to {BASE}"), *rows))
    both = ONE_UNIT[-1]
    for tokens, part in zip(TOKENS, parts(CATALOGUE[both]), strict=True):
        price = times[both, tokens] - times[part.name, tokens]
        print(f"{both} with {tokens} in flight: {cell(price)} µs more than {part.name} alone")


if __name__ == "__main__":
    main()
