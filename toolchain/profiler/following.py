"""Rows of single processes: a few whole models and the references beside them, again and again in the course of a profile.

They are for how a model's latency follows the machine's speed (`costs/following.py`), so they are kept as they were seen, at no other
speed. Owns which policies and how often.
"""

from __future__ import annotations

from statistics import median

from toolchain.costs.rows import MOST_SESSIONS, Row, SessionRow
from toolchain.costs.table import CostTable
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE
from toolchain.profiler.ask import Host
from toolchain.profiler.model_rows import Anchor, Packages, anchors, bound_of_model, label, subject
from toolchain.spec import Phase, Workload

FOLLOWED = 10
"""Processes, spread over the profile; as many more each time that it is asked to follow the machine on."""
WINDOWS = 5


def followed(graph: Graph, table: CostTable) -> list[Anchor]:
    """Three unlike ones of the models that are timed anyway, cut where those are: of the widest and of the narrowest weights, and mixed."""
    made = {anchor.name: anchor for anchor in reversed(anchors(graph, table.header.kernels, table.header.cache_bytes))}
    uniform = sorted((CATALOGUE[name] for name in made if name in CATALOGUE), key=lambda kernel: kernel.weight_bits)
    quantised = [kernel for kernel in uniform if kernel.quantised] or uniform
    names = [*dict.fromkeys(kernel.name for kernel in (quantised[-1], quantised[0])), "mixed-0"]
    return [made[name] for name in names]


def missing(graph: Graph, workload: Workload, table: CostTable, more: bool = False) -> list[int]:
    """The sessions of this workload that the table lacks or holds as not valid. more: and FOLLOWED beyond those that it has."""
    wanted = [_about(graph, anchor, phase) for anchor in followed(graph, table) for phase in workload.phases]
    known = {key[-1] for key in table.rows if key[0] == "session" and key[1:-1] in wanted}
    most = max([FOLLOWED, *(session + 1 for session in known)]) + FOLLOWED * more
    return [
        session
        for session in range(min(most, MOST_SESSIONS))
        if not all(getattr(table.rows.get(("session", *about, session)), "valid", False) for about in wanted)
    ]


def measure(host: Host, graph: Graph, workload: Workload, session: int, table: CostTable, packages: Packages) -> list[Row]:
    """One process with the followed models in rotation."""
    chosen = followed(graph, table)
    answer = host.time([subject(graph, anchor.label, packages.of(anchor), workload.phases) for anchor in chosen], WINDOWS)
    references = {work: median(times) for work, times in answer["reference_ns"].items()}
    made: list[Row] = []
    for anchor in chosen:
        for phase in workload.phases:
            latency_ms = median(trial[label(phase)] for trial in answer["trials"][anchor.label]) / 1e6
            _, bound = bound_of_model(host, graph, anchor, phase, table.header.cache_bytes, latency_ms, answer["reference_ns"])
            about = _about(graph, anchor, phase)
            made.append(SessionRow(*about, session, latency_ms, references, bound, bool(answer["valid"])))
    return made


def _about(graph: Graph, anchor: Anchor, phase: Phase) -> tuple[str, str, int, int, int, int, str]:
    return (graph.fingerprint, phase.name, phase.batch, phase.tokens, phase.past, anchor.layers, anchor.name)
