"""Training the network of prices on devices and models that nobody has: `python -m toolchain.train.prices --out FILE`.

    problem     units of many sizes, kernels of 2 to 32 bits; bytes by the bits, times by a speed that the imagined device gives each
                kernel and each shape; losses that fall with the bits, by a sensitivity that each unit has of its own
    answer      prices λ* are drawn from the problem's own exchange rates; the policy of least loss + λ*·cost is then the exact optimum
                for the budget that it just keeps: no solver is needed for a label
    loss        (log λ − log λ*)² where a limit binds, and the regret Σ p·m, m = how much more a kernel costs at λ* than the best one

A measured table is thus never seen in training: every device it is used on is one it was not trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.policy.prices import LAYERS, SHAPES, Situation, forward, reduced, write
from toolchain.progress import track
from toolchain.spec import LIMITS

BITS = np.array([2, 2, 3, 4, 4, 8, 8, 8, 32])
OVERHEAD = np.array([1.0, 0.25, 1.0, 1.0, 0.25, 1.0, 0.25, 0.0, 0.0])
"""Bits per weight that scales and zero points add: g32, g128, none."""
_MEMORY, _COMPUTE = LIMITS.index("peak_memory_bytes"), LIMITS.index("compute_flop")
SHARPNESS = 20.0


def problems(rng: np.random.Generator, batch: int) -> tuple[Situation, np.ndarray, np.ndarray]:
    """(situations with leading axis `batch`, λ* [B, R], binding [B, R]) of imagined devices and models."""
    U, C, R = int(np.exp(rng.uniform(np.log(8), np.log(160)))), len(BITS), len(LIMITS)
    kinds = rng.integers(2, 8)
    size = np.exp(rng.normal(0, 0.7, (batch, kinds)))[:, rng.integers(0, kinds, U)]
    size[:, :2] *= np.exp(rng.uniform(0, 2.5, (batch, 2)))  # embedding and head
    mask = (rng.random((batch, 1, C)) < 0.8) & (rng.random((batch, U, C)) < 0.97)
    mask[..., :-1] |= ~mask[..., :-1].any(-1, keepdims=True)
    mask[:, :, -1] &= rng.random((batch, 1)) < 0.5  # full precision stretches every range: half of the time it is not offered
    container = np.where((BITS == 3), 4, BITS)
    loss = size ** rng.uniform(0, 1, (batch, 1)) * np.exp(rng.normal(0, rng.uniform(0.2, 1.5, (batch, 1)), (batch, U)))
    steepness = rng.uniform(1.0, 2.2, (batch, 1, 1))
    loss = (
        loss[..., None]
        * np.exp(-steepness * BITS.clip(max=10))
        * np.exp(rng.normal(0, 0.3, (batch, U, C)))
        * (1 + 0.5 * (OVERHEAD < 1))
    )
    loss[..., -1] = 0
    cost = np.zeros((batch, R, U, C))
    for resource in range(R):
        if resource == _MEMORY:
            speed = (container + OVERHEAD) * np.exp(rng.normal(0, 0.08, (batch, 1, C)))
        else:
            streamed = rng.random((batch, 1, 1))  # between bound by bytes and bound by something else
            speed = np.exp(streamed * np.log(container + OVERHEAD) + (1 - streamed) * rng.normal(0, 0.6, (batch, 1, C)))
        cost[:, resource] = size[..., None] * speed * np.exp(rng.normal(0, 0.05, (batch, U, C)))
    far = 1e9
    loss = np.where(mask, loss, 0)
    loss /= np.maximum(loss.max(-1).sum(-1), 1e-12)[:, None, None]
    least = np.where(mask[:, None], cost, far).min(-1, keepdims=True)
    cost = np.where(mask[:, None], cost - least, 0)
    cost /= np.maximum(cost.max(-1).sum(-1), 1e-12)[..., None, None]
    present = rng.random((batch, R)) < 0.5
    present[:, _COMPUTE] &= rng.random(batch) < 0.2
    present[np.arange(batch), rng.choice([_MEMORY, LIMITS.index("latency_ms")], batch)] = True
    binding = present & (rng.random((batch, R)) < 0.75)
    binding[np.arange(batch), present.argmax(-1)] = True
    prices = np.where(binding, _rates(rng, loss, cost, mask) / np.maximum(binding.sum(-1), 1)[:, None], 0)
    worth = np.where(mask, loss + (prices[..., None, None] * cost).sum(1), far)
    chosen = worth.argmin(-1)
    spent = np.take_along_axis(cost, chosen[:, None, :, None], -1)[..., 0].sum(-1)
    slack = np.where(binding, rng.uniform(0, 2e-3, (batch, R)), rng.uniform(0, 0.6, (batch, R)))
    limit = np.where(present, spent + slack * (1 - spent), 0)
    situation = Situation(
        *(np.asarray(array, np.float32) for array in (loss, cost * present[..., None, None], mask, limit, present))
    )
    return situation, prices.astype(np.float32), binding


def _rates(rng: np.random.Generator, loss: np.ndarray, cost: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[B, R]: what a random unit pays in loss per share of cost between two of its kernels."""
    batch, R, U, C = cost.shape
    rates = np.full((batch, R), 1e-3)
    rows = np.arange(batch)[:, None]
    for _ in range(8):  # until most draws gave a rate that is one
        unit, a, b = rng.integers(0, U, (batch, R)), rng.integers(0, C, (batch, R)), rng.integers(0, C, (batch, R))
        column = np.arange(R)[None]
        dearer = cost[rows, column, unit, a] - cost[rows, column, unit, b]
        saved = loss[rows, unit, b] - loss[rows, unit, a]
        good = (dearer > 1e-7) & (saved > 1e-9) & mask[rows, unit, a] & mask[rows, unit, b]
        rates = np.where(good, saved / np.where(good, dearer, 1), rates)
    return rates


class PriceNetwork(nn.Module):
    """The weights of `policy.prices.forward` as torch parameters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, nn.Parameter] = {}
        for name, shape in SHAPES.items():
            if len(shape) == 2:
                start = torch.randn(shape, generator=generator) * shape[0] ** -0.5
                if name.endswith(("attend.out", "narrow.weight")):
                    start = start * (2 * LAYERS) ** -0.5
            else:
                start = torch.ones(shape) if "norm" in name else torch.zeros(shape)
            self.weights[name] = nn.Parameter(start)
            self.register_parameter(name.replace(".", "/"), self.weights[name])
        self.weights["price.bias"].data.fill_(-2.0)

    def forward(self, seen: Situation) -> Tensor:
        """log λ [B, R]."""
        return forward(self.weights, seen, torch)


def objective(log_prices: Tensor, seen: Situation, wanted: Tensor, binding: Tensor) -> Tensor:
    """Squared error of the binding prices' logarithms, and the regret of the softened choice relative to the optimum's loss."""
    error = torch.nn.functional.huber_loss(log_prices, wanted.clamp_min(1e-9).log(), reduction="none")
    far = (1 - seen.mask) * 1e3
    best = seen.loss + (seen.cost * wanted[..., None, None]).sum(-3) + far
    regret = best - best.amin(-1, keepdim=True)
    scale = best.gather(-1, best.argmin(-1, keepdim=True)).mean((-2, -1))[:, None, None] + 1e-6
    choice = torch.softmax(-SHARPNESS * (reduced(seen, log_prices, torch) + far) / scale, -1)
    relative = (choice * regret * seen.mask).sum((-2, -1)) / (scale[:, 0, 0] * seen.loss.shape[-2])
    return (error * binding).sum() / binding.sum() + relative.mean()


def train(steps: int, batch: int, seed: int, lr: float = 2e-3) -> PriceNetwork:
    """A network trained on `steps` batches of imagined problems; a function of its arguments."""
    network = PriceNetwork(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng([seed, 53])
    for _ in track(range(steps), steps, "training prices"):
        seen, prices, binding = problems(rng, batch)
        tensors = Situation(*(torch.from_numpy(array) for array in (seen.loss, seen.cost, seen.mask, seen.limit, seen.present)))
        optimiser.zero_grad(set_to_none=True)
        loss = objective(network(tensors), tensors, torch.from_numpy(prices), torch.from_numpy(binding))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    network = train(arguments.steps, arguments.batch, arguments.seed)
    facts = {"steps": arguments.steps, "batch": arguments.batch, "seed": arguments.seed}
    write(arguments.out, {name: weight.detach().numpy() for name, weight in network.weights.items()}, facts)


if __name__ == "__main__":
    main()
