"""The joint loop: one step trains the supernet on a few policies and, now and then, the meta-network on a budget.

    step t:  a batch of windows, the teacher's output once
             policy 1   the sandwich: every unit at one of the low bit-widths, in turn
             policy 2   a mixed one at the triangle wave's mean;  every `meta_every` steps instead the meta-network's own for a drawn budget
             each: α·distance + β·penalty backward;  then one AdamW step

The meta-network first imitates the exact solver's answers to random budgets (values: measured sensitivities), then goes on with
Gumbel-softmax, straight-through. Its gradient needs no extra backward pass: with Ŵ = Σ_k y_k Ŵ_k, ∂L/∂y_k = ⟨∂L/∂Ŵ, Ŵ_k⟩, and ∂L/∂Ŵ is
what the supernet's own backward pass computed (relative to the chosen kernel's; activation quantisers are taken as given). To that come the
expected-cost penalty and, still, the imitation.

Every random draw is a function of (seed, step), so a run that was killed goes on from its last checkpoint exactly as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toolchain.costs.model import CostModel
from toolchain.errors import InputError
from toolchain.policy.meta_network import MetaNetwork
from toolchain.policy.solver import Values
from toolchain.progress import track
from toolchain.spec import Policy
from toolchain.supernet.model import Supernet
from toolchain.train import checkpoint
from toolchain.train.losses import BALANCE, ExpectedCost, Interference, Target, penalty
from toolchain.train.sampler import MOST_BITS, PolicySampler, Scenarios, scenarios, triangle, worth_training

LOW_BITS = 4
"""The sandwich visits bit-widths up to this one: above it there is next to nothing to learn, and mixed policies cover it."""


@dataclass(frozen=True)
class Settings:
    """What the pocket model was tuned with (400 policies of 4×256 tokens): see each field's reason.

    lr             adapters; 5e-3 gains 3% perplexity at 2 bits and loses 3 to 5% at 3 to 8, 1e-2 is worse everywhere
    clip_lr        clip logits: they live on a scale of 1, the adapters on one of 0.05
    waves          triangle waves in a run
    a, balance     interference-aware loss
    meta_every     steps between two meta-network steps; tau anneals from tau_start to tau_end
    """

    lr: float = 2e-3
    clip_lr: float = 1e-2
    warm_up: int = 10
    last_lr: float = 0.05
    waves: int = 4
    a: float = 1.0
    balance: float = BALANCE
    activations: bool = True
    imitation_lr: float = 1e-3
    meta_lr: float = 1e-4
    meta_every: int = 4
    imitation_steps: int = 400
    scenarios: int = 240
    tau_start: float = 1.0
    tau_end: float = 0.3
    cost_weight: float = 1.0
    imitation_weight: float = 1.0
    checkpoint_seconds: float = 30.0


@dataclass(frozen=True)
class Trained:
    """The supernet is trained in place. history: one dict per step of this call; resumed_from: the step a checkpoint held, or 0."""

    meta_network: MetaNetwork
    history: tuple[dict[str, float], ...]
    resumed_from: int


def train(
    supernet: Supernet,
    windows: np.ndarray,
    cost_model: CostModel,
    sensitivity: Callable[[], Values],
    steps: int,
    batch: int,
    out: Path,
    seed: int = 0,
    masks: np.ndarray | None = None,
    settings: Settings = Settings(),
) -> Trained:
    """Train supernet and meta-network together for `steps` steps of `batch` windows [n, T]; masks [n, T] 0/1 for padded encoder windows.

    sensitivity: unit → kernel → loss, called only where no checkpoint in `out` has its result. A checkpoint of the same set-up is
    continued: parameters after the last step equal those of an uninterrupted run. The last one stays, for the caller to delete.
    Raises InputError for too few windows or a cost model of other units.
    """
    if windows.ndim != 2 or len(windows) < batch or steps < 1 or batch < 1:
        raise InputError(
            f"expected at least {batch} windows of text and one step, got {len(windows)} and {steps}", "give more text: --text FILE"
        )
    if [unit.name for unit in cost_model.units] != [unit.name for unit in supernet.units]:
        raise InputError("expected a cost model of the supernet's own units, got another model's", "type: bittailor profile MODEL")
    candidates = _candidates(supernet, cost_model)
    network = MetaNetwork(candidates, seed=seed)
    optimiser = _supernet_optimiser(supernet, settings)
    meta_optimiser = torch.optim.AdamW(network.parameters(), lr=settings.meta_lr, weight_decay=0.0)
    named = {**supernet.parameters, **{f"meta:{name}": parameter for name, parameter in network.named_parameters()}}
    identity = _identity(supernet, windows, masks, cost_model, candidates, steps, batch, seed, settings)
    state = checkpoint.load(out, identity, named, (optimiser, meta_optimiser))
    values: Values = state.extra["sensitivity"] if state else sensitivity()
    drawn = scenarios(_restricted(cost_model, candidates), values, settings.scenarios, seed)
    if state is None:
        _imitate(network, drawn, settings)
        state = checkpoint.State(0, {"sensitivity": values})
        checkpoint.save(out, identity, state, named, (optimiser, meta_optimiser))
    step = _Step(supernet, network, cost_model, candidates, drawn, steps, seed, settings)
    history = []
    saved = time.monotonic()
    ids, kept = torch.as_tensor(windows), None if masks is None else torch.as_tensor(masks)
    for index in track(range(state.step, steps), steps - state.step, "training"):
        rows = _rows(len(windows), batch, index, seed)
        rate = min(1.0, (index + 1) / settings.warm_up)
        rate *= settings.last_lr + (1 - settings.last_lr) * 0.5 * (1 + math.cos(math.pi * index / steps))
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * rate
        optimiser.zero_grad(set_to_none=True)
        meta_optimiser.zero_grad(set_to_none=True)
        history.append(step(index, ids[rows], None if kept is None else kept[rows]))
        optimiser.step()
        if index % settings.meta_every == settings.meta_every - 1:
            meta_optimiser.step()
        if time.monotonic() - saved > settings.checkpoint_seconds or index == steps - 1:
            checkpoint.save(out, identity, checkpoint.State(index + 1, state.extra), named, (optimiser, meta_optimiser))
            saved = time.monotonic()
    return Trained(network, tuple(history), state.step)


class _Step:
    """One step's gradients. Holds what is the same in every step; each call is a function of the step's number and batch."""

    def __init__(
        self,
        supernet: Supernet,
        network: MetaNetwork,
        cost_model: CostModel,
        candidates: Mapping[str, tuple[str, ...]],
        drawn: Scenarios,
        steps: int,
        seed: int,
        settings: Settings,
    ) -> None:
        self.supernet, self.network, self.drawn = supernet, network, drawn
        self.steps, self.seed, self.settings = steps, seed, settings
        self.sampler = PolicySampler.of(supernet.units, candidates)
        self.low, self.high = self.sampler.range()
        self.levels = [level for level in self.sampler.levels if level <= LOW_BITS] or list(self.sampler.levels)
        self.cost = ExpectedCost(cost_model, candidates)
        rng = np.random.default_rng([seed, 29])
        sampled = [self.sampler.mixed(target, rng) for target in np.linspace(self.low, self.high, 64)]
        sampled += [self.sampler.level(level, rng) for level in self.levels for _ in range(64 // len(self.levels))]
        self.interference = Interference(supernet.units, sampled, settings.a, settings.balance)

    def __call__(self, index: int, ids: Tensor, mask: Tensor | None) -> dict[str, float]:
        rng = np.random.default_rng([self.seed, 1, index])
        target = Target(self.supernet.kind, self.supernet.teacher(ids, mask), mask)
        sandwich = self.sampler.level(self.levels[index % len(self.levels)], rng)
        out = {"sandwich": self._backward(sandwich, ids, mask, target, self.supernet.weights(sandwich))}
        if index % self.settings.meta_every == self.settings.meta_every - 1:
            return out | self._meta(index, rng, ids, mask, target)
        period = max(self.steps // self.settings.waves, 2)
        mixed = self.sampler.mixed(triangle(index, period, self.low, self.high), rng)
        return out | {"mixed": self._backward(mixed, ids, mask, target, self.supernet.weights(mixed))}

    def _backward(self, policy: Policy, ids: Tensor, mask: Tensor | None, target: Target, weights: Mapping[str, Tensor]) -> float:
        """Accumulate the gradient of the interference-aware loss; returns the distance to the teacher."""
        distance = target.distance(self.supernet(policy, ids, mask, self.settings.activations, weights))
        used = self.supernet.parameters_of(policy)
        loss = self.interference.alpha(policy) * distance + self.interference.beta(policy) * penalty(used)
        if loss.requires_grad:  # not for a policy that is fp32 everywhere
            loss.backward()
        return float(distance.detach())

    def _meta(self, index: int, rng: np.random.Generator, ids: Tensor, mask: Tensor | None, target: Target) -> dict[str, float]:
        settings, scenario = self.settings, self.drawn.draw(rng)
        encoding = torch.from_numpy(self.drawn.encodings[scenario])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        tau = settings.tau_start * (settings.tau_end / settings.tau_start) ** (index / self.steps)
        policy, soft = self.network.sample(encoding, tau, generator)
        # One handle per use of a weight: a tied embedding and head are one tensor but two choices.
        handles = {
            name: weight.view_as(weight) if weight.requires_grad else weight.detach().requires_grad_()
            for name, weight in self.supernet.weights(policy).items()
        }
        for handle in handles.values():
            handle.retain_grad()
        distance = self._backward(policy, ids, mask, target, handles)
        log_probabilities = self.network(encoding)
        probabilities = log_probabilities.exp()
        imitation = (
            -(self.network.one_hot(self.drawn.answers[scenario]) * log_probabilities.masked_fill(~self.network.mask, 0.0))
            .sum(-1)
            .mean()
        )
        excess = self.cost.excess(self.drawn.budgets[scenario], probabilities)
        loss = (
            # No further than the loss there is: a first-order estimate of a jump of several bits is not to be believed beyond it, and
            # unbounded it was seen to drive the network away from everything it had imitated.
            (soft * self._choice_gradient(policy, handles).clamp(-distance, distance)).sum() / len(self.network.candidates)
            + settings.cost_weight * excess
            + settings.imitation_weight * imitation
        )
        loss.backward()
        return {"meta": distance, "excess": float(excess.detach()), "imitation": float(imitation.detach())}

    @torch.no_grad()
    def _choice_gradient(self, policy: Policy, handles: Mapping[str, Tensor]) -> Tensor:
        """∂L/∂y [U, C], relative to the chosen kernel's, to first order in the weights."""
        gradient = torch.zeros(len(self.network.candidates), self.network.most)
        for column in range(self.network.most):
            trial = {unit: kernels[min(column, len(kernels) - 1)] for unit, kernels in self.network.candidates.items()}
            weights = self.supernet.weights(trial)
            for row, unit in enumerate(self.supernet.units):
                if column < len(self.network.candidates[unit.name]) and trial[unit.name] != policy[unit.name]:
                    names = [f"{module}.weight" for module in unit.modules]
                    gradient[row, column] = sum(
                        float((grad * (weights[name] - handles[name])).sum())
                        for name in names
                        if (grad := handles[name].grad) is not None
                    )
        return gradient


def _imitate(network: MetaNetwork, drawn: Scenarios, settings: Settings) -> None:
    """Cross-entropy to the solver's answers, whole pool at a time, rare encodings weighing more."""
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.imitation_lr)
    encodings = torch.from_numpy(drawn.encodings)
    answers = torch.stack([network.one_hot(policy) for policy in drawn.answers])
    weights = torch.tensor(drawn.weights, dtype=torch.float32)
    for _ in range(settings.imitation_steps):
        optimiser.zero_grad(set_to_none=True)
        log_probabilities = network(encodings).masked_fill(~network.mask, 0.0)
        (-(answers * log_probabilities).sum(-1).mean(-1) @ weights).backward()
        optimiser.step()


def _candidates(supernet: Supernet, cost_model: CostModel) -> dict[str, tuple[str, ...]]:
    """What the meta-network chooses among: kernels the supernet has and some budget could want."""
    worth = worth_training(cost_model)
    return {unit.name: tuple(name for name in supernet.kernels[unit.name] if name in worth[unit.name]) for unit in supernet.units}


def _restricted(cost_model: CostModel, candidates: Mapping[str, Sequence[str]]) -> CostModel:
    from dataclasses import replace

    return replace(cost_model, kernels={unit: tuple(names) for unit, names in candidates.items()})


def _supernet_optimiser(supernet: Supernet, settings: Settings) -> torch.optim.Optimizer:
    adapters = [parameter for name, parameter in supernet.parameters.items() if name.endswith(("/A", "/B"))]
    clip = [parameter for name, parameter in supernet.parameters.items() if not name.endswith(("/A", "/B"))]
    groups = [
        {"params": adapters, "lr": settings.lr, "base": settings.lr},
        {"params": clip, "lr": settings.clip_lr, "base": settings.clip_lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)  # R(θ) is the decay


def _rows(count: int, batch: int, index: int, seed: int) -> np.ndarray:
    """The windows of step `index`: without repetition within an epoch, a new order in the next."""
    per_epoch = count // batch
    epoch, place = divmod(index, per_epoch)
    order = np.random.default_rng([seed, 2, epoch]).permutation(count)
    return order[place * batch : (place + 1) * batch]


def _identity(
    supernet: Supernet,
    windows: np.ndarray,
    masks: np.ndarray | None,
    cost_model: CostModel,
    candidates: Mapping[str, Sequence[str]],
    steps: int,
    batch: int,
    seed: int,
    settings: Settings,
) -> str:
    """sha256 over everything that a step depends on, save the sensitivities (which the checkpoint carries)."""
    digest = hashlib.sha256()
    for array in (windows, masks) if masks is not None else (windows,):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, parameter in supernet.model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    for name, parameter in supernet.parameters.items():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    facts = [steps, batch, seed, supernet.rank, supernet.alpha, asdict(settings), dict(candidates), MOST_BITS]
    costs = [cost_model.per_unit, cost_model.fixed, [[tie.units, tie.savings] for tie in cost_model.ties]]
    digest.update(json.dumps([facts, costs], sort_keys=True, default=dict).encode())
    return digest.hexdigest()
