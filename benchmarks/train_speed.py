"""How fast does the supernet train, against plain fp32 training of the same model on the same machine?

    python benchmarks/train_speed.py [MODEL] [--batch 4] [--window 256] [--rounds 15] [--on cpu] [--precision fp32] [--compile]

Interleaved, one process: a plain step (forward, cross-entropy with the next token, backward, AdamW on every weight), and steps of the
supernet with one policy, with two, and compiled (teacher, merge, rounding, int8 activations, backward, AdamW on the policies' adapters).
A policy-step is one policy's share of a step. Goal on 2 cores: at least 0.5 policy-steps in the time of a plain step.
Then the memory: what the supernet keeps beside the model, in bytes of parameters, gradients and moments, and the process's peak.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from toolchain.commands.workflow import opened
from toolchain.graph.build import resolve
from toolchain.spec import Policy
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import input_moments
from toolchain.train.losses import Interference
from toolchain.train.sampler import PolicySampler
from toolchain.train.settings import Settings
from toolchain.train.step import Batch, step_gradients
from toolchain.train.team import Team

KERNELS = ("fp32", "w8a8", "w8g32", "w4g32", "w3g32", "w2g32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="pocket-llama-6m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--on", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--compile", action="store_true", help="a compiled step too; the process's peak is then the compiler's")
    arguments = parser.parse_args()
    team, settings = Team(arguments.on), Settings(precision=arguments.precision)
    with opened(arguments.model) as source:
        units = source.graph.units
    model = load_model(resolve(arguments.model)).to(team.device)
    rng = np.random.default_rng(0)
    plain = copy.deepcopy(model).requires_grad_(True)
    ids = torch.from_numpy(rng.integers(0, model.config.vocab_size, (arguments.batch, arguments.window))).to(team.device)
    supernet = Supernet(model, units, KERNELS, moments=input_moments(model, units, ids))
    sampler = PolicySampler.of(units, supernet.kernels)
    weights = Interference(units, [sampler.mixed(4.0, rng) for _ in range(8)])
    fused = team.device.type == "cuda" or None
    ours = torch.optim.AdamW(supernet.parameters.values(), lr=1e-5, weight_decay=0.0, fused=fused)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-7, fused=fused)

    def plain_step() -> None:
        theirs.zero_grad(set_to_none=True)
        with torch.autocast(team.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = plain(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        theirs.step()

    def supernet_step(policies: list[Policy], compiled: bool = False) -> Callable[[], None]:
        mode = replace(settings, compiled=compiled)

        def step() -> None:
            ours.zero_grad(set_to_none=True)
            step_gradients(supernet, policies, Batch(ids, None), weights, mode, team)
            ours.step()

        return step

    mixed = [sampler.mixed(bits, rng) for bits in (3.0, 5.0)]
    subjects = {
        "plain fp32 step": (plain_step, 1),
        "supernet, one policy (w2g32)": (supernet_step([supernet.policy("w2g32")]), 1),
        "supernet, two policies (w2g32, mixed)": (supernet_step([supernet.policy("w2g32"), mixed[0]]), 2),
        "supernet, two mixed policies": (supernet_step(mixed), 2),
    }
    if arguments.compile:
        subjects["supernet, two mixed policies, compiled"] = (supernet_step(mixed, compiled=True), 2)
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(arguments.rounds + 2):
        for name, (step, _) in subjects.items():
            begin = time.perf_counter()
            step()
            if team.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    print(
        f"{arguments.model}, {arguments.batch} x {arguments.window} tokens, {team.device.type} ({torch.get_num_threads()} threads), "
    )
    print(f"torch {torch.__version__}, {settings.precision}; {arguments.rounds} rounds in turn\n")
    print("| step | ms | 10th to 90th percentile | policy-steps per plain step |\n|---|---|---|---|")
    base = np.array(seconds["plain fp32 step"])
    for name, (_, policies) in subjects.items():
        times = np.array(seconds[name])
        low, high = np.percentile(times * 1e3, [10, 90])
        print(f"| {name} | {median(times) * 1e3:.0f} | {low:.0f} to {high:.0f} | {median(policies * base / times):.2f} |")
    held = sum(parameter.numel() * 4 for parameter in model.parameters())
    adapters = sum(parameter.numel() * 4 for parameter in supernet.parameters.values())
    frozen = sum(part.nbytes for row in supernet.frozen.values() for part in (row.places, row.low, row.high))
    ranks = ", ".join(f"{name} {supernet.adapters.rank_of(name)}" for name in KERNELS[1:])
    what = f"adapters and bounds (ranks: {ranks})"
    print(f"\nmodel {held / 1e6:.1f} MB; frozen weights of the kernels up to 4 bits {frozen / 1e6:.1f} MB;")
    print(f"{what}: {adapters / 1e6:.1f} MB, with both moments and their average {4 * adapters / 1e6:.1f} MB;")
    print(f"plain training's weights, gradients and moments {4 * held / 1e6:.1f} MB")
    print(f"peak of this process, which holds both: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
