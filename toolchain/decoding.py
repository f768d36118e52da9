"""A decoder, or an encoder-decoder, on stock onnxruntime, token by token with a bound cache.

numpy and onnxruntime only. The profiler times it, the package check runs it and `bittailor run` generates with it: what is measured
is what serves. A decoder has one buffer per KV tensor, bound as past and as present, because copying the cache every step costs more
than the attention does. An encoder-decoder's graph concatenates, so there the runtime's own output is bound as the next step's input.
The cache stays in the provider's memory; token ids go there and logits come back with every step, and a run returns when it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from toolchain.errors import InputError
from toolchain.session import (
    ENCODER,
    STEP,
    CacheSlot,
    TokenInputs,
    cache_slots,
    cross_slots,
    is_encoder_decoder,
    memory_of,
    open_session,
    token_feeds,
)
from toolchain.spec import CPU, CUDA

if TYPE_CHECKING:
    import onnxruntime

DEFAULT_CONTEXT = 2048
"""Positions assumed for a folder whose genai_config.json does not say."""


class Generator(Protocol):
    """What makes tokens one by one: `prefill` starts a sequence, `step` adds a token, both return logits [V] for the next one.

    used: positions that are filled; `seek` goes on as if so many were."""

    @property
    def used(self) -> int: ...

    def seek(self, used: int) -> None: ...

    def prefill(self, ids: np.ndarray) -> np.ndarray: ...

    def step(self, token: int) -> np.ndarray: ...


def open_generator(
    directory: Path,
    threads: int = 0,
    prompt: int = 1,
    new_tokens: int = DEFAULT_CONTEXT,
    shared_pool: bool = False,
    start: int = 0,
    provider: str = CPU,
) -> Generator:
    """The Decoder or EncoderDecoder of a folder, with room for so many prompt tokens and new ones. start: see EncoderDecoder."""
    if is_encoder_decoder(directory):
        return EncoderDecoder(directory, threads, new_tokens + 1, shared_pool, start, provider)
    return Decoder(directory, threads, prompt + new_tokens, shared_pool, provider)


def check_cache(slots: Sequence[CacheSlot], provider: str) -> None:
    """Raise InputError for a cache that the provider's attention does not take: CUDA's takes fp16 alone. With fp32 it runs on the CPU, on a
    copy of the bound cache, and what it adds is lost (logits were off by 0.7 of their norm)."""
    if provider == CUDA and (wrong := [slot for slot in slots if slot.dtype != np.float16]):
        raise InputError(
            f"expected a decoder in fp16 for {CUDA}, got a cache of {wrong[0].dtype}", "export it for a device with that provider"
        )


class Decoder:
    """One session and its cache. `prefill` starts a sequence, `step` adds a token; both return the last position's logits [V]."""

    def __init__(
        self,
        directory: Path,
        threads: int = 0,
        capacity: int = DEFAULT_CONTEXT,
        shared_pool: bool = False,
        provider: str = CPU,
    ) -> None:
        """Raises InputError for a folder without a decoder, or a capacity below 1."""
        if capacity < 1:
            raise InputError(f"expected room for at least 1 token, got {capacity}")
        self.capacity = capacity
        self._session = open_session(directory, threads, provider, shared_pool)
        slots = cache_slots(self._session)
        if not slots:
            raise InputError(f"expected a decoder (a graph with past_key_values inputs) in {directory}, got none")
        check_cache(slots, provider)
        self._inputs = TokenInputs.of(self._session)
        # Bound once: the buffers stay, and binding them anew for every token took up to a tenth of it (`benchmarks/roofline.py`).
        self._binding = self._session.io_binding()
        for slot in slots:
            buffer = _value(slot.zeros(capacity), memory_of(provider))
            self._binding.bind_ortvalue_input(slot.past, buffer)
            self._binding.bind_ortvalue_output(slot.present, buffer)
        self._logits = self._fixed_logits()
        self._used = 0

    def _fixed_logits(self) -> onnxruntime.OrtValue | None:
        """A bound buffer for the logits where they are always [1, 1, V]; None where a graph makes those of every position."""
        output = next((output for output in self._session.get_outputs() if output.name == "logits"), None)
        if output is None:
            raise InputError("expected a decoder with an output named logits, got none")
        if len(output.shape) != 3 or output.shape[1] != 1 or not isinstance(output.shape[2], int) or output.type != "tensor(float)":
            return None
        value = _value(np.zeros((1, 1, output.shape[2]), np.float32))
        self._binding.bind_ortvalue_output("logits", value)
        return value

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
        feeds = self._inputs.feeds(ids, past=self._used)
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        if self._logits is None:
            self._binding.bind_output("logits")  # anew: a bound output would keep the last run's shape
        self._session.run_with_iobinding(self._binding)
        self._used += T
        if self._logits is None:
            return self._binding.get_outputs()[-1].numpy()[0, -1]
        return self._logits.numpy()[0, -1].copy()  # the next run writes into the same buffer


class EncoderDecoder:
    """Two sessions and a cache. `prefill` encodes a source and makes the first logits, `step` adds a target token.

    The first token is made by the graph of every other step, on an empty cache. Keys and values of the source come out of the encoder
    and are bound once per source; those of the target grow by one position per step. Positions count target tokens, the start included.
    """

    def __init__(
        self,
        directory: Path,
        threads: int = 0,
        capacity: int = DEFAULT_CONTEXT,
        shared_pool: bool = False,
        start: int = 0,
        provider: str = CPU,
    ) -> None:
        """start: the token that every target begins with. Raises InputError for a folder without these graphs, or a capacity below 1."""
        if capacity < 1:
            raise InputError(f"expected room for at least 1 token, got {capacity}")
        self.capacity, self._start, self._memory = capacity, start, memory_of(provider)
        self._encoder = open_session(directory, threads, provider, shared_pool, ENCODER)
        self._session = open_session(directory, threads, provider, shared_pool, STEP)
        self._cross, self._own = cross_slots(self._session, self._encoder), cache_slots(self._session)
        if not self._cross or not self._own:
            raise InputError(f"expected {STEP} with cache inputs of encoder and decoder in {directory}, got none")
        self._source: list[onnxruntime.OrtValue] = []
        self._grown: list[onnxruntime.OrtValue] = []
        self._binding = self._session.io_binding()
        self.reset()

    @property
    def used(self) -> int:
        """Positions of the target's cache that are filled."""
        return self._used

    def reset(self) -> None:
        """Forget the target; the source stays."""
        self._fill(0)

    def seek(self, used: int, source: int | None = None) -> None:
        """Go on as if `used` target tokens had followed a source of `source` tokens (None: the one there is).

        What is in the cache does not matter to what a step costs: it is zeros.
        """
        if not 0 <= used <= self.capacity:
            raise InputError(f"expected a position from 0 to {self.capacity}, got {used}")
        if source is not None:
            self._attend([_value(slot.zeros(source), self._memory) for slot in self._cross], source)
        self._fill(used)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Start over with the source ids [T]; logits [V] after the start token. InputError if there are none."""
        ids = np.asarray(ids, np.int64).reshape(1, -1)
        if not ids.size:
            raise InputError("expected a source of 1 token or more, got 0")
        binding = self._encoder.io_binding()
        for name, array in token_feeds(self._encoder, ids).items():
            binding.bind_cpu_input(name, array)
        for slot in self._cross:
            binding.bind_output(slot.present, self._memory)
        self._encoder.run_with_iobinding(binding)
        self._attend(binding.get_outputs(), ids.size)
        self.reset()
        return self.step(self._start)

    def step(self, token: int) -> np.ndarray:
        """Append one target token; logits [V] after it. InputError when the cache is full, or before the first source."""
        if not self._source:
            raise InputError("expected a source before the first step, got none")
        if self._used >= self.capacity:
            raise InputError(f"expected at most {self.capacity} target tokens, got one more")
        binding = self._binding
        binding.bind_cpu_input("input_ids", np.array([[token]], np.int64))
        for slot, value in zip(self._own, self._grown, strict=True):
            binding.bind_ortvalue_input(slot.past, value)
        # Bound anew each time: a bound output would keep the last step's shape.
        binding.clear_binding_outputs()
        binding.bind_output("logits")
        for slot in self._own:
            binding.bind_output(slot.present, self._memory)
        self._session.run_with_iobinding(binding)
        logits, *self._grown = binding.get_outputs()
        self._used += 1
        return logits.numpy()[0, -1]

    def _attend(self, values: list[onnxruntime.OrtValue], length: int) -> None:
        self._source = list(values)
        for slot, value in zip(self._cross, self._source, strict=True):
            self._binding.bind_ortvalue_input(slot.past, value)
        self._binding.bind_cpu_input("encoder_attention_mask", np.ones((1, length), np.int64))

    def _fill(self, used: int) -> None:
        self._used = used
        self._grown = [_value(slot.zeros(used), self._memory) for slot in self._own]


def _value(array: np.ndarray, memory: str = "cpu") -> onnxruntime.OrtValue:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array, memory, 0)
