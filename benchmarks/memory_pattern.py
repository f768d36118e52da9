"""onnxruntime's memory patterns on and off: a fresh process's peak memory, and the time of a run, interleaved.

    python benchmarks/memory_pattern.py MODEL WORKLOAD [--policy w8a8 ...] [--rounds 60] [--threads 2]

A pattern is the plan of one block for all activations of a run; it is made in the first run of a shape and used from the second on,
beside what the first run left in the arena. Ratios are off / on: below 1 where doing without is better.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

from toolchain import session
from toolchain.commands.workflow import opened
from toolchain.graph.assemble import assemble
from toolchain.graph.oneunit import drawn
from toolchain.kernels import uniform
from toolchain.profiler import agent
from toolchain.profiler.measure import subject
from toolchain.profiler.subjects import SUBJECTS
from toolchain.spec import Workload


def weigh(described: dict, threads: int, pattern: bool) -> float:
    """Peak bytes in a process of its own."""
    request = json.dumps({"subject": described, "threads": threads})
    done = subprocess.run(
        [sys.executable, __file__, "--weigh", request, str(int(pattern))], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    if sys.argv[1:2] == ["--weigh"]:
        session.SESSION_OPTIONS["enable_mem_pattern"] = bool(int(sys.argv[3]))
        print(agent.peak(json.loads(sys.argv[2]))["peak_bytes"])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("workload", type=Workload.parse)
    parser.add_argument("--policy", nargs="*", default=["w8a8", "w4g32", "w8g128"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print("| policy | peak MB on | off | off / on | phase | ms on | off | off / on (10th to 90th percentile) |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, opened(arguments.model) as source:
        onnxruntime.set_global_thread_pool_sizes(arguments.threads, 1)  # only now: building the graph opens sessions of its own
        for name in arguments.policy:
            graph, place = source.graph, Path(folder) / name
            place.mkdir()
            assemble(graph, uniform(name, graph.units), drawn, place, sync=False)
            described = subject(name, place, arguments.workload, graph.vocabulary)
            peaks = {on: np.median([weigh(described, arguments.threads, on) for _ in range(3)]) for on in (True, False)}
            models = {}
            for on in (True, False):
                session.SESSION_OPTIONS["enable_mem_pattern"] = on
                models[on] = SUBJECTS[arguments.workload.kind](described, arguments.threads, True)
            times: dict[bool, list[dict[str, float]]] = {True: [], False: []}
            for turn in range(arguments.rounds + 2):
                for on in (True, False) if turn % 2 else (False, True):
                    times[on].append(models[on].trial())
            for phase in times[True][0]:
                on, off = (np.array([trial[phase] for trial in times[kind][2:]]) / 1e6 for kind in (True, False))
                low, middle, high = np.percentile(off / on, [10, 50, 90])
                memory = f"{peaks[True] / 1e6:.1f} | {peaks[False] / 1e6:.1f} | {peaks[False] / peaks[True]:.2f}"
                spread = f"{middle:.3f} ({low:.2f} to {high:.2f})"
                print(
                    f"| {name} | {memory} | {phase.removesuffix('_ns')} | {np.median(on):.3f} | {np.median(off):.3f} | {spread} |"
                )


if __name__ == "__main__":
    main()
