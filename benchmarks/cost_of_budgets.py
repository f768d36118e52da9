"""What do N budgets cost: one supernet, or a dedicated run for each that is as good?

    python benchmarks/cost_of_budgets.py --text TRAIN... --heldout TEXT --out DIR [--steps 600] [--polish 90] [--batch 64] [--seeds 3]

A dedicated run need not be as long as the supernet's to be as good as its subnet. So for each of the five policies that `dedicated.py` had
chosen by the exact solver there are dedicated runs of S, S/2, S/4 and S/8 policy-steps; where what they lose on held-out text, between two
lengths on the line through the logarithms, is the subnet's, they are as long as it takes. A subnet as good as the longest or better counts
as that one, one as bad as the shortest or worse as that. As good in KL to fp32 and as good in perplexity are two things, so there are two
tables. What `dedicated.py` left in --out is used.

    supernet     start + its steps + losses of its units and kernels + N · (search + polishing + export)
    dedicated    losses of the untrained ones + N · (start + its steps + search + export)

Start: GPTQ for every kernel, both of them once anew. Search: the exact solver, mean bits as the limit. Wall seconds, of a step measured in
runs with nothing beside them (the jobs above share the machine as it comes). Goal: 7 times at N = 8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from toolchain.train.loop import adapt, train
from toolchain.train.quality import scorer

SHARES = (8, 4, 2, 1)
"""A dedicated run has S policy-steps over one of these."""
SERVED = (1, 3, 8, 40)
POLICIES = [f"solver {bits}" for bits in MEANS]
OVERHEADS = "overheads 0"
FEW = (12, 10, 60)
"""Steps of the runs that tell what a step takes: the first compiles."""


def main() -> None:
    arguments = jobs.with_polish(jobs.parser(__doc__))
    if arguments.serve:
        jobs.serve(arguments, work)
        return
    prepared_policies(arguments, jobs.prepare(arguments))
    seeds = range(arguments.seeds)
    wanted = [f"supernet {seed}" for seed in seeds]
    wanted += [job_of(name, share, seed) for share in reversed(SHARES) for name in POLICIES for seed in seeds]
    jobs.run_all(arguments, wanted)
    jobs.run_all(arguments, dedicated.polishing_jobs(arguments, POLICIES))
    jobs.run_all(arguments, [OVERHEADS])  # with nothing beside it
    report(arguments)


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
    """Seconds of everything that is no training, and of a step of a supernet (two policies) and of a dedicated run."""
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
    run = dedicated.run_of(arguments, OVERHEADS, 1)
    for what, act in (
        ("a supernet's step", lambda run: train(supernet, run, None, dict)),
        ("a dedicated step", lambda run: adapt(supernet, run, [policy])),
    ):
        for steps in FEW:  # what a run takes besides its steps is in both
            with scratch() as folder:
                timed(f"{steps}", lambda act=act, steps=steps, folder=folder: act(replace(run, steps=steps, out=folder)))
        seconds[what] = (seconds.pop(f"{FEW[2]}") - seconds.pop(f"{FEW[1]}")) / (FEW[2] - FEW[1])
        del seconds[f"{FEW[0]}"]
    return seconds


def as_long(distance: float, lengths: list[int], distances: list[float]) -> float:
    """The length at which runs of these lengths, rising, would come as near to the teacher."""
    falling = np.minimum.accumulate(distances)  # a longer run that came out worse could have been stopped
    return float(np.exp(np.interp(-np.log(distance), -np.log(falling), np.log(lengths))))


def report(arguments: argparse.Namespace) -> None:
    """By either figure: how long a dedicated run must be to be as good, and what N budgets take. Means over the seeds."""
    lengths = [arguments.steps // share for share in SHARES]
    print(f"{arguments.model}, S = {arguments.steps} {jobs.described(arguments)}; {arguments.polish} to polish a subnet")
    seeds = range(arguments.seeds)
    wanted = {"around": [OVERHEADS], "supernet": [f"supernet {seed}" for seed in seeds]}
    wanted |= {name: [job_of(name, share, seed) for share in SHARES for seed in seeds] for name in POLICIES}
    wanted["polished"] = dedicated.polishing_jobs(arguments, POLICIES)
    found = {job: jobs.read(arguments, job) for each in wanted.values() for job in each}
    if missing := [job for job, result in found.items() if not result]:
        print(f"\nexpected results of {', '.join(missing)}: start again with the same arguments")
        return

    def seen(what: Sequence[str], name: str, figure: int) -> float:
        return mean(found[job]["quality"][name][figure] for job in what)

    around = found[OVERHEADS]
    a_step = around["a dedicated step"]
    training, polish = dedicated.loop_steps(arguments) * around["a supernet's step"], arguments.polish * a_step
    print(f"seconds: {', '.join(f'{what} {value:.3f}' for what, value in around.items() if what != 'setup')}, ", end="")
    print(f"supernet {training:.0f}, polishing a subnet {polish:.1f}")
    for figure, what in ((1, "KL"), (0, "perplexity")):
        print(f"\n| policy | subnet: {what} | polished | {' | '.join(f'dedicated, {length}' for length in lengths)} ", end="")
        print(f"| as good | polished |\n|---{'|---' * (len(lengths) + 4)}|")
        needed: dict[str, list[float]] = {"as it is": [], "polished": []}
        for name in POLICIES:
            losses = [seen([job_of(name, share, seed) for seed in seeds], name, figure) for share in SHARES]
            ours = [seen(wanted["supernet"], name, figure)]
            ours.append(seen([f"polished {name} {seed}" for seed in seeds], name, figure) if arguments.polish else ours[0])
            for kind, loss in zip(needed, ours, strict=True):
                needed[kind].append(as_long(loss, lengths, losses))
            cells = [f"{value:.4f}" if figure else f"{value:.2f}" for value in (*ours, *losses)]
            print(f"| {' | '.join([name, *cells, *(f'{each[-1]:.0f}' for each in needed.values())])} |")
        print(
            "\n| budgets | supernet s | dedicated s | times | polished: supernet s | dedicated s | times |\n|---|---|---|---|---|---|---|"
        )
        for served in SERVED:
            cells = []
            for kind, each in (("as it is", 0.0), ("polished", polish)):
                one = around["start"] + training + around["losses"] + served * (around["search"] + each + around["export"])
                run = around["start"] + mean(needed[kind]) * a_step + around["search"] + around["export"]
                many = around["losses"] + served * run
                cells += [f"{one:.0f}", f"{many:.0f}", f"{many / one:.1f}"]
            print(f"| {served} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
