"""The loop: supernet and meta-network together (`train`), or the supernet alone on given policies (`adapt`, a dedicated run).

    step t:  a batch of windows; the policies that the schedule has for t (`schedule.py`)
             every `meta_every` steps, in place of the last of them, the meta-network's own for a drawn budget (`joint.py`)
             gradients (`step.py`), then one AdamW step; an embedding's rows move only in steps that use them

Every random draw is a function of (seed, step), so a run that was killed goes on from its last checkpoint exactly as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from toolchain.costs.model import CostModel
from toolchain.errors import InputError
from toolchain.kernels import CATALOGUE
from toolchain.policy.meta_network import MetaNetwork
from toolchain.policy.solver import Values
from toolchain.progress import track
from toolchain.spec import Policy
from toolchain.supernet.model import Supernet
from toolchain.train import checkpoint
from toolchain.train.joint import Joint, imitate
from toolchain.train.losses import Interference
from toolchain.train.sampler import MOST_BITS, PolicySampler, scenarios, worth_training
from toolchain.train.schedule import Schedule, fixed, low_level, low_levels, schedule
from toolchain.train.settings import TUNED, Settings
from toolchain.train.step import Batch, step_gradients
from toolchain.train.team import Team

FEW_BITS = 2
"""Kernels of at most this many bits take larger steps."""

History = tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Trained:
    """The supernet is trained in place. history: one dict per step of this call; resumed_from: the step a checkpoint held, or 0."""

    meta_network: MetaNetwork | None
    history: History
    resumed_from: int


@dataclass(frozen=True)
class Run:
    """What every kind of run is given: windows int64 [n, T], of which every step takes `batch`; where its checkpoint is kept (`out`); masks
    0/1 [n, T] for padded windows. Raises InputError for too few windows."""

    windows: np.ndarray
    steps: int
    batch: int
    out: Path
    seed: int = 0
    masks: np.ndarray | None = None
    settings: Settings = TUNED
    team: Team = field(default_factory=lambda: Team("cpu"))

    def __post_init__(self) -> None:
        if self.windows.ndim != 2 or len(self.windows) < self.batch or self.steps < 1 or self.batch < 1:
            raise InputError(
                f"expected at least {self.batch} windows of text and one step, got {len(self.windows)} and {self.steps}",
                "give more text: --text FILE",
            )

    def rows(self, index: int) -> np.ndarray:
        """The windows of a step: without repetition within an epoch, a new order in the next."""
        epoch, place = divmod(index, len(self.windows) // self.batch)
        order = np.random.default_rng([self.seed, 2, epoch]).permutation(len(self.windows))
        return order[place * self.batch : (place + 1) * self.batch]


def train(supernet: Supernet, run: Run, cost_model: CostModel | None, sensitivity: Callable[[], Values]) -> Trained:
    """Train supernet and meta-network together. Without a cost model there is no meta-network, and every kernel of the supernet is trained.

    sensitivity: unit → kernel → loss, called only where no checkpoint in `run.out` has its result. A checkpoint of the same set-up is
    continued: parameters after the last step equal those of an uninterrupted run. The last one stays, for the caller to delete.
    Raises InputError for a cost model of other units.
    """
    if cost_model and [unit.name for unit in cost_model.units] != [unit.name for unit in supernet.units]:
        raise InputError("expected a cost model of the supernet's own units, got another model's", "type: bittailor profile MODEL")
    worth = worth_training(cost_model) if cost_model else supernet.kernels
    candidates = {
        unit.name: tuple(name for name in supernet.kernels[unit.name] if name in worth[unit.name]) for unit in supernet.units
    }
    sampler, settings = PolicySampler.of(supernet.units, candidates), run.settings
    loop = _Loop(supernet, run, schedule(sampler, run.steps, settings), _sampled(sampler, run.seed))
    if not settings.meta_every or not cost_model:
        return loop.go(None, None, [candidates])
    network = MetaNetwork(candidates, seed=run.seed)
    loop.watch({f"meta:{name}": parameter for name, parameter in network.named_parameters()}, settings.meta_lr)

    def joint(state: checkpoint.State | None) -> tuple[Joint, dict[str, Any]]:
        values: Values = state.extra["sensitivity"] if state else sensitivity()
        drawn = scenarios(replace(cost_model, kernels=candidates), values, settings.scenarios, run.seed)
        if state is None:
            imitate(network, drawn, settings)
        return Joint(supernet, network, cost_model, candidates, drawn, run.steps, settings), {"sensitivity": values}

    costs = [cost_model.per_unit, cost_model.fixed, [[tie.units, tie.savings] for tie in cost_model.ties]]
    return loop.go(network, joint, [candidates, costs])


def adapt(supernet: Supernet, run: Run, policies: Sequence[Policy]) -> Trained:
    """Train given policies and nothing else, all of them in every step: with one it is a dedicated run. Otherwise as `train`."""
    return _Loop(supernet, run, fixed(policies), policies).go(None, None, [[dict(policy) for policy in policies]])


class _Loop:
    """Optimisers, learning rates, checkpoints: what is the same for every kind of run."""

    def __init__(self, supernet: Supernet, run: Run, visits: Schedule, sampled: Sequence[Mapping[str, str]]) -> None:
        self.supernet, self.run, self.visits = supernet, run, visits
        self.settings, self.team = run.settings, run.team
        settings = self.settings
        self.weights = (
            Interference(supernet.units, sampled, settings.a, settings.balance) if settings.loss == "interference" else None
        )
        self.optimisers: list[torch.optim.Optimizer] = [_supernet_optimiser(supernet, settings)]
        self.average = {
            name: torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, parameter in supernet.parameters.items()
            if settings.average
        }
        self.named = {**supernet.parameters, **{f"average:{name}": parameter for name, parameter in self.average.items()}}

    def watch(self, named: Mapping[str, torch.nn.Parameter], lr: float) -> None:
        """A second optimiser and its parameters."""
        self.optimisers.append(torch.optim.AdamW(named.values(), lr=lr, weight_decay=0.0))
        self.named |= named

    def go(
        self,
        network: MetaNetwork | None,
        make_joint: Callable[[checkpoint.State | None], tuple[Joint, dict[str, Any]]] | None,
        facts: list[Any],
    ) -> Trained:
        run, settings, team = self.run, self.settings, self.team
        identity = _identity(self.supernet, run, facts)
        state = checkpoint.load(run.out, identity, self.named, self.optimisers)
        team.wait()  # before anyone writes a first one
        joint, extra = make_joint(state) if make_joint else (None, {})
        begin = state.step if state else 0
        if state is None:
            self._save(identity, checkpoint.State(0, extra))
        history = []
        saved = time.monotonic()
        device = self.supernet.device
        ids = torch.as_tensor(run.windows).to(device)
        kept = None if run.masks is None else torch.as_tensor(run.masks).to(device)
        for index in track(range(begin, run.steps), run.steps - begin, "training"):
            rows = torch.as_tensor(run.rows(index)).to(device)
            self._set_rates(index)
            history.append(self._step(index, Batch(ids[rows], None if kept is None else kept[rows]), joint))
            if time.monotonic() - saved > settings.checkpoint_seconds or index == run.steps - 1:
                self._save(identity, checkpoint.State(index + 1, extra))
                saved = time.monotonic()
        team.wait()
        for name, parameter in self.average.items():
            self.supernet.parameters[name].data.copy_(parameter)
        return Trained(network, tuple({name: float(value) for name, value in row.items()} for row in history), begin)

    def _step(self, index: int, batch: Batch, joint: Joint | None) -> dict[str, Any]:
        """Gradients and optimiser steps; distances stay on their device until the run is over, since to read one is to wait for it."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        rng = np.random.default_rng([self.run.seed, 1, index])
        policies = list(self.visits(index, rng))
        every = self.settings.meta_every
        proposed = joint.propose(index, rng) if joint and index % every == every - 1 else None
        if proposed:
            policies[-1] = proposed[1]
        elif joint and rng.random() < self.settings.likely:
            policies[-1] = joint.likely(rng)
        seen = step_gradients(self.supernet, policies, batch, self.weights, self.settings, self.team)
        self.team.join_gradients(self.supernet.parameters.values())
        with self._only_rows_of(batch.ids):
            self.optimisers[0].step()
        if self.average:
            share = self.settings.average / (
                self.settings.average + 1 + index
            )  # of the newest: a mean with weights t^(average − 1)
            get_ema_multi_avg_fn(1 - share)([*self.average.values()], [*self.supernet.parameters.values()], 0)
        out: dict[str, Any] = {str(place): visit.distance for place, visit in enumerate(seen)}
        if joint and proposed:
            out |= joint.learn(proposed[0], proposed[2], seen[-1], self.team)
            self.optimisers[1].step()
        return out

    @contextmanager
    def _only_rows_of(self, ids: torch.Tensor) -> Iterator[None]:
        """Of an embedding's row parameters a step moves those of the batch's tokens alone. Adam moves a row that had one gradient for
        dozens of steps, by some 30 learning rates in all, and most tokens are rare."""
        moving = [parameter for parameter in self.supernet.row_parameters().values() if parameter.grad is not None]
        before = [parameter.detach().clone() for parameter in moving]
        yield
        if not moving:
            return
        seen = torch.zeros(max(map(len, before)), dtype=torch.bool, device=ids.device)
        seen[ids.flatten()] = True
        if self.supernet.kind == "encoder-decoder":
            seen[self.supernet.passes.start] = True
        with torch.no_grad():
            for parameter, old in zip(moving, before, strict=True):
                parameter.copy_(torch.where(seen[: len(old), None], parameter, old))

    def _set_rates(self, index: int) -> None:
        rate = min(1.0, (index + 1) / self.settings.warm_up)
        rate *= self.settings.last_lr + (1 - self.settings.last_lr) * 0.5 * (1 + math.cos(math.pi * index / self.run.steps))
        for group in self.optimisers[0].param_groups:
            group["lr"] = group["base"] * rate

    def _save(self, identity: str, state: checkpoint.State) -> None:
        if self.team.main:
            checkpoint.save(self.run.out, identity, state, self.named, self.optimisers)


def _sampled(sampler: PolicySampler, seed: int) -> list[Policy]:
    """Policies as training sees them, over which the interference-aware weights are normalised."""
    rng = np.random.default_rng([seed, 29])
    found = [sampler.mixed(target, rng) for target in np.linspace(*sampler.range(), 64)]
    levels = low_levels(sampler)
    return found + [sampler.level(low_level(levels, index), rng) for index in range(64)]


def _supernet_optimiser(supernet: Supernet, settings: Settings) -> torch.optim.Optimizer:
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in supernet.parameters.items():
        lr = settings.bound_lr
        if name.endswith(("/A", "/B")):
            kernel = CATALOGUE.get(name.partition("/")[0])  # none: an adapter that kernels share
            lr = settings.lr * (settings.low_lr if kernel and kernel.weight_bits <= FEW_BITS else 1)
        groups.setdefault(lr, []).append(parameter)
    rates = [{"params": parameters, "lr": lr, "base": lr} for lr, parameters in groups.items()]
    return torch.optim.AdamW(rates, weight_decay=0.0, fused=True)  # R(θ) is the decay; fused: one pass over all moments


def _identity(supernet: Supernet, run: Run, facts: list[Any]) -> str:
    """sha256 over everything that a step depends on, save the sensitivities (which the checkpoint carries)."""
    digest = hashlib.sha256()
    for array in (run.windows, run.masks) if run.masks is not None else (run.windows,):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, parameter in supernet.model.named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    for name, parameter in supernet.parameters.items():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    for name, frozen in sorted(supernet.frozen.items()):
        digest.update(name.encode() + frozen.places.cpu().numpy().tobytes())
    more = [run.steps, run.batch, run.seed, supernet.rank, supernet.alpha, asdict(run.settings), MOST_BITS, facts]
    digest.update(json.dumps(more, sort_keys=True, default=dict).encode())
    return digest.hexdigest()
