"""From what the user typed to a package: open a model or supernet, find its cost model, cut. Choosing a policy is `choosing.py`.

Owns the order in which rooms are called; refuses to print results and to parse arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.blocks import Speed
from toolchain.costs.bounds import bound_of_phase
from toolchain.costs.following import share_of
from toolchain.costs.from_table import cost_model
from toolchain.costs.model import CostModel
from toolchain.costs.operations import working_set_of
from toolchain.costs.predictor import ShapePredictor
from toolchain.costs.rows import ModelRow
from toolchain.costs.table import CostTable, find_tables, open_table, refuse_if_stale
from toolchain.errors import DamagedFileError, InputError, MissingCostError
from toolchain.files import scratch, write_atomic
from toolchain.graph.assemble import Weights, package_bytes, round_to_nearest
from toolchain.graph.build import build
from toolchain.graph.model import DESCRIPTION as GRAPH_DESCRIPTION
from toolchain.graph.model import Graph
from toolchain.hardware import has_provider, named_budget, read_budget, shipped, thread_count
from toolchain.kernels import CATALOGUE, counterpart, full_precision, offered, parts, uniform, validate
from toolchain.package.export import export_package
from toolchain.package.manifest import Package
from toolchain.policy import budgets, proposal
from toolchain.profiler.ask import Host
from toolchain.profiler.probe import working_kernels
from toolchain.profiler.profile import check_workload, current_header, default_workload, header_of, profile
from toolchain.progress import note
from toolchain.reading import read_json, read_yaml
from toolchain.spec import DERIVED_BUDGETS, FINER, Budget, Cost, Device, Estimate, Policy, Workload

if TYPE_CHECKING:
    from toolchain.supernet.store import SupernetFolder


@dataclass(frozen=True)
class Source:
    """What a command was pointed at: a graph, its weights, and the supernet folder if it is one."""

    graph: Graph
    weights: Weights
    supernet: SupernetFolder | None


@contextmanager
def opened(source: str) -> Iterator[Source]:
    """A SUPERNET folder, the graph folder inside one, or a MODEL whose fp32 graph is built in a temporary folder and gone afterwards."""
    if (Path(source) / "supernet.yaml").is_file():
        from toolchain.supernet.store import SupernetFolder

        supernet = SupernetFolder.open(Path(source))
        yield Source(Graph.open(supernet.graph_directory), supernet.quantized, supernet)
        return
    if (Path(source) / GRAPH_DESCRIPTION).is_file():  # needs no torch: what a machine without the training stack profiles
        graph = Graph.open(Path(source))
        yield Source(graph, round_to_nearest(graph), None)
        return
    with scratch() as folder:
        out = folder / "graph"
        out.mkdir()
        graph = build(source, out)
        yield Source(graph, round_to_nearest(graph), None)


def trained_workload(source: Source) -> Workload | None:
    """The workload that a supernet's meta-network was trained for; None for a model."""
    said = source.supernet.description["training"].get("workload") if source.supernet else None
    return Workload.parse(said) if said else None


@dataclass(frozen=True)
class Costs:
    """A cost model with the table it came from."""

    model: CostModel
    table: CostTable
    path: Path


def profile_folders(given: str | None) -> list[Path]:
    """Where tables are looked for: --profiles, or profiles/ here and then the tables that are shipped."""
    return [Path(given)] if given else [Path("profiles"), shipped("profiles")]


def find_costs(
    graph: Graph, device: Device, folders: Sequence[Path], workload: Workload | None, allow_predicted: bool | None = None
) -> Costs:
    """The cost model of a graph from the device's table. Raises MissingCostError, StaleTableError, DamagedFileError, InputError.

    allow_predicted: where rows are missing, predict them from the rows of all tables of this device, and say so in the cost model's
    notes. None: the command that asks has no such flag, so the error does not name it.
    """
    workload = workload or default_workload(graph)
    check_workload(graph, workload)
    paths = find_tables(device.name, folders)
    path, table = paths[0], open_table(paths[0])
    if device.at_hand and has_provider(device.provider).usable:  # of another the table alone is needed
        refuse_if_stale(table, current_header(device, thread_count(device)))
    predictor = ShapePredictor.of([table, *map(open_table, paths[1:])]) if allow_predicted else None
    try:
        costs = Costs(cost_model(graph, table, workload, predictor), table, path)
    except MissingCostError as error:
        if allow_predicted is not False:
            raise
        raise MissingCostError(error.problem, f"{error.remedy}, or add --allow-predicted") from error
    invalid = sum(not row.valid for row in table.of(ModelRow) if row.model == graph.fingerprint)
    if invalid:
        note(
            f"bittailor: {invalid} whole-model rows of {path} are not valid (others used the CPU); type: bittailor profile to repeat them"
        )
    return costs


def measure_costs(
    graph: Graph,
    device: Device,
    folder: Path,
    workload: Workload | None,
    command: str,
    renew: bool,
    energy: bool = True,
    follow: bool = False,
) -> Costs:
    """Profile what is missing into `folder`/<device>/ and write the derived budgets beside the table. energy: where there is a meter, of
    that too, which takes minutes. follow: more of how the model follows the machine's speed."""
    path = folder / device.name / "table.jsonl"
    workload = workload or default_workload(graph)
    host = Host.of(device)
    name, reason = host.meter() if energy else ("none", "it was not asked for")
    header = header_of(host, f"none: {reason}" if reason else name, command)
    table = profile(graph, header, host, workload, path, renew, follow)
    costs = Costs(cost_model(graph, table, workload), table, path)
    derived = {name: budget.to_json() for name, budget in budgets.derive(costs.model).items()}
    write_atomic(_budget_file(path, graph, workload), json.dumps({"workload": str(workload), **derived}, indent=1) + "\n")
    return costs


def predicted(graph: Graph, costs: Costs, policy: Policy) -> Cost:
    """A policy's predicted cost; the package's bytes are counted, not estimated."""
    return replace(costs.model.predict(policy), package_bytes=Estimate(float(package_bytes(graph, policy)), 0.0))


def _budget_file(table: Path, graph: Graph, workload: Workload) -> Path:
    text = str(workload).replace(":", "-")
    return table.with_name(f"budgets-{graph.fingerprint[:12]}-{text}.json")


def find_budget(text: str | None, limits: Mapping[str, float], graph: Graph, costs: Costs | None, device: Device) -> Budget | None:
    """--budget NAME|FILE with the limits given beside it on top. None if neither is given.

    A name is one of the device's own, of a preset (sources/low), or low/medium/high derived from the cost table. Derived limits are held at
    the table's speed, so a budget of the user's that has such a name gets another.
    """
    budget: Budget | None = None
    if text:
        budget = named_budget(text, device)
        if budget is None and Path(text).is_file():
            budget = read_budget(Path(text))
        if budget and budget.name in DERIVED_BUDGETS:
            budget = replace(budget, name=f"own {budget.name}")
        if budget is None and text in budgets.FRACTIONS:
            if costs is None:
                raise MissingCostError(
                    f"expected a cost table to derive the budget {text!r} from, found none", "type: bittailor profile MODEL"
                )
            stored = _budget_file(costs.path, graph, costs.model.workload)
            budget = _stored_budget(stored, text) if stored.is_file() else budgets.derive(costs.model)[text]
        if budget is None:
            raise InputError(
                f"expected a budget file or one of {', '.join(budgets.FRACTIONS)}, got {text!r}",
                "type for example: --budget medium",
            )
    if limits:
        extra = Budget.from_json(limits)
        budget = replace(budget, **extra.limits, name=f"{budget.name} with limits") if budget else extra
    return budget


def _stored_budget(path: Path, name: str) -> Budget:
    """One of the budgets that `measure_costs` wrote. Raises DamagedFileError."""
    try:
        return Budget.from_json(read_json(path)[name], name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise DamagedFileError(
            f"expected the derived budget {name!r} in {path}, got {type(error).__name__}: {error}",
            "type: bittailor profile MODEL, which writes it anew",
        ) from error


def kernels_of(device: Device, folders: Sequence[Path]) -> tuple[str, ...]:
    """Kernels that a policy for this device may name: those that work here, or worked on the device when its table was measured. All that
    the catalogue has for its provider where neither is known."""
    if device.at_hand and has_provider(device.provider).usable:
        return working_kernels(device.provider)
    try:
        return open_table(find_tables(device.name, folders)[0]).header.kernels
    except MissingCostError:
        return offered(device.provider)


def read_policy(text: str, source: Source, device: Device, folders: Sequence[Path]) -> Policy:
    """--policy: a kernel name, or a JSON/YAML file {"units": {name: kernel}}. Raises PolicyError or InputError.

    Of a supernet only kernels that it was trained with: those that worked where its table was made.
    """
    graph, available = source.graph, kernels_of(device, folders)
    if source.supernet:
        own = (*source.supernet.kernels, full_precision(device.provider))
        available = tuple(name for name in available if all(counterpart(part.name, own) for part in parts(CATALOGUE[name])))
    path = Path(text)
    if not path.is_file():
        return uniform(text, graph.units, available)
    try:
        data = read_yaml(path)
        units = {str(unit): str(kernel) for unit, kernel in data["units"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())[:120]
        raise InputError(
            f'expected a policy file {{"units": {{name: kernel}}}} in {path}, got {type(error).__name__}: {what}'
        ) from error
    return validate(units, graph.units, available)


@dataclass(frozen=True)
class Choice:
    """A policy, by whom it was chosen, and its relative excess of predicted loss over the exact optimum (None without sensitivities)."""

    policy: Policy
    chosen_by: str
    gap_to_optimum: float | None


def _speeds(graph: Graph, policy: Policy, costs: Costs) -> dict[str, Speed]:
    """Latency → the machine's speed when the table began, by the kind of work that bounds it under this policy, the finer one where the
    table has it, and how the model follows it."""
    header, foreseen = costs.table.header, costs.model.totals(policy)
    has = header.reference_ns
    if not has:
        return {}
    kind = working_set_of(graph.units, policy, header.cache_bytes)
    works = {
        phase.resource: bound_of_phase(graph.units, policy, phase, kind, foreseen[phase.resource], has, header.provider)
        for phase in costs.model.workload.phases
    }
    finest = {name: FINER[bound] if FINER.get(bound) in has else bound for name, bound in works.items()}
    phases = {phase.resource: phase for phase in costs.model.workload.phases}
    return {
        name: Speed(bound, has[bound], share_of(costs.table, graph.fingerprint, phases[name], bound))
        for name, bound in finest.items()
    }


def cut(
    source: Source,
    choice: Choice,
    out: Path,
    device: Device,
    budget: Budget | None,
    costs: Costs | None,
    workload: Workload,
    polish: Mapping[str, Any] | None = None,
) -> Package:
    """Export a policy as a package. Without a budget the package promises its own prediction, if there is one.

    polish: what the manifest says of steps that were added for this package alone.
    """
    cost = predicted(source.graph, costs, choice.policy) if costs else None
    if budget is None and costs is not None:
        budget = budgets.promise(costs.model.totals(choice.policy), costs.model)
    training = dict(source.supernet.description.get("training", {})) if source.supernet else None
    if source.supernet and training is not None:
        offered = proposal.read(source.supernet.meta_network)[0]
        used = {(unit, part.name) for unit, kernel in choice.policy.items() for part in parts(CATALOGUE[kernel])}
        skipped = sorted(
            {kernel for unit, kernel in used if CATALOGUE[kernel].quantised and not counterpart(kernel, offered[unit])}
        )
        if other := sorted({kernel for _, kernel in used if CATALOGUE[kernel].quantised and kernel not in source.supernet.kernels}):
            training["trained_as"] = {kernel: counterpart(kernel, source.supernet.kernels) for kernel in other}
        if skipped:  # no budget would choose them, so no step saw them
            training["not_trained"] = f"{', '.join(skipped)}: their start alone"
    if training is not None and polish:
        training["polish"] = dict(polish)
    evidence: dict[str, Any] = {
        "chosen_by": choice.chosen_by,
        "training": training or "none: round-to-nearest of the model's weights",
    }
    if costs:
        speeds = _speeds(source.graph, choice.policy, costs)
        evidence["reference_ns"] = {name: {speed.work: speed.ns} for name, speed in speeds.items()}
        evidence["follows"] = {name: {"share": speed.share.value, "unknown": speed.share.unknown} for name, speed in speeds.items()}
        evidence["measured_on"] = costs.table.header.identity
    runtime = costs.table.header.runtime if costs else "not measured"
    return export_package(
        source.graph,
        choice.policy,
        source.weights,
        out,
        workload=workload,
        device=device.name,
        provider=device.provider,
        budget=budget,
        predicted=cost,
        gap_to_optimum=choice.gap_to_optimum,
        runtime=runtime,
        evidence=evidence,
    )
