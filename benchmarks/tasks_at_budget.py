"""The sources' tasks at a device's budgets: each method's package for each, its score, its measured memory and latency.

    python benchmarks/finetune.py MODEL --data DATA --out MODELS                              a model per task and seed
    bittailor profile GRAPH --device DEVICE --profiles PROFILES                               GRAPH: of one of them; its rows are for all
    python benchmarks/tasks_at_budget.py run --graph GRAPH --device DEVICE --profiles PROFILES --models MODELS --data DATA --out DIR
                                             [--steps 150] [--seeds 3] [--workers 1] [--on cuda] [--precision bf16]
    python benchmarks/tasks_at_budget.py measure --graph GRAPH --device DEVICE --profiles PROFILES --out DIR          on the device
    python benchmarks/tasks_at_budget.py report --graph GRAPH --device DEVICE --profiles PROFILES --out DIR [--results results]
    python benchmarks/tasks_at_budget.py restore --out DIR [--results results] [--measured]   as `report` kept it: no training needed;
                                                                                              `run` adds what a model has not come to

Policies are chosen under the device's low, medium and high, and under a tight limit on memory alone, a twentieth of the way from the least
to the most that quantised policies take; less the room that `export` keeps. All methods have the same kernels to choose from.
Nobody trains on labels but `finetune.py`: what is trained is held to the fine-tuned model's answers on the training sentences.

    PTQ, min-max / MSE (and γ), GPTQ      the uniform policy of most bits that fits
    closed form, solver                   GPTQ's weights; the theorem's bits, of the highest mean that fits; the exact solver by trials
    QAT, Q-BERT                           a run of S policy-steps for each budget, on the solver's policy by trials, by Ω·‖W − Ŵ‖²
    Q8BERT                                8-bit QAT, where it fits
    QA-LoRA                               a run for each budget on the uniform policy; scored in torch, since no integer codes hold it
    uniform OFA, LLM-QFA, MetaQuantLLM    one supernet of 3·S for all four budgets (dedicated runs may come to 4·S), as in
                                          `perplexity_at_bits.py`; and its variants

Not here but in `perplexity_at_bits.py`: the log quantiser, whose powers of two no kernel has; pruning, which none uses; half the depth.
A score is of the package on stock onnxruntime, every sentence alone. Memory and latency do not depend on weights: `measure` checks every
distinct policy once per budget, with GRAPH's weights rounded. What is kept in DIR is not done again.
SQuAD's model has another head: it takes a run of its own, with a GRAPH and a DIR of its own (--tasks squad; report --name squad_at_budget).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import task_kinds
import tasks_measured
import tasks_report
import training_jobs as jobs
from choosing import keeps
from perplexity_at_bits import META, SUPERNETS
from post_training import closed_form
from quality_at_budget import remembered
from tasks_bench import Bench, Cells, Chosen, ptq

from toolchain.costs.encoding import encode
from toolchain.files import scratch
from toolchain.kernels import uniform
from toolchain.policy.projection import project
from toolchain.policy.search import Candidates, search
from toolchain.policy.solver import Values, solve
from toolchain.spec import Policy
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import input_moments
from toolchain.train.loop import adapt, train
from toolchain.train.sampler import PolicySampler
from toolchain.train.settings import PRECISIONS, TUNED

ANCHOR = 4
"""Bits at which the closed form's α is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for act in (run, tasks_measured.measure, tasks_report.report, tasks_measured.restore):
        sub = commands.add_parser(act.__name__)
        sub.set_defaults(act=act)
        sub.add_argument("--out", type=Path, required=True)
        if act is not tasks_measured.restore:
            sub.add_argument("--graph", type=Path, required=True)
            sub.add_argument("--device", required=True)
            sub.add_argument("--profiles", type=Path, required=True)
        if act is tasks_measured.measure:
            sub.add_argument("--most-seconds", type=float, default=10.0, help="of timing one package")
            sub.add_argument(
                "--part", default="1/1", metavar="I/N", help="the I-th of N: on N machines of one kind, or N sets of cores"
            )
            sub.add_argument("--packages", type=int, default=0, help="measure at most so many more (0: all)")
        if act in (tasks_report.report, tasks_measured.restore):
            sub.add_argument("--results", type=Path, default=Path("results"))
            sub.add_argument("--name", default="tasks_at_budget", help="of the files in --results")
        if act is tasks_measured.restore:
            sub.add_argument("--measured", action="store_true", help="with what was measured: else that is to be done anew")
        if act is not run:
            continue
        sub.add_argument("--models", type=Path, required=True)
        sub.add_argument("--data", type=Path, required=True, help="a folder for each task")
        sub.add_argument("--tasks", nargs="+", choices=task_kinds.NAMES, default=list(task_kinds.TASKS), help="of one --graph")
        sub.add_argument("--examples", type=int, default=0, help="of evaluation, at most (0: all)")
        sub.add_argument("--steps", type=int, default=150, help="S, policy-steps of a dedicated run")
        sub.add_argument("--batch", type=int, default=32)
        sub.add_argument("--seeds", type=int, default=3)
        sub.add_argument("--workers", type=int, default=1)
        sub.add_argument("--threads", type=int, default=1, help="sentences that a worker scores a package on at a time")
        sub.add_argument("--on", default="auto")
        sub.add_argument("--precision", choices=PRECISIONS, default="fp32")
        sub.add_argument("--lr", type=float, default=TUNED.lr / 4, help="32 sentences are a small batch: a quarter of the usual")
        sub.set_defaults(micro_batch=0, compile=False)
        sub.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.act(arguments)


def run(arguments: argparse.Namespace) -> None:
    if arguments.serve:
        jobs.serve(arguments, work)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs.run_all(arguments, [f"{task} {seed}" for seed in range(arguments.seeds) for task in arguments.tasks])


def untrained(bench: Bench, cells: Cells) -> None:
    """Everything that takes no training."""
    ids, mask, _ = bench.sentences(0, jobs.CALIBRATION)
    moments = input_moments(bench.untrained.model, bench.units, ids, masks=mask)
    chosen = bench.uniforms()
    for way in ("PTQ, min-max", "PTQ, min-max, and γ", "PTQ, MSE", "PTQ, MSE, and γ"):
        cells.add(way, chosen, ptq(bench.graph, way, moments))
    cells.add("GPTQ", chosen, bench.untrained.quantized)
    begin = time.monotonic()
    losses = bench.losses(bench.untrained)
    spent = time.monotonic() - begin
    cells.add("closed form", closed_forms(bench, losses), bench.untrained.quantized, choosing=spent)
    solved = bench.fitting(lambda budget: solve(bench.costs, losses, budget).policy)
    cells.add("solver", solved, bench.untrained.quantized, choosing=spent)
    dedicated(bench, cells, "QAT, solver", solved, lambda: bench.start("own"), choosing=spent)
    dedicated(bench, cells, "QA-LoRA", chosen, lambda: bench.start("pooled"), bound_lr=0.0)
    eight = uniform("w8a8", bench.units, ("w8a8", "w8g32"))
    fits = bench.fitting(lambda budget: eight if known(bench, eight) and keeps(bench.costs, eight, budget) else None)
    dedicated(bench, cells, "Q8BERT", fits, lambda: bench.start("own", gptq=False))
    start = bench.start("own")
    begin = time.monotonic()
    curves = bench.curvatures(start)
    spent = time.monotonic() - begin
    ranked = bench.fitting(lambda budget: solve(bench.costs, curves, budget).policy)
    dedicated(bench, cells, "Q-BERT", ranked, lambda: bench.start("own", gptq=False), choosing=spent)


def known(bench: Bench, policy: Policy) -> bool:
    return all(policy[unit.name] in bench.costs.kernels[unit.name] for unit in bench.units)


def closed_forms(bench: Bench, losses: Values) -> Chosen:
    """The theorem's bits, of the highest mean, in quarters, whose policy fits."""
    names = {2: "w2g32", 4: "w4g32", 8: "w8g32"}
    offered = {bits: name for bits, name in names.items() if all(name in row for row in losses.values())}
    if ANCHOR not in offered:
        return {}
    made = [
        closed_form(bench.units, bench.untrained, losses, quarters / 4, offered, ANCHOR)
        for quarters in range(4 * max(offered), 4 * min(offered) - 1, -1)
    ]
    return bench.fitting(lambda budget: next((one for one in made if keeps(bench.costs, one, budget)), None))


def dedicated(
    bench: Bench, cells: Cells, method: str, chosen: Chosen, start: Callable[[], Supernet], choosing: float = 0.0, **changes: Any
) -> None:
    """A run for each distinct policy."""
    for policy in dict.fromkeys(chosen.values()):
        columns = {name: one for name, one in chosen.items() if one == policy}
        if cells.has(method, columns):
            continue
        with scratch() as folder:
            supernet = start()
            begin = time.monotonic()
            adapt(supernet, bench.training(bench.arguments.steps, folder, meta_every=0, **changes), [policy])
            spent = time.monotonic() - begin
        scores = None if supernet.adapters.requantised else bench.score_in_torch(supernet, policy)
        cells.add(method, columns, supernet.quantized, spent, choosing, scores)


def once_for_all(bench: Bench, cells: Cells, method: str) -> None:
    """A supernet of 3·S policy-steps, and how it answers to every budget."""
    adapters, changes = SUPERNETS[method]
    if (f"{META}, solver" if method == META else method) in cells.found:
        return
    supernet = bench.start(adapters)
    with scratch() as folder:
        begin = time.monotonic()
        course = bench.training(3 * bench.arguments.steps // 2, folder, **changes)
        trained = train(supernet, course, bench.costs, lambda: bench.losses(supernet))
        spent = time.monotonic() - begin
    begin = time.monotonic()
    if network := trained.meta_network:
        chosen = bench.fitting(lambda budget: project(network.log_probabilities(encode(budget, bench.costs)), bench.costs, budget))
        cells.add(method, chosen, supernet.quantized, spent, time.monotonic() - begin)
    else:
        score = remembered(bench.scorer(supernet))

        def draw(offered: Candidates, bits: float, rng: np.random.Generator) -> Policy:
            return PolicySampler(bench.units, offered).mixed(bits, rng)

        chosen = bench.fitting(lambda budget: search(score, bench.costs, budget, draw).policy)
        cells.add(method, chosen, supernet.quantized, spent, time.monotonic() - begin)
    if method == META:
        cells.add(f"{META}, fixed policy", bench.uniforms(), supernet.quantized, spent)
        begin = time.monotonic()
        losses = bench.losses(supernet)
        solved = bench.fitting(lambda budget: solve(bench.costs, losses, budget).policy)
        cells.add(f"{META}, solver", solved, supernet.quantized, spent, time.monotonic() - begin)


def work(arguments: argparse.Namespace, job: str) -> None:
    """Everything of one fine-tuned model."""
    task, _, seed = job.rpartition(" ")
    bench = Bench(arguments, task, int(seed))
    about = {"setup": jobs.setup(arguments, job), "task": task, "seed": int(seed)}
    cells = Cells(bench, jobs.beside(arguments, job, tasks_measured.PART), about, tasks_measured.brought_back(arguments, job))
    untrained(bench, cells)
    for method in SUPERNETS:
        once_for_all(bench, cells, method)
    jobs.keep(arguments, job, about | {"fp32": cells.full, "cells": cells.found})
    cells.path.unlink()


if __name__ == "__main__":
    main()
