"""MODEL on a device → its cost table: what is missing is measured, and saved shape by shape, so a killed run resumes.

Five kinds of rows: the time of each unit shape and kernel, their memory (`unit_rows`), a few whole models (`model_rows`), whose
difference from the sum of their units is the remainder (attention, norms, cache, per-run overhead), single processes spread over the
profile, which tell how a model follows the machine's speed (`following`), and the energy of units and models where a meter works
(`energy_rows`). Times but those of single processes are scaled to the speed the machine had when the table began, by the reference for
their kind of work.
Refuses to know budgets and training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

from toolchain.costs.borrowed import describe
from toolchain.costs.rows import Header, Row, at_speed
from toolchain.costs.table import CostTable, open_table, refuse_if_stale
from toolchain.errors import InputError, MeterError
from toolchain.files import scratch
from toolchain.graph.assemble import check_float_type
from toolchain.graph.model import Graph
from toolchain.profiler import energy_rows, following, model_rows, unit_rows
from toolchain.profiler.ask import Host, References
from toolchain.profiler.energy import WARM_S
from toolchain.profiler.meters import LEAST_WINDOW_S
from toolchain.profiler.probe import working_kernels_of
from toolchain.progress import note, track
from toolchain.spec import WORKS, Device, Unit, Workload


def current_header(device: Device, threads: int, meter: str = "", command: str = "") -> Header:
    """`header_of` the device with so many threads."""
    return header_of(Host(device, threads), meter, command)


def header_of(host: Host, meter: str = "", command: str = "") -> Header:
    """The header of a table measured now: what the agent says of its machine, and the kernels that work there."""
    answer = host.identify()
    return Header(
        device=host.device.name,
        cpu=answer["cpu"],
        provider=host.device.provider,
        threads=host.threads,
        runtime=answer["runtime"],
        protocol=answer["protocol"],
        meter=meter,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=command,
        kernels=working_kernels_of(host),
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


def profile(
    graph: Graph, header: Header, host: Host, workload: Workload, path: Path, renew: bool = False, follow: bool = False
) -> CostTable:
    """Measure what the table at `path` lacks for this model and workload, and return the whole table.

    header: `header_of` the host, the machine as it is now. renew: start over instead of refusing a stale table.
    follow: more of how the model follows the machine's speed, although nothing lacks.
    Raises StaleTableError, DamagedFileError, InputError.
    """
    check_workload(graph, workload)
    check_float_type(graph, header.kernels)
    table = CostTable(header, {})
    if path.exists() and not renew:
        table = open_table(path)
        refuse_if_stale(table, header)
    with scratch() as folder:
        packages = model_rows.Packages(graph, folder)
        jobs = _spread(
            list(_jobs(graph, host, workload, table, packages)), list(_sessions(graph, host, workload, table, packages, follow))
        )
        meter, said, gone = header.meter.partition(":")[0], "", ""
        if meter not in ("", "none"):
            table = replace(table, header=replace(table.header, meter=header.meter))
            energy, said = _energy_jobs(graph, host, workload, table, packages, meter)
            jobs += energy
        for job in track(jobs, len(jobs), f"profile {Path(graph.source).name} on {host.device.name}{said}"):
            if job.energy and gone:
                continue
            try:
                batches = job.measure()
            except MeterError as error:
                gone = str(error)
                table = replace(table, header=replace(table.header, meter=f"none: {gone}"))
                batches = []
            for rows, references in batches:
                table = _adding(table, rows, references)
            if job.unit:
                table = unit_rows.with_errors(table, job.unit)
            table.save(path)
    if gone:
        note(f"bittailor: the energy of some rows was not measured: {gone}; the same command again asks the meter anew")
    return table


@dataclass(frozen=True)
class _Job:
    """One save of the table: batches of rows not yet corrected for drift, each with the references' times meanwhile. unit: whose shape it
    is about. energy: a meter is asked, which may have no answer (MeterError)."""

    measure: Callable[[], list[tuple[list[Row], References]]]
    unit: Unit | None = None
    energy: bool = False


def _jobs(graph: Graph, host: Host, workload: Workload, table: CostTable, packages: model_rows.Packages) -> Iterator[_Job]:
    """One job per unit shape that lacks a row, a few for the time of whole models, between them one for the memory of each, one to
    describe the model."""
    for unit in {unit.shape: unit for unit in graph.units}.values():
        sets = unit_rows.working_sets(graph, unit, table)
        wanted = unit_rows.cases(graph, unit, sets, workload, table.header.cache_bytes)
        times, memory = unit_rows.missing(unit, wanted, table, workload)
        if times or memory:
            yield _Job(partial(_one_batch, unit_rows.measure, host, unit, times, memory), unit)
    lacking = model_rows.missing(graph, workload, table)
    timed, weighed = ([item for item in lacking if getattr(item, what)] for what in ("times", "memory"))
    anchors = model_rows.Sessions(host, graph, table.header.cache_bytes, timed, packages)
    for turn in range(model_rows.SESSIONS):
        if timed:
            yield _Job(partial(_one_batch, anchors.time))
        for item in weighed[turn :: model_rows.SESSIONS]:
            yield _Job(partial(_weigh, host, graph, workload, item, packages))
    if (shape := describe(graph)).key not in table.rows:
        yield _Job(lambda: [([shape], {})])


def _sessions(
    graph: Graph, host: Host, workload: Workload, table: CostTable, packages: model_rows.Packages, more: bool
) -> Iterator[_Job]:
    """One job per process that tells how the model follows the machine's speed."""

    def one(session: int) -> list[tuple[list[Row], References]]:
        return [(following.measure(host, graph, workload, session, table, packages), {})]

    for session in following.missing(graph, workload, table, more):
        yield _Job(partial(one, session))


def _spread(jobs: list[_Job], between: list[_Job]) -> list[_Job]:
    """The jobs in their order, those `between` at even distances among them, the last one at the end."""
    made = list(jobs)
    for place, job in reversed(list(enumerate(between, 1))):
        made.insert(len(jobs) * place // len(between), job)
    return made


def _energy_jobs(
    graph: Graph, host: Host, workload: Workload, table: CostTable, packages: model_rows.Packages, meter: str
) -> tuple[list[_Job], str]:
    """One job per unit shape and per whole model that lacks energy, and in words how long they take."""
    units = energy_rows.missing_units(graph, workload, table, meter)
    models = energy_rows.missing_models(graph, workload, table, meter)
    jobs = [_Job(partial(energy_rows.measure_units, host, meter, item), energy=True) for item in units]
    jobs += [
        _Job(partial(energy_rows.measure_model, host, meter, graph, item, packages, table.header.cache_bytes), energy=True)
        for item in models
    ]
    if not jobs:
        return [], ""
    windows = energy_rows.windows(units, models)
    minutes = max(1, round(windows * (LEAST_WINDOW_S[meter] + WARM_S) / 60))
    note(f"bittailor: energy by {meter} takes {windows} windows, {minutes} min or longer")
    return jobs, f" (of it energy: {minutes} min or longer)"


def _weigh(
    host: Host, graph: Graph, workload: Workload, wanted: model_rows.Wanted, packages: model_rows.Packages
) -> list[tuple[list[Row], References]]:
    return [(model_rows.weigh(host, graph, workload, wanted, packages), {})]


def _one_batch(measure: Callable[..., tuple[list[Row], References]], *arguments: object) -> list[tuple[list[Row], References]]:
    return [measure(*arguments)]


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
        every = {work: median(times) for work, times in references.items()}
        table = replace(table, header=replace(table.header, reference_ns=every))
    speed = {work: table.header.reference_ns[work] / now[work] for work in WORKS}
    return table.adding(at_speed(row, speed, table.header.provider) for row in rows)
