"""What a model loses that nobody trains further: every post-training method of the sources, at the same mean bits, in perplexity.

    python benchmarks/post_training.py run --text TRAIN... --heldout TEXT --out DIR [--model pocket-llama-6m] [--seeds 3] [--windows 0]
                                           [--on cpu]
    python benchmarks/post_training.py report --out DIR --results results

    PTQ, min-max      algorithm 1 of the PTQ/QAT study, by group (arXiv:2411.06084)
    PTQ, MSE          the same with each group's range where the squared error is least: what its theorem of the optimal scale promises
    … and γ           its scaling factor: the outputs of every layer get their second moment again (equation 18); of an embedding, its rows
    log quantiser     its powers of two (equation 8), by group; no kernel of the runtime has them
    pruned, MSE       half of every matrix's weights, the smallest, are 0 before PTQ; no kernel skips them, and they count as codes
    GPTQ              column by column (arXiv:2210.17323)
    closed form       GPTQ's weights at the bits of b* = ½ log₂(α σ²/λ) (its theorem 8). α: what the unit costs alone at 3 bits, per weight
                      and variance; so b* knows of one measurement a unit, where the solver knows of one for each width
    solver            GPTQ's weights at the bits of the exact solver, by what each unit costs alone at each width
    Hessian           GPTQ's weights at the bits of the exact solver, by Ω·‖W − Ŵ‖²: Q-BERT's ranking, Ω from the largest eigenvalues of a
                      unit's block of the Hessian (`quantize/hessian.py`), which knows of no trial at all

Weights and, as the kernels do at run time, activations to 8 bits; groups of 32; embedding and head too. Mean bits are of the codes of all
units; where widths do not add up to a column's, the mean that was reached stands behind. A seed draws the calibration windows; rows that
use none have no spread. Held-out windows of 256 tokens. Seconds: of making a policy's weights and, of the last three, of choosing it, which
serves all means. DIR keeps every cell with what it was made by, so a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import training_jobs as jobs
from bits import KERNELS, MEANS, OFF, full, kernels_of, solved

from toolchain.files import sha256, write_atomic
from toolchain.graph.build import resolve
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, candidates, mean_bits, uniform
from toolchain.policy import sensitivity
from toolchain.policy.solver import Values
from toolchain.profiler.machine import cpu_name
from toolchain.quantize.allocation import allocate, rounded
from toolchain.quantize.fake import fake_quantise
from toolchain.quantize.gptq import compensated
from toolchain.quantize.hessian import largest_eigenvalues, ranked
from toolchain.quantize.post_training import gamma, log_quantise
from toolchain.report import table
from toolchain.spec import Kernel, Policy, Unit
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import input_moments, search
from toolchain.train.quality import scorer
from toolchain.train.team import Team

ANCHOR = 3
"""Bits at which the closed form's α is measured."""
SCORED = 16
"""Calibration windows on which sensitivities are measured."""
BATCHES, TOGETHER = 4, 2
"""Of calibration windows for the Hessian's eigenvalues."""

Loss = Callable[[], torch.Tensor]
"""A loss of a batch, whose graph each call makes anew."""

Make = Callable[[torch.Tensor, Kernel, torch.Tensor], torch.Tensor]
"""(weight [N, K], kernel, moments of its inputs [K, K]) → ŵ [N, K]. An embedding has no inputs: where a head shares its tensor, the head's
count for it, as in training (`starts.input_moments`)."""


def _min_max(weight: torch.Tensor, kernel: Kernel, moments: torch.Tensor) -> torch.Tensor:
    return fake_quantise(weight, kernel)


def _mse(weight: torch.Tensor, kernel: Kernel, moments: torch.Tensor) -> torch.Tensor:
    return fake_quantise(weight, kernel, *search(weight, kernel))


def _log(weight: torch.Tensor, kernel: Kernel, moments: torch.Tensor) -> torch.Tensor:
    return log_quantise(weight, kernel)


def _pruned(weight: torch.Tensor, kernel: Kernel, moments: torch.Tensor) -> torch.Tensor:
    return _mse(weight * (weight.abs() > weight.abs().median()), kernel, moments)


def _gptq(weight: torch.Tensor, kernel: Kernel, moments: torch.Tensor) -> torch.Tensor:
    low, high = search(weight, kernel, moments.diagonal())
    return fake_quantise(compensated(weight, moments, kernel, low, high), kernel, low, high)


PLAIN: dict[str, Make] = {"PTQ, min-max": _min_max, "PTQ, MSE": _mse, "log quantiser": _log, "pruned, MSE": _pruned, "GPTQ": _gptq}
SCALED = ", and γ"
UNIFORM = [f"{method}{more}" for method in PLAIN for more in ("", SCALED)]
CALIBRATED = ("γ", "GPTQ")
MIXED = ("closed form", "solver", "Hessian")
SETUP = ("model", "heldout_sha256", "also", "text_sha256", "tokens")
"""What all cells of a folder have in common."""


class Bench:
    """The model, its units' moments on a seed's calibration windows, and the weights that methods make of them."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        graph, device = Graph.open(arguments.out / "graph"), Team(arguments.on).device
        model = load_model(resolve(arguments.model)).to(device)
        self.units = graph.units
        self.net = Supernet(model, self.units, tuple(KERNELS.values()), seed=0, start=False)
        drawn = np.random.default_rng(seed).permutation(np.load(arguments.out / "train.npy"))[: jobs.CALIBRATION].astype(np.int64)
        self.calibration, self.heldout, self.also = drawn, jobs.heldout_windows(arguments), jobs.also_windows(arguments)
        self.moments = input_moments(model, self.units, torch.from_numpy(drawn).to(device))
        self._made: dict[tuple[str, str, str], tuple[torch.Tensor, float]] = {}
        self._losses: dict[str, tuple[dict[str, dict[str, float]], float]] = {}

    @torch.no_grad()
    def weights(self, method: str, policy: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Parameter of the model → what the method makes of it under the policy's kernels; of fp32 the weight itself."""
        return {
            f"{module}.weight": self._weight(method, unit, module, policy[unit.name])
            for unit in self.units
            for module in unit.modules
        }

    def _weight(self, method: str, unit: Unit, module: str, name: str) -> torch.Tensor:
        weight = self.net.model.get_submodule(module).get_parameter("weight").detach()
        if not CATALOGUE[name].quantised:
            return weight
        plain, rows = method.removesuffix(SCALED), torch.eye(weight.shape[1], device=weight.device)
        key, moments = (plain, self.net.owner(module), name), self.moments.get(module, rows)
        if key not in self._made:
            begin = time.monotonic()
            made = PLAIN[plain](weight, CATALOGUE[name], moments)
            float(made.flatten()[0])  # a GPU answers once it has done the work
            self._made[key] = (made, time.monotonic() - begin)
        made = self._made[key][0]
        return made if method == plain else gamma(weight, made, moments if unit.op == "MatMul" else rows) * made

    def seconds(self, method: str, policy: Mapping[str, str]) -> float:
        """What it took to make the policy's weights, without γ, which takes next to nothing."""
        plain = method.removesuffix(SCALED)
        used = {(plain, self.net.owner(module), policy[unit.name]) for unit in self.units for module in unit.modules}
        return sum(self._made[key][1] for key in used if key in self._made)

    def quality(self, method: str, policy: Policy) -> dict[str, Any]:
        """Perplexity, KL to fp32 in nats per token; both on each further text."""
        weights = {"": self.weights(method, policy)}
        perplexity, distance = jobs.quality(self.net, {"": policy}, self.heldout, weights)[""]
        also = {text: jobs.quality(self.net, {"": policy}, windows, weights)[""] for text, windows in self.also.items()}
        others = {key: {text: of[place] for text, of in also.items()} for place, key in enumerate(("also", "also_kl"))}
        return {"perplexity": perplexity, "kl": distance, **others}

    def losses(self, kind: str) -> tuple[dict[str, dict[str, float]], float]:
        """(unit → kernel → loss with this unit alone in GPTQ's weights, seconds). kind: "trials", KL on calibration windows; "Hessian"."""
        if kind not in self._losses:
            begin = time.monotonic()
            found = self._trials() if kind == "trials" else curved(self.net, of_the_next_token(self.net, self.calibration))
            self._losses[kind] = (found, time.monotonic() - begin)
        return self._losses[kind]

    def _trials(self) -> dict[str, dict[str, float]]:
        score = scorer(self.net, self.calibration[:SCORED])
        self.net.weights = lambda policy: self.weights("GPTQ", policy)  # type: ignore[method-assign]
        return sensitivity.measure(score, self.units, kernels_of(self.units), full(self.units))


def curved(net: Supernet, losses: Sequence[Loss], names: Sequence[str] = tuple(KERNELS.values())) -> dict[str, dict[str, float]]:
    """Unit → kernel, of those named that it may have, → Ω·‖W − Ŵ‖², Ŵ rounded to nearest; Ω of each of the losses."""
    curvature, found = unit_curvatures(net, losses), {}
    for unit in net.units:
        weights = [net.model.get_submodule(module).get_parameter("weight").detach() for module in unit.modules]
        wrong = {
            name: sum(float((_mse(weight, CATALOGUE[name], weight) - weight).double().square().sum()) for weight in weights)
            for name in candidates(unit, names)
        }
        found[unit.name] = {name: curvature[unit.name] * error for name, error in wrong.items()}
    return found


def unit_curvatures(net: Supernet, losses: Sequence[Loss]) -> dict[str, float]:
    """Unit → Ω of its modules' weights, the largest among them."""
    owners = dict.fromkeys(net.owner(module) for unit in net.units for module in unit.modules)
    weights = [net.model.get_submodule(owner).get_parameter("weight").requires_grad_() for owner in owners]
    seen = [largest_eigenvalues(loss, weights) for loss in losses]
    for weight in weights:
        weight.requires_grad_(False)
    found = dict(zip(owners, ranked(seen), strict=True))
    return {unit.name: max(found[net.owner(module)] for module in unit.modules) for unit in net.units}


def of_the_next_token(net: Supernet, windows: np.ndarray) -> list[Loss]:
    """A decoder's own loss on BATCHES parts of the first windows [n, T]."""

    def loss(ids: torch.Tensor) -> torch.Tensor:
        said = net.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(said.flatten(0, 1), ids[:, 1:].flatten())

    return [partial(loss, ids) for ids in torch.from_numpy(windows[: BATCHES * TOGETHER]).to(net.device).split(TOGETHER)]


def closed_form(
    units: Sequence[Unit], net: Supernet, losses: Values, bits: float, kernels: Mapping[int, str] = KERNELS, anchor: int = ANCHOR
) -> Policy:
    """The theorem's bits, rounded to those there are."""
    sizes = {unit.name: unit.parameters for unit in units}
    variance = {unit.name: _variance(net, unit) for unit in units}
    alpha = {name: losses[name][kernels[anchor]] * 4**anchor / (variance[name] * sizes[name]) for name in sizes}
    chosen = rounded(allocate(alpha, variance, sizes, bits, max(kernels)), sizes, bits, tuple(kernels))
    return Policy.of({name: kernels[width] for name, width in chosen.items()})


def _variance(net: Supernet, unit: Unit) -> float:
    rows = torch.cat([net.model.get_submodule(module).get_parameter("weight") for module in unit.modules])
    return float(rows.detach().double().var())


def run(arguments: argparse.Namespace) -> None:
    jobs.prepare(arguments)
    kept = arguments.out / "cells.json"
    cells: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for seed in range(arguments.seeds):
        wanted: list[tuple[str, float]] = [("fp32", 32)] if seed == 0 else []
        wanted += [
            (method, bits) for method in UNIFORM for bits in KERNELS if seed == 0 or any(word in method for word in CALIBRATED)
        ]
        wanted += [(method, bits) for method in MIXED for bits in MEANS]
        wanted = [(method, bits) for method, bits in wanted if f"{method} {bits} {seed}" not in cells]
        if not wanted:
            continue
        bench = Bench(arguments, seed)
        about = setup(arguments, bench)
        if any(cells.get("setup", about).get(name) != about[name] for name in SETUP):
            raise SystemExit(f"expected cells of {about} in {kept}, got those of {cells['setup']}: take another --out")
        for number, (method, bits) in enumerate(wanted, 1):
            policy, seconds = chosen(bench, method, bits)
            made = "GPTQ" if method in (*MIXED, "fp32") else method
            cell = {"method": method, "bits": bits, "seed": seed, **bench.quality(made, policy)}
            cell |= {
                "mean_bits": mean_bits(policy, bench.units),
                "seconds": bench.seconds(made, policy),
                "choosing_seconds": seconds,
            }
            cells[f"{method} {bits} {seed}"] = cell | {"device": about["device"], "commit": about["commit"]}
            write_atomic(kept, json.dumps({**cells, "setup": about}, indent=1) + "\n")
            print(
                f"seed {seed}, {number}/{len(wanted)}: {method} at {bits} bits: {cell['perplexity']:.2f}",
                file=sys.stderr,
                flush=True,
            )


def chosen(bench: Bench, method: str, bits: float) -> tuple[Policy, float]:
    """(a method's policy of these mean bits, seconds that it took to know the units)."""
    if method not in MIXED:
        return uniform(KERNELS.get(int(bits), "fp32"), bench.units), 0.0
    losses, seconds = bench.losses("Hessian" if method == "Hessian" else "trials")
    if method == "closed form":
        return closed_form(bench.units, bench.net, losses, bits), seconds
    return solved(bench.units, kernels_of(bench.units), losses, bits), seconds


def setup(arguments: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What a table's first lines say."""
    return {
        "model": arguments.model,
        "heldout": Path(arguments.heldout).name,
        "heldout_sha256": sha256(arguments.heldout),
        "text_sha256": [sha256(path) for path in arguments.text],
        "also": {jobs.text_name(path): sha256(path) for path in jobs.also_of(arguments)},
        "tokens": int(bench.heldout[:, 1:].size),
        "seeds": arguments.seeds,
        **made_by(bench.net.device),
    }


def made_by(device: torch.device) -> dict[str, str]:
    """The device and the commit that a number was made on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {"device": f"{name}, torch {torch.__version__}, Python {platform.python_version()}", "commit": commit}


def report(arguments: argparse.Namespace) -> None:
    kept = arguments.out / "cells.json"
    if not kept.is_file():
        raise SystemExit(
            f"expected cells in {kept}, found none; type: python benchmarks/post_training.py run --out {arguments.out} ..."
        )
    cells = json.loads(kept.read_text())
    about = cells.pop("setup")
    unquantised = cells["fp32 32 0"]["perplexity"]
    rows = []
    for method in (*UNIFORM, *MIXED):
        row: dict[str, Any] = {"method": method}
        for bits in MEANS:
            seen = [cell for cell in cells.values() if (cell["method"], cell["bits"]) == (method, bits)]
            row[f"{bits:g} bits"] = spread([cell["perplexity"] for cell in seen])
            reached = [cell["mean_bits"] for cell in seen]
            if any(abs(each - bits) > OFF for each in reached):
                row[f"{bits:g} bits"] += f" ({mean(reached):.2f})"
        rows.append(row)
    text = f"{about['model']}, perplexity on {about['heldout']} ({about['tokens']} tokens), fp32 {unquantised:.2f}\n"
    text += "; ".join(sorted({f"{cell['device']}, commit {cell['commit']}" for cell in cells.values()})) + "\n\n"
    text += table(rows, list(rows[0]), markdown=True) + "\n"
    arguments.results.mkdir(exist_ok=True)
    write_atomic(arguments.results / "post_training.md", text)
    write_atomic(
        arguments.results / "post_training.json", json.dumps({"setup": about, "cells": [*cells.values()]}, indent=1) + "\n"
    )
    print(text)


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± half the range; – of nothing."""
    if not values:
        return "–"
    digits = digits if mean(values) < 1000 else 0
    return f"{mean(values):.{digits}f}" + (f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for act in (run, report):
        sub = commands.add_parser(act.__name__)
        sub.set_defaults(act=act)
        sub.add_argument("--out", type=Path, required=True)
        if act is report:
            sub.add_argument("--results", type=Path, default=Path("results"))
            continue
        sub.add_argument("--text", nargs="+", type=Path, required=True)
        sub.add_argument("--heldout", type=Path, required=True)
        sub.add_argument("--also", nargs="+", type=Path, help="further held-out texts")
        sub.add_argument("--model", default="pocket-llama-6m")
        sub.add_argument("--seeds", type=int, default=3)
        sub.add_argument("--windows", type=int, default=0, help="held-out windows to measure on (0: all)")
        sub.add_argument("--on", default="cpu")
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
