"""Every method of the sources at the same mean bits, trained ones too: perplexity on held-out text, and what it took.

    python benchmarks/perplexity_at_bits.py --text TRAIN... --heldout TEXT --out DIR [--steps 600] [--batch 16] [--seeds 3] [--on cuda]
    python benchmarks/perplexity_at_bits.py ... --report [--post-training DIR/cells.json] [--results results]

S policy-steps for a run that serves one column, 3·S for one that serves all; all but Q8BERT, Q-BERT and the student start from GPTQ.

    QAT, uniform      a run for each width (`adapt` of this package)
    QAT, solver       a run for each mean, on the exact solver's policy by what each unit costs untrained
    Q8BERT            8-bit QAT, embeddings included, weights by row and activations by tensor (arXiv:1910.06188): our w8a8, whose weights
                      keep to ±63 of 127 (`quantize/affine.py`), embeddings by groups
    Q-BERT            QAT on the exact solver's policy by Ω·‖W − Ŵ‖², from weights rounded to nearest (arXiv:1909.05840). The paper leaves
                      open how a ranking becomes bits
    QA-LoRA           a run for each width: frozen GPTQ codes, pooled adapters (arXiv:2309.14717)
    uniform OFA       one supernet; its kernels share their adapters, every unit's kernel is drawn by itself, every policy counts alike;
                      LLM-QFA's search
    LLM-QFA           one supernet, own adapters, balanced sampling; its own search (arXiv:2405.20202)
    MetaQuantLLM      one supernet with its meta-network, whose proposal is projected onto the mean; the same with
      fixed policy      the uniform policy of most bits that fits, in place of the meta-network's
      MSE               instead of the interference-aware loss
      uniform sampling  instead of the balanced one and the sandwich
      solver            the exact solver on the trained supernet's sensitivities, in place of the meta-network
    half depth        every other block of the model, all weights trained on the teacher's answers, then GPTQ: bits are those of its codes

Kernels of 2, 3, 4 and 8 bits in groups of 32, activations to 8 bits as the kernels have them; windows of 256 tokens. A uniform policy
stands at its own width alone. –: the method has none there, or its search found none. Seconds are of training and of choosing, with
--workers jobs at a time. A job's result is kept: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import post_training
import torch
import training_jobs as jobs
from bits import KERNELS, MEANS, OFF, costs_of_bits, full, kernels_of, limit_of, solved
from quality_at_budget import remembered
from torch import nn

from toolchain.costs.encoding import encode
from toolchain.errors import InfeasibleBudgetError
from toolchain.files import write_atomic
from toolchain.graph.build import resolve
from toolchain.graph.model import Graph
from toolchain.kernels import mean_bits
from toolchain.policy import sensitivity
from toolchain.policy.projection import project
from toolchain.policy.search import search
from toolchain.policy.solver import Values
from toolchain.report import table
from toolchain.spec import Policy, Unit
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import input_moments
from toolchain.train.loop import Run, adapt, train
from toolchain.train.quality import scorer
from toolchain.train.sampler import PolicySampler
from toolchain.train.team import Team

NAMES = tuple(KERNELS.values())
Q8BERT = "w8a8"
DEDICATED = {"QAT, uniform": KERNELS, "QAT, solver": (2.5, 3, 3.5, 4), "Q8BERT": (8,), "Q-BERT": MEANS, "QA-LoRA": KERNELS}
"""Method → the columns that it has a run for."""
LOSSES = {"QAT, solver": "trials", "Q-BERT": "Hessian"}
"""Method → which losses of units, measured before anything is trained, tell it its policy."""
META = "MetaQuantLLM"
SUPERNETS: dict[str, tuple[str, dict[str, Any]]] = {
    META: ("own", {}),
    f"{META}, MSE": ("own", {"loss": "mse"}),
    f"{META}, uniform sampling": ("own", {"sampling": "uniform"}),
    "LLM-QFA": ("own", {"sampling": "balanced", "meta_every": 0}),
    "uniform OFA": ("shared", {"sampling": "uniform", "meta_every": 0, "a": 0.0, "balance": 0.0}),
}
"""Method → (adapters, settings)."""
HALF = "half depth"
SCORED = 16
"""Training windows on which sensitivities are measured and subnets are searched."""
LEARNING_RATE, WARM_UP = 1e-3, 20
"""Of the student, all of whose weights are trained."""


def main() -> None:
    parser = jobs.parser(__doc__)
    parser.set_defaults(batch=16)
    parser.add_argument(
        "--also", nargs="+", type=Path, help="further held-out texts, a table each; what is kept is of the same ones"
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="run these alone; the report has what is kept")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--post-training", type=Path, help="cells of post_training.py, for the same table")
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    if arguments.serve:
        jobs.serve(arguments, work)
        return
    if unknown := [method for method in arguments.only or () if method not in (*SUPERNETS, HALF, *DEDICATED)]:
        parser.error(f"expected methods among {', '.join((*SUPERNETS, HALF, *DEDICATED))}; got {unknown[0]!r}")
    if not arguments.report:
        jobs.prepare(arguments)
        if any(method in (arguments.only or LOSSES) for method in LOSSES):
            untrained_losses(arguments)  # before the jobs, each of which would measure them
        jobs.run_all(arguments, job_names(arguments))
    report(arguments)


def job_names(arguments: argparse.Namespace) -> list[str]:
    """The longest first, so that the others fill what they leave."""
    dedicated = [(method, f"{method} {bits:g}") for method, columns in DEDICATED.items() for bits in columns]
    named = [*((method, method) for method in (*SUPERNETS, HALF)), *dedicated]
    chosen = [name for method, name in named if method in (arguments.only or [method])]
    return [f"{name} {seed}" for name in chosen for seed in range(arguments.seeds)]


def untrained_losses(arguments: argparse.Namespace) -> dict[str, Values]:
    """ "trials", "Hessian" → unit → kernel → loss before anything is trained; measured once, kept in --out."""
    kept = jobs.beside(arguments, "untrained losses", ".json")
    if not kept.is_file():
        supernet = jobs.started(arguments, NAMES, 0)
        found = {}
        for name, losses in (("trials", measured_losses), ("Hessian", curved_losses)):
            begin = time.monotonic()
            found[name] = losses(supernet, arguments)
            found[f"{name} seconds"] = {"": {"": time.monotonic() - begin}}
        write_atomic(kept, json.dumps(found, indent=1) + "\n")
    return json.loads(kept.read_text())


def measured_losses(supernet: Supernet, arguments: argparse.Namespace) -> Values:
    score = scorer(supernet, jobs.training_windows(arguments)[:SCORED])
    return sensitivity.measure(score, supernet.units, kernels_of(supernet.units), full(supernet.units))


def curved_losses(supernet: Supernet, arguments: argparse.Namespace) -> Values:
    return post_training.curved(supernet, post_training.of_the_next_token(supernet, jobs.training_windows(arguments)))


def work(arguments: argparse.Namespace, job: str) -> None:
    """Train what the job names and measure it in every column that it serves. Kept: column → (perplexity, KL), mean bits, seconds."""
    name, _, seed = job.rpartition(" ")
    folder = jobs.place(arguments.out, job).with_suffix(".training")
    run = Run(
        jobs.training_windows(arguments),
        3 * arguments.steps // 2,
        arguments.batch,
        folder,
        int(seed),
        settings=jobs.settings_of(arguments),
        team=Team(arguments.on),
    )
    if name in SUPERNETS:
        supernet, columns, seconds = once_for_all(arguments, name, run)
    elif name == HALF:
        supernet, columns, seconds = student(arguments, run)
    else:
        supernet, columns, seconds = dedicated(arguments, name, run)
    seen: dict[str, Sequence[float | None]] = dict(jobs.quality(supernet, columns, jobs.heldout_windows(arguments)))
    also = {text: jobs.quality(supernet, columns, windows) for text, windows in jobs.also_windows(arguments).items()}
    others = {text: {column: perplexity for column, (perplexity, _) in of.items()} for text, of in also.items()}
    apart = {text: {column: distance for column, (_, distance) in of.items()} for text, of in also.items()}
    if name == HALF:  # what its distance is to is itself
        seen, apart = {column: (perplexity, None) for column, (perplexity, _) in seen.items()}, {}
    bits = {column: mean_bits(policy, supernet.units) for column, policy in columns.items()}
    made = post_training.made_by(supernet.device)
    result = {"quality": seen, "also": others, "also_kl": apart, "bits": bits, "seconds": seconds, "made": made}
    jobs.keep(arguments, job, result)


Trained = tuple[Supernet, dict[str, Policy], dict[str, float]]
"""(what was trained, column → policy, what → seconds)."""


def dedicated(arguments: argparse.Namespace, name: str, run: Run) -> Trained:
    """A run for one policy."""
    method, _, column = name.rpartition(" ")
    run = replace(run, steps=arguments.steps, settings=jobs.settings_of(arguments, meta_every=0))
    names, adapters, gptq = NAMES, "own", True
    if method == "Q8BERT":
        names, gptq = (Q8BERT, KERNELS[8]), False  # an embedding is looked up: by groups
    elif method == "QA-LoRA":
        adapters, run = "pooled", replace(run, settings=replace(run.settings, bound_lr=0.0))
    elif method == "Q-BERT":
        gptq = False
    supernet = jobs.started(arguments, names, run.seed, gptq=gptq, adapters=adapters)
    spent = 0.0
    if method in LOSSES:
        chosen, kind, losses = time.monotonic(), LOSSES[method], untrained_losses(arguments)
        policy = solved(supernet.units, kernels_of(supernet.units), losses[kind], float(column))
        spent = losses[f"{kind} seconds"][""][""] + time.monotonic() - chosen
    else:
        policy = supernet.policy(Q8BERT if method == "Q8BERT" else KERNELS[int(column)])
    begin = time.monotonic()
    adapt(supernet, run, [policy])
    return supernet, {column: policy}, {"training": time.monotonic() - begin, "choosing": spent}


def once_for_all(arguments: argparse.Namespace, name: str, run: Run) -> Trained:
    """A supernet, and how it answers to every mean. Of MetaQuantLLM's also the columns "fixed …" and "solver …"."""
    adapters, changes = SUPERNETS[name]
    supernet = jobs.started(arguments, NAMES, run.seed, adapters=adapters)
    units, kernels = supernet.units, kernels_of(supernet.units)
    costs = costs_of_bits(units, kernels)
    begin = time.monotonic()
    run = replace(run, settings=jobs.settings_of(arguments, **changes))
    trained = train(supernet, run, costs, lambda: measured_losses(supernet, arguments))
    seconds = {"training": time.monotonic() - begin}
    columns: dict[str, Policy] = {}
    begin = time.monotonic()
    if network := trained.meta_network:
        for bits in MEANS:
            limit = limit_of(units, bits)
            columns[f"{bits:g}"] = project(network.log_probabilities(encode(limit, costs)), costs, limit)
        seconds["choosing"] = time.monotonic() - begin
        losses = measured_losses(supernet, arguments)
        for bits in MEANS:
            columns[f"fixed {bits:g}"] = supernet.policy(KERNELS[max(width for width in KERNELS if width <= bits)])
            columns[f"solver {bits:g}"] = solved(units, kernels, losses, bits)
        return supernet, columns, seconds | {"solver": time.monotonic() - begin - seconds["choosing"]}
    score = remembered(scorer(supernet, run.windows[:SCORED]))
    for bits in MEANS:
        try:
            columns[f"{bits:g}"] = search(
                score,
                costs,
                limit_of(units, bits),
                lambda offered, target, rng: PolicySampler(units, offered).mixed(target, rng),
            ).policy
        except InfeasibleBudgetError:  # random draws do not meet the end of the range
            if bits == min(KERNELS):
                columns[f"{bits:g}"] = supernet.policy(KERNELS[bits])
    return supernet, columns, seconds | {"choosing": time.monotonic() - begin}


def student(arguments: argparse.Namespace, run: Run) -> Trained:
    """Half of the blocks, distilled, then GPTQ. Column "fp32": as it was distilled."""
    device = run.team.device
    teacher, model = (load_model(resolve(arguments.model)).to(device) for _ in range(2))
    units = halved(model, Graph.open(arguments.out / "graph").units)
    ids = torch.as_tensor(run.windows).to(device)
    steps, begin = 3 * arguments.steps, time.monotonic()
    model.requires_grad_(True).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def rate(step: int) -> float:
        return min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    for index in range(steps):
        rows = ids[torch.as_tensor(run.rows(index)).to(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            with torch.no_grad():
                wanted = teacher(input_ids=rows, use_cache=False).logits
            said = model(input_ids=rows, use_cache=False).logits
        log_wanted, log_said = (torch.log_softmax(logits.float(), -1) for logits in (wanted, said))
        (log_wanted.exp() * (log_wanted - log_said)).sum(-1).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
    seconds = time.monotonic() - begin
    model.requires_grad_(False).eval()
    moments = input_moments(model, units, ids[: jobs.CALIBRATION])
    supernet = Supernet(model, units, NAMES, seed=run.seed, moments=moments)
    columns = {f"{bits:g}": supernet.policy(name) for bits, name in KERNELS.items()}
    return supernet, {"fp32": full(units)} | columns, {"training": seconds, "choosing": 0.0}


def halved(model: nn.Module, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Keep every other block of a decoder, the first among them; returns the units that are left, under their new names."""
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    kept = list(range(0, len(blocks), 2))
    model.get_submodule("model").layers = nn.ModuleList(blocks[place] for place in kept)
    model.config.num_hidden_layers = len(kept)
    left = []
    for unit in units:
        found = re.search(r"\blayers\.(\d+)\.", unit.modules[0])
        if found and int(found[1]) not in kept:
            continue
        place = kept.index(int(found[1])) if found else 0

        def renamed(name: str, place: int = place) -> str:
            return re.sub(r"\blayers\.\d+\.", f"layers.{place}.", name)

        left.append(replace(unit, name=renamed(unit.name), modules=tuple(map(renamed, unit.modules))) if found else unit)
    return tuple(left)


def rows_of(arguments: argparse.Namespace) -> list[tuple[str, Callable[[str], list[dict[str, Any]]]]]:
    """(method, column → what its seeds have there)."""

    def found(job: Callable[[str], str], prefix: str, key: str) -> Callable[[str], list[dict[str, Any]]]:
        def at(column: str) -> list[dict[str, Any]]:
            kept = [jobs.read(arguments, f"{job(column)} {seed}") for seed in range(arguments.seeds)]
            place = f"{prefix}{column}"
            return [
                {
                    "perplexity": row["quality"][place][0],
                    "kl": row["quality"][place][1],
                    **{name: {text: of[place] for text, of in row.get(name, {}).items()} for name in ("also", "also_kl")},
                    "bits": row["bits"][place],
                    "training": row["seconds"]["training"],
                    "choosing": row["seconds"].get(key, 0.0),
                    **row["made"],
                }
                for row in kept
                if row and place in row["quality"]
            ]

        return at

    rows = [(method, found(lambda column, method=method: f"{method} {column}", "", "choosing")) for method in DEDICATED]
    rows += [(method, found(lambda _, method=method: method, "", "choosing")) for method in reversed(SUPERNETS)]
    rows.append((f"{META}, fixed policy", found(lambda _: META, "fixed ", "")))
    rows.append((f"{META}, solver", found(lambda _: META, "solver ", "solver")))
    rows.append((HALF, found(lambda _: HALF, "", "choosing")))
    return rows


def report(arguments: argparse.Namespace) -> None:
    """perplexity_at_bits.md and .json in --results: a row a method, means over the seeds ± half their range, then KL, and the seconds."""
    cells = []
    if arguments.post_training:
        for cell in json.loads(arguments.post_training.read_text()).values():
            if "method" in cell:
                seconds = {"training": cell["seconds"], "choosing": cell["choosing_seconds"]}
                cells.append((cell["method"], f"{cell['bits']:g}", {**cell, **seconds, "bits": cell["mean_bits"]}))
    for method, at in rows_of(arguments):
        cells += [(method, column, cell) for column in (f"{bits:g}" for bits in MEANS) for cell in at(column)]
    figures: dict[str, tuple[int, Callable[[Mapping[str, Any]], float | None]]] = {
        "perplexity": (2, lambda cell: cell["perplexity"]),
        "kl": (3, lambda cell: cell["kl"]),
    }
    for title, key, digits in (("perplexity", "also", 2), ("kl", "also_kl", 3)):
        for text in dict.fromkeys(text for _, _, cell in cells for text in cell.get(key, ())):
            figures[f"{title} on {text}"] = (digits, lambda cell, key=key, text=text: cell.get(key, {}).get(text))
    made: Mapping[str, list[dict[str, str]]] = {figure: [] for figure in figures}
    for method in dict.fromkeys(method for method, _, _ in cells if method != "fp32"):
        mine = [(column, cell) for of, column, cell in cells if of == method]
        for figure, (digits, value) in figures.items():
            row = {"method": method}
            for bits in MEANS:
                seen = [cell for column, cell in mine if column == f"{bits:g}"]
                row[f"{bits:g} bits"] = post_training.spread(
                    [number for cell in seen if (number := value(cell)) is not None], digits
                )
                if any(abs(cell["bits"] - bits) > OFF for cell in seen):
                    row[f"{bits:g} bits"] += f" ({mean(cell['bits'] for cell in seen):.2f})"
            for key in ("training", "choosing"):
                row[f"{key} s"] = f"{mean(cell[key] for _, cell in mine):.0f}"
            made[figure].append(row)
    unquantised = {figure: value(cell) for method, _, cell in cells if method == "fp32" for figure, (_, value) in figures.items()}
    size = f"{arguments.batch} x {jobs.WINDOW} tokens, {arguments.precision}, learning rate {arguments.lr:g}"
    how = f"{arguments.model}, {Path(arguments.heldout).name}; S = {arguments.steps} policy-steps of {size}"
    made_on: dict[str, dict[str, None]] = {}
    for method, _, cell in cells:
        if method != "fp32":
            made_on.setdefault(f"{cell['device']}, commit {cell['commit']}", {})[method] = None
    whence = "; ".join(f"{made}: {', '.join(of) if len(of) < 4 else f'{len(of)} rows'}" for made, of in made_on.items())
    full = "; ".join(f"{figure} {value:.2f}" for figure, value in unquantised.items() if value and not figure.startswith("kl"))
    text = f"{how}; fp32: {full or 'not measured'}\n{whence}\n"
    for figure, rows in made.items():
        if rows:
            text += f"\n{figure}\n\n{table(rows, list(rows[0]), markdown=True)}\n"
    arguments.results.mkdir(exist_ok=True)
    write_atomic(arguments.results / "perplexity_at_bits.md", text)
    kept = [{**cell, "method": method, "column": column} for method, column, cell in cells]
    write_atomic(arguments.results / "perplexity_at_bits.json", json.dumps({"how": how, "cells": kept}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
