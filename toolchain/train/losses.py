"""The numbers that training makes small.

supernet      α(π) · (D(teacher, student) + λ · H) + β(π) · R(θ_π)          interference-aware loss (MetaQuantLLM), hidden states beside
D             decoder, encoder-decoder: KL(teacher ‖ student) per token, nats
              encoder: 1 − cosine + relative squared error of the hidden states, and to it what its task head's logits lose:
              KL of labels, vocabulary or positions, nats;  of a regression (t − s)² / (1 + t²)
H             relative squared error of the hidden states behind each block, per token: holds every block to what the teacher's gives the
              next, whatever kernels the others have. Where D is in nats, so is H: an error of relative square ε in the logits costs
              about ε · ½ Var_p(logits), p the teacher's distribution
α(π), β(π)    (b_max / b̄(π))^a normalised to mean 1 over the sampler;  0.1 · b̄(π)/b_max
R             mean square of the subnet's adapter entries (not of the bounds: their zero means nothing)
meta-network  Σ_r max(0, expected cost_r / budget_r − 1)          the cost table's pull under the budget
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from toolchain.costs.model import CostModel
from toolchain.spec import Budget, Unit
from toolchain.supernet.passes import Headed, Output
from toolchain.train.sampler import mean_bits_of

BALANCE = 0.1


def divergence_of(kind: str, teacher: Output, student: Output, attention_mask: Tensor | None = None) -> Tensor:
    """Scalar distance of a student's output to the teacher's, averaged over the tokens that the mask keeps.

    kind "decoder", "encoder-decoder": outputs are logits [B, T, V]; "encoder": hidden states [B, T, H], or `Headed`. What a head says of
    a whole window counts for each of its tokens.
    """
    if isinstance(teacher, Headed):
        per_token = _of_hidden(teacher.hidden, student.hidden) + _per_token(_of_head(teacher, student, attention_mask))
    else:
        per_token = _of_hidden(teacher, student) if kind == "encoder" else _kl(teacher, student)
    return _masked_mean(per_token, attention_mask)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL of the distributions over the last axis, nats."""
    log_teacher = torch.log_softmax(teacher, -1)
    return (log_teacher.exp() * (log_teacher - torch.log_softmax(student, -1))).sum(-1)


def _of_hidden(teacher: Tensor, student: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(teacher, student, dim=-1) + _relative(teacher, student)


def _relative(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared error over the teacher's square, per token."""
    return (teacher - student).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


def _of_head(teacher: Headed, student: Headed, mask: Tensor | None) -> Tensor:
    """[B] or [B, T]: how far the heads' answers are apart; several answers to one window are summed."""
    ours, theirs = student.logits, teacher.logits
    match teacher.task:
        case "regression":
            # Squared where numbers are small, relative where they are large. Their variance would be the natural scale, but that
            # is a batch's: a window's loss must not depend on those beside it, or micro-batches would not add up to their batch.
            return ((ours - theirs).square() / (1 + theirs.square())).mean(-1)
        case "multi-label":  # a sigmoid is a softmax over the logit and 0
            pairs = [torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (theirs, ours)]
            return _kl(*pairs).sum(-1)
        case "span":
            if mask is not None:  # padding is no position to choose: e^−10000 is 0
                ours, theirs = (logits.masked_fill(mask[..., None] == 0, -1e4) for logits in (ours, theirs))
            return _kl(theirs.transpose(-1, -2), ours.transpose(-1, -2)).sum(-1)
        case _:
            return _kl(theirs, ours)


def _per_token(values: Tensor) -> Tensor:
    """[B] → [B, 1], to be added to values per token."""
    return values[:, None] if values.ndim == 1 else values


class Target:
    """A teacher's output, prepared once for the several students of a step: `distance(student)` equals `divergence_of`.

    hidden: the teacher's hidden states [B, T, H], for `apart`."""

    def __init__(self, kind: str, teacher: Output, attention_mask: Tensor | None = None, hidden: Sequence[Tensor] = ()) -> None:
        self.kind, self.teacher, self.mask = kind, teacher, attention_mask
        self.hidden = hidden
        self.nats: Tensor | float = 1.0
        if kind != "encoder":
            log_probabilities = torch.log_softmax(teacher, -1)
            self.probabilities = log_probabilities.exp()
            surprise = -(self.probabilities * log_probabilities).sum(-1)
            self.entropy = _masked_mean(surprise, attention_mask)
            if hidden:  # Var_p(logits) is Var_p(log p); a window's mean, since an encoder's tokens are not its decoder's
                variance = (self.probabilities * log_probabilities.square()).sum(-1) - surprise.square()
                kept = torch.ones_like(variance) if attention_mask is None else attention_mask
                self.nats = (variance * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1) / 2

    def distance(self, student: Output) -> Tensor:
        if self.kind == "encoder" or isinstance(student, Headed):
            return divergence_of(self.kind, self.teacher, student, self.mask)
        if self.mask is None:
            crossed = F.cross_entropy(student.flatten(0, -2), self.probabilities.flatten(0, -2))
        else:
            crossed = _masked_mean(-(self.probabilities * torch.log_softmax(student, -1)).sum(-1), self.mask)
        return crossed - self.entropy

    def apart(self, hidden: Sequence[Tensor]) -> Tensor:
        """H of a student's hidden states, averaged over the tokens that the mask keeps and over the blocks."""
        errors = [_relative(ours.float(), theirs.float()) for ours, theirs in zip(self.hidden, hidden, strict=True)]
        return torch.stack([_masked_mean(error * self.nats, self.mask) for error in errors]).mean()

    def squared(self, student: Output) -> Tensor:
        """Mean squared error of the outputs, averaged over the tokens that the mask keeps; a head's is added to its hidden states'."""
        if not isinstance(self.teacher, Headed):
            return _masked_mean((self.teacher - student).square().mean(-1), self.mask)
        hidden = (self.teacher.hidden - student.hidden).square().mean(-1)
        return _masked_mean(hidden + _per_token((self.teacher.logits - student.logits).square().mean(-1)), self.mask)


def _masked_mean(per_token: Tensor, mask: Tensor | None) -> Tensor:
    return per_token.mean() if mask is None else (per_token * mask).sum() / mask.sum().clamp_min(1)


class Interference:
    """α(π) and β(π), normalised over policies the sampler drew (`sampled`)."""

    def __init__(
        self, units: Sequence[Unit], sampled: Iterable[Mapping[str, str]], a: float = 1.0, balance: float = BALANCE
    ) -> None:
        self.units, self.a, self.balance = tuple(units), a, balance
        means = [mean_bits_of(policy, self.units) for policy in sampled]
        self.most = max(means)
        self.norm = sum((self.most / mean) ** a for mean in means) / len(means)

    def alpha(self, policy: Mapping[str, str]) -> float:
        """Weight of the distance: rises as the mean bit-width falls; mean 1 over the sampler."""
        return (self.most / mean_bits_of(policy, self.units)) ** self.a / self.norm

    def beta(self, policy: Mapping[str, str]) -> float:
        """Weight of the penalty: rises with the mean bit-width."""
        return self.balance * mean_bits_of(policy, self.units) / self.most


@torch.no_grad()
def pull(parameters: Mapping[str, Tensor], weight: float) -> None:
    """Accumulate the gradient of weight · R, R the mean square over the adapter entries (names ending in /A or /B) of one subnet.

    In one launch for all: autograd takes several for each of hundreds of tensors.
    """
    adapters = [tensor for name, tensor in parameters.items() if name.endswith(("/A", "/B"))]
    if not adapters:
        return
    for tensor in adapters:
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
    torch._foreach_add_(
        [tensor.grad for tensor in adapters], adapters, alpha=2 * weight / sum(tensor.numel() for tensor in adapters)
    )


class ExpectedCost:
    """Σ_r max(0, E_p[cost_r]/budget_r − 1) for probabilities [U, C] of a meta-network's units and candidates.

    Ties: both ends taking a kernel has probability p_a·p_b, which is exact for independent units.
    """

    def __init__(self, cost_model: CostModel, candidates: Mapping[str, Sequence[str]]) -> None:
        self.cost_model = cost_model
        self.candidates = {unit: tuple(kernels) for unit, kernels in candidates.items()}
        most = max(len(kernels) for kernels in self.candidates.values())
        self.tables = {
            resource: torch.tensor(
                [
                    [table[unit][kernel] for kernel in kernels] + [0.0] * (most - len(kernels))
                    for unit, kernels in self.candidates.items()
                ],
                dtype=torch.float64,
            )
            for resource, table in cost_model.per_unit.items()
        }

    def expected(self, resource: str, probabilities: Tensor) -> Tensor:
        """E[cost] of one resource, in its unit."""
        total = (self.tables[resource] * probabilities.double()).sum() + self.cost_model.fixed[resource]
        rows = list(self.candidates)
        for tie in self.cost_model.ties:
            for kernel, savings in tie.savings.items():
                ends = [
                    (rows.index(unit), self.candidates[unit].index(kernel)) for unit in tie.units if kernel in self.candidates[unit]
                ]
                if len(ends) == 2 and savings.get(resource):
                    total = total - savings[resource] * probabilities[ends[0]] * probabilities[ends[1]]
        return total

    def excess(self, budget: Budget, probabilities: Tensor) -> Tensor:
        """Summed relative excess over the measured limits; 0 inside the budget."""
        parts = [
            torch.relu(self.expected(resource, probabilities) / limit - 1)
            for resource, limit in budget.limits.items()
            if resource in self.tables
        ]
        return torch.stack(parts).sum().float() if parts else torch.zeros(())
