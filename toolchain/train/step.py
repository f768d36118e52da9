"""One step's gradients: some policies, one batch of windows, the teacher asked once.

    Ŵ = weights(policy), made once a step         handles: Ŵ cut from its graph, one per use of a weight
    for every micro-batch:  the teacher's output; for every policy:  α·(distance + λ·apart) backward, into the handles
    then once:  the handles' gradients backward through quantiser and adapters;  β·penalty backward

So accumulation costs no second merge or rounding; and ∂L/∂Ŵ stays at hand, which is all the meta-network's gradient needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.spec import Policy
from toolchain.supernet.model import Supernet
from toolchain.train.losses import Interference, Target, penalty
from toolchain.train.settings import Settings
from toolchain.train.team import Team


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


def step_gradients(
    supernet: Supernet, policies: Sequence[Policy], batch: Batch, weights: Interference | None, settings: Settings, team: Team
) -> list[Visit]:
    """Accumulate into the supernet's parameters the gradient of Σ_π α(π)·(distance(π) + λ·apart(π)) + β(π)·penalty(π); weights None: plain
    MSE in the distance's place, α 1."""
    hidden = settings.hidden_weight > 0
    made = [supernet.weights(policy) for policy in policies]
    # One handle per use: a tied embedding and head are one tensor but two choices of the meta-network.
    handles = [{name: weight.detach().requires_grad_() for name, weight in row.items()} for row in made]
    distances = [torch.zeros((), device=batch.ids.device) for _ in policies]
    for ids, mask, share in batch.shares(settings.micro_batch, team):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            teacher = supernet.teacher_trace(ids, mask, hidden)
        target = Target(supernet.kind, teacher.output.float(), mask, teacher.hidden)
        for place, policy in enumerate(policies):
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                student = supernet.trace(policy, ids, mask, settings.activations, handles[place], hidden=hidden)
            distance = (target.distance if weights else target.squared)(student.output.float()) * share
            beside = settings.hidden_weight * target.apart(student.hidden) * share if hidden else 0.0
            ((distance + beside) * (weights.alpha(policy) if weights else 1.0)).backward()
            distances[place] += distance.detach()
    for policy, row, ends in zip(policies, made, handles, strict=True):
        trained = [
            (weight, ends[name].grad) for name, weight in row.items() if weight.requires_grad and ends[name].grad is not None
        ]
        if trained:  # not for a policy that is fp32 everywhere
            torch.autograd.backward([weight for weight, _ in trained], [gradient for _, gradient in trained])
            if weights and team.main:
                (weights.beta(policy) * penalty(supernet.parameters_of(policy))).backward()
    return [Visit(*row) for row in zip(policies, distances, handles, strict=True)]
