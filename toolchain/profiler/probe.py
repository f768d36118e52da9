"""Which kernels this runtime loads and computes right: each is run on a small unit and held against the numpy reference.

A kernel that is refused, falls back to something wrong, or saturates is not offered. Tolerance 1e-3 relative: the simulated int8
activations agree to about 3e-7, and a saturating kernel is off by 1e-2.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from toolchain.errors import DamagedFileError
from toolchain.files import scratch
from toolchain.graph.oneunit import random_weights, write_one_unit
from toolchain.kernels import CATALOGUE, legal, parts
from toolchain.quantize.affine import dequantize, quantize_activation
from toolchain.session import open_session
from toolchain.spec import Kernel, Unit

if TYPE_CHECKING:
    from toolchain.graph.oneunit import Weights
    from toolchain.profiler.ask import Host

TOLERANCE = 1e-3
_UNITS = (Unit("probe", "MatMul", 256, 48), Unit("probe", "MatMul", 200, 48), Unit("probe", "Gather", 256, 48))
_TOKENS = (1, 5)
"""Decoding one token takes other code paths than several; 200 is a width that no group divides."""


@cache
def working_kernels() -> tuple[str, ...]:
    """Names of the catalogue's kernels that load and compute right here, in catalogue order."""
    works: list[str] = []
    for name, kernel in CATALOGUE.items():
        whole = all(part.name in works for part in parts(kernel)) if kernel.prefill else True
        if whole and all(relative_error(unit, kernel) < TOLERANCE for unit in _UNITS if legal(unit, kernel)):
            works.append(name)
    return tuple(works)


def working_kernels_of(host: Host) -> tuple[str, ...]:
    """`working_kernels` of the runtime on the host's device: what it computes is compared here."""
    if host.device.at_hand:
        return working_kernels()
    subjects, wanted = [], {}
    with scratch() as folder:
        for name, kernel in CATALOGUE.items():
            for number, unit in enumerate(unit for unit in _UNITS if legal(unit, kernel)):
                label = f"{name} {number}"
                place = folder / label
                place.mkdir()
                weights, rng = random_weights(unit, kernel), np.random.default_rng(0)
                write_one_unit(unit, kernel, weights, 1, place)
                cases = [_case(unit, kernel, weights, tokens, rng) for tokens in _TOKENS]
                subjects.append({"name": label, "folder": str(place), "inputs": [x.tolist() for x, _ in cases]})
                wanted[label] = (name, [expected for _, expected in cases])
        made = host.outputs(subjects)
    wrong = set()
    for label, (name, expected) in wanted.items():
        got = made[label]
        if got is None or any(_error(np.asarray(y), right) >= TOLERANCE for y, right in zip(got, expected, strict=True)):
            wrong.add(name)
    return tuple(name for name, kernel in CATALOGUE.items() if not wrong & {name, *(part.name for part in parts(kernel))})


def relative_error(unit: Unit, kernel: Kernel) -> float:
    """Largest ‖runtime − reference‖ / ‖reference‖ over token counts, on random numbers; infinite where the runtime refuses the kernel."""
    rng = np.random.default_rng(0)
    weights = random_weights(unit, kernel)
    errors = []
    with scratch() as folder:
        write_one_unit(unit, kernel, weights, 1, folder)
        try:
            session = open_session(folder, threads=1)
        except DamagedFileError:
            return float("inf")
        for tokens in _TOKENS:
            x, expected = _case(unit, kernel, weights, tokens, rng)
            errors.append(_error(session.run(None, {"x": x})[0], expected))
    return max(errors)


def _case(unit: Unit, kernel: Kernel, weights: Weights, tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(input, what the reference makes of it)."""
    x: np.ndarray
    several = tokens > 1
    part = parts(kernel)[-1 if several else 0]
    plain = weights if isinstance(weights, np.ndarray) else dequantize(weights[-1 if several else 0])
    if unit.op == "Gather":
        x = rng.integers(0, unit.N, tokens)
        return x, plain[x]
    x = rng.standard_normal((tokens, unit.K), dtype=np.float32)
    return x, quantize_activation(x, part) @ plain.T


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
