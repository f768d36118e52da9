"""Quality at budget: the package that our supernet gives against everything else that fits the same limit.

    python benchmarks/quality_at_budget.py --table FILE --text TRAIN... --heldout TEXT --out DIR [--steps 600] [--polish 90] [--seeds 3]

--table: a device's table.jsonl that holds the model at --workload. Five memory limits and five latency limits between the cheapest and
the dearest quantised policy; perplexity on held-out text, windows of 256 tokens, int8 activations as the kernels have them.

    ours        one supernet; the exact solver on its sensitivities; as it is, and polished. 3·S policy-steps in all, polishing included
    QAT         a dedicated run of S policy-steps for each limit, on the policy that the exact solver finds for it untrained
    LLM-QFA     one supernet of 3·S policy-steps with its sampler, adapters and one group size, and its own search for each limit
    untrained   GPTQ: best uniform policy that fits, and sensitivity + exact solver; and the best uniform policy rounded to nearest
                (clipped where the squared error is least). Which uniform one is best, they are told by the held-out text itself

Limits hold in the cost model, with no room for its spread. Unlike `export --polish`, a polished package is taken whether it helped or not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean

import training_jobs as jobs
from choosing import keeps

from toolchain.costs.from_table import cost_model
from toolchain.costs.model import CostModel
from toolchain.costs.table import open_table
from toolchain.errors import InfeasibleBudgetError
from toolchain.files import write_atomic
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, mean_bits, uniform
from toolchain.policy import sensitivity
from toolchain.policy.search import search
from toolchain.policy.solver import solve
from toolchain.spec import Budget, Policy, Workload
from toolchain.supernet.model import Supernet
from toolchain.train.loop import Run, adapt, train
from toolchain.train.quality import scorer
from toolchain.train.sampler import PolicySampler, worth_training
from toolchain.train.team import Team

FRACTIONS = (0.05, 0.2, 0.35, 0.5, 0.65)
PUBLISHED = ("w8g32", "w4g32", "w2g32")
"""LLM-QFA's group size, at the bit-widths that cost something of their own."""
SCORED = 16
"""Training windows on which sensitivities are measured and subnets are searched."""


def main() -> None:
    parser = jobs.parser(__doc__)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--workload", type=Workload.parse, default=Workload.parse("generate:64+32"))
    arguments = jobs.with_polish(parser)
    if arguments.serve:
        jobs.serve(arguments, work)
        return
    jobs.prepare(arguments)
    untrained_policies(arguments)
    jobs.run_all(arguments, job_names(arguments))
    report(arguments)


def untrained_policies(arguments: argparse.Namespace) -> dict[str, Policy]:
    """The exact solver's policy for every limit by the losses of untrained kernels, which are measured once; kept in --out."""
    kept = jobs.beside(arguments, "untrained policies", ".json")
    if not kept.is_file():
        costs = costs_of(arguments)
        policies = chosen(costs, losses_of(jobs.started(arguments, trained_kernels(costs), 0), arguments))
        write_atomic(kept, json.dumps({place: dict(policy) for place, policy in policies.items()}, indent=1) + "\n")
    return {place: Policy.of(policy) for place, policy in json.loads(kept.read_text()).items()}


def job_names(arguments: argparse.Namespace) -> list[str]:
    """Nothing is drawn in what is not trained: one seed of it."""
    names = ["ours", "LLM-QFA", *(f"QAT {place}" for place in range(len(budgets(costs_of(arguments)))))]
    return ["untrained 0", *(f"{name} {seed}" for name in names for seed in range(arguments.seeds))]


def costs_of(arguments: argparse.Namespace) -> CostModel:
    """The table's cost model over the quantised kernels that can be trained and that some budget could choose."""
    return trainable(cost_model(Graph.open(arguments.out / "graph"), open_table(arguments.table), arguments.workload))


def trainable(whole: CostModel) -> CostModel:
    """A cost model over the quantised kernels of a cost model that can be trained and that some budget could choose."""
    trained = {
        unit: tuple(name for name in names if CATALOGUE[name].quantised and not CATALOGUE[name].prefill) or names
        for unit, names in whole.kernels.items()
    }
    ordinary = replace(whole, kernels=trained)
    return replace(ordinary, kernels=worth_training(ordinary))


def budgets(costs: CostModel) -> list[Budget]:
    """Limits spread over the range of the policies."""
    made = []
    for resource in ("peak_memory_bytes", "latency_ms"):
        low, high = costs.bounds(resource)
        made += [Budget.from_json({resource: low + fraction * (high - low)}, "spread") for fraction in FRACTIONS]
    return made


def of_one_group_size(costs: CostModel) -> dict[str, tuple[str, ...]]:
    """unit → the kernels that LLM-QFA chooses among."""
    return {unit: tuple(name for name in names if name in PUBLISHED) for unit, names in costs.kernels.items()}


def trained_kernels(costs: CostModel) -> tuple[str, ...]:
    return tuple(name for name in CATALOGUE if any(name in names for names in costs.kernels.values()))


def losses_of(supernet: Supernet, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    score = scorer(supernet, jobs.training_windows(arguments)[:SCORED])
    return sensitivity.measure(score, supernet.units, supernet.kernels, Policy.of({unit.name: "fp32" for unit in supernet.units}))


def chosen(costs: CostModel, losses: Mapping[str, Mapping[str, float]]) -> dict[str, Policy]:
    return {str(place): solve(costs, losses, budget).policy for place, budget in enumerate(budgets(costs))}


def remembered(score: Callable[[Policy], float]) -> Callable[[Policy], float]:
    """The same, each policy scored once."""
    seen: dict[tuple, float] = {}

    def scored(policy: Policy) -> float:
        key = tuple(policy.items())
        if key not in seen:
            seen[key] = score(policy)
        return seen[key]

    return scored


def best_uniform(costs: CostModel, budget: Budget, quality: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
    """The best of the uniform policies that keep the budget."""
    names = trained_kernels(costs)
    fitting = [name for name in quality if keeps(costs, uniform(name, costs.units, names), budget)]
    return min((quality[name] for name in fitting), default=None)


def work(arguments: argparse.Namespace, job: str) -> None:
    """Train what the job names, choose for every limit, measure. Kept: per limit (perplexity, KL), and the policies' mean bits."""
    name, _, seed = job.rpartition(" ")
    begin = time.monotonic()
    costs, windows, heldout = costs_of(arguments), jobs.training_windows(arguments), jobs.heldout_windows(arguments)
    kernels, limits = trained_kernels(costs), budgets(costs)
    folder = jobs.place(arguments.out, job).with_suffix(".training")
    settings = jobs.settings_of(arguments, meta_every=0)
    run = Run(windows, arguments.steps, arguments.batch, folder, int(seed), settings=settings, team=Team(arguments.on))
    if name == "LLM-QFA":
        costs, kernels = replace(costs, kernels=of_one_group_size(costs)), PUBLISHED
    supernet = jobs.started(arguments, kernels, int(seed), adapters="own" if name == "LLM-QFA" else None)
    kept: dict[str, dict] = {}
    if name == "ours":
        left = 3 * arguments.steps - len(limits) * arguments.polish
        train(supernet, replace(run, steps=left // 2), None, dict)
        policies = chosen(costs, losses_of(supernet, arguments))
        kept["ours"] = jobs.quality(supernet, policies, heldout)
        kept["ours, polished"] = jobs.polished(supernet, policies, run, arguments.polish, heldout)
    elif name == "LLM-QFA":
        published = replace(settings, sampling="balanced")
        train(supernet, replace(run, steps=3 * arguments.steps // 2, settings=published), None, dict)
        # The search's first stage draws the same policies for every limit.
        score, policies = remembered(scorer(supernet, windows[:SCORED])), {}
        for place, budget in enumerate(limits):
            try:
                policies[str(place)] = search(
                    score, costs, budget, lambda offered, bits, rng: PolicySampler(costs.units, offered).mixed(bits, rng)
                ).policy
            except InfeasibleBudgetError:
                continue
        kept[name] = jobs.quality(supernet, policies, heldout)
    elif name == "untrained":
        policies = untrained_policies(arguments)
        uniforms = {kernel: supernet.policy(kernel) for kernel in kernels}
        kept["GPTQ, solver"] = jobs.quality(supernet, policies, heldout)
        plain = jobs.started(arguments, kernels, int(seed), gptq=False)
        for head, one in (("GPTQ, uniform", supernet), ("rounded, uniform", plain)):
            each = jobs.quality(one, uniforms, heldout)
            found = {str(place): best_uniform(costs, budget, each) for place, budget in enumerate(limits)}
            kept[head] = {place: value for place, value in found.items() if value}
    else:
        place = name.rpartition(" ")[2]
        policies = {place: untrained_policies(arguments)[place]}
        adapt(supernet, run, [*policies.values()])
        kept["QAT"] = jobs.quality(supernet, policies, heldout)
    bits = {place: mean_bits(policy, costs.units) for place, policy in policies.items()}
    jobs.keep(arguments, job, {"seconds": time.monotonic() - begin, "quality": kept, "bits": bits})


def report(arguments: argparse.Namespace) -> None:
    """Perplexity, then KL to fp32: one row a limit, means over the seeds; the spread is half the range of the seeds."""
    costs = costs_of(arguments)
    print(
        f"{arguments.model}, {costs.workload}, {costs.device}; kernels {', '.join(trained_kernels(costs))}\n"
        f"S = {arguments.steps} {jobs.described(arguments)}; {arguments.polish} to polish a package"
    )
    heads = ["ours, polished", "ours", "QAT", "LLM-QFA", "GPTQ, solver", "GPTQ, uniform", "rounded, uniform"]
    rows = [row for job in job_names(arguments) if (row := jobs.read(arguments, job))]
    for figure, digits in ((0, 2), (1, 4)):
        print(f"\n| limit | mean bits | {' | '.join(heads)} |\n|---{'|---' * (len(heads) + 1)}|")
        for place, budget in enumerate(budgets(costs)):
            memory = budget.peak_memory_bytes
            cells = [f"{memory / 1e6:.2f} MB" if memory else f"{budget.latency_ms:.4f} ms"]
            cells.append(f"{mean([row['bits'][str(place)] for row in rows if 'ours' in row['quality']] or [0.0]):.2f}")
            for head in heads:
                seen = [row["quality"][head][str(place)][figure] for row in rows if str(place) in row["quality"].get(head, {})]
                spread = f" ± {(max(seen) - min(seen)) / 2:.{digits}f}" if len(seen) > 1 else ""
                cells.append(f"{mean(seen):.{digits}f}{spread}" if seen else "–")
            print(f"| {' | '.join(cells)} |")
    seconds = {
        kind: [row["seconds"] for job in job_names(arguments) if job.startswith(kind) and (row := jobs.read(arguments, job))]
        for kind in ("ours", "QAT", "LLM-QFA")
    }
    print(f"\nseconds of a job: {', '.join(f'{kind} {mean(each):.0f}' for kind, each in seconds.items() if each)}")


if __name__ == "__main__":
    main()
