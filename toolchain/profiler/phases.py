"""Whole models as the agent times them phase by phase: at each count of tokens and each position of the cache that was asked for.

A subject says {folder, rows, phases: [{label, batch, tokens, past, prompt}]} (`model_rows.subject`), and `capacity` where its memory is
weighed. A trial is nanoseconds by label; `runs` are for energy: by label, what runs that phase alone. onnxruntime and numpy only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from toolchain.decoding import Decoder, EncoderDecoder, Generator
from toolchain.profiler.energy import Run
from toolchain.session import open_session, token_feeds
from toolchain.spec import CPU, CUDA

STEPS = 6
UNTIMED = {CUDA: 1}
"""Provider → runs of a phase before each one that is timed. On a GPU the first run after another model's is 0.1 to 0.25 ms late, which a
model in use does not see; on CPUs it is not."""


class DecoderPhases:
    """A decoder: a trial is one run of each prefill asked for, and STEPS steps around each asked position of the cache.

    The steps follow an untimed one, as a token follows a token, a prefill as many as `UNTIMED` says; what is in the cache does not matter
    to their time.
    Quick steps are repeated until they fill 5 ms.
    """

    def __init__(self, subject: dict[str, Any], threads: int, shared_pool: bool) -> None:
        self._phases = subject["phases"]
        capacity = max(phase["past"] + max(phase["tokens"], STEPS + 1) for phase in self._phases)
        room = max(capacity, subject.get("capacity", 0))
        provider = subject.get("provider", CPU)
        self._decoder = Decoder(Path(subject["folder"]), threads, room, shared_pool, provider)
        self._untimed = UNTIMED.get(provider, 0)
        self._ids = np.random.default_rng(0).integers(0, subject["rows"], self._decoder.capacity)

    def trial(self) -> dict[str, float]:
        seen = {}
        for phase in self._phases:
            if phase["tokens"] > 1 or not phase["past"]:
                for _ in range(self._untimed):
                    self._decoder.prefill(self._ids[: phase["tokens"]]).argmax()
                start = time.perf_counter_ns()
                self._decoder.prefill(self._ids[: phase["tokens"]]).argmax()
                seen[phase["label"]] = float(time.perf_counter_ns() - start)
                continue
            seen[phase["label"]] = self._steps(phase["past"])
        return seen

    def _steps(self, past: int) -> float:
        def run() -> float:
            self._decoder.seek(max(0, past - 1 - STEPS // 2))
            return median_step_ns(self._decoder, int(self._decoder.step(1).argmax()), STEPS)

        return _repeated(run)

    def runs(self) -> dict[str, Run]:
        def prefill(tokens: int) -> int:
            self._decoder.prefill(self._ids[:tokens]).argmax()
            return 1

        def decode(past: int) -> int:
            self._decoder.seek(max(0, past - STEPS // 2))
            return stepped(self._decoder, 1, STEPS)

        return {
            phase["label"]: partial(prefill, phase["tokens"])
            if phase["tokens"] > 1 or not phase["past"]
            else partial(decode, phase["past"])
            for phase in self._phases
        }


class EncoderDecoderPhases:
    """An encoder-decoder: a trial is one encoding with its first token for each prefill asked for, and STEPS steps around each asked
    position: `prompt` of the past are the source, the others the target so far.

    capacity: a prefill is followed by an untimed step where source and target fill it, so that a memory trial sees the whole cache.
    """

    def __init__(self, subject: dict[str, Any], threads: int, shared_pool: bool) -> None:
        self._phases = subject["phases"]
        self._capacity = subject.get("capacity", 0)
        most = max(phase["past"] + STEPS + 1 for phase in self._phases)
        room = max(most, self._capacity)
        provider = subject.get("provider", CPU)
        self._model = EncoderDecoder(Path(subject["folder"]), threads, room, shared_pool, provider=provider)
        self._untimed = UNTIMED.get(provider, 0)
        longest = max(phase["tokens"] for phase in self._phases)
        self._ids = np.random.default_rng(0).integers(0, subject["rows"], longest)

    def trial(self) -> dict[str, float]:
        seen = {}
        for phase in self._phases:
            if phase["past"]:
                seen[phase["label"]] = self._steps(phase["prompt"], phase["past"] - phase["prompt"])
                continue
            for _ in range(self._untimed):
                self._model.prefill(self._ids[: phase["tokens"]]).argmax()
            start = time.perf_counter_ns()
            self._model.prefill(self._ids[: phase["tokens"]]).argmax()
            seen[phase["label"]] = float(time.perf_counter_ns() - start)
            if self._capacity:
                self._model.seek(self._capacity - phase["tokens"] - 1)
                self._model.step(1)
        return seen

    def _steps(self, source: int, target: int) -> float:
        def run() -> float:
            self._model.seek(max(0, target - 1 - STEPS // 2), source)
            return median_step_ns(self._model, int(self._model.step(1).argmax()), STEPS)

        return _repeated(run)

    def runs(self) -> dict[str, Run]:
        def prefill(tokens: int) -> int:
            self._model.prefill(self._ids[:tokens]).argmax()
            return 1

        def decode(source: int, target: int) -> int:
            self._model.seek(max(0, target - STEPS // 2), source)
            return stepped(self._model, 1, STEPS)

        return {
            phase["label"]: partial(decode, phase["prompt"], phase["past"] - phase["prompt"])
            if phase["past"]
            else partial(prefill, phase["tokens"])
            for phase in self._phases
        }


class EncoderPhases:
    """An encoder: a trial is one inference of each [batch, tokens] asked for."""

    def __init__(self, subject: dict[str, Any], threads: int, shared_pool: bool) -> None:
        provider = subject.get("provider", CPU)
        self._session, self._untimed = (
            open_session(Path(subject["folder"]), threads, provider, shared_pool),
            UNTIMED.get(provider, 0),
        )
        rng = np.random.default_rng(0)
        self._feeds = {
            phase["label"]: token_feeds(self._session, rng.integers(0, subject["rows"], (phase["batch"], phase["tokens"])))
            for phase in subject["phases"]
        }

    def trial(self) -> dict[str, float]:
        seen = {}
        for label, feeds in self._feeds.items():
            for _ in range(self._untimed):
                self._session.run(None, feeds)
            start = time.perf_counter_ns()
            self._session.run(None, feeds)
            seen[label] = float(time.perf_counter_ns() - start)
        return seen

    def runs(self) -> dict[str, Run]:
        def encode(feeds: dict[str, np.ndarray]) -> int:
            self._session.run(None, feeds)
            return 1

        return {label: partial(encode, feeds) for label, feeds in self._feeds.items()}


def stepped(decoder: Generator, token: int, steps: int) -> int:
    """`steps` greedy steps, the first of them from `token`; how many they were."""
    for _ in range(steps):
        token = int(decoder.step(token).argmax())
    return steps


def median_step_ns(decoder: Generator, token: int, steps: int) -> float:
    """Median time of `steps` greedy steps, the first of them from `token`."""
    return float(median(step_times_ns(decoder, token, steps)))


def step_times_ns(decoder: Generator, token: int, steps: int) -> list[float]:
    """Time of each of `steps` greedy steps, the first of them from `token`."""
    times: list[float] = []
    for _ in range(steps):
        start = time.perf_counter_ns()
        token = int(decoder.step(token).argmax())
        times.append(float(time.perf_counter_ns() - start))
    return times


def _repeated(run: Callable[[], float]) -> float:
    """Median of what `run` returns, called once, or as often as fits into 5 ms, at most 8 times."""
    times: list[float] = []
    start = time.perf_counter_ns()
    while len(times) < 8 and (not times or time.perf_counter_ns() - start < 5e6):
        times.append(run())
    return float(median(times))
