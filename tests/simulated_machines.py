"""Machines whose processes are drawn: what the statistics of a check are tried on, since a real machine tells nobody the truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from toolchain.blocks import PRIOR, Block, Share, Speed
from toolchain.check import hold_latency, hold_ratio
from toolchain.commands.deciding import Patience, decide_in_looks
from toolchain.spec import Verdict

SPEED = Speed("model token", 100.0)


class Machine:
    """Processes of a package of `level_ms` at the speed at which the reference takes 100 ns. The machine's speed wanders by a factor of two
    and the reference follows; what it does not follow differs from process to process by `between`, from window to window by `within`."""

    def __init__(self, seed: int, level_ms: float, between: float = 0.04, within: float = 0.1, seconds: float = 2.5) -> None:
        self._rng, self._level, self._between, self._within = np.random.default_rng(seed), level_ms, between, within
        self._mood, self._seconds, self.now = 0.0, seconds, 0.0

    def measure(self) -> Block:
        rng = self._rng
        self.now += self._seconds
        self._mood = 0.7 * self._mood + 0.2 * rng.standard_normal()
        windows = self._mood + 0.05 * rng.standard_normal(5)
        own = self._between * rng.standard_normal() + self._within * rng.standard_normal(5)
        times = tuple(self._level * np.exp(windows + own))
        return Block({"latency_ms": times}, {"model token": tuple(100.0 * np.exp(windows))})


class TwoSpeeds:
    """As two cores of README's machine, which have two speeds, each for some processes on end. At one the reference takes 1.9 times as
    long, the package 1.9^0.75 times: it follows by a share of its own. slow: another factor than 1.9."""

    def __init__(self, seed: int, level_ms: float, sharing: float, lasting: float = 0.8, slow: float = 1.9) -> None:
        self._slow = slow
        self._rng, self._level, self._sharing, self._lasting = np.random.default_rng(seed), level_ms, sharing, lasting
        self._shared, self.now = self._rng.random() < sharing, 0.0

    def measure(self) -> Block:
        rng = self._rng
        self.now += 2.0
        if rng.random() > self._lasting:
            self._shared = rng.random() < self._sharing
        reference = (
            46.0 * (self._slow if self._shared else 1.0) * np.exp(0.01 * rng.standard_normal() + 0.02 * rng.standard_normal(5))
        )
        times = self._level * (reference / 46.0) ** 0.75 * np.exp(0.02 * rng.standard_normal() + 0.02 * rng.standard_normal(5))
        return Block({"latency_ms": tuple(times)}, {"model token": tuple(reference)})

    def held(self, limit: float, share: Share = PRIOR) -> Verdict:
        """At the speed of the cost table, at which the reference takes 46 ns. share: what the table says of it."""

        def judge(blocks: Sequence[Block], look: int) -> list[Verdict]:
            return [hold_latency("latency_ms", limit, blocks, look, Speed("model token", 46.0, share))]

        return decide_in_looks(self.measure, judge, Patience(), lambda: self.now).verdicts[0]

    def against(self, then: list[Block]) -> str:
        found = decide_in_looks(
            self.measure, lambda blocks, look: [hold_ratio("latency_ms", blocks, then, look)], Patience(), lambda: self.now
        )
        return found.verdicts[0].verdict


class Restless:
    """Two cores as they were seen while an encoder was held against a baseline: fast; slow (the encoder takes 1.75 times as long, its
    reference 1.55 and another one 1.32 times); or disturbed by another process, to a degree that changes from window to window, where the
    references lose more than the encoder. sharing: how often it is slow; disturbed: how often that."""

    def __init__(self, seed: int, level_ms: float, sharing: float, disturbed: float) -> None:
        self._rng, self._level, self._odds, self.now = np.random.default_rng(seed), level_ms, (sharing, disturbed), 0.0

    def measure(self) -> Block:
        rng, (sharing, disturbed) = self._rng, self._odds
        self.now += 2.0
        draw = rng.random()
        if draw < sharing:
            slowness = np.log([1.75, 1.55, 1.32])[:, None] * np.ones(5)
        elif draw < sharing + disturbed:
            slowness = np.log([1.23, 1.44, 1.2])[:, None] * rng.uniform(0, 1, 5)
        else:
            slowness = np.zeros((3, 5))
        own = np.array([0.02, 0.01, 0.02])[:, None] * rng.standard_normal((3, 1)) + 0.015 * rng.standard_normal((3, 5))
        times, near, far = np.array([self._level, 146.0, 430.0])[:, None] * np.exp(slowness + own)
        return Block({"latency_ms": tuple(times)}, {"model tokens": tuple(near), "tokens": tuple(far)})

    def against(self, then: list[Block]) -> str:
        found = decide_in_looks(
            self.measure, lambda blocks, look: [hold_ratio("latency_ms", blocks, then, look)], Patience(), lambda: self.now
        )
        return found.verdicts[0].verdict
