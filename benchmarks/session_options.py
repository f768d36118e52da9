"""What onnxruntime's session options cost and gain: a fresh process's peak memory, and the time of a run, interleaved.

    python benchmarks/session_options.py MODEL WORKLOAD [--policy w8a8 ...] [--rounds 20] [--threads 2]

Every variant is a process of its own, and all take turns. Ratios are variant / as shipped of the same round: below 1 where the variant is
better. "As shipped" twice is the noise. A memory pattern is the plan of one block for all activations of a run; it is made in the first
run of a shape and used from the second on, beside what the first run left in the arena.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

from toolchain.commands.workflow import opened
from toolchain.graph.assemble import assemble
from toolchain.graph.oneunit import drawn
from toolchain.kernels import uniform
from toolchain.profiler import agent
from toolchain.profiler.measure import subject
from toolchain.profiler.subjects import SUBJECTS
from toolchain.session import SESSION_OPTIONS
from toolchain.spec import Workload

PAUSE_SECONDS = 0.1
"""An idle pool was seen to spin for 45 ms: it must not take the next process's cores."""


@dataclass(frozen=True)
class Variant:
    """What is set otherwise than we ship it: options by attribute, config entries, the process's environment."""

    attributes: dict[str, bool] = field(default_factory=dict)
    entries: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


VARIANTS = {
    "as shipped": Variant(),
    "as shipped, again": Variant(),
    "memory patterns": Variant({"enable_mem_pattern": True}),
    "no arena": Variant({"enable_cpu_mem_arena": False}),
    "weights outside the arena": Variant(entries={"session.use_device_allocator_for_initializers": "1"}),
    "no spinning": Variant(entries={"session.intra_op.allow_spinning": "0"}),
    "blocks of work by 4": Variant(entries={"session.dynamic_block_base": "4"}),
    "second thread pinned": Variant(entries={"session.intra_op_thread_affinities": "2"}),
    "denormals are zero": Variant(entries={"session.set_denormal_as_zero": "1"}),
    "no flash attention": Variant(environment={"ORT_GQA_DISABLE_FLASH_ATTENTION": "1"}),
    "huge pages": Variant(environment={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
}


def worker(described: dict, threads: int, variant: Variant) -> None:
    """Print the peak; then, per line on stdin, one trial."""
    options = onnxruntime.SessionOptions

    class Varied(options):
        def __init__(self) -> None:
            super().__init__()
            for key, value in variant.entries.items():
                self.add_session_config_entry(key, value)

    onnxruntime.SessionOptions = Varied
    SESSION_OPTIONS.update(variant.attributes)
    print(agent.peak({"subject": described, "threads": threads})["peak_bytes"], flush=True)
    running = SUBJECTS[described["kind"]](described, threads, False)
    for _ in sys.stdin:
        print(json.dumps(running.trial()), flush=True)


class Process:
    """A variant's process: its peak bytes, and a trial when asked."""

    def __init__(self, described: dict, threads: int, name: str) -> None:
        command = [sys.executable, __file__, "--worker", json.dumps([described, threads, name])]
        environment = os.environ | VARIANTS[name].environment
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.peak_bytes = float(self._process.stdout.readline())

    def trial(self) -> dict[str, float]:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def measured(described: dict, threads: int, rounds: int) -> tuple[dict[str, float], dict[str, list[dict[str, float]]]]:
    """(peak bytes, trials) of every variant."""
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in VARIANTS:
            processes[name] = Process(described, threads, name)
            stack.callback(processes[name].close)
        trials: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
        for turn in range(rounds + 1):  # the first warms up
            for name in list(processes)[:: -1 if turn % 2 else 1]:
                time.sleep(PAUSE_SECONDS)
                trials[name].append(processes[name].trial())
        return {name: process.peak_bytes for name, process in processes.items()}, trials


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        described, threads, name = json.loads(sys.argv[2])
        worker(described, threads, VARIANTS[name])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("workload", type=Workload.parse)
    parser.add_argument("--policy", nargs="*", default=["w8a8", "w4g128"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, opened(arguments.model) as source:
        for name in arguments.policy:
            place = Path(folder) / name
            place.mkdir()
            assemble(source.graph, uniform(name, source.graph.units), drawn, place, sync=False)
            described = subject(name, place, arguments.workload, source.graph.vocabulary)
            peaks, trials = measured(described, arguments.threads, arguments.rounds)
            phases = list(trials["as shipped"][0])
            named = [phase.removesuffix("_ns") for phase in phases]
            print(f"\n| {name} | peak MB | ratio | {' | '.join(f'{phase} ms | ratio' for phase in named)} |")
            print("|---" * (3 + 2 * len(phases)) + "|")
            for variant, peak in peaks.items():
                cells = [f"{peak / 1e6:.1f}", f"{peak / peaks['as shipped']:.2f}"]
                for phase in phases:
                    here, base = (
                        np.array([trial[phase] for trial in trials[which][1:]]) / 1e6 for which in (variant, "as shipped")
                    )
                    low, middle, high = np.percentile(here / base, [10, 50, 90])
                    cells += [f"{np.median(here):.2f}", f"{middle:.3f} ({low:.2f} to {high:.2f})"]
                print(f"| {variant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
