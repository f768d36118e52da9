"""The meta-network's share of a step: its policy for a drawn budget is trained with the supernet, and it learns from what that cost.

The meta-network first imitates the exact solver's answers to random budgets (values: measured sensitivities), then goes on with
Gumbel-softmax, straight-through. Its gradient needs no extra backward pass: with Ŵ = Σ_k y_k Ŵ_k, ∂L/∂y_k = ⟨∂L/∂Ŵ, Ŵ_k⟩, and ∂L/∂Ŵ is
what the supernet's own backward pass computed (relative to the chosen kernel's; activation quantisers are taken as given). To that come the
expected-cost penalty and, still, the imitation. It lives on the CPU: it is small, and its draws are the same wherever training runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from toolchain.costs.model import CostModel
from toolchain.policy.meta_network import MetaNetwork
from toolchain.spec import Policy
from toolchain.supernet.model import Supernet
from toolchain.train.losses import ExpectedCost
from toolchain.train.sampler import Scenarios
from toolchain.train.settings import Settings
from toolchain.train.step import Visit
from toolchain.train.team import Team


class Joint:
    """`propose` a policy for a drawn budget; once it was visited, `learn` from the visit."""

    def __init__(
        self,
        supernet: Supernet,
        network: MetaNetwork,
        cost_model: CostModel,
        candidates: Mapping[str, tuple[str, ...]],
        drawn: Scenarios,
        steps: int,
        settings: Settings,
    ) -> None:
        self.supernet, self.network, self.drawn = supernet, network, drawn
        self.steps, self.settings = steps, settings
        self.cost = ExpectedCost(cost_model, candidates)

    def propose(self, index: int, rng: np.random.Generator) -> tuple[int, Policy, Tensor]:
        """(number of a scenario, policy, relaxed choices [U, C])."""
        settings, scenario = self.settings, self.drawn.draw(rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        tau = settings.tau_start * (settings.tau_end / settings.tau_start) ** (index / self.steps)
        return scenario, *self.network.sample(torch.from_numpy(self.drawn.encodings[scenario]), tau, generator)

    def likely(self, rng: np.random.Generator) -> Policy:
        """What the exact solver answers to a drawn budget: of all mixed policies such ones will be asked for."""
        return self.drawn.answers[self.drawn.draw(rng)]

    def learn(self, scenario: int, soft: Tensor, visit: Visit, team: Team) -> dict[str, float]:
        """Accumulate the meta-network's gradient; returns the parts of its loss."""
        settings = self.settings
        log_probabilities = self.network(torch.from_numpy(self.drawn.encodings[scenario]))
        answer = self.network.one_hot(self.drawn.answers[scenario])
        imitation = -(answer * log_probabilities.masked_fill(~self.network.mask, 0.0)).sum(-1).mean()
        excess = self.cost.excess(self.drawn.budgets[scenario], log_probabilities.exp())
        distance = float(team.total(visit.distance))
        # No further than the loss there is: a first-order estimate of a jump of several bits is not to be believed beyond it, and
        # unbounded it was seen to drive the network away from everything it had imitated.
        slope = team.total(self._choice_gradient(visit)).cpu().clamp(-distance, distance)
        loss = (
            (soft * slope).sum() / len(self.network.candidates)
            + settings.cost_weight * excess
            + settings.imitation_weight * imitation
        )
        loss.backward()
        return {"excess": float(excess.detach()), "imitation": float(imitation.detach())}

    @torch.no_grad()
    def _choice_gradient(self, visit: Visit) -> Tensor:
        """∂L/∂y [U, C], relative to the chosen kernel's, to first order in the weights."""
        rows = []
        for column in range(self.network.most):
            trial = {unit: kernels[min(column, len(kernels) - 1)] for unit, kernels in self.network.candidates.items()}
            weights = self.supernet.weights(trial)
            for unit in self.supernet.units:
                slope = torch.zeros((), device=visit.distance.device)
                if column < len(self.network.candidates[unit.name]) and trial[unit.name] != visit.policy[unit.name]:
                    for name in (f"{module}.weight" for module in unit.modules):
                        if (gradient := visit.handles[name].grad) is not None:
                            slope = slope + (gradient * (weights[name] - visit.handles[name])).sum()
                rows.append(slope)
        return torch.stack(rows).reshape(self.network.most, -1).T


def imitate(network: MetaNetwork, drawn: Scenarios, settings: Settings) -> None:
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
