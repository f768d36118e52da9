"""What the agent can run: one-unit graphs, whole models as they serve, and the reference that tells the machine's speed.

A subject says {folder, ...} and the `provider` it runs on. A trial is nanoseconds by phase; for energy, each phase runs by itself, over
and over. Whole models phase by phase are in `phases.py`. onnxruntime and numpy only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from toolchain.decoding import open_generator
from toolchain.profiler.energy import Run
from toolchain.profiler.phases import UNTIMED, DecoderPhases, EncoderDecoderPhases, EncoderPhases, step_times_ns, stepped
from toolchain.session import memory_of, open_session, token_feeds
from toolchain.spec import CPU, CUDA, FINER, STREAMED_TOKEN, TOKEN, TOKENS

GRAPHS = Path(__file__).with_name("graphs")


class Subject(Protocol):
    """Something to time: one trial → nanoseconds by phase."""

    def trial(self) -> dict[str, float]: ...


class Powered(Protocol):
    """Something whose energy is measured: by phase, what runs it once or some times and says how often."""

    def runs(self) -> dict[str, Run]: ...


class Unit:
    """A one-unit graph: a trial is a run over all its copies. One token in flight: a second run is timed, which finds the caches as a
    model's next token does; several are bound by arithmetic, and the first will do, except on a GPU (`UNTIMED`). Input and outputs stay
    in the provider's memory, as between the units of a model."""

    def __init__(self, subject: dict[str, Any], threads: int, shared_pool: bool) -> None:
        import onnxruntime

        provider = subject.get("provider", CPU)
        self._session = open_session(Path(subject["folder"]), threads, provider, shared_pool)
        rng = np.random.default_rng(0)
        value = self._session.get_inputs()[0]
        self._untimed = max(int(subject["tokens"] == 1), UNTIMED.get(provider, 0))
        if value.type == "tensor(int64)":
            feed = rng.integers(0, subject["rows"], subject["tokens"])
        else:
            feed = rng.standard_normal((subject["tokens"], value.shape[1]), dtype=np.float32)
            feed = feed.astype(np.float16) if value.type == "tensor(float16)" else feed
        self._binding = self._session.io_binding()
        memory = memory_of(provider)
        self._binding.bind_ortvalue_input(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(feed, memory, 0))
        for output in self._session.get_outputs():
            self._binding.bind_output(output.name, memory)

    def trial(self) -> dict[str, float]:
        for _ in range(self._untimed):
            self._session.run_with_iobinding(self._binding)
        start = time.perf_counter_ns()
        self._session.run_with_iobinding(self._binding)
        return {"run_ns": time.perf_counter_ns() - start}

    def runs(self) -> dict[str, Run]:
        def run() -> int:
            self._session.run_with_iobinding(self._binding)
            return 1

        return {"run": run}


class Generate:
    """A decoder or encoder-decoder: a trial is one prefill and `new_tokens` greedy steps. decode_ns is the median step: a step that
    somebody else held up for ten times as long would tell of them."""

    def __init__(self, subject: dict[str, Any], threads: int, shared_pool: bool) -> None:
        self._new, provider = int(subject["new_tokens"]), subject.get("provider", CPU)
        self._decoder = open_generator(
            Path(subject["folder"]), threads, subject["tokens"], self._new, shared_pool, provider=provider
        )
        self._untimed = UNTIMED.get(provider, 0)
        self._ids = np.random.default_rng(0).integers(0, subject["rows"], subject["tokens"])
        self.steps_ns: list[float] = []
        """Of the last trial, each step."""

    def trial(self) -> dict[str, float]:
        for _ in range(self._untimed):
            self._decoder.prefill(self._ids).argmax()
        start = time.perf_counter_ns()
        token = int(self._decoder.prefill(self._ids).argmax())
        middle = time.perf_counter_ns()
        self.steps_ns = step_times_ns(self._decoder, token, self._new)
        return {"prefill_ns": middle - start, "decode_ns": float(median(self.steps_ns))}

    def runs(self) -> dict[str, Run]:
        """A prefill, and all steps of one inference after it."""
        token = int(self._decoder.prefill(self._ids).argmax())
        used = self._decoder.used

        def prefill() -> int:
            self._decoder.prefill(self._ids).argmax()
            return 1

        def decode() -> int:
            self._decoder.seek(used)
            return stepped(self._decoder, token, self._new)

        return {"prefill": prefill, "decode": decode}


def singles_of(subject: Subject, trial: dict[str, float]) -> dict[str, list[float]]:
    """By phase, each single run of the subject's last trial: the steps of a decoder, else the trial itself."""
    steps = {"decode_ns": subject.steps_ns} if isinstance(subject, Generate) else {}
    return {phase: steps.get(phase, [time]) for phase, time in trial.items()}


class Encode:
    """An encoder: a trial is one inference of [batch, tokens]."""

    def __init__(self, subject: dict[str, Any], threads: int, shared_pool: bool) -> None:
        provider = subject.get("provider", CPU)
        self._session, self._untimed = (
            open_session(Path(subject["folder"]), threads, provider, shared_pool),
            UNTIMED.get(provider, 0),
        )
        ids = np.random.default_rng(0).integers(0, subject["rows"], (subject["batch"], subject["tokens"]))
        self._feeds = token_feeds(self._session, ids)

    def trial(self) -> dict[str, float]:
        for _ in range(self._untimed):
            self._session.run(None, self._feeds)
        start = time.perf_counter_ns()
        self._session.run(None, self._feeds)
        return {"encode_ns": time.perf_counter_ns() - start}

    def runs(self) -> dict[str, Run]:
        def encode() -> int:
            self._session.run(None, self._feeds)
            return 1

        return {"encode": encode}


class References:
    """The machine's speed by kind of work: a trial is nanoseconds per kind.

    One token from the cache is bound by handing out small pieces of work (`small`: a 256 × 256 product), one whose weights stream from
    memory slows down as plain arithmetic does (`float`: products of 64 tokens), several tokens as the mean of that and of int8 arithmetic.

    Small models follow a small model more closely: `step`, two blocks of one with 4-bit products, sums and norms, for one token, and its
    geometric mean with several tokens' reference (`benchmarks/references.py --seconds 120 --models pocket-llama-6m`).

    On a GPU, a token whose weights lie in its cache is bound by a CPU that launches kernels (`launches`: 64 of them, of no size), one
    whose weights stream by the GPU's memory (`large`: 4096 × 4096 products, more than an L2 cache holds), several tokens by its
    arithmetic (the same, of 256).
    """

    def __init__(self, threads: int, provider: str = CPU) -> None:
        counts = (
            [("launches", 1), ("large", 1), ("large", 256)] if provider == CUDA else [("small", 1), ("float", 64), ("int8", 64)]
        )
        self._parts = [
            Unit({"folder": GRAPHS / name, "tokens": tokens, "rows": 1, "provider": provider}, threads, shared_pool=True)
            for name, tokens in counts
        ]
        self._step = (
            Unit({"folder": GRAPHS / "step", "tokens": 1, "rows": 1}, threads, shared_pool=True) if provider == CPU else None
        )

    def trial(self) -> dict[str, float]:
        small, streamed, several = (part.trial()["run_ns"] for part in self._parts)
        if not self._step:
            return {TOKEN: small, STREAMED_TOKEN: streamed, TOKENS: several}
        tokens, step = (streamed * several) ** 0.5, self._step.trial()["run_ns"]
        return {TOKEN: small, STREAMED_TOKEN: streamed, TOKENS: tokens, FINER[TOKEN]: step, FINER[TOKENS]: (step * tokens) ** 0.5}


class Measurable(Subject, Powered, Protocol):
    """A subject of the agent: both."""


SUBJECTS: dict[str, Callable[[dict[str, Any], int, bool], Measurable]] = {
    "unit": Unit,
    "generate": Generate,
    "encode": Encode,
    "decoder phases": DecoderPhases,
    "encoder phases": EncoderPhases,
    "encoder-decoder phases": EncoderDecoderPhases,
}
