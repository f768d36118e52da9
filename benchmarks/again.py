"""How far a second run of the tasks' training comes to what the first came to, cell by cell. Measures nothing.

    python benchmarks/again.py [--results results] [--of NAME DIR] [--of NAME DIR]

NAME: of the first run's table in --results (tasks_at_budget_epyc, say); DIR: where `tasks_at_budget.py run` kept the second, which may have
come to a part of it; cells that `restore` brought there count for neither. again.json keeps the scores of both; without --of again.md is
made from it. A set of seeds is compared where both runs have all of the first's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from tasks_measured import cells_of, jobs_of

from toolchain.files import write_atomic
from toolchain.report import table

WHERE = ("task", "seed", "method", "budget")


def compared(results: Path, name: str, out: Path) -> Iterator[dict[str, Any]]:
    """The models and the cells that both runs have, with both scores, as parts of 1."""
    path = results / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"expected {path}, found none: its own benchmark makes it, see {results / 'README.md'}")
    first = json.loads(path.read_text())
    models = {(job["task"], job["seed"]): job["fp32"] for job in first["fp32"]}
    cells = {tuple(cell[word] for word in WHERE): cell for cell in first["cells"]}
    for job in jobs_of(out):
        if (model := (job["task"], job["seed"])) in models:
            yield {"task": model[0], "seed": model[1], "first": models[model], "second": job["fp32"]}
    for method, budget, cell in cells_of(out):
        where = (cell["task"], cell["seed"], method, budget)
        if (earlier := cells.get(where)) and earlier["commit"] != cell["commit"]:
            same = first["policies"][earlier["policy"]] == cell["policy"]
            scores = {"first": earlier["headline"], "second": cell["headline"]}
            yield {**dict(zip(WHERE, where, strict=True)), **scores, "same_policy": same, "commit": cell["commit"]}


def page(found: Sequence[Mapping[str, Any]]) -> str:
    cells = [row for row in found if "method" in row]
    rows = [
        {"task": task} | line([row for row in found if row["task"] == task]) for task in dict.fromkeys(row["task"] for row in cells)
    ]
    said = (
        f"A second run of the tasks' training (commit {', '.join(sorted({cell['commit'] for cell in cells}))}) with the same seeds beside "
        "the first, as far as it came; scores (of SQuAD the mean of both) in hundredths. Apart: least to most of the seeds, as "
        "`README.md` tells methods apart"
    )
    return f"{said}\n\n{table(rows, list(rows[0]), markdown=True)}\n"


def line(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A task's line."""
    models, cells = ([row for row in found if ("method" in row) == wanted] for wanted in (False, True))
    grouped: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell in cells:
        grouped.setdefault((cell["method"], cell["budget"]), []).append((100 * cell["first"], 100 * cell["second"]))
    sets = {where: both for where, both in grouped.items() if len(both) == len(models)}
    means = {where: mean(second - first for first, second in both) for where, both in sets.items()}
    ranges = [[(min(run), max(run)) for run in zip(*both, strict=True)] for both in sets.values()]
    apart = sum(first[1] < second[0] or second[1] < first[0] for first, second in ranges)
    alike = sum(all(first == second for first, second in both) for both in sets.values())
    where = max(means, key=lambda one: abs(means[one]), default=("", ""))
    farthest = f"{means[where]:+.2f} ({', '.join(where)})" if means.get(where) else "0" if means else "–"
    return {
        "models": str(len(models)),
        "same score in fp32": str(sum(model["first"] == model["second"] for model in models)),
        "cells": str(len(cells)),
        "same score": str(sum(cell["first"] == cell["second"] for cell in cells)),
        "same policy": str(sum(cell["same_policy"] for cell in cells)),
        "a cell differs by at most": f"{max(100 * abs(cell['second'] - cell['first']) for cell in cells):.2f}",
        "a mean over the seeds by at most": farthest,
        "half of the means by at most": f"{sorted(map(abs, means.values()))[(len(means) - 1) // 2]:.2f}" if means else "–",
        "sets of seeds": str(len(sets)),
        "all the same": str(alike),
        "apart": str(apart),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--of", nargs=2, action="append", default=[], metavar=("NAME", "DIR"))
    arguments = parser.parse_args()
    kept = arguments.results / "again.json"
    if arguments.of:
        made = [row for name, out in arguments.of for row in compared(arguments.results, name, Path(out))]
        if not any("method" in row for row in made):
            raise SystemExit(
                f"expected cells of a second run in {', '.join(out for _, out in arguments.of)}, found none that the first has"
            )
        write_atomic(kept, "[\n" + ",\n".join(map(json.dumps, made)) + "\n]\n")
    if not kept.is_file():
        raise SystemExit(f"expected {kept}, found none; type: python benchmarks/again.py --of NAME DIR")
    text = page(json.loads(kept.read_text()))
    write_atomic(arguments.results / "again.md", text)
    print(text)


if __name__ == "__main__":
    main()
