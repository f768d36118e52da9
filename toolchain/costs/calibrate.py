"""Measured models → what their units cost inside a model, and the remainder.

    whole(π) ≈ Σ_k a_k · S_k(π) + r + L · r_layer

S_k(π) is the sum of the isolated costs of π's units under kernel k, L the number of layers. Alone, a unit finds caches, memory pages
and threads in another state than among its neighbours, and each kernel minds that differently: a_k says how much. Ridge regression
towards a_k = 1 on relative errors, so that few measured models suffice and a kernel that none of them holds keeps its isolated cost.
A model that was cut finds more of itself in the caches than a whole one: the typical whole ones set the level of the fit.
Refuses to know what the numbers are (milliseconds or bytes). By hand: six lines of numpy, and the prior is not scikit-learn's zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

NOISE, TRUST = 0.01, 0.1
"""Least relative noise of a measured model; how far from 1 a factor is expected to lie."""


@dataclass(frozen=True)
class Sample:
    """One measured model: its cost and the relative noise of that, the isolated costs of its units summed by kernel, its layers.

    name: its policy's. typical: whether it looks like the policies that will be predicted; only such samples count for the spread.
    """

    whole: float
    sums: Mapping[str, float]
    layers: int
    noise: float = 0.0
    typical: bool = True
    name: str = ""


@dataclass(frozen=True)
class Calibration:
    """factors: kernel → a_k; remainder(L) = per_run + L · per_layer, never negative: units cannot cost more than the model they are in.

    level: how much more a whole model costs than the fit says (1 where none was cut). spread: largest relative error with which samples
    of other policies predict a typical one: a whole one with the level, one that was cut without.
    """

    factors: Mapping[str, float]
    per_run: float
    per_layer: float
    level: float = 1.0
    spread: float = 0.0

    def remainder(self, layers: int) -> float:
        return self.per_run + layers * self.per_layer

    def predict(self, sums: Mapping[str, float], layers: int) -> float:
        """The fit, without the level."""
        return sum(self.factors.get(kernel, 1.0) * value for kernel, value in sums.items()) + self.remainder(layers)


def calibrate(samples: Sequence[Sample], depth: int = 0) -> Calibration:
    """Fit all samples; the spread by leaving each policy out in turn. ValueError for fewer than two samples.

    depth: layers of the whole model, whose level is found where samples are both whole and cut; 0: there is none.
    """
    if len(samples) < 2:
        raise ValueError(f"expected two or more measured models, got {len(samples)}")
    errors = []
    for place, sample in enumerate(samples):
        if sample.typical:
            others = [other for at, other in enumerate(samples) if at != place and not (sample.name and other.name == sample.name)]
            fitted = _fit(others)
            level = _level(fitted, others, depth) if sample.layers == depth else 1.0
            errors.append(abs(level * fitted.predict(sample.sums, sample.layers) / sample.whole - 1))
    fitted = _fit(samples)
    return replace(fitted, level=_level(fitted, samples, depth), spread=max(errors, default=0.0))


def _level(fitted: Calibration, samples: Sequence[Sample], depth: int) -> float:
    whole = [sample for sample in samples if sample.typical and sample.layers == depth]
    if not whole or all(sample.layers == depth for sample in samples):
        return 1.0
    return float(np.exp(np.mean([np.log(sample.whole / fitted.predict(sample.sums, sample.layers)) for sample in whole])))


def _fit(samples: Sequence[Sample]) -> Calibration:
    kernels = sorted({kernel for sample in samples for kernel in sample.sums})
    whole = np.array([sample.whole for sample in samples])
    sums = np.array([[sample.sums.get(kernel, 0.0) for kernel in kernels] for sample in samples])
    layers = np.array([float(sample.layers) for sample in samples])
    columns = {"per_run": np.ones(len(samples))}
    if np.ptp(layers) > 0:
        columns["per_layer"] = layers
    weight = 1 / np.array([max(NOISE, sample.noise) for sample in samples])
    while True:
        left = np.column_stack([sums, *columns.values()]) * (weight / whole)[:, None]
        prior = np.zeros((len(kernels), left.shape[1]))
        np.fill_diagonal(prior, 1 / TRUST)
        # With x = a − 1 for the factors, the prior pulls x to zero.
        right = (1 - sums.sum(1) / whole) * weight
        solution = np.linalg.lstsq(np.vstack([left, prior]), np.append(right, np.zeros(len(kernels))), rcond=None)[0]
        rest = dict(zip(columns, solution[len(kernels) :], strict=True))
        lowest = min(rest, key=lambda name: float(rest[name]), default=None)
        if lowest is None or rest[lowest] >= 0:
            break
        del columns[lowest]
    factors = {kernel: float(1 + value) for kernel, value in zip(kernels, solution, strict=False)}
    return Calibration(factors, float(rest.get("per_run", 0.0)), float(rest.get("per_layer", 0.0)))
