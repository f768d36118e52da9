"""Text that a decoder writes itself, for machines that have none: data-free distillation (LLM-QAT, arXiv:2305.17888).

Owns only the sampling. Every token is drawn from the full-precision model at temperature 1, after the end-of-text token: what the model
believes text to be. Blind to what users will feed it, so other prose is mixed in where there is some.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from toolchain.progress import track


@torch.no_grad()
def self_written(model: nn.Module, tokens: int, seed: int, eos: int, length: int = 256, batch: int = 64) -> np.ndarray:
    """int64 [n, length], n = ceil(tokens / length): windows that begin after `eos` (which is not part of them) and run on past the next.

    The same arguments give the same windows; the global generator is not touched.
    """
    count = -(-tokens // length)
    starts = range(0, count, batch)
    device = next(model.parameters()).device
    written = []
    for start in track(starts, len(starts), "writing text"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        size = min(batch, count - start)
        newest, past, columns = torch.full((size, 1), eos, device=device), None, []
        for _ in range(length):
            out = model(input_ids=newest, past_key_values=past, use_cache=True)
            past = out.past_key_values
            cumulated = torch.softmax(out.logits[:, -1], -1).cumsum(-1)  # inverse of the distribution: torch.multinomial is slower
            draw = torch.rand(size, 1, generator=generator).to(device) * cumulated[:, -1:]
            newest = torch.searchsorted(cumulated, draw).clamp_max_(cumulated.shape[-1] - 1)
            columns.append(newest)
        written.append(torch.cat(columns, dim=1).cpu())
    return torch.cat(written).numpy()
