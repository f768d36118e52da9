"""LoRA adapters of a supernet: which ones a kernel of a layer adds up, how large they are, how they start.

own      one per kernel and layer (LLM-QFA's decoupled adapters, arXiv:2405.20202): bit-widths do not disturb each other. The fewer the
         bits, the higher the rank: there is more to make up for
both     and one more per layer, shared by its kernels of up to 4 bits: every policy that has one of those trains it. Low bits and mixed
         policies gain, 4 bits move away from their teacher (`benchmarks/dedicated.py`), on a narrow text from any other text too. So it
         is not the default
shared   one per layer for all its kernels, as large as their own together: to compare with
pooled   QA-LoRA's (arXiv:2309.14717): one per kernel and layer on top of frozen codes; its input is averaged over each group, so that it
         moves nothing but the group's zero points. They become fractional: a package would run on the runtime's slow path. To compare with
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.errors import InputError
from toolchain.kernels import CATALOGUE
from toolchain.quantize.affine import groups
from toolchain.supernet.starts import bounded
from toolchain.supernet.store import SHARED

RANK = 32
RANKS = {2: 4, 3: 2}
"""Weight bits → times the rank of the others."""
COMMON = 6
"""The rank of what kernels share beside their own, in ranks of the others."""

OWN, BOTH, POOLED = "own", "both", "pooled"
KINDS = (OWN, BOTH, SHARED, POOLED)
SAVED = (OWN, BOTH)
"""The kinds whose supernets can be saved."""


@dataclass(frozen=True)
class Adapters:
    """kind: see the module. rank: of a kernel of more than 3 bits. Raises InputError for another kind."""

    kind: str
    rank: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"expected adapters of a kind among {', '.join(KINDS)}, got {self.kind!r}")

    def rank_of(self, name: str) -> int:
        """Of a kernel's own adapters; "shared": of those beside them."""
        return self.rank * (COMMON if name == SHARED else RANKS.get(CATALOGUE[name].weight_bits, 1))

    def shares(self, name: str) -> bool:
        """Whether a kernel adds what its layer's kernels share to its own."""
        return self.kind == BOTH and bounded(CATALOGUE[name])

    @property
    def requantised(self) -> bool:
        """Whether what adapters add is rounded with the weights, so that plain integer codes stay."""
        return self.kind != POOLED

    def inputs(self, name: str, K: int) -> int:
        """How many inputs a kernel's adapter has in a layer of K; pooled: one a group."""
        return K if self.requantised else groups(K, CATALOGUE[name])[0]

    def ranks(self, offered: Mapping[str, Collection[str]]) -> dict[str, int]:
        """Every adapter there is, "kernel/module" or "shared/module" → its rank, for module → quantised kernels."""
        if self.kind == SHARED:
            return {f"{SHARED}/{module}": sum(self.rank_of(name) for name in names) for module, names in offered.items() if names}
        found = {f"{name}/{module}": self.rank_of(name) for module, names in offered.items() for name in names}
        sharing = [module for module, names in offered.items() if any(map(self.shares, names))]
        return found | {f"{SHARED}/{module}": self.rank_of(SHARED) for module in sharing}

    def of(self, name: str, module: str) -> list[str]:
        """The adapters that a kernel of a layer adds up."""
        own, common = f"{name}/{module}", f"{SHARED}/{module}"
        if self.kind == SHARED:
            return [common]
        return [own, common] if self.shares(name) else [own]


def started(rank: int, N: int, K: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A [r, K] uniform as in PEFT, B [N, r] zeros: an adapter starts as nothing. Drawn on the CPU: the same on every device."""
    return {"A": (torch.rand(rank, K, generator=generator) * 2 - 1) * math.sqrt(3 / K), "B": torch.zeros(N, rank)}
