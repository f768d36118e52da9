"""A decoder on stock onnxruntime: one buffer per KV tensor, bound as past and as present, so that no step copies the cache.

numpy and onnxruntime only. The profiler times it, the package check runs it and `bittailor run` generates with it: what is measured
is what serves. The buffer is shared because copying the cache every step costs more than the attention does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from toolchain.errors import InputError
from toolchain.session import cache_slots, open_session, token_feeds

DEFAULT_CONTEXT = 2048
"""Positions assumed for a folder whose genai_config.json does not say."""


class Decoder:
    """One session and its cache. `prefill` starts a sequence, `step` adds a token; both return the last position's logits [V]."""

    def __init__(self, directory: Path, threads: int = 0, capacity: int = DEFAULT_CONTEXT, shared_pool: bool = False) -> None:
        """Raises InputError for a folder without a decoder, or a capacity below 1."""
        import onnxruntime

        if capacity < 1:
            raise InputError(f"expected room for at least 1 token, got {capacity}")
        self.capacity = capacity
        self._session = open_session(directory, threads, shared_pool=shared_pool)
        slots = cache_slots(self._session)
        if not slots:
            raise InputError(f"expected a decoder (a graph with past_key_values inputs) in {directory}, got none")
        self._buffers = [(slot, onnxruntime.OrtValue.ortvalue_from_numpy(slot.zeros(capacity))) for slot in slots]
        self._used = 0

    @property
    def used(self) -> int:
        """Positions of the cache that are filled."""
        return self._used

    def reset(self) -> None:
        """Forget the sequence. The buffers keep their bytes: positions past `used` are never read."""
        self._used = 0

    def seek(self, used: int) -> None:
        """Go on as if `used` positions were filled: what a step costs there does not depend on what is in them."""
        if not 0 <= used <= self.capacity:
            raise InputError(f"expected a position from 0 to {self.capacity}, got {used}")
        self._used = used

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Start over with the tokens ids [T]; logits [V] after the last. InputError if they are none or more than the capacity."""
        self.reset()
        return self._run(np.asarray(ids, np.int64).reshape(1, -1))

    def step(self, token: int) -> np.ndarray:
        """Append one token; logits [V] after it. InputError when the cache is full."""
        return self._run(np.array([[token]], np.int64))

    def _run(self, ids: np.ndarray) -> np.ndarray:
        T = ids.shape[1]
        if T < 1 or self._used + T > self.capacity:
            raise InputError(f"expected 1 to {self.capacity - self._used} more tokens (room for {self.capacity}), got {T}")
        binding = self._session.io_binding()
        feeds = token_feeds(self._session, ids, past=self._used)
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for slot, buffer in self._buffers:
            binding.bind_ortvalue_input(slot.past, buffer)
            binding.bind_ortvalue_output(slot.present, buffer)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        self._used += T
        return binding.get_outputs()[-1].numpy()[0, -1]
