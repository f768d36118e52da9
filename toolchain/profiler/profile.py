"""MODEL on a device → its cost table: what is missing is measured, and saved shape by shape, so a killed run resumes.

Three kinds of rows: the time of each unit shape and kernel, their memory (`unit_rows`), and a few whole models (`model_rows`), whose
difference from the sum of their units is the remainder: attention, norms, cache, per-run overhead. Times are scaled to the speed the
machine had when the table began, by the reference for their kind of work. Refuses to know budgets and training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

from toolchain.costs.borrowed import describe
from toolchain.costs.operations import working_set
from toolchain.costs.rows import Header, Row, at_speed
from toolchain.costs.table import CostTable, open_table, refuse_if_stale
from toolchain.errors import InputError
from toolchain.files import scratch
from toolchain.graph.model import Graph
from toolchain.kernels import candidates, runs_as
from toolchain.profiler import model_rows, unit_rows
from toolchain.profiler.ask import Host, References
from toolchain.profiler.probe import working_kernels
from toolchain.progress import track
from toolchain.spec import WORKS, Device, Unit, Workload


def current_header(device: Device, threads: int, meter: str = "", command: str = "") -> Header:
    """The header of a table measured now: what the agent says of its machine, and the kernels that work there."""
    answer = Host(device, threads).identify()
    return Header(
        device=device.name,
        cpu=answer["cpu"],
        provider=device.provider,
        threads=threads,
        runtime=answer["runtime"],
        protocol=answer["protocol"],
        meter=meter,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=command,
        kernels=working_kernels(device.provider),
        cache_bytes=answer["cache_bytes"],
    )


def default_workload(graph: Graph) -> Workload:
    return Workload.parse("encode:1x128" if graph.kind == "encoder" else "generate:64+32")


def check_workload(graph: Graph, workload: Workload) -> None:
    """Raise InputError for a workload this model cannot run."""
    default = default_workload(graph)
    if workload.kind != default.kind:
        raise InputError(
            f"expected a workload {default.kind}:... for this {graph.kind}, got {workload}", f"type: --workload {default}"
        )
    if graph.kind == "encoder-decoder":
        if max(workload.prompt_tokens, workload.new_tokens) > graph.context:
            raise InputError(
                f"expected at most {graph.context} tokens of source and of target, the model's context, got {workload}"
            )
    elif workload.prompt_tokens + workload.new_tokens > graph.context:
        raise InputError(f"expected at most {graph.context} tokens, the model's context, got {workload}")


def profile(graph: Graph, header: Header, device: Device, workload: Workload, path: Path, renew: bool = False) -> CostTable:
    """Measure what the table at `path` lacks for this model and workload, and return the whole table.

    header: `current_header`, the machine as it is now. renew: start over instead of refusing a stale table.
    Raises StaleTableError, DamagedFileError, InputError.
    """
    check_workload(graph, workload)
    table = CostTable(header, {})
    if path.exists() and not renew:
        table = open_table(path)
        refuse_if_stale(table, header)
    with scratch() as folder:
        packages = model_rows.Packages(graph, folder)
        jobs = list(_jobs(graph, Host(device, header.threads), workload, table, packages))
        for job in track(jobs, len(jobs), f"profile {Path(graph.source).name}"):
            rows, references = job.measure()
            table = _adding(table, rows, references)
            if job.unit:
                table = unit_rows.with_errors(table, job.unit)
            table.save(path)
    return table


@dataclass(frozen=True)
class _Job:
    """One save of the table: rows not yet corrected for drift, and the references' times meanwhile. unit: whose shape it is about."""

    measure: Callable[[], tuple[list[Row], References]]
    unit: Unit | None = None


def _jobs(graph: Graph, host: Host, workload: Workload, table: CostTable, packages: model_rows.Packages) -> Iterator[_Job]:
    """One job per unit shape that lacks a row, a few for the time of whole models, between them one for the memory of each, one to
    describe the model."""
    for unit in {unit.shape: unit for unit in graph.units}.values():
        names = dict.fromkeys(runs_as(name) for name in candidates(unit, table.header.kernels))
        sets = {name: working_set(graph.units, name, table.header.cache_bytes) for name in names}
        wanted = unit_rows.cases(graph, unit, sets, workload, table.header.cache_bytes)
        times, memory = unit_rows.missing(unit, wanted, table, workload)
        if times or memory:
            yield _Job(partial(unit_rows.measure, host, unit, times, memory), unit)
    lacking = model_rows.missing(graph, workload, table)
    timed, weighed = ([item for item in lacking if getattr(item, what)] for what in ("times", "memory"))
    sessions = model_rows.Sessions(host, graph, table.header.cache_bytes, timed, packages)
    for turn in range(model_rows.SESSIONS):
        if timed:
            yield _Job(sessions.time)
        for item in weighed[turn :: model_rows.SESSIONS]:
            yield _Job(partial(_weigh, host, graph, workload, item, packages))
    if (shape := describe(graph)).key not in table.rows:
        yield _Job(lambda: ([shape], {}))


def _weigh(
    host: Host, graph: Graph, workload: Workload, wanted: model_rows.Wanted, packages: model_rows.Packages
) -> tuple[list[Row], References]:
    return model_rows.weigh(host, graph, workload, wanted, packages), {}


def _adding(table: CostTable, rows: list[Row], references: References) -> CostTable:
    """The table with rows scaled to the speed the machine had when it began, which its header keeps."""
    if not references:
        return table.adding(rows)
    now = {work: median(references[work]) for work in WORKS}
    if not table.header.reference_ns:
        if not all(getattr(row, "valid", True) for row in rows):
            return table.adding(
                rows
            )  # a disturbed machine must not become the measure of all later rows; these are repeated anyway
        table = replace(table, header=replace(table.header, reference_ns=now))
    speed = {work: table.header.reference_ns[work] / now[work] for work in WORKS}
    return table.adding(at_speed(row, speed) for row in rows)
