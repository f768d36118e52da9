"""What bounds a run, and so which reference tells how fast the machine was for it (`spec.WORKS`).

On CPUs tokens and working set say so before anything runs (`rows.work`). A GPU is done with most kernels before the next one is launched,
and then it is the CPU that bounds. A roofline of the reference's own rates tells (Williams et al. 2009, doi:10.1145/1498765.1498785): where
the weights' way from memory, or the multiplications, would take half of the run's time or more at the rates of the reference, they bound
it; else the launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from toolchain.costs.operations import tokens_in_flight
from toolchain.costs.rows import work
from toolchain.kernels import CATALOGUE
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import CUDA, STREAMED_TOKEN, TOKEN, TOKENS, Phase, Unit

LARGE_BYTES = 2 * 4096 * 4096 * 4
"""Weights of the GPU's reference `profiler/graphs/large`, which it reads from memory for one token."""
LARGE_PRODUCTS = 2 * 4096 * 4096 * 256
"""Multiplications of the same with 256 tokens. The runtime has TF32 do them, at half the rate of fp16: a kernel's arithmetic takes between
half and all of what this says."""
MOST_LAUNCHING = 0.5
"""Share of a run's time from which on memory or arithmetic are said to bound it."""


def bound_of_unit(
    unit: Unit, kernel: str, tokens: int, working_set: str, run_ms: float, reference_ns: Mapping[str, float], provider: str
) -> str:
    """What bounds one execution of a unit that took `run_ms` while the reference took `reference_ns`, by kind of work."""
    if provider != CUDA:
        return work(tokens == 1, working_set)
    return _on_gpu(*_load(unit, kernel, tokens), working_set, run_ms, reference_ns)


def bound_of_phase(
    units: Iterable[Unit],
    policy: Mapping[str, str],
    phase: Phase,
    working_set: str,
    run_ms: float,
    reference_ns: Mapping[str, float],
    provider: str,
) -> str:
    """The same of one run of a model's phase under a policy."""
    if provider != CUDA:
        return work(phase.name == "decode", working_set)
    loads = [_load(unit, policy[unit.name], tokens) for unit in units if (tokens := tokens_in_flight(unit, phase))]
    return _on_gpu(sum(load[0] for load in loads), sum(load[1] for load in loads), working_set, run_ms, reference_ns)


def _load(unit: Unit, kernel: str, tokens: int) -> tuple[float, float]:
    """(bytes of weights, multiplications); an embedding reads a row a token, which is nothing."""
    if unit.op == "Gather":
        return 0.0, 0.0
    return float(packed_bytes(unit, CATALOGUE[kernel])), float(unit.parameters * tokens)


def _on_gpu(weights: float, products: float, working_set: str, run_ms: float, reference_ns: Mapping[str, float]) -> str:
    streaming = weights / LARGE_BYTES * reference_ns[STREAMED_TOKEN] if working_set == "streamed" else 0.0
    arithmetic = products / LARGE_PRODUCTS * reference_ns[TOKENS]
    if max(streaming, arithmetic) < MOST_LAUNCHING * run_ms * 1e6:
        return TOKEN
    return STREAMED_TOKEN if streaming > arithmetic else TOKENS
