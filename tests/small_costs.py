"""Small cost models made by hand, for tests of the policy and training rooms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toolchain.costs.model import CostModel, Tie
from toolchain.kernels import CATALOGUE, candidates
from toolchain.spec import Unit, Workload


def cost_model(
    per_unit: Mapping[str, Mapping[str, Mapping[str, float]]], fixed: Mapping[str, float] | None = None, ties: Sequence[Tie] = ()
) -> CostModel:
    """A cost model from resource → unit → kernel → cost alone."""
    table = next(iter(per_unit.values()))
    return CostModel(
        units=tuple(Unit(name, "MatMul", 32, 32) for name in table),
        kernels={name: tuple(row) for name, row in table.items()},
        per_unit=per_unit,
        fixed=dict.fromkeys(per_unit, 0.0) if fixed is None else fixed,
        ties=tuple(ties),
        relative_spread=dict.fromkeys(per_unit, 0.1),
        workload=Workload.parse("generate:64+32"),
        device="by-hand",
    )


def bytes_and_time(units: Sequence[Unit], kernels: Sequence[str]) -> CostModel:
    """Bytes by the bits (with scales), time by bytes but 3 bits as slow as 4: what a real table looks like."""
    table: dict[str, dict[str, dict[str, float]]] = {"peak_memory_bytes": {}, "latency_ms": {}}
    names = {}
    for unit in units:
        names[unit.name] = candidates(unit, kernels)
        memory = {}
        for name in names[unit.name]:
            kernel = CATALOGUE[name]
            memory[name] = unit.parameters * kernel.container_bits / 8 + (
                4 * unit.parameters / kernel.group_size if kernel.group_size else 0
            )
        table["peak_memory_bytes"][unit.name] = memory
        table["latency_ms"][unit.name] = {name: 0.01 + cost / 2e7 for name, cost in memory.items()}
    ties = []
    for unit in units:
        if unit.tied_to and unit.name < unit.tied_to:
            shared = [name for name in names[unit.name] if name in names[unit.tied_to]]
            savings = {name: {"peak_memory_bytes": table["peak_memory_bytes"][unit.name][name]} for name in shared}
            ties.append(Tie((unit.name, unit.tied_to), savings))
    model = cost_model(table, {"peak_memory_bytes": 1e6, "latency_ms": 0.5}, ties)
    return CostModel(tuple(units), names, table, model.fixed, tuple(ties), model.relative_spread, model.workload, model.device)
