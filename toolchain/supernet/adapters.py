"""LoRA adapters of a supernet: which ones a kernel of a layer adds up, how large they are, how they start.

    own      one per kernel and layer (LLM-QFA's decoupled adapters, arXiv:2405.20202): bit-widths do not disturb each other. The fewer the
             bits, the higher the rank: there is more to make up for
    shared   one per layer, added to the own ones of its kernels of up to 4 bits: every policy trains it, and it brings the layers to where
             they suit neighbours of any kernel. Above 4 bits there is nothing to suit, and what low bits need would only be in the way

A layer that may have every kernel has as large adapters in all three kinds (but for rounding), so that they can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.errors import InputError
from toolchain.kernels import CATALOGUE
from toolchain.supernet.starts import bounded
from toolchain.supernet.store import SHARED

RANK = 16
RANKS = {2: 4, 3: 2}
"""Weight bits → times the rank of the others."""
COMMON = 12
"""The shared adapter's rank, in ranks of the others."""

BOTH, OWN = "both", "own"
KINDS = (BOTH, OWN, SHARED)


@dataclass(frozen=True)
class Adapters:
    """kind: "both"; to compare with: "own", which divides the shared one's rank among the kernels that would share it, or "shared", which
    pools all ranks of a layer in one adapter for every kernel. rank: of a kernel of more than 3 bits. names: the quantised kernels.

    Raises InputError for another kind.
    """

    kind: str
    rank: int
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"expected adapters of a kind among {', '.join(KINDS)}, got {self.kind!r}")

    def rank_of(self, name: str) -> int:
        """Of a kernel's own adapters, or of the shared ones ("shared")."""
        if name == SHARED:
            return self.rank * COMMON
        own = self._share(name) * self.rank
        if self.kind == BOTH or not bounded(CATALOGUE[name]):
            return own
        together = sum(self._share(other) for other in self.names if bounded(CATALOGUE[other]))
        return own + round(self.rank_of(SHARED) * self._share(name) / together)

    def ranks(self, offered: Mapping[str, Collection[str]]) -> dict[str, int]:
        """Every adapter there is, "kernel/module" or "shared/module" → its rank, for module → quantised kernels."""
        if self.kind == SHARED:
            return {f"{SHARED}/{module}": sum(self.rank_of(name) for name in names) for module, names in offered.items() if names}
        found = {f"{name}/{module}": self.rank_of(name) for module, names in offered.items() for name in names}
        if self.kind == BOTH:
            common = [module for module, names in offered.items() if any(bounded(CATALOGUE[name]) for name in names)]
            found |= {f"{SHARED}/{module}": self.rank_of(SHARED) for module in common}
        return found

    def of(self, name: str, module: str) -> list[str]:
        """The adapters that a kernel of a layer adds up."""
        own, common = f"{name}/{module}", f"{SHARED}/{module}"
        if self.kind == SHARED:
            return [common]
        return [own, common] if self.kind == BOTH and bounded(CATALOGUE[name]) else [own]

    @staticmethod
    def _share(name: str) -> int:
        return RANKS.get(CATALOGUE[name].weight_bits, 1)


def started(rank: int, N: int, K: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A [r, K] uniform as in PEFT, B [N, r] zeros: an adapter starts as nothing. Drawn on the CPU: the same on every device."""
    return {"A": (torch.rand(rank, K, generator=generator) * 2 - 1) * math.sqrt(3 / K), "B": torch.zeros(N, rank)}
