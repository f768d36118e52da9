"""What do N budgets cost: one supernet, or a dedicated run for each that is as good?

    python benchmarks/cost_of_budgets.py --text TRAIN... --heldout TEXT --out DIR [--steps 600] [--polish 46] [--batch 64] [--seeds 3]

A dedicated run need not be as long as the supernet's to be as good as its subnet. So for each of the five policies that `dedicated.py` had
chosen by the exact solver there are dedicated runs of S, S/2, S/4 and S/8 policy-steps; where their KL to fp32 on held-out text, between
two lengths on the line through the logarithms, is the subnet's, they are as long as it takes. A subnet as good as the longest or better
counts as that one, one as bad as the shortest or worse as that. What `dedicated.py` left in --out is used.

    supernet     start + training + losses of its units and kernels + N · (search + polishing + export)
    dedicated    losses of the untrained ones + N · (start + its steps + search + export)

Start: GPTQ for every kernel, both of them once anew. Search: the exact solver, mean bits as the limit. Wall seconds; runs share the
machine as --workers says, all of them alike. Goal: 7 times at N = 8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import mean
from typing import Any

import dedicated
import numpy as np
import training_jobs as jobs
from dedicated import KERNELS, MEANS, SCORED, chosen, dedicated_run, prepared_policies

from toolchain.files import scratch
from toolchain.graph.assemble import assemble
from toolchain.graph.model import Graph
from toolchain.policy import sensitivity
from toolchain.spec import Policy
from toolchain.train.quality import scorer

SHARES = (8, 4, 2, 1)
"""A dedicated run has S policy-steps over one of these."""
SERVED = (1, 3, 8, 40)
POLICIES = [f"solver {bits}" for bits in MEANS]
OVERHEADS = "overheads 0"


def main() -> None:
    arguments = jobs.with_polish(jobs.parser(__doc__), 13)
    if arguments.job:
        work(arguments, arguments.job)
        return
    policies = prepared_policies(arguments, jobs.prepare(arguments))
    seeds = range(arguments.seeds)
    wanted = [f"supernet {seed}" for seed in seeds]
    wanted += [job_of(name, share, seed) for share in reversed(SHARES) for name in POLICIES for seed in seeds]
    jobs.run_all(arguments, [*wanted, OVERHEADS])
    report(arguments, policies)


def job_of(name: str, share: int, seed: int) -> str:
    """The whole length is a job of `dedicated.py`."""
    return f"{name} {seed}" if share == 1 else f"{name} over {share} {seed}"


def work(arguments: argparse.Namespace, job: str) -> None:
    """One run, or what everything around the runs takes."""
    name, _, share = job.rpartition(" ")[0].partition(" over ")
    if job == OVERHEADS:
        jobs.keep(arguments, job, overheads(arguments))
    elif not share:
        dedicated.work(arguments, job)
    else:
        policy = prepared_policies(arguments, Graph.open(arguments.out / "graph"))[name]
        supernet, seconds = dedicated_run(arguments, job, policy, arguments.steps // int(share))
        seen = jobs.quality(supernet, {name: policy}, jobs.heldout_windows(arguments))
        jobs.keep(arguments, job, {"seconds": seconds, "quality": seen})


def overheads(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of everything that is no training."""
    graph = Graph.open(arguments.out / "graph")
    policy = prepared_policies(arguments, graph)[POLICIES[0]]
    seconds: dict[str, float] = {}

    def timed(what: str, act: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        result = act()
        seconds[what] = time.monotonic() - begin
        return result

    supernet = timed("start", lambda: jobs.start(arguments, KERNELS, 0))
    score = scorer(supernet, jobs.training_windows(arguments)[:SCORED])
    reference = Policy.of({unit.name: "fp32" for unit in graph.units})
    losses = timed("losses", lambda: sensitivity.measure(score, graph.units, supernet.kernels, reference))
    timed("search", lambda: chosen(graph.units, supernet.kernels, losses, MEANS[0]))
    with scratch() as folder:
        timed("export", lambda: assemble(graph, policy, supernet.quantized, folder))
    return seconds


def as_long(distance: float, lengths: list[int], distances: list[float]) -> float:
    """The length at which runs of these lengths, rising, would come as near to the teacher."""
    falling = np.minimum.accumulate(distances)  # a longer run that came out worse could have been stopped
    return float(np.exp(np.interp(-np.log(distance), -np.log(falling), np.log(lengths))))


def report(arguments: argparse.Namespace, policies: dict[str, Policy]) -> None:
    """Two tables: how long a dedicated run must be to be as good, and what N budgets take. Means over the seeds."""
    lengths = [arguments.steps // share for share in SHARES]
    print(f"{arguments.model}, S = {arguments.steps} {jobs.described(arguments)}; {arguments.polish} to polish a subnet\n")
    print(f"| policy | subnet: KL | polished | {' | '.join(f'dedicated, {length}' for length in lengths)} | as good | polished |")
    print(f"|---{'|---' * (len(lengths) + 4)}|")
    ours = [jobs.read(arguments, f"supernet {seed}") for seed in range(arguments.seeds)]
    around = jobs.read(arguments, OVERHEADS)
    if not around or not all(ours):
        print("\nexpected results of the supernets and of what is around them: start again with the same arguments")
        return
    needed: dict[str, list[float]] = {"as it is": [], "polished": []}
    a_step = []
    for name in POLICIES:
        rows = [[jobs.read(arguments, job_of(name, share, seed)) for share in SHARES] for seed in range(arguments.seeds)]
        if not all(each for row in rows for each in row):
            continue
        distances = [mean(row[place]["quality"][name][1] for row in rows) for place in range(len(SHARES))]
        a_step += [row[-1]["seconds"] / arguments.steps for row in rows]
        seen = [mean(each["quality"][name][1] for each in ours)]
        seen.append(mean((each["polished"] or each["quality"])[name][1] for each in ours))
        found = [as_long(distance, lengths, distances) for distance in seen]
        for kind, length in zip(needed, found, strict=True):
            needed[kind].append(length)
        cells = [f"{value:.4f}" for value in (*seen, *distances)] + [f"{length:.0f}" for length in found]
        print(f"| {name} | {' | '.join(cells)} |")
    if not a_step:
        return
    training, polish = (mean(each[key] for each in ours) for key in ("seconds", "polishing_seconds"))
    around = {key: value for key, value in around.items() if key != "setup"}
    print(f"\nseconds: {', '.join(f'{what} {value:.2f}' for what, value in around.items())}, ", end="")
    print(f"supernet {training:.0f}, polishing a subnet {polish:.1f}, a dedicated policy-step {mean(a_step):.3f}\n")
    print(
        "| budgets | supernet s | dedicated s | times | polished: supernet s | dedicated s | times |\n|---|---|---|---|---|---|---|"
    )
    for served in SERVED:
        cells = []
        for kind, each in (("as it is", 0.0), ("polished", polish)):
            one = around["start"] + training + around["losses"] + served * (around["search"] + each + around["export"])
            run = around["start"] + mean(needed[kind]) * mean(a_step) + around["search"] + around["export"]
            many = around["losses"] + served * run
            cells += [f"{one:.0f}", f"{many:.0f}", f"{many / one:.1f}"]
        print(f"| {served} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
