"""A policy's loss on some windows, as the callable that `policy.sensitivity` wants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from toolchain.spec import Policy
from toolchain.supernet.model import Supernet
from toolchain.train.losses import Target


def scorer(supernet: Supernet, windows: np.ndarray, masks: np.ndarray | None = None) -> Callable[[Policy], float]:
    """policy → mean distance to the teacher over windows [n, T] (decoder: KL in nats per token). The teacher is asked once, here.

    Activations are quantised as the kernels do it, one window at a time, so w8a8 shows what its per-tensor range loses on a device.
    """
    ids = torch.as_tensor(windows).to(supernet.device)
    kept = None if masks is None else torch.as_tensor(masks).to(supernet.device)
    pieces = [slice(start, start + 1) for start in range(len(ids))]
    targets = [
        (ids[piece], mask, Target(supernet.kind, supernet.teacher(ids[piece], mask), mask))
        for piece in pieces
        for mask in [None if kept is None else kept[piece]]
    ]

    @torch.no_grad()
    def score(policy: Policy) -> float:
        weights = supernet.weights(policy)
        losses = [float(target.distance(supernet(policy, x, mask, True, weights))) * len(x) for x, mask, target in targets]
        return sum(losses) / len(ids)

    return score
