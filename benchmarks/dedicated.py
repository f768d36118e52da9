"""One supernet against dedicated runs: is a subnet as good as a model that was trained for its policy alone?

    python benchmarks/dedicated.py --text TRAIN... --heldout TEXT --out DIR [--steps 600] [--batch 64] [--seeds 3] [--workers 6]

Per seed: one supernet of 3·S policy-steps, and a dedicated run of S steps for each of thirteen policies (uniform 2, 3 and 4 bits, five
random mixed ones of mean 2.5 to 3.5, five of the same means that the exact solver chose by the untrained kernels' losses), all from the
same start (GPTQ) with the same settings: `adapt` and `train` of this package, so a dedicated run has every trick the supernet has. A
policy-step is one policy's forward and backward pass over a batch. Every job is a process of its own that keeps its result in DIR: a
killed run goes on.

Perplexity and KL to fp32 (nats per token) on held-out text, windows of 256 tokens, int8 activations as the kernels have them.
Goals: uniform 2 bits at most 0.98 of the dedicated run's perplexity, 3 and 4 bits 1.00, every mixed policy 1.02.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from toolchain import text as texts
from toolchain.files import write_atomic
from toolchain.graph.build import resolve
from toolchain.kernels import CATALOGUE, mean_bits
from toolchain.policy import sensitivity
from toolchain.spec import Policy, Unit
from toolchain.supernet.model import Supernet, load_model
from toolchain.supernet.starts import input_moments
from toolchain.train.loop import adapt, train
from toolchain.train.quality import scorer
from toolchain.train.sampler import PolicySampler
from toolchain.train.settings import Settings
from toolchain.train.team import Team

KERNELS = ("w4g32", "w3g32", "w2g32")
MEANS = (2.5, 2.75, 3.0, 3.25, 3.5)
WINDOW, CALIBRATION = 256, 64
GOALS = {"uniform 2": 0.98, "uniform 3": 1.00, "uniform 4": 1.00}
MIXED_GOAL = 1.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llama-6m")
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--windows", type=int, default=0, help="held-out windows to measure on (0: all)")
    parser.add_argument("--on", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--job", help="only this one, in this process (what the workers are called with)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.job:
        work(arguments, arguments.job)
        return
    data = prepare(arguments)
    jobs = [f"{name} {seed}" for seed in range(arguments.seeds) for name in ("supernet", *data)]
    todo = [job for job in jobs if not place(arguments.out, job).exists()]
    command = [sys.executable, *sys.argv]

    def start(job: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if arguments.workers > 1 else None
        with (arguments.out / f"{job.replace(' ', '-')}.log").open("w") as log:
            code = subprocess.run([*command, "--job", job], stderr=log, env=environment, check=False).returncode
        print(f"{job}: {'done' if code == 0 else f'failed, see {log.name}'}", file=sys.stderr)

    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(start, todo))
    report(arguments, data)


def place(out: Path, job: str) -> Path:
    """Where a job's result is kept."""
    return out / f"{job.replace(' ', '-')}.json"


def prepare(arguments: argparse.Namespace) -> dict[str, Policy]:
    """Graph, token windows and the thirteen policies, in --out. The untrained kernels' losses are measured once."""
    from toolchain.graph.build import build
    from toolchain.graph.model import Graph

    out = arguments.out
    if not (out / "graph" / "graph.json").is_file():
        (out / "graph").mkdir(exist_ok=True)
        build(arguments.model, out / "graph")
    graph = Graph.open(out / "graph")
    for name, paths in (("train", arguments.text), ("heldout", [arguments.heldout])):
        if not (out / f"{name}.npy").is_file():
            folder = resolve(arguments.model)
            tokens = texts.windows(
                texts.load_tokenizer(folder), texts.documents(paths), WINDOW, texts.separator_id(folder), framed=False
            )
            np.save(out / f"{name}.npy", tokens.astype(np.uint16 if graph.vocabulary < 1 << 16 else np.int32))
    kept = out / "policies.json"
    if not kept.is_file():
        supernet, windows, _ = started(arguments, 0)
        reference = Policy.of({unit.name: "fp32" for unit in graph.units})
        losses = sensitivity.measure(scorer(supernet, windows[:4]), graph.units, supernet.kernels, reference)
        rng = np.random.default_rng(7)
        sampler = PolicySampler.of(graph.units, supernet.kernels)
        policies = {f"uniform {CATALOGUE[name].weight_bits}": supernet.policy(name) for name in reversed(KERNELS)}
        policies |= {f"random {bits}": sampler.mixed(bits, rng) for bits in MEANS}
        policies |= {f"solver {bits}": chosen(graph.units, supernet.kernels, losses, bits) for bits in MEANS}
        write_atomic(kept, json.dumps({name: dict(policy) for name, policy in policies.items()}, indent=1) + "\n")
    return {name: Policy.of(policy) for name, policy in json.loads(kept.read_text()).items()}


def chosen(
    units: tuple[Unit, ...], kernels: Mapping[str, tuple[str, ...]], losses: Mapping[str, Mapping[str, float]], bits: float
) -> Policy:
    """The policy of least summed loss whose mean bits are at most `bits`: the exact solver, with bits as the only cost."""
    from toolchain.costs.model import CostModel
    from toolchain.policy.solver import solve
    from toolchain.spec import Budget, Workload

    spent = {
        unit.name: {name: float(CATALOGUE[name].weight_bits * unit.parameters) for name in kernels[unit.name]} for unit in units
    }
    model = CostModel(
        units=units,
        kernels=kernels,
        per_unit={"peak_memory_bytes": spent},
        fixed={"peak_memory_bytes": 0.0},
        ties=(),
        relative_spread={},
        workload=Workload.parse("generate:64+32"),
        device="bits alone",
    )
    return solve(model, losses, Budget(peak_memory_bytes=bits * sum(unit.parameters for unit in units))).policy


def started(arguments: argparse.Namespace, seed: int) -> tuple[Supernet, np.ndarray, Team]:
    """A supernet at its start, the training windows, and the device."""
    from toolchain.graph.model import Graph

    team = Team(arguments.on)
    graph = Graph.open(arguments.out / "graph")
    windows = np.load(arguments.out / "train.npy").astype(np.int64)
    model = load_model(resolve(arguments.model)).to(team.device)
    moments = input_moments(model, graph.units, torch.from_numpy(windows[:CALIBRATION]).to(team.device))
    return Supernet(model, graph.units, KERNELS, seed=seed, moments=moments), windows, team


def work(arguments: argparse.Namespace, job: str) -> None:
    """Train what the job names and measure every policy it has to answer for."""
    name, _, seed = job.rpartition(" ")
    policies = {key: Policy.of(value) for key, value in json.loads((arguments.out / "policies.json").read_text()).items()}
    begin = time.monotonic()
    supernet, windows, team = started(arguments, int(seed))
    settings = Settings(precision=arguments.precision, meta_every=0)
    folder = arguments.out / f"{job.replace(' ', '-')}.training"
    common = {"batch": arguments.batch, "out": folder, "seed": int(seed), "settings": settings, "team": team}
    if name == "supernet":
        train(supernet, windows, None, dict, steps=3 * arguments.steps // 2, **common)
    else:
        policies = {name: policies[name]}
        adapt(supernet, windows, [policies[name]], steps=arguments.steps, **common)
    trained = time.monotonic() - begin
    heldout = torch.from_numpy(np.load(arguments.out / "heldout.npy").astype(np.int64)).to(team.device)
    seen = quality(supernet, policies, heldout[: arguments.windows or None])
    write_atomic(place(arguments.out, job), json.dumps({"seconds": trained, "quality": seen}, indent=1) + "\n")


@torch.no_grad()
def quality(
    supernet: Supernet, policies: Mapping[str, Policy], windows: torch.Tensor, batch: int = 32
) -> dict[str, tuple[float, float]]:
    """(perplexity, KL to fp32 in nats per token) of each. The kernels here quantise activations per row, so windows can share a batch."""
    made = {name: supernet.weights(policy) for name, policy in policies.items()}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in policies}
    for ids in windows.split(batch):
        teacher = torch.log_softmax(supernet.teacher(ids)[:, :-1].float(), -1)
        for name, policy in policies.items():
            student = torch.log_softmax(supernet(policy, ids, None, True, made[name])[:, :-1].float(), -1)
            sums[name][0] -= student.gather(-1, ids[:, 1:, None]).double().sum().cpu()
            sums[name][1] += (teacher.exp() * (teacher - student)).sum(-1).double().sum().cpu()
    tokens = windows[:, 1:].numel()
    return {name: (math.exp(float(nll) / tokens), float(distance) / tokens) for name, (nll, distance) in sums.items()}


def report(arguments: argparse.Namespace, policies: dict[str, Policy]) -> None:
    """One row a policy: the supernet's subnet, the dedicated run, their ratio; mean over the seeds and each seed's ratio."""
    from toolchain.graph.model import Graph

    units = Graph.open(arguments.out / "graph").units
    read = {path.stem: json.loads(path.read_text()) for path in arguments.out.glob("*-[0-9].json")}
    print(f"{arguments.model}, S = {arguments.steps} policy-steps of {arguments.batch} x {WINDOW} tokens, {arguments.precision}\n")
    print("| policy | mean bits | supernet: perplexity | KL | dedicated: perplexity | KL | ratio | each seed | goal |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, policy in policies.items():
        pairs = [
            (read[f"supernet-{seed}"]["quality"][name], read[f"{name.replace(' ', '-')}-{seed}"]["quality"][name])
            for seed in range(arguments.seeds)
            if f"supernet-{seed}" in read and f"{name.replace(' ', '-')}-{seed}" in read
        ]
        if not pairs:
            continue
        ratios = [ours[0] / theirs[0] for ours, theirs in pairs]
        goal = GOALS.get(name, MIXED_GOAL)
        ours, theirs = ([mean(pair[side][figure] for pair in pairs) for figure in (0, 1)] for side in (0, 1))
        cells = [
            name,
            f"{mean_bits(policy, units):.2f}",
            f"{ours[0]:.2f}",
            f"{ours[1]:.4f}",
            f"{theirs[0]:.2f}",
            f"{theirs[1]:.4f}",
        ]
        cells += [f"{mean(ratios):.3f}", ", ".join(f"{ratio:.3f}" for ratio in ratios), f"{goal:.2f}"]
        print(f"| {' | '.join(cells)} |")
    seconds = {kind: [row["seconds"] for key, row in read.items() if key.startswith("supernet") == kind] for kind in (True, False)}
    print(f"\nseconds: supernet {mean(seconds[True] or [0]):.0f}, dedicated run {mean(seconds[False] or [0]):.0f}", end=" ")
    print(f"({arguments.workers} at a time)")


if __name__ == "__main__":
    main()
