"""What a supernet and a cost table say of packages beforehand: the exact front, a policy's loss, its cost unit by unit. All predictions.

Owns finding the supernet and the table that the packages were cut from, and the reasons where there are none. Nothing is measured here, and
nothing is asked of this machine: the device whose table it is may be elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.commands.choosing import in_trained_names, restricted
from toolchain.commands.workflow import Costs, profile_folders
from toolchain.costs.from_table import cost_model
from toolchain.costs.model import CostModel
from toolchain.costs.table import find_table, open_table
from toolchain.errors import BittailorError, InputError
from toolchain.files import inside
from toolchain.graph.assemble import package_bytes
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, full_precision, mean_bits, parts, uniform
from toolchain.package.manifest import Package
from toolchain.policy.front import exact_front
from toolchain.report.comparison import COSTS, no_breakdown
from toolchain.report.contents import kinds
from toolchain.spec import Policy
from toolchain.supernet.store import SupernetFolder

POINTS = 32
"""Of each front."""
_SAME = 1e-6
"""Relative difference up to which two predictions of one policy are one: sums of floats in another order."""


@dataclass(frozen=True)
class Foresight:
    """A supernet's graph and losses with the cost model of the device, in the device's own kernel names and in those that were trained."""

    folder: SupernetFolder
    graph: Graph
    costs: Costs
    trained: CostModel
    own_names: Mapping[str, str]
    """A device's kernel → the one that was trained in its place."""

    def fronts(self, packages: Sequence[Package]) -> dict[str, dict[str, Any]]:
        """resource → {"points": [{"cost", "loss", "mean_bits", "proven"}], "reason"}: policies of least loss for limits on it, among them
        what each package is predicted to cost."""
        model, losses = self.trained, self.folder.sensitivity
        found: dict[str, dict[str, Any]] = {}
        for resource in COSTS:
            if resource not in model.per_unit:
                found[resource] = {"points": [], "reason": model.no_energy}
                continue
            points = [
                {"cost": point.cost, "loss": point.loss, "mean_bits": mean_bits(point.policy, model.units), "proven": point.proven}
                for point in exact_front(model, losses, resource, POINTS, self._costs_of(packages, resource))
            ]
            found[resource] = {"points": points, "reason": ""}
        return found

    def _costs_of(self, packages: Sequence[Package], resource: str) -> list[float]:
        values = (package.predicted.get(resource, {}).get("value") for package in packages)
        return [value for value in values if value is not None]

    def loss(self, package: Package) -> dict[str, Any]:
        """{"value", "reason"}: the sensitivities summed over the package's policy: a prediction, blind to how losses interact."""
        said, trained = package.data.get("training"), self.folder.description["training"]
        if not isinstance(said, Mapping) or any(said.get(name) != value for name, value in trained.items()):
            return {"value": None, "reason": "it was not cut from this supernet, whose sensitivities are of its own weights"}
        if "polish" in said:
            return {"value": None, "reason": "it was polished after it was cut: the sensitivities are of the weights before"}
        total, sensitivity = 0.0, self.folder.sensitivity
        for unit, kernel in package.policy.items():
            own = parts(CATALOGUE[self.own_names.get(kernel, kernel)])[0].name
            if own not in sensitivity.get(unit, {}):
                return {"value": None, "reason": f"the supernet has no sensitivity of {kernel} on {unit}"}
            total += sensitivity[unit][own]
        return {"value": total, "reason": ""}

    @property
    def losses_are(self) -> str:
        """What a loss is, in words."""
        unit = "nats per token" if self.graph.kind != "encoder" else "distance to the full-precision model's outputs"
        return f"sum over units of what each kernel alone loses on the supernet's calibration windows, {unit}"

    def breakdown(self, policy: Policy, resource: str, predicted: float | None) -> dict[str, Any]:
        """What each unit is predicted to cost, by kind and one by one, in the resource's unit; remainder and shared make up the rest.

        {"parts": [{"kind", "units", "value"}], "units": [{"unit", "kernel", "value"}], "remainder", "shared", "total", "reason"}.
        predicted: what the package's manifest says; where the table now says otherwise, there is a reason instead.
        """
        model = self.costs.model
        if resource not in model.per_unit:
            return no_breakdown(model.no_energy)
        names, cost = [unit.name for unit in model.units], model.per_unit[resource]
        if sorted(names) != sorted(policy):
            return no_breakdown("its units are not the supernet's")
        if unknown := [unit for unit in names if policy[unit] not in cost[unit]]:
            return no_breakdown(f"the cost table has no {policy[unknown[0]]} of {unknown[0]}")
        total = model.totals(policy)[resource]
        if predicted is None or abs(total - predicted) > _SAME * abs(total):
            return no_breakdown("the cost table has changed since the package was cut: it now predicts another total")
        by_kind: dict[str, list[float]] = {}
        for unit, name in kinds(names).items():
            by_kind.setdefault(name, []).append(cost[unit][policy[unit]])
        agreed = [(tie, policy[tie.units[0]]) for tie in model.ties if policy[tie.units[0]] == policy[tie.units[1]]]
        return {
            "parts": [{"kind": name, "units": len(values), "value": sum(values)} for name, values in by_kind.items()],
            "units": [{"unit": unit, "kernel": policy[unit], "value": cost[unit][policy[unit]]} for unit in names],
            "remainder": model.fixed[resource],
            "shared": -sum(tie.savings.get(kernel, {}).get(resource, 0.0) for tie, kernel in agreed),
            "total": total,
            "reason": "",
        }

    def full_precision(self, provider: str) -> tuple[float | None, float]:
        """(predicted latency in ms, counted package bytes) of the model without quantisation."""
        policy = uniform(full_precision(provider), self.graph.units)
        return self.costs.model.totals(policy).get("latency_ms"), float(package_bytes(self.graph, policy))


def refuse_a_stranger(supernet: Path, packages: Sequence[Package]) -> None:
    """Raise InputError where a supernet that was named belongs to none of the packages, DamagedFileError where it does not open."""
    fingerprint = Graph.open(SupernetFolder.open(supernet).graph_directory).fingerprint
    if all(package.data["model"]["fingerprint"] != fingerprint for package in packages):
        raise InputError(f"expected the supernet that the packages were cut from, got another model's in {supernet}")


def foresee(supernet: Path, packages: Sequence[Package], profiles: str | None) -> Foresight | str:
    """What is known of packages of one model, device and workload; or why nothing is."""
    try:
        folder = SupernetFolder.open(supernet)
        graph = Graph.open(folder.graph_directory)
        if graph.fingerprint != packages[0].data["model"]["fingerprint"]:
            return f"{supernet} is another model's supernet"
        beside = [] if profiles else [supernet.parent / "profiles"]  # where quickstart keeps them
        return _with_table(folder, graph, packages, [*beside, *profile_folders(profiles)])
    except BittailorError as error:
        return str(error)


def _with_table(folder: SupernetFolder, graph: Graph, packages: Sequence[Package], profiles: Sequence[Path]) -> Foresight | str:
    device = str(packages[0].data["device"])
    for root in profiles:
        inside(root, device)  # the name comes from a stranger's manifest
    path = find_table(device, profiles)
    table = open_table(path)
    if any(package.data.get("measured_on") != table.header.identity for package in packages):
        return f"{path} is not the cost table that the packages were cut with: it is of {json.dumps(table.header.identity)}"
    costs = Costs(cost_model(graph, table, packages[0].workload), table, path)
    measured, there = in_trained_names(costs, folder)
    return Foresight(folder, graph, costs, restricted(measured, folder), {own: name for name, own in there.items()})
