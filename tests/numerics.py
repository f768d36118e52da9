"""What a graph computes, what torch makes of the same model, and how far the two are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_models import VOCABULARY

from toolchain.decoding import EncoderDecoder
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, candidates
from toolchain.quantize.affine import dequantize, quantize, quantize_activation, unquantised
from toolchain.session import cache_slots, open_session, token_feeds
from toolchain.spec import Policy


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def mixed_policy(graph: Graph) -> Policy:
    """Every kernel that some unit may have, in turn."""
    names = [candidates(unit) for unit in graph.units]
    return Policy.of({unit.name: some[turn % len(some)] for turn, (unit, some) in enumerate(zip(graph.units, names, strict=True))})


def with_kernels(model: Any, graph: Graph, policy: Policy) -> Any:
    """The model with every unit computed by numpy: dequantised weights, and activations as the kernel's own quantiser rounds them."""
    modules = dict(model.named_modules())
    for unit in graph.units:
        kernel = CATALOGUE[policy[unit.name]]
        weight = graph.weight(unit).copy()
        rows = torch.from_numpy(dequantize(quantize(weight, kernel)) if kernel.quantised else unquantised(weight, kernel))
        sizes = [modules[name].weight.shape[0] for name in unit.modules]
        for name, part in zip(unit.modules, torch.split(rows, sizes), strict=True):
            if unit.op == "Gather":
                modules[name].forward = lambda ids, part=part: part[ids]
            else:
                bias = modules[name].bias

                def forward(x: Any, part: Any = part, bias: Any = bias, kernel: Any = kernel) -> Any:
                    y = torch.from_numpy(quantize_activation(x.numpy(), kernel)) @ part.T
                    return y if bias is None else y + bias

                modules[name].forward = forward
    return model


# ---- decoders and encoders


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (batch, length))


def run_graph(folder: Path, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The graph's first output, with an empty cache if it has one."""
    return first_output(open_session(folder, threads=1), ids, mask)


def first_output(session: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    feeds = token_feeds(session, ids, every_position=True)
    if mask is not None:
        feeds["attention_mask"] = mask
    for slot in cache_slots(session):
        feeds[slot.past] = np.zeros((len(ids), slot.heads, 0, slot.width), slot.dtype)
    return session.run([session.get_outputs()[0].name], feeds)[0]


def run_torch(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids), None if mask is None else torch.from_numpy(mask))[0].numpy()


# ---- encoder-decoders


def source_tokens(length: int = 11, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length)


def greedy(folder: Path, source: np.ndarray, count: int) -> list[int]:
    """The `count` likeliest tokens, one by one, that an encoder-decoder's graphs answer `source` with."""
    model = EncoderDecoder(folder, threads=1, capacity=count + 1)
    logits, found = model.prefill(source), []
    for _ in range(count):
        found.append(int(logits.argmax()))
        logits = model.step(found[-1])
    return found
