"""A policy's loss on some windows, as the callable that `policy.sensitivity` wants."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from toolchain.kernels import CATALOGUE
from toolchain.spec import Policy
from toolchain.supernet.model import Supernet
from toolchain.train.losses import Target

TOGETHER = 4
"""Windows that go through the model at once on a GPU, where they cannot disturb each other; a CPU gains nothing by it."""


def scorer(supernet: Supernet, windows: np.ndarray, masks: np.ndarray | None = None) -> Callable[[Policy], float]:
    """policy → mean distance to the teacher over windows [n, T] (decoder: KL in nats per token). What the teacher says of them is kept.

    Activations are quantised as the kernels do it; where one does it per tensor, one window at a time, so that w8a8 shows what its range
    loses on a device. So do windows with masks, which count alike whatever they hold.
    """
    ids = torch.as_tensor(windows).to(supernet.device)
    kept = None if masks is None else torch.as_tensor(masks).to(supernet.device)

    @cache
    def targets(size: int) -> list[tuple[Tensor, Tensor | None, Target]]:
        pieces = [slice(start, start + size) for start in range(0, len(ids), size)]
        rows = [(ids[piece], None if kept is None else kept[piece]) for piece in pieces]
        return [(x, mask, Target(supernet.kind, supernet.teacher(x, mask), mask)) for x, mask in rows]

    @torch.no_grad()
    def score(policy: Policy) -> float:
        weights = supernet.weights(policy)
        alone = (
            ids.device.type == "cpu"
            or kept is not None
            or any(CATALOGUE[name].activation == "int8_tensor" for name in policy.values())
        )
        rows = targets(1 if alone else TOGETHER)
        losses = [float(target.distance(supernet(policy, x, mask, True, weights))) * len(x) for x, mask, target in rows]
        return sum(losses) / len(ids)

    return score
