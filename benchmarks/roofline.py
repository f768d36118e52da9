"""What stands between decoding at 4 and 8 bits and the memory's speed?

    python benchmarks/roofline.py [--work DIR] [--rounds 15] [--threads 2]

One token needs every weight once, so the weights' bytes over the memory's speed are the least time that a step can take.

* readers: how fast this machine reads memory, from at least 160 MB and five times the last-level cache. numpy's max and dot, one array
  per thread, and onnxruntime's own fp32 MatMul of one row. The fastest by its median is what all else is a share of.
* units: one 1024 × 2816 linear under each kernel at one token, with as many copies as it takes to stream those bytes; MatMulNBits also
  without zero points, to show what they cost. GB/s is of packed weights: codes, scales and zero points. "Held" is what the runtime keeps
  for them in memory of its own, over packed: MatMulNBits packs anew and adds a sum per group, and that is what it streams.
* whole model: decode of a random Llama of 336M parameters (weights do not change the time) at position 64, and where a step's time goes.
  Operators: from onnxruntime's profiler, which works inside a node's time too: what its cheapest node takes, a shape or a sign of one
  number, is taken off every node. Dispatch: as many nodes of a graph whose nodes have nothing to do. Our loop (bindings, argmax): what
  a step takes beyond its run. None of them is what the others leave over, so their sum over the step shows how far to trust them.

Everything takes turns in one process and on one thread pool, the order reversed every round, the models with the profiler on as well.
Before each turn the pool is given time to fall asleep; then one run is untimed, and the median of nine counts. A round in which others
used more than a tenth of the CPU is repeated, up to three times as many rounds as asked; the quietest are kept. Shares and ratios are of
the same round. Printed are medians, and in brackets the 10th to 90th percentile of the rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
from roofline_subjects import (
    MODELS,
    SYMMETRIC_TOO,
    WHOLE,
    WITHOUT,
    Subject,
    decoders,
    far_beyond_cache,
    idle_nodes,
    operators,
    readers,
    timed_runs,
    units,
)
from threadpoolctl import threadpool_limits
from two_phases import cell, llama, opened_graph, table

from toolchain.profiler.contention import Watch
from toolchain.profiler.machine import cpu_name, last_level_cache_bytes

RUNS, QUIET, SMALL = 9, 0.1, 0.005
IDLE = "idle nodes"
PAUSE_SECONDS = 0.1
"""After a run onnxruntime's idle pool was seen to spin for 45 ms: it must not take the next one's cores."""


def measure(subjects: Mapping[str, Subject], rounds: int) -> tuple[dict[str, np.ndarray], list[int], str]:
    """({subject: seconds per run in each kept round}, which rounds those are, how quiet it was)."""
    tried: list[tuple[float, dict[str, float]]] = []
    while len(tried) < 3 * rounds and sum(others <= QUIET for others, _ in tried) < rounds:
        watch = Watch()
        seen = {name: _seconds(subjects[name]) for name in list(subjects)[:: -1 if len(tried) % 2 else 1]}
        tried.append((watch.usage().others or 0.0, seen))
        print(f"round {len(tried)}: others used {tried[-1][0]:.0%} of the CPU", file=sys.stderr)
    kept = sorted(range(len(tried)), key=lambda number: tried[number][0])[:rounds]
    quiet = f"{len(kept)} of {len(tried)} rounds kept, others used at most {tried[kept[-1]][0]:.0%} of the CPU"
    return {name: np.array([tried[number][1][name] for number in kept]) for name in subjects}, kept, quiet


def _seconds(subject: Subject) -> float:
    time.sleep(PAUSE_SECONDS)
    subject.run()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subject.run()
        times.append(time.perf_counter() - start)
    return median(times)


def breakdown(
    spent: dict[str, np.ndarray], nodes: Counter[str], dispatch: np.ndarray, loop: np.ndarray, step: np.ndarray, least: np.ndarray
) -> str:
    """Where a step's seconds go. spent: by operator, as the profiler says; least: what the fastest reader takes for the weights."""
    own = np.min([spent[what] / count for what, count in nodes.items()], axis=0)
    took = {what: spent[what] - count * own for what, count in nodes.items()}
    large = sorted((what for what in took if np.median(took[what] / step) >= SMALL), key=lambda what: -np.median(took[what]))
    small = [what for what in took if what not in large]
    rows = [(what, nodes[what], took[what]) for what in large]
    rows.append((f"{len(small)} others", sum(nodes[what] for what in small), sum(took[what] for what in small)))
    rows += [("dispatch", nodes.total(), dispatch), ("our loop", 1, loop)]
    rows.append(("sum", nodes.total(), sum(seconds for _, _, seconds in rows)))
    lines = [
        (what, count, cell(seconds * 1e6, ".0f"), f"{np.median(seconds) / count * 1e6:.1f}", cell(seconds / step, ".3f"))
        for what, count, seconds in rows
    ]
    return (
        f"{table(('operator', 'nodes', 'µs per step', 'µs per node', 'share of a step'), *lines)}\n"
        f"MatMulNBits alone reads at {cell(least / took['MatMulNBits'], '.2f')} of the fastest; "
        f"{cell(own * 1e6)} µs were taken off every node.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep the checkpoint here (0.7 GB) instead of in a temporary folder")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    onnxruntime.set_global_thread_pool_sizes(arguments.threads, 1)
    size = far_beyond_cache()
    # One thread per array is all that BLAS may have: its own would double them.
    with tempfile.TemporaryDirectory() as temporary, threadpool_limits(1, user_api="blas"):
        with opened_graph(llama(arguments.work or Path(temporary))) as graph:
            whole, sessions = decoders(graph, Path(temporary))
        read, one = readers(size, arguments.threads), units(size)
        subjects = {**read, **one, **whole, IDLE: idle_nodes()}
        seconds, kept, quiet = measure(subjects, arguments.rounds)
        traces = {name: operators(Path(watched.end_profiling()), kept, RUNS) for name, (_, watched) in sessions.items()}
    speed = {name: subject.bytes / seconds[name] / 1e9 for name, subject in subjects.items()}
    fastest = max([*read, "fp32"], key=lambda name: float(np.median(speed[name])))
    share = {name: speed[name] / speed[fastest] for name in subjects}
    cache = last_level_cache_bytes() / 1e6
    print(
        f"{cpu_name()}, {arguments.threads} threads, last-level cache {cache:.0f} MB, onnxruntime {onnxruntime.__version__}; {quiet}\n"
    )

    rows = [(name if name in read else "onnxruntime MatMul, fp32", name) for name in (*read, "fp32")]
    lines = [(label, f"{subjects[name].bytes / 1e6:.0f}", cell(speed[name]), cell(share[name], ".2f")) for label, name in rows]
    print(table(("reader", "MB", "GB/s", "share of the fastest"), *lines))

    lines = []
    for name, unit in one.items():
        took, held = seconds[name] / unit.copies * 1e6, unit.held / unit.bytes
        numbers = (cell(took), cell(speed[name]), cell(share[name], ".2f"), f"{held:.2f}", f"{np.median(share[name]) * held:.2f}")
        lines.append((name, f"{unit.copies} × {unit.bytes / unit.copies / 1e6:.2f}", *numbers))
    head = (
        "unit at one token",
        "copies × MB",
        "µs per unit",
        "GB/s packed",
        "share of the fastest",
        "held / packed",
        "share by bytes held",
    )
    print(table(head, *lines))
    for name in SYMMETRIC_TOO:
        print(f"zero points: {name} takes {cell(seconds[name] / seconds[WITHOUT.format(name)], '.3f')} times as long as without")

    lines = []
    for name in MODELS:
        label = WHOLE.format(name)
        rest = seconds[label] * (1 - share[label]) * 1e3
        numbers = (cell(seconds[label] * 1e3, ".2f"), cell(speed[label]), cell(share[label], ".2f"), cell(rest, ".2f"))
        lines.append((name, f"{whole[label].bytes / 1e6:.0f}", *numbers))
    head = (
        "whole model, decode",
        "packed MB per token",
        "ms per token",
        "GB/s packed",
        "share of the fastest",
        "ms beyond it",
    )
    print("\n" + table(head, *lines))

    for name, (timed, _) in sessions.items():
        step = seconds[WHOLE.format(name)]
        spent, nodes = traces[name]
        run = np.array([median(run) for run in timed_runs(timed.seconds, kept, RUNS)])
        dispatch = seconds[IDLE] / subjects[IDLE].copies * nodes.total()
        text = breakdown(spent, nodes, dispatch, step - run, step, step * share[WHOLE.format(name)])
        print(f"{name}, a step by operator:\n\n{text}")


if __name__ == "__main__":
    main()
