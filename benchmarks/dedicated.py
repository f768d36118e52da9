"""One supernet against dedicated runs: is a subnet as good as a model that was trained for its policy alone?

    python benchmarks/dedicated.py --text TRAIN... --heldout TEXT --out DIR [--steps 600] [--polish 90] [--batch 64] [--seeds 3]

Per seed: a supernet, and a dedicated run of S steps for each of thirteen policies (uniform 2, 3 and 4 bits, five random mixed ones of
mean 2.5 to 3.5, five of the same means that the exact solver chose by the untrained kernels' losses), all from the same start (GPTQ)
with the same settings: `train` and `adapt` of this package, so a dedicated run has every trick the supernet has. A policy-step is one
policy's forward and backward pass over a batch. The supernet has 3·S of them in all, and what its mixed subnets are polished with
(--polish steps for each of the ten; 0: none) is counted in: less is left to train with. Uniform subnets, which the sandwich visits by
themselves, are left alone: 2 bits lose by it. Unlike `export --polish`, what was polished is taken whether it helped or not.

Perplexity and KL to fp32 (nats per token) on held-out text, windows of 256 tokens, int8 activations as the kernels have them.
Goals: uniform 2 bits at most 0.98 of the dedicated run's perplexity, 3 and 4 bits 1.00, every mixed policy 1.02.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

import numpy as np
import training_jobs as jobs
from bits import solved
from safetensors.numpy import load_file, save

from toolchain.files import write_atomic
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, mean_bits
from toolchain.policy import sensitivity
from toolchain.spec import Policy
from toolchain.supernet.model import Supernet
from toolchain.train.loop import Run, adapt, train
from toolchain.train.quality import scorer
from toolchain.train.sampler import PolicySampler
from toolchain.train.team import Team

KERNELS = ("w4g32", "w3g32", "w2g32")
MEANS = (2.5, 2.75, 3.0, 3.25, 3.5)
GOALS = {"uniform 2": 0.98, "uniform 3": 1.00, "uniform 4": 1.00}
MIXED_GOAL = 1.02
SCORED = 4
"""Training windows on which losses are measured."""


def main() -> None:
    arguments = jobs.with_polish(jobs.parser(__doc__))
    if arguments.serve:
        jobs.serve(arguments, work)
        return
    graph = jobs.prepare(arguments)
    policies = prepared_policies(arguments, graph)
    # The longest first, so that the others fill what they leave.
    jobs.run_all(arguments, [f"{name} {seed}" for name in ("supernet", *policies) for seed in range(arguments.seeds)])
    jobs.run_all(arguments, polishing_jobs(arguments, mixed(policies)))
    report(arguments, graph, policies)


def mixed(policies: Mapping[str, Policy]) -> list[str]:
    """The names of those that are not uniform."""
    return [name for name in policies if not name.startswith("uniform")]


def polishing_jobs(arguments: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Once the supernets are there."""
    return [f"polished {name} {seed}" for name in names for seed in range(arguments.seeds)] if arguments.polish else []


def prepared_policies(arguments: argparse.Namespace, graph: Graph) -> dict[str, Policy]:
    """The thirteen policies, in --out. The untrained kernels' losses are measured once."""
    kept = arguments.out / "policies.json"
    if not kept.is_file():
        supernet = jobs.started(arguments, KERNELS, 0)
        reference = Policy.of({unit.name: "fp32" for unit in graph.units})
        losses = sensitivity.measure(
            scorer(supernet, jobs.training_windows(arguments)[:SCORED]), graph.units, supernet.kernels, reference
        )
        rng = np.random.default_rng(7)
        sampler = PolicySampler.of(graph.units, supernet.kernels)
        policies = {f"uniform {CATALOGUE[name].weight_bits}": supernet.policy(name) for name in reversed(KERNELS)}
        for bits in MEANS:  # a single draw's mean strays
            drawn = [sampler.mixed(bits, rng) for _ in range(100)]
            policies[f"random {bits}"] = min(drawn, key=lambda policy, bits=bits: abs(mean_bits(policy, graph.units) - bits))
        policies |= {f"solver {bits}": solved(graph.units, supernet.kernels, losses, bits) for bits in MEANS}
        write_atomic(kept, json.dumps({name: dict(policy) for name, policy in policies.items()}, indent=1) + "\n")
    return {name: Policy.of(policy) for name, policy in json.loads(kept.read_text()).items()}


def work(arguments: argparse.Namespace, job: str) -> None:
    """Train what the job names and measure every policy it has to answer for; seconds: of training alone."""
    name, _, seed = job.rpartition(" ")
    kind, _, policy = name.partition(" ")
    policies, heldout = prepared_policies(arguments, Graph.open(arguments.out / "graph")), jobs.heldout_windows(arguments)
    run, trained = run_of(arguments, job, arguments.steps), jobs.beside(arguments, f"supernet {seed}", ".safetensors")
    if kind == "supernet":
        supernet = jobs.started(arguments, KERNELS, int(seed))
        begin = time.monotonic()
        train(supernet, replace(run, steps=loop_steps(arguments)), None, dict)
        seconds = time.monotonic() - begin
        write_atomic(trained, save(supernet.arrays()))
    elif kind == "polished":
        supernet, policies = jobs.started(arguments, KERNELS, int(seed)), {policy: policies[policy]}
        supernet.load(load_file(trained))
        seconds = jobs.polish(supernet, policies[policy], run, arguments.polish)
    else:
        policies = {name: policies[name]}
        supernet, seconds = dedicated_run(arguments, job, policies[name], arguments.steps)
    jobs.keep(arguments, job, {"seconds": seconds, "quality": jobs.quality(supernet, policies, heldout)})


def loop_steps(arguments: argparse.Namespace) -> int:
    """A supernet's steps of two policies each: what polishing ten mixed subnets leaves of 3·S."""
    return (3 * arguments.steps - 2 * len(MEANS) * arguments.polish) // 2


def run_of(arguments: argparse.Namespace, job: str, steps: int) -> Run:
    """A job's run; the last word of its name is its seed."""
    folder = jobs.place(arguments.out, job).with_suffix(".training")
    settings, team = jobs.settings_of(arguments, meta_every=0), Team(arguments.on)
    seed = int(job.rpartition(" ")[2])
    return Run(jobs.training_windows(arguments), steps, arguments.batch, folder, seed, settings=settings, team=team)


def dedicated_run(arguments: argparse.Namespace, job: str, policy: Policy, steps: int) -> tuple[Supernet, float]:
    """What was trained for one policy, and the seconds it took from its start."""
    run = run_of(arguments, job, steps)
    supernet = jobs.started(arguments, KERNELS, run.seed)
    begin = time.monotonic()
    adapt(supernet, run, [policy])
    return supernet, time.monotonic() - begin


def report(arguments: argparse.Namespace, graph: Graph, policies: dict[str, Policy]) -> None:
    """One row a policy: the supernet's subnet as it is and polished, the dedicated run, their ratios; means over the seeds, and each seed's
    ratio of the last of them."""
    print(
        f"{arguments.model}, S = {arguments.steps} {jobs.described(arguments)}; {arguments.polish} of them for polishing a subnet\n"
    )
    print("| policy | mean bits | subnet | KL | polished | KL | dedicated | KL | ratio as it is | polished | seeds | goal |")
    print(f"|{'---|' * 12}")
    seconds: dict[str, list[float]] = {"supernet": [], "polishing a subnet": [], "dedicated run": []}
    for name, policy in policies.items():
        rows = []
        for seed in range(arguments.seeds):
            jobs_of = [f"{who} {seed}" for who in ("supernet", f"polished {name}", name)]
            found = [jobs.read(arguments, job) for job in jobs_of]
            polished = arguments.polish and name in mixed(policies)
            if found[0] and found[2] and (found[1] or not polished):  # a polished one that failed is no unpolished one
                rows.append([(result or found[0])["quality"][name] for result in found])
                for who, result in zip(seconds, found, strict=True):
                    seconds[who] += [result["seconds"]] if result else []
        if not rows:
            continue
        means = [mean(row[who][figure] for row in rows) for who in range(3) for figure in (0, 1)]
        ratios = [[row[who][0] / row[2][0] for row in rows] for who in (0, 1)]
        cells = [name, f"{mean_bits(policy, graph.units):.2f}"]
        cells += [f"{value:.4f}" if place % 2 else f"{value:.2f}" for place, value in enumerate(means)]
        cells += [f"{mean(values):.3f}" for values in ratios] + [", ".join(f"{ratio:.3f}" for ratio in ratios[1])]
        print(f"| {' | '.join([*cells, f'{GOALS.get(name, MIXED_GOAL):.2f}'])} |")
    times = ", ".join(f"{who} {mean(each):.0f}" for who, each in seconds.items() if each)
    print(f"\nseconds, {arguments.workers} at a time: {times}")


if __name__ == "__main__":
    main()
