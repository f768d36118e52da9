"""Mean bits as the only budget: what benchmarks share that compare methods at the same mean bits of all units' codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toolchain.costs.model import CostModel
from toolchain.kernels import CATALOGUE
from toolchain.policy.solver import Values, solve
from toolchain.spec import Budget, Policy, Unit, Workload

KERNELS = {2: "w2g32", 3: "w3g32", 4: "w4g32", 8: "w8g32"}
MEANS = (2, 2.5, 3, 3.5, 4, 8)
OFF = 0.005
"""Mean bits that differ by more than this from a column's are named."""


def kernels_of(units: Sequence[Unit]) -> dict[str, tuple[str, ...]]:
    """All of KERNELS for every unit."""
    return {unit.name: tuple(KERNELS.values()) for unit in units}


def full(units: Sequence[Unit]) -> Policy:
    """fp32 everywhere."""
    return Policy.of({unit.name: "fp32" for unit in units})


def costs_of_bits(units: Sequence[Unit], kernels: Mapping[str, tuple[str, ...]]) -> CostModel:
    """Bytes of the codes alone, under the name of the only resource that every table has."""
    codes = {unit.name: {name: CATALOGUE[name].weight_bits * unit.parameters / 8 for name in kernels[unit.name]} for unit in units}
    return CostModel(
        units=tuple(units),
        kernels=kernels,
        per_unit={"peak_memory_bytes": codes},
        fixed={"peak_memory_bytes": 0.0},
        ties=(),
        relative_spread={"peak_memory_bytes": 0.0},
        workload=Workload.parse("generate:64+32"),
        device="bits alone",
    )


def limit_of(units: Sequence[Unit], bits: float) -> Budget:
    """At most `bits` on average."""
    return Budget(peak_memory_bytes=bits * sum(unit.parameters for unit in units) / 8)


def solved(units: Sequence[Unit], kernels: Mapping[str, tuple[str, ...]], losses: Values, bits: float) -> Policy:
    """The exact solver's policy of least summed loss whose mean bits are at most `bits`."""
    return solve(costs_of_bits(units, kernels), losses, limit_of(units, bits)).policy
