"""The meta-network: a budget's encoding → one distribution over kernels for every unit (MetaQuantLLM, section 4).

Four linear layers of width 256 with ReLU, softmax over each unit's own candidates. Units and candidates are part of the network and of
its file; `proposal.py` reads the same file without torch. Samples by Gumbel-softmax, straight-through (arXiv:1611.01144).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from toolchain.errors import InputError
from toolchain.files import write_atomic
from toolchain.policy.proposal import LAYERS, read
from toolchain.spec import RESOURCES, Policy

WIDTH = 256


class MetaNetwork(nn.Module):
    """f: encoding [..., 4] → probabilities [..., U, C]; U units in order, C the most candidates any unit has, the rest masked to 0."""

    mask: Tensor

    def __init__(self, candidates: Mapping[str, Sequence[str]], width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        self.candidates = {unit: tuple(kernels) for unit, kernels in candidates.items()}
        if not self.candidates or not all(self.candidates.values()):
            raise InputError("expected at least one candidate kernel for every unit, got none")
        self.most = max(len(kernels) for kernels in self.candidates.values())
        U = len(self.candidates)
        widths = [len(RESOURCES), width, width, width, U * self.most]
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, a, b) for a, b in pairwise(widths))
        assert len(self.layers) == LAYERS
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:  # He initialisation from our own generator: the global one stays untouched
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        mask = torch.tensor([[column < len(kernels) for column in range(self.most)] for kernels in self.candidates.values()])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, encoding: Tensor) -> Tensor:
        """Log-probabilities [..., U, C]; −inf for what is not a candidate."""
        x = encoding
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        logits = self.layers[-1](x).reshape(*x.shape[:-1], len(self.candidates), self.most)
        return torch.log_softmax(logits.masked_fill(~self.mask, -torch.inf), dim=-1)

    def sample(self, encoding: Tensor, tau: float, generator: torch.Generator | None = None) -> tuple[Policy, Tensor]:
        """(policy, relaxed choices [U, C]) for one encoding [4]: Gumbel-softmax at temperature tau.

        The policy is the arg-max of the relaxed choices; a straight-through loss sends its gradient on each choice into them.
        """
        noise = torch.empty(len(self.candidates), self.most).exponential_(generator=generator).log().neg()
        soft = torch.softmax((self(encoding) + noise) / tau, dim=-1)
        return self.policy(soft), soft

    def policy(self, scores: Tensor) -> Policy:
        """The best-scored candidate of every unit; scores [U, C]."""
        best = scores.masked_fill(~self.mask, -torch.inf).argmax(-1).tolist()
        return Policy.of({unit: kernels[index] for (unit, kernels), index in zip(self.candidates.items(), best, strict=True)})

    def one_hot(self, policy: Mapping[str, str]) -> Tensor:
        """[U, C] with 1 at each unit's kernel. Raises ValueError if the policy has a kernel that is no candidate."""
        index = [kernels.index(policy[unit]) for unit, kernels in self.candidates.items()]
        return nn.functional.one_hot(torch.tensor(index), self.most).float()

    @torch.no_grad()
    def log_probabilities(self, encoding: Sequence[float]) -> dict[str, dict[str, float]]:
        """unit → kernel → log-probability for an encoding in [0, 1]^4."""
        rows = self(torch.tensor(encoding, dtype=torch.float32)).tolist()
        return {
            unit: dict(zip(kernels, row, strict=False)) for (unit, kernels), row in zip(self.candidates.items(), rows, strict=True)
        }

    def save(self, path: Path) -> None:
        """Write weights and candidates to one safetensors file, atomically."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(path, save(tensors, metadata={"candidates": json.dumps(self.candidates)}))

    @classmethod
    def load(cls, path: Path) -> MetaNetwork:
        """Read what `save` wrote. Raises DamagedFileError."""
        candidates, arrays = read(path)
        network = cls(candidates, width=arrays["layers.0.bias"].shape[0])
        network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return network
