"""Which kernels this runtime loads and computes right: each is run on a small unit and held against the numpy reference.

A kernel that is refused, falls back to something wrong, or saturates is not offered. Tolerance 1e-3 relative: the simulated int8
activations agree to about 3e-7, and a saturating kernel is off by 1e-2.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from toolchain.errors import DamagedFileError
from toolchain.files import scratch
from toolchain.graph.oneunit import random_weights, write_one_unit
from toolchain.kernels import CATALOGUE, legal, parts
from toolchain.quantize.affine import dequantize, quantize_activation
from toolchain.session import open_session
from toolchain.spec import Kernel, Unit

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
            x: np.ndarray
            several = tokens > 1
            part = parts(kernel)[-1 if several else 0]
            plain = weights if isinstance(weights, np.ndarray) else dequantize(weights[-1 if several else 0])
            if unit.op == "Gather":
                x = rng.integers(0, unit.N, tokens)
                expected = plain[x]
            else:
                x = rng.standard_normal((tokens, unit.K), dtype=np.float32)
                expected = quantize_activation(x, part) @ plain.T
            got = session.run(None, {"x": x})[0]
            errors.append(float(np.linalg.norm(got - expected) / np.linalg.norm(expected)))
    return max(errors)
