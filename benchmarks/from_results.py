"""What is drawn from results that are there already: the second source's ablation table, the PTQ/QAT study's radar and its table of what
bits save in energy. Measures nothing.

    python benchmarks/from_results.py ablation [--results results]
    python benchmarks/from_results.py radar --graph GRAPH --table TABLE [OTHER_DEVICES_TABLE ...] [--results results]
    python benchmarks/from_results.py energy --table TABLE --model FINGERPRINT [--results results]

ablation: ablation.md. The meta-network system and what it loses without each part, beside the systems that the source's table names, as far
as they are methods here: on text at a mean of so many bits, on tasks at a device's budgets.
radar: radar.svg and radar.md (arXiv:2411.06084, figure 2). GRAPH: the embedded model's; TABLE: a device's, where the model was measured.
Below, ms per token of these kernels and of w8a8 on every device, whose tables all have that.

    accuracy retention   perplexity of full precision over the method's      perplexity_at_bits.json
    size reduction       1 − bytes of the package over full precision's      counted, not measured
    latency reduction    1 − ms per token over full precision's              the table's rows of the whole model, measured
energy: energy.md (arXiv:2411.06084, table II), of decoding one token. A sum over the units of a model in TABLE, each measured by the
device's meter, with one kernel on all of them; beside it what the whole model took where TABLE has that. FINGERPRINT: its first digits, as
in TABLE's "model shape" rows.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from post_training import spread

from toolchain.costs.rows import ModelEnergyRow, ModelRow, ModelShapeRow, UnitEnergyRow
from toolchain.costs.table import CostTable, open_table
from toolchain.files import write_atomic
from toolchain.graph.assemble import package_bytes
from toolchain.graph.model import Graph
from toolchain.kernels import full_precision, uniform
from toolchain.profiler.profile import default_workload
from toolchain.report import table

ABLATED = {
    "MetaQuantLLM": "all of it",
    "MetaQuantLLM, fixed policy": "a uniform policy instead of the meta-network's",
    "MetaQuantLLM, MSE": "MSE instead of the interference-aware loss",
    "MetaQuantLLM, uniform sampling": "uniform instead of balanced sampling",
    "uniform OFA": "shared weights, uniform sampling, a search",
    "Q-BERT": "bits by the Hessian, groups of 32, trained per budget",
    "Q8BERT": "8 bits, embeddings too, trained",
    "half depth": "distillation instead of fewer bits: every other block",
}
TEXT, TASKS, SQUAD = "perplexity_at_bits.json", "tasks_at_budget.json", "squad_at_budget.json"
OFF = 0.01  # of mean bits
BITS, BUDGETS = (2.0, 3.0, 4.0, 8.0), ("tight", "low", "medium", "high")
SHOWN = (
    ("fp32", "fp32", 32.0),
    ("PTQ, min-max", "w8g32", 8.0),
    ("PTQ, min-max, and γ", "w8g32", 8.0),
    ("PTQ, min-max", "w4g32", 4.0),
    ("PTQ, min-max, and γ", "w4g32", 4.0),
    ("QAT, uniform", "w4g32", 4.0),
    ("PTQ, min-max, and γ", "w2g32", 2.0),
    ("QAT, uniform", "w2g32", 2.0),
)
"""(method, its kernel, bits) of the radar's shapes."""
KERNELS = tuple(dict.fromkeys(kernel for _, kernel, _ in SHOWN))
TIMED = (*KERNELS, "w8a8")
"""What is timed on every device: the radar's kernels, and the INT8 that the study means."""
AXES = ("accuracy retention", "size reduction", "latency reduction")
_LABELS = ((0.5, 1.04, "bottom"), (0.0, 0.0, "top"), (1.0, 0.0, "top"))
"""Where the axes' names stand beside a shape."""


def cells_of(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise SystemExit(f"expected {path}, found none: its own benchmark makes it, see {path.parent / 'README.md'}")
    found = json.loads(path.read_text())["cells"]
    assert isinstance(found, list)
    return found


def ablation(arguments: argparse.Namespace) -> None:
    text, tasks, squad = (cells_of(arguments.results / name) for name in (TEXT, TASKS, SQUAD))
    wanted = len({(cell["task"], cell["seed"]) for cell in tasks})
    rows = []
    for method, what in ABLATED.items():
        row = {"method": method, "is": what}
        for bits in BITS:
            there = [cell for cell in text if (cell["method"], cell["column"]) == (method, f"{bits:g}")]
            row[f"{bits:g} bits"] = spread([cell["perplexity"] for cell in there])
            if there and abs((reached := mean(cell["bits"] for cell in there)) - bits) > OFF:
                row[f"{bits:g} bits"] += f" ({reached:.2f})"
        for name in BUDGETS:
            seen = [cell for cell in tasks if (cell["method"], cell["budget"]) == (method, name)]
            some = f"{len(seen)} of {wanted} models" if seen else "–"
            row[f"GLUE, {name}"] = spread(by_seed(seen), 1) if len(seen) == wanted else some
        for name in BUDGETS:
            answered = [cell["scores"]["f1"] for cell in squad if (cell["method"], cell["budget"]) == (method, name)]
            row[f"SQuAD, {name}"] = spread([100 * f1 for f1 in answered], 1)
        for place, cells in (("text", text), ("tasks", tasks)):
            spent = [cell["training"] + cell["choosing"] for cell in cells if cell["method"] == method]
            row[f"{place} s"] = f"{mean(spent):.0f}" if spent else "–"
        rows.append(row)
    said = (
        f"Perplexity on text at a mean of so many bits (`{TEXT}`; in brackets the mean that was reached where it is another); GLUE's mean "
        f"(`{TASKS}`) and SQuAD's F1 (`{SQUAD}`), both in hundredths, at a device's budgets. s: training and choosing together, of one "
        "run; MetaQuantLLM and OFA serve all columns by one, the others need one for each. –: not of that table, or no policy of the "
        "method keeps the budget"
    )
    write_atomic(arguments.results / "ablation.md", f"{said}\n\n{table(rows, list(rows[0]), markdown=True)}\n")


def by_seed(cells: Iterable[Mapping[str, Any]]) -> list[float]:
    """Means over tasks, in hundredths."""
    found: dict[int, list[float]] = {}
    for cell in cells:
        found.setdefault(cell["seed"], []).append(100 * cell["headline"])
    return [mean(values) for values in found.values()]


def radar(arguments: argparse.Namespace) -> None:
    graph, tables = Graph.open(arguments.graph), [open_table(path) for path in arguments.table]
    cells = cells_of(arguments.results / TEXT)
    times = [whole_model(costs, graph) for costs in tables]
    for path, found in zip(arguments.table, times, strict=True):
        if missing := [kernel for kernel in TIMED if kernel not in found]:
            raise SystemExit(f"expected the model of {arguments.graph} with {missing[0]} on all units in {path}, found no row")
    measured = times[0]
    sizes = {kernel: package_bytes(graph, uniform(kernel, graph.units)) for kernel in KERNELS}
    full = mean(cell["perplexity"] for cell in cells if cell["method"] == "fp32")
    shapes = []
    for method, kernel, bits in SHOWN:
        seen = [cell for cell in cells if cell["method"] == method and (method == "fp32" or cell["column"] == f"{bits:g}")]
        values = (
            full / mean(cell["perplexity"] for cell in seen),
            1 - sizes[kernel] / sizes["fp32"],
            1 - measured[kernel].latency_ms / measured["fp32"].latency_ms,
        )
        seconds = mean(cell["training"] + cell["choosing"] for cell in seen) if method != "fp32" else 0.0
        shapes.append((method if method == "fp32" else f"{method}, {bits:g} bits", kernel, values, seconds))
    rows = [
        {"configuration": name, "kernel": kernel}
        | {axis: f"{value:.1%}" for axis, value in zip(AXES, values, strict=True)}
        | {"ms per token": shown(measured[kernel]), "training s": f"{seconds:.0f}"}
        for name, kernel, values, seconds in shapes
    ]
    said = (
        f"{graph.source} against full precision: perplexity of `{TEXT}`, bytes of the package (counted), ms per token in rotation in three "
        f"processes at the table's speed, on {named(tables[0])}; ±: half from the 10th to the 90th percentile; s: training and choosing"
    )
    write_atomic(arguments.results / "radar.svg", draw([(name, values) for name, _, values, _ in shapes]))
    text = f"{said}\n\n![Radar: the table below, drawn](radar.svg)\n\n{table(rows, list(rows[0]), markdown=True)}\n"
    rows = [
        {"device": named(costs)}
        | {kernel: f"{shown(found[kernel])}, {found[kernel].latency_ms / found['fp32'].latency_ms:.0%}" for kernel in TIMED}
        for costs, found in zip(tables, times, strict=True)
    ]
    text += f"\nMs per token by device, and the share of fp32's:\n\n{table(rows, list(rows[0]), markdown=True)}\n"
    write_atomic(arguments.results / "radar.md", text)


def whole_model(costs: CostTable, graph: Graph) -> dict[str, ModelRow]:
    """Policy → what the model took for one more token, as its default workload ends."""
    phase = default_workload(graph).phases[-1]
    at = (graph.fingerprint, phase.name, phase.tokens, phase.past, graph.layers)
    rows = [row for row in costs.of(ModelRow) if (row.model, row.phase, row.tokens, row.past, row.layers) == at and row.valid]
    return {row.policy: row for row in rows}


def named(costs: CostTable) -> str:
    about = costs.header
    return f"{about.device} ({about.cpu}, {about.runtime}, {about.date})"


def shown(row: ModelRow) -> str:
    return f"{row.latency_ms:.3f} ± {row.spread_ms:.3f}"


def energy(arguments: argparse.Namespace) -> None:
    costs = open_table(arguments.table)
    found = [row for row in costs.of(ModelShapeRow) if row.model.startswith(arguments.model)]
    if len(found) != 1:
        raise SystemExit(f"expected one model {arguments.model}... in {arguments.table}, found {len(found)}")
    (shape,), about = found, costs.header
    units = [(op, K, N) for op, K, N, _ in shape.units.values()]
    decoding = [row for row in costs.of(UnitEnergyRow) if row.one_token and row.working_set == "streamed" and row.valid]
    seen = {(row.kernel, row.op, row.K, row.N): row for row in decoding}
    whole = {
        row.policy: row
        for row in costs.of(ModelEnergyRow)
        if (row.model, row.phase, row.layers) == (shape.model, "decode", shape.layers)
    }
    sums = {}
    for kernel in dict.fromkeys(row.kernel for row in decoding):
        parts = [seen.get((kernel, *unit)) for unit in units]
        if all(parts):
            sums[kernel] = [sum(getattr(part, name) for part in parts) for name in ("run_ms", "energy_mj", "above_idle_mj")]
    rows = []
    for kernel, values in sums.items():
        row = {"kernel": kernel}
        for name, value, full in zip(("ms", "mJ", "mJ above idle"), values, sums[full_precision(about.provider)], strict=True):
            row |= {name: f"{value:.3g}", f"{name}, of {full_precision(about.provider)}'s": f"{value / full:.2f}"}
        it = whole.get(kernel)
        row["mJ of the whole model"] = f"{it.energy_mj:.0f} ± {it.spread_mj:.0f}, {it.above_idle_mj:.0f} above idle" if it else "–"
        rows.append(row)
    meter = ", ".join(dict.fromkeys(row.meter for row in decoding))
    said = (
        f"All {len(units)} units of a model of {shape.layers} layers of width {shape.hidden}, decoding one token, on {about.device} "
        f"({about.runtime}; {meter}), every shape measured by itself: weights read from memory, idle power in mJ and not in mJ above idle. "
        "The whole model has what lies between its units besides. Left out: kernels that some unit was not measured with; –: not measured"
    )
    write_atomic(arguments.results / "energy.md", f"{said}\n\n{table(rows, list(rows[0]), markdown=True)}\n")


def draw(shapes: Sequence[tuple[str, Sequence[float]]]) -> bytes:
    """One small radar each, side by side: eight shapes on one would hide one another. Values below 0 are drawn in the middle."""
    angles = np.pi / 2 + np.arange(len(AXES)) * 2 * np.pi / len(AXES)
    figure = Figure(figsize=(11, 6), facecolor="white")
    FigureCanvasSVG(figure)
    for place, (name, values) in enumerate(shapes, 1):
        axes = figure.add_subplot(2, 4, place, polar=True)
        axes.set_ylim(0, 1)
        axes.set_yticks([0.25, 0.5, 0.75, 1.0], labels=[])
        axes.set_xticks(angles, labels=[""] * len(AXES))
        for (x, y, va), axis, value in zip(_LABELS, AXES, values, strict=True):
            axes.text(x, y, f"{axis}\n{value:.0%}", transform=axes.transAxes, fontsize=9, ha="center", va=va)
        corners = np.clip([*values, values[0]], 0, 1)
        axes.plot([*angles, angles[0]], corners, color="#1f5fa8", linewidth=1.6, marker="o", markersize=3.5)
        axes.fill([*angles, angles[0]], corners, color="#1f5fa8", alpha=0.2)
        axes.set_title(name, fontsize=10, fontweight="bold", pad=34)
    figure.subplots_adjust(left=0.08, right=0.92, bottom=0.08, top=0.86, wspace=0.8, hspace=0.75)
    made = io.BytesIO()
    with mpl.rc_context(
        {"svg.hashsalt": "bittailor", "svg.fonttype": "none"}
    ):  # the same picture twice is the same bytes; text is text
        figure.savefig(made, format="svg", metadata={"Date": None})
    return made.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for act in (ablation, radar, energy):
        sub = commands.add_parser(act.__name__)
        sub.set_defaults(act=act)
        sub.add_argument("--results", type=Path, default=Path("results"))
        if act is not ablation:
            sub.add_argument("--table", type=Path, required=True, nargs="+" if act is radar else None)
        if act is radar:
            sub.add_argument("--graph", type=Path, required=True)
        if act is energy:
            sub.add_argument("--model", required=True)
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
