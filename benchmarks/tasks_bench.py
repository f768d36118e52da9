"""What `tasks_at_budget.py` asks of a fine-tuned model: its sentences, its device's costs, supernets at their start, a package's score."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import task_kinds
import torch
import training_jobs as jobs
from choosing import keeps
from post_training import BATCHES, Loss, curved, gamma, made_by
from quality_at_budget import trainable, trained_kernels
from tasks_measured import columns
from torch.func import functional_call

from toolchain import hardware
from toolchain.commands.workflow import find_costs
from toolchain.costs.model import CostModel
from toolchain.errors import InfeasibleBudgetError
from toolchain.files import scratch, write_atomic
from toolchain.graph.assemble import Weights, assemble, round_to_nearest
from toolchain.graph.build import build
from toolchain.graph.model import DESCRIPTION, Graph
from toolchain.kernels import CATALOGUE, mean_bits, uniform
from toolchain.policy import budgets, sensitivity
from toolchain.policy.solver import Values
from toolchain.quantize.affine import Quantized
from toolchain.quantize.fake import codes, fake_quantise
from toolchain.spec import Budget, Kernel, Policy, Unit
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import input_moments, search
from toolchain.train.loop import Run
from toolchain.train.losses import Target
from toolchain.train.team import Team

SCORED, CURVED = 64, 8
"""Training sentences on which sensitivities are measured and subnets are searched; sentences of each of the Hessian's batches."""

Chosen = Mapping[str, Policy]
"""Budget → the policy that a method has for it; of a budget that it cannot keep, none."""


class Bench:
    """A task's fine-tuned model: its graph, its sentences, what the device's table says of it, and supernets at their start."""

    def __init__(self, arguments: argparse.Namespace, task: str, seed: int) -> None:
        self.seed, self.arguments = seed, arguments
        self.folder = arguments.models / f"{task}-{seed}"
        self.task = task_kinds.kind_of(task, arguments.data, self.folder, arguments.examples)
        self.device = Team(arguments.on).device
        place = arguments.out / "graphs" / f"{task}-{seed}"
        if not (place / DESCRIPTION).is_file():
            place.mkdir(parents=True, exist_ok=True)
            build(str(self.folder), place)
        self.graph = Graph.open(place)
        device = hardware.load(arguments.device)
        whole = find_costs(Graph.open(arguments.graph), device, [arguments.profiles], None).model
        if [unit.name for unit in whole.units] != [unit.name for unit in self.graph.units]:
            raise SystemExit(
                f"expected the units of {arguments.graph} in {self.folder}, got others: name a graph of one of --models"
            )
        self.costs: CostModel = trainable(whole)
        self.budgets = {name: budgets.planned(budget, whole) for name, budget in columns(whole).items()}
        rows = task_kinds.padded(self.task.rows, "cpu")
        self.windows, self.masks = rows["input_ids"].numpy(), rows["attention_mask"].numpy()
        self.drawn = np.random.default_rng([seed, 5]).permutation(len(self.windows))

    @property
    def units(self) -> Sequence[Unit]:
        return self.graph.units

    def sentences(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, mask, labels) of drawn training sentences, as long as the longest of them."""
        rows = self.drawn[first : first + count]
        longest = int(self.masks[rows].sum(1).max())
        ids, mask = (torch.from_numpy(part[rows, :longest]).to(self.device) for part in (self.windows, self.masks))
        return ids, mask, self.task.labels[rows].to(self.device)

    @cached_property
    def untrained(self) -> Supernet:
        """GPTQ's codes, adapters that add nothing yet. What it holds is the start of all others and must stay."""
        return self.start("own")

    @cached_property
    def kept(self) -> dict[str, np.ndarray]:
        return self.untrained.arrays()

    def start(self, adapters: str, gptq: bool = True) -> Supernet:
        """A supernet of its own at its start."""
        model, names = load_model(self.folder).to(self.device), trained_kernels(self.costs)
        if adapters == "own" and gptq and "untrained" not in self.__dict__:
            ids, mask, _ = self.sentences(0, jobs.CALIBRATION)
            moments = input_moments(model, self.units, ids, masks=mask)
            return Supernet(model, self.units, names, seed=self.seed, moments=moments)
        if not gptq:
            return Supernet(model, self.units, names, seed=self.seed, adapters=adapters)
        supernet = Supernet(model, self.units, names, seed=self.seed, start=False, adapters=adapters)
        ours = supernet.arrays()
        supernet.load(
            ours | {name: array for name, array in self.kept.items() if adapters == "own" or not name.endswith(("/A", "/B"))}
        )
        return supernet

    def training(self, steps: int, folder: Path, **changes: Any) -> Run:
        settings = jobs.settings_of(self.arguments, **changes)
        return Run(self.windows, steps, self.arguments.batch, folder, self.seed, self.masks, settings, Team(self.arguments.on))

    def scorer(self, supernet: Supernet) -> Callable[[Policy], float]:
        """policy → distance to the fine-tuned model on SCORED training sentences at once: a range per tensor is then of them all."""
        ids, mask, _ = self.sentences(0, SCORED)
        with torch.no_grad():
            target = Target(supernet.kind, supernet.teacher(ids, mask), mask)

        @torch.no_grad()
        def score(policy: Policy) -> float:
            return float(target.distance(supernet(policy, ids, mask)))

        return score

    def losses(self, supernet: Supernet) -> Values:
        return sensitivity.measure(self.scorer(supernet), self.units, supernet.kernels, uniform("fp32", self.units))

    def curvatures(self, supernet: Supernet) -> Values:
        """Of the task's own loss on labelled sentences."""

        def loss(first: int) -> torch.Tensor:
            ids, mask, labels = self.sentences(first, CURVED)
            return self.task.loss(supernet.model(input_ids=ids, attention_mask=mask), labels)

        parts: list[Loss] = [partial(loss, place * CURVED) for place in range(BATCHES)]
        return curved(supernet, parts, trained_kernels(self.costs))

    def uniforms(self) -> Chosen:
        """Of the uniform policies that fit the one of most bits, of equal ones the first of the catalogue."""
        names = [name for name in trained_kernels(self.costs) if CATALOGUE[name].activation != "int8_tensor"]
        made = sorted((uniform(name, self.units, names) for name in names), key=lambda one: -mean_bits(one, self.units))
        return self.fitting(lambda budget: next((one for one in made if keeps(self.costs, one, budget)), None))

    def fitting(self, choose: Callable[[Budget], Policy | None]) -> Chosen:
        found = {}
        for name, budget in self.budgets.items():
            try:
                policy = choose(budget)
            except InfeasibleBudgetError:
                continue
            if policy:
                found[name] = policy
        return found

    def score(self, policy: Policy, weights: Weights | None) -> dict[str, float]:
        """Metrics of the package on onnxruntime. weights: needed where something is quantised."""
        with scratch() as folder:
            assemble(self.graph, policy, weights or round_to_nearest(self.graph), folder, sync=False)
            for path in self.graph.companions():
                (folder / path.name).write_bytes(path.read_bytes())
            return self.task.of_package(folder, self.arguments.threads)

    def score_in_torch(self, supernet: Supernet, policy: Policy) -> dict[str, float]:
        """Metrics of a subnet that no package holds. Its kernels quantise activations by groups, so sentences may share a batch."""
        weights = supernet.weights(policy)

        class Answers(torch.nn.Module):
            def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
                with supernet.quantised_inputs(policy):
                    return functional_call(supernet.model, weights, (input_ids, attention_mask), tie_weights=False)

        return self.task.of_model(Answers(), str(self.device))


def ptq(graph: Graph, way: str, moments: Mapping[str, torch.Tensor]) -> Weights:
    """Weights that nobody trained: min-max or MSE, with γ or without. moments: of the layers' inputs, for γ."""

    def made(unit: Unit, kernel: Kernel) -> Quantized:
        weight = torch.from_numpy(graph.weight(unit))
        low, high = search(weight, kernel) if "MSE" in way else (None, None)
        found = codes(weight, kernel, low, high)
        if not way.endswith("γ"):
            return found
        seen = moments[unit.modules[0]].cpu() if unit.op == "MatMul" else torch.eye(unit.K)
        factor = gamma(weight, fake_quantise(weight, kernel, low, high), seen)
        return replace(found, scales=(found.scales * factor).astype(np.float32))

    return made


class Cells:
    """Method → budget → what it reached there; kept after every method, in a file like that of a job that is done.

    about: what that file says of the job; earlier: what it begins with where nothing is kept yet, if full precision scores as it did there.
    full: the headline of the model itself, on the same examples.
    """

    def __init__(self, bench: Bench, path: Path, about: Mapping[str, Any], earlier: Mapping[str, dict[str, Any]]) -> None:
        self.bench, self.path, self.about = bench, path, about
        self._scores: dict[tuple[str, Policy], dict[str, float]] = {}
        self.full = task_kinds.headline(bench.score(uniform("fp32", bench.units), None))
        kept = json.loads(path.read_text())["cells"] if path.is_file() else earlier
        same = kept.get(task_kinds.FULL) == (full := {"": {"headline": self.full}})
        self.found: dict[str, dict[str, Any]] = dict(kept) if same else {task_kinds.FULL: full}

    def has(self, method: str, columns: Mapping[str, Any]) -> bool:
        return all(name in self.found.get(method, {}) for name in columns)

    def add(
        self,
        method: str,
        chosen: Chosen,
        weights: Weights | None,
        training: float = 0.0,
        choosing: float = 0.0,
        scores: dict[str, float] | None = None,
    ) -> None:
        """Score a method's package for each budget. `choosing` serves all of them, `training` too where a run does."""
        bench = self.bench
        row = self.found.setdefault(method, {})
        for name, policy in chosen.items():
            if name in row:
                continue
            if (method, policy) not in self._scores:
                assert scores or weights
                self._scores[method, policy] = scores or bench.score(policy, weights)
            seen = self._scores[method, policy]
            foreseen = bench.costs.totals(policy)
            row[name] = {
                "policy": dict(policy.items()),
                "scores": seen,
                "headline": task_kinds.headline(seen),
                "mean_bits": mean_bits(policy, bench.units),
                "predicted": {key: foreseen[key] for key in ("peak_memory_bytes", "latency_ms")},
                "training": training,
                "choosing": choosing,
                **made_by(bench.device),
            }
        write_atomic(self.path, json.dumps({**self.about, "fp32": self.full, "cells": self.found}, indent=1) + "\n")
