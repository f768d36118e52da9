"""What every part of the method is worth: the supernet trained with one part taken out, everything else the same.

    python benchmarks/ablations.py --table FILE --text TRAIN... --heldout TEXT --out DIR [--steps 600] [--batch 64] [--seeds 3]

--table: a device's table.jsonl that holds the model at --workload; the meta-network is trained for that device. A supernet has 3·S
policy-steps. Per variant: perplexity and KL to fp32 on held-out text (windows of 256 tokens, int8 activations as the kernels have them)
of uniform 2, 4 and 8 bits, of five random mixed policies (mean), and of the policies for five memory budgets (mean): what the
meta-network proposes, projected; for "fixed policy" the uniform policy of most bits that fits. Of 200 random budgets the share that the
meta-network's proposal keeps before it is projected.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import training_jobs as jobs
from choosing import keeps, least, random_budgets

from toolchain.costs.encoding import encode
from toolchain.costs.from_table import cost_model
from toolchain.costs.model import CostModel
from toolchain.costs.table import open_table
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, mean_bits, uniform
from toolchain.policy import sensitivity
from toolchain.policy.projection import project
from toolchain.policy.solver import Values
from toolchain.spec import Budget, Policy, Workload
from toolchain.train.loop import Run, train
from toolchain.train.quality import scorer
from toolchain.train.sampler import PolicySampler
from toolchain.train.team import Team

KERNELS = ("fp32", "w8g32", "w4g32", "w2g32")
VARIANTS: dict[str, dict] = {
    "whole": {},
    "own adapters (one as large, shared)": {"adapters": "shared"},
    "nothing, and one more adapter shared": {"adapters": "both"},
    "rounded to nearest at the start": {"gptq": False},
    "uniform sampling": {"sampling": "uniform"},
    "LLM-QFA's sampling": {"sampling": "balanced"},
    "MSE": {"loss": "mse"},
    "no cost penalty": {"cost_weight": 0.0},
    "no imitation": {"imitation_weight": 0.0, "imitation_steps": 0},
    "no hidden states": {"hidden_weight": 0.0},
    "fixed bounds": {"bound_lr": 0.0},
    "float activations": {"activations": False},
    "no averaging": {"average": 0},
    "nothing, and half of the mixed ones are the solver's": {"likely": 0.5},
    "no meta-network": {"meta_every": 0},
}
FRACTIONS = (0.1, 0.2, 0.3, 0.45, 0.6)


def main() -> None:
    parser = jobs.parser(__doc__)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--workload", type=Workload.parse, default=Workload.parse("generate:64+32"))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.serve:
        jobs.serve(arguments, work)
        return
    jobs.prepare(arguments)
    jobs.run_all(arguments, [f"{name} {seed}" for name in arguments.only for seed in range(arguments.seeds)])
    report(arguments)


def costs_of(arguments: argparse.Namespace) -> CostModel:
    """The table's cost model over KERNELS."""
    whole = cost_model(Graph.open(arguments.out / "graph"), open_table(arguments.table), arguments.workload)
    return replace(whole, kernels={unit: tuple(name for name in names if name in KERNELS) for unit, names in whole.kernels.items()})


def memory_budgets(costs: CostModel) -> list[Budget]:
    """Limits between the least and the most memory of quantised policies."""
    quantised = {unit: tuple(name for name in names if CATALOGUE[name].quantised) or names for unit, names in costs.kernels.items()}
    low, high = replace(costs, kernels=quantised).bounds("peak_memory_bytes")
    return [Budget(peak_memory_bytes=low + fraction * (high - low)) for fraction in FRACTIONS]


def largest_uniform(costs: CostModel, budget: Budget) -> Policy:
    """The uniform policy of most bits that keeps a budget."""
    fitting = [policy for name in KERNELS if keeps(costs, policy := uniform(name, costs.units, KERNELS), budget)]
    return max(fitting, key=lambda policy: mean_bits(policy, costs.units))


def work(arguments: argparse.Namespace, job: str) -> None:
    """Train one variant and measure it."""
    name, _, seed = job.rpartition(" ")
    changes = dict(VARIANTS[name])
    start = {key: changes.pop(key) for key in ("adapters", "gptq") if key in changes}
    begin = time.monotonic()
    costs, windows = costs_of(arguments), jobs.training_windows(arguments)
    supernet = jobs.started(arguments, KERNELS, int(seed), **start)
    reference = supernet.policy("fp32")

    def losses() -> Values:
        return sensitivity.measure(scorer(supernet, windows[:4]), supernet.units, supernet.kernels, reference)

    run = Run(
        windows,
        3 * arguments.steps // 2,
        arguments.batch,
        jobs.place(arguments.out, job).with_suffix(".training"),
        int(seed),
        settings=jobs.settings_of(arguments, **changes),
        team=Team(arguments.on),
    )
    trained = train(supernet, run, costs, losses)
    seconds = time.monotonic() - begin
    rng = np.random.default_rng(7)
    sampler = PolicySampler.of(supernet.units, supernet.kernels)
    policies = {f"uniform {bits}": supernet.policy(f"w{bits}g32") for bits in (2, 4, 8)}
    policies |= {f"random {place}": sampler.mixed(3.0, rng) for place in range(5)}
    limits = memory_budgets(costs)
    policies |= {f"fixed {place}": largest_uniform(costs, budget) for place, budget in enumerate(limits)}
    kept = None
    if network := trained.meta_network:

        def likely(budget: Budget) -> dict[str, dict[str, float]]:
            return network.log_probabilities(encode(budget, costs))

        def proposed(budget: Budget) -> Policy:
            return least({unit: {kernel: -value for kernel, value in row.items()} for unit, row in likely(budget).items()})

        policies |= {f"chosen {place}": project(likely(budget), costs, budget) for place, budget in enumerate(limits)}
        kept = mean(keeps(costs, proposed(budget), budget) for budget in random_budgets(costs, 200, 0))
    seen = jobs.quality(supernet, policies, jobs.heldout_windows(arguments))
    jobs.keep(arguments, job, {"seconds": seconds, "quality": seen, "kept": kept})


def report(arguments: argparse.Namespace) -> None:
    """One row a variant: perplexity, KL; means over the seeds, the spread is half their range."""
    print(f"{arguments.model}, {3 * arguments.steps} {jobs.described(arguments)}\n")
    heads = ["uniform 2", "uniform 4", "uniform 8", "random", "fixed", "chosen"]
    print(f"| without | {' | '.join(heads)} | budgets kept unprojected |\n|---{'|---' * (len(heads) + 1)}|")
    for name in arguments.only:
        found = [row for seed in range(arguments.seeds) if (row := jobs.read(arguments, f"{name} {seed}"))]
        cells = []
        for head in heads:
            each = [[value for key, value in row["quality"].items() if key.startswith(head)] for row in found]
            perplexities, distances = ([mean(value[figure] for value in values) for values in each if values] for figure in (0, 1))
            spread = f" ± {(max(perplexities) - min(perplexities)) / 2:.2f}" if len(perplexities) > 1 else ""
            cells.append(f"{mean(perplexities):.2f}{spread}, {mean(distances):.3f}" if perplexities else "–")
        kept = [row["kept"] for row in found if row["kept"] is not None]
        print(f"| {name} | {' | '.join(cells)} | {f'{mean(kept):.1%}' if kept else '–'} |")


if __name__ == "__main__":
    main()
