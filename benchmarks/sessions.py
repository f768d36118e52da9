"""How far do windows of one process differ, loads of one package in one process, and processes? Why models are timed in several processes.

    python benchmarks/sessions.py MODEL --workload generate:64+32 [--processes 4] [--copies 3] [--threads N]

Three uniform policies, each loaded --copies times in every process, all in one rotation, in another order per process. Standard
deviations relative to the mean: of windows within one load, of loads within one process, of processes (the means of their loads), as they
are and over the reference for that kind of work, which is how a table's rows are brought to one speed.
"""

from __future__ import annotations

import argparse
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev

from toolchain import hardware
from toolchain.commands.workflow import opened
from toolchain.costs.operations import working_set_of
from toolchain.costs.rows import work
from toolchain.files import scratch
from toolchain.graph.assemble import assemble
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import drawn
from toolchain.hardware import thread_count
from toolchain.kernels import uniform
from toolchain.profiler.ask import Host
from toolchain.profiler.machine import last_level_cache_bytes
from toolchain.profiler.measure import latencies, levelled, subject
from toolchain.spec import Measurement, Workload

POLICIES, WINDOWS = ("w8g128", "w4g32", "w2g32"), 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--workload", required=True, type=Workload.parse)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the machine has")
    arguments = parser.parse_args()
    device = replace(hardware.load("local"), threads=arguments.threads)
    host = Host(device, thread_count(device))
    graph_folder = (Path(arguments.model) / "graph.json").is_file()
    seen: dict[tuple[str, str], list[list[Measurement]]] = {}
    references: list[dict[str, float]] = []
    with scratch() as folder, nullcontext() if graph_folder else opened(arguments.model) as source:
        graph = source.graph if source else Graph.open(Path(arguments.model))
        subjects = []
        for name in POLICIES:
            (place := folder / name).mkdir()
            assemble(graph, uniform(name, graph.units), drawn, place)
            subjects += [subject(f"{name} {copy}", place, arguments.workload, graph.vocabulary) for copy in range(arguments.copies)]
        for process in range(arguments.processes):
            answer = host.time(random.Random(process).sample(subjects, len(subjects)), WINDOWS)
            trials = levelled(answer["trials"])
            references.append({bound: median(times) for bound, times in answer["reference_ns"].items()})
            for name in POLICIES:
                loads = [latencies(trials[f"{name} {copy}"], answer["valid"]) for copy in range(arguments.copies)]
                for resource in loads[0]:
                    seen.setdefault((name, resource), []).append([load[resource] for load in loads])
    print(f"{graph.source}, {arguments.workload}, {thread_count(device)} threads, standard deviations\n")
    print("| policy | figure | mean | windows | loads | processes | over the reference |\n|---|---|---|---|---|---|---|")
    for (name, resource), processes in seen.items():
        middle = mean(load.value or 0.0 for loads in processes for load in loads)
        windows = mean(stdev(load.trials) for loads in processes for load in loads)
        copies = mean(stdev(load.value or 0.0 for load in loads) for loads in processes)
        means = [mean(load.value or 0.0 for load in loads) for loads in processes]
        kind = working_set_of(graph.units, uniform(name, graph.units), last_level_cache_bytes())
        bound = work(resource == "latency_ms" and arguments.workload.kind == "generate", kind)
        over = [value / reference[bound] for value, reference in zip(means, references, strict=True)]
        cells = [name, resource, f"{middle:.2f} ms", *(f"{value / middle:.1%}" for value in (windows, copies, stdev(means)))]
        cells.append(f"{stdev(over) / mean(over):.1%}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
