"""Which kernels this runtime loads and computes right: each is run on a small unit and held against the numpy reference.

A kernel that is refused, falls back to something wrong, or saturates is not offered. Tolerance 1e-3 relative: the simulated int8
activations agree to about 3e-7, and a saturating kernel is off by 1e-2. Kernels in fp16 have 3e-3: the reference rounds what goes in as
they do, but sums in float32 where CUDA's sum partly in fp16 (an H200: 2e-4 to 7e-4, at 4096 inputs up to 1.3e-3); int8 activations would be
off by 5e-3, 8-bit codes that are one off by 1e-2.
A kernel of a GPU that the runtime would run on the CPU instead is not offered either.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from toolchain.errors import DamagedFileError, InputError
from toolchain.files import scratch
from toolchain.graph.oneunit import random_weights, write_one_unit
from toolchain.hardware import has_provider
from toolchain.kernels import CATALOGUE, legal, offered, parts
from toolchain.quantize.affine import dequantize, quantize_activation, unquantised
from toolchain.session import open_session
from toolchain.spec import CPU, CUDA, Kernel, Unit

if TYPE_CHECKING:
    from toolchain.graph.oneunit import Weights
    from toolchain.profiler.ask import Host

TOLERANCE, TOLERANCE_FP16 = 1e-3, 3e-3
_UNITS = (Unit("probe", "MatMul", 256, 48), Unit("probe", "MatMul", 200, 48), Unit("probe", "Gather", 256, 48))
_TOKENS = (1, 5, 96)
"""Decoding one token takes other code paths than several, and a GPU others again for many; 200 is a width that no group divides."""


@cache
def working_kernels(provider: str = CPU) -> tuple[str, ...]:
    """Names of the provider's kernels that load and compute right here, in catalogue order.

    Raises InputError where the runtime has no such provider, it does not start, or it computes none of them.
    """
    if not (state := has_provider(provider)).usable:
        raise InputError(f"expected {provider}: {state.reason}", "type: pip install onnxruntime-gpu" if provider == CUDA else "")
    works: list[str] = []
    for name in offered(provider):
        kernel = CATALOGUE[name]
        whole = all(part.name in works for part in parts(kernel)) if kernel.prefill else True
        if whole and all(relative_error(unit, kernel, provider) < _tolerance(kernel) for unit in _UNITS if legal(unit, kernel)):
            works.append(name)
    return _any_of(tuple(works), provider)


def working_kernels_of(host: Host) -> tuple[str, ...]:
    """`working_kernels` of the runtime on the host's device: what it computes is compared here. Raises InputError if that is nothing."""
    names = offered(host.device.provider)
    if host.device.at_hand:
        return working_kernels(host.device.provider)
    if host.device.provider not in (has := host.identify())["providers"]:
        problem = f"{has['runtime']} on {host.device.name!r} has no {host.device.provider}, only {', '.join(has['providers'])}"
        raise InputError(problem, f"install one there that has, or set provider: in the file of {host.device.name!r}")
    subjects, wanted = [], {}
    with scratch() as folder:
        for name in names:
            kernel = CATALOGUE[name]
            for number, unit in enumerate(unit for unit in _UNITS if legal(unit, kernel)):
                label = f"{name} {number}"
                place = folder / label
                place.mkdir()
                weights, rng = random_weights(unit, kernel), np.random.default_rng(0)
                write_one_unit(unit, kernel, weights, 1, place)
                cases = [_case(unit, kernel, weights, tokens, rng) for tokens in _TOKENS]
                inputs = {f"{tokens}.npy": x for tokens, (x, _) in zip(_TOKENS, cases, strict=True)}
                for file, x in inputs.items():  # as files: the request goes down the link again with every exchange
                    np.save(place / file, x)
                subjects.append({"name": label, "folder": str(place), "inputs": list(inputs)})
                wanted[label] = (name, [expected for _, expected in cases])
        made = host.outputs(subjects)
    wrong = set()
    for label, (name, expected) in wanted.items():
        got, most = made.get(label), _tolerance(CATALOGUE[name])
        try:
            right = got is not None and all(
                _error(np.array(y, float), known) < most for y, known in zip(got, expected, strict=True)
            )
        except (ValueError, TypeError):  # other shapes, or no numbers
            right = False
        if not right:
            wrong.add(name)
    return _any_of(
        tuple(name for name in names if not wrong & {name, *(part.name for part in parts(CATALOGUE[name]))}), host.device.provider
    )


def _any_of(works: tuple[str, ...], provider: str) -> tuple[str, ...]:
    if not works:
        raise InputError(f"expected {provider} to compute at least one kernel right, none of {', '.join(offered(provider))} does")
    return works


def _tolerance(kernel: Kernel) -> float:
    return TOLERANCE_FP16 if kernel.float_type == "float16" else TOLERANCE


def relative_error(unit: Unit, kernel: Kernel, provider: str = CPU) -> float:
    """Largest ‖runtime − reference‖ / ‖reference‖ over token counts, on random numbers; infinite where the runtime refuses the kernel or
    what it computes is no number."""
    rng = np.random.default_rng(0)
    weights = random_weights(unit, kernel)
    errors = []
    with scratch() as folder:
        write_one_unit(unit, kernel, weights, 1, folder)
        try:
            session = open_session(folder, threads=1, provider=provider, only=True)
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
    plain = unquantised(weights, part) if isinstance(weights, np.ndarray) else dequantize(weights[-1 if several else 0])
    if unit.op == "Gather":
        x = rng.integers(0, unit.N, tokens)
        return x, plain[x]
    x = rng.standard_normal((tokens, unit.K), dtype=np.float32)
    return x.astype(kernel.float_type), quantize_activation(x, part) @ plain.T


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    error = float(np.linalg.norm(got.astype(np.float32) - expected) / np.linalg.norm(expected))
    return error if np.isfinite(error) else float("inf")  # NaN is neither below a tolerance nor above it
