"""One step's gradients: some policies, one batch of windows, the teacher asked once.

    Ŵ = weights(policy), made once a step         handles: Ŵ cut from its graph, one per use of a weight
    for every micro-batch:  the teacher's output; for every policy:  α·(distance + λ·apart) backward, into the handles
    then once:  the handles' gradients backward through quantiser and adapters, and β·penalty's

So accumulation costs no second merge or rounding; and ∂L/∂Ŵ stays at hand, which is all the meta-network's gradient needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from toolchain.spec import Policy
from toolchain.supernet.model import Supernet
from toolchain.train.losses import Interference, Target, pull
from toolchain.train.settings import Settings
from toolchain.train.team import Team

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Windows int64 [n, T] and, for padded ones, masks 0/1 [n, T], on the training device."""

    ids: Tensor
    mask: Tensor | None

    def shares(self, size: int, team: Team) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """This process's micro-batches of at most `size` windows (0: one), each with its share of the whole batch's kept tokens."""
        mine = slice(self.ids.shape[0] * team.rank // team.size, self.ids.shape[0] * (team.rank + 1) // team.size)
        kept = (torch.ones_like(self.ids) if self.mask is None else self.mask).sum(1).double()
        whole, kept, ids = kept.sum(), kept[mine], self.ids[mine]
        mask = None if self.mask is None else self.mask[mine]
        size = size or max(len(ids), 1)
        return [
            (ids[at : at + size], None if mask is None else mask[at : at + size], (kept[at : at + size].sum() / whole).float())
            for at in range(0, len(ids), size)
        ]


@dataclass(frozen=True)
class Visit:
    """What a policy's turn left behind: distance to the teacher (this process's share of it), and its weights with their gradients."""

    policy: Policy
    distance: Tensor
    handles: Mapping[str, Tensor]


def _target(supernet: Supernet, ids: Tensor, mask: Tensor | None, settings: Settings) -> Target:
    """What the teacher says of a micro-batch."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        teacher = supernet.teacher_trace(ids, mask, settings.hidden_weight > 0)
    return Target(supernet.kind, teacher.output.float(), mask, teacher.hidden)


def _losses(
    supernet: Supernet,
    weights: Mapping[str, Tensor],
    ids: Tensor,
    mask: Tensor | None,
    target: Target,
    settings: Settings,
    squared: bool,
) -> tuple[Tensor, Tensor]:
    """(distance, λ · apart) of the subnet with these weights."""
    hidden = settings.hidden_weight > 0
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        student = supernet.passed(weights, ids, mask, hidden=hidden)
    distance = (target.squared if squared else target.distance)(student.output.float())
    return distance, settings.hidden_weight * target.apart(student.hidden) if hidden else torch.zeros_like(distance)


@cache
def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The same, compiled by torch at its first call."""
    return torch.compile(function)


def step_gradients(
    supernet: Supernet, policies: Sequence[Policy], batch: Batch, weights: Interference | None, settings: Settings, team: Team
) -> list[Visit]:
    """Accumulate into the supernet's parameters the gradient of Σ_π α(π)·(distance(π) + λ·apart(π)) + β(π)·penalty(π); weights None: plain
    MSE in the distance's place, α 1."""
    teach, hold = (compiled(_target), compiled(_losses)) if settings.compiled else (_target, _losses)
    made = [supernet.weights(policy) for policy in policies]
    # One handle per use: a tied embedding and head are one tensor but two choices of the meta-network.
    handles = [{name: weight.detach().contiguous().requires_grad_() for name, weight in row.items()} for row in made]
    distances = [torch.zeros((), device=batch.ids.device) for _ in policies]
    for ids, mask, share in batch.shares(settings.micro_batch, team):
        target = teach(supernet, ids, mask, settings)
        for place, policy in enumerate(policies):
            with supernet.quantised_inputs(policy if settings.activations else None, settings.compiled):
                distance, beside = hold(supernet, handles[place], ids, mask, target, settings, weights is None)
            distance, beside = distance * share, beside * share
            ((distance + beside) * (weights.alpha(policy) if weights else 1.0)).backward()
            distances[place] += distance.detach()
    for policy, row, ends in zip(policies, made, handles, strict=True):
        trained = [
            (weight, ends[name].grad) for name, weight in row.items() if weight.requires_grad and ends[name].grad is not None
        ]
        if trained:  # not for a policy that is fp32 everywhere
            torch.autograd.backward([weight for weight, _ in trained], [gradient for _, gradient in trained])
            if weights and team.main:
                pull(supernet.parameters_of(policy), weights.beta(policy))
    return [Visit(*row) for row in zip(policies, distances, handles, strict=True)]
