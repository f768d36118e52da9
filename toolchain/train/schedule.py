"""Which policies a step trains: a function of the step's number and a generator, so that a resumed run trains what it would have.

    sandwich   every unit at one of the low bit-widths, every other time at the lowest, which has furthest to go, the others in turn; and a
               mixed policy (universally slimmable networks, arXiv:1903.05134)
    balanced   mixed policies only, their mean along the triangle wave: LLM-QFA's scheduler as published
    uniform    every unit's kernel drawn by itself, each as likely as the other: what once-for-all training began with
    fixed      the same policies in every step: a dedicated run

Mixed policies meet a target mean bit-width that moves along a triangle wave over the run, so that all means get equal time (LLM-QFA,
arXiv:2405.20202); independent draws would cluster around the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from toolchain.spec import Policy
from toolchain.train.sampler import PolicySampler, triangle
from toolchain.train.settings import Settings

LOW_BITS = 4
"""The sandwich visits bit-widths up to this one: above it there is next to nothing to learn, and mixed policies cover it."""

Schedule = Callable[[int, np.random.Generator], tuple[Policy, ...]]
"""(step, generator) → the policies of this step."""


def schedule(sampler: PolicySampler, steps: int, settings: Settings) -> Schedule:
    """Two policies a step, as `settings.sampling` says."""
    low, high = sampler.range()
    levels = low_levels(sampler)
    period = max(steps // settings.waves, 2)

    def mixed(index: int, rng: np.random.Generator) -> Policy:
        return sampler.mixed(triangle(index, period, low, high), rng)

    def sandwich(index: int, rng: np.random.Generator) -> tuple[Policy, ...]:
        return sampler.level(low_level(levels, index), rng), mixed(index, rng)

    def balanced(index: int, rng: np.random.Generator) -> tuple[Policy, ...]:
        return mixed(index, rng), mixed(index, rng)

    def uniform(_: int, rng: np.random.Generator) -> tuple[Policy, ...]:
        return sampler.uniform(rng), sampler.uniform(rng)

    return {"sandwich": sandwich, "balanced": balanced, "uniform": uniform}[settings.sampling]


def low_level(levels: Sequence[int], index: int) -> int:
    """Which of the rising low bit-widths is visited in a step: the lowest every other time, the others in turn."""
    lowest, *others = levels
    return others[index // 2 % len(others)] if others and index % 2 else lowest


def fixed(policies: Sequence[Policy]) -> Schedule:
    """The same policies in every step."""
    return lambda _, __: tuple(policies)


def low_levels(sampler: PolicySampler) -> list[int]:
    """The bit-widths that the sandwich visits everywhere at once."""
    return [level for level in sampler.levels if level <= LOW_BITS] or list(sampler.levels)
