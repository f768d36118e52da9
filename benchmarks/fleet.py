"""Twenty devices profiled at once by one command, three of which fail, each in a way of its own: are the other seventeen complete?

    python benchmarks/fleet.py [--devices 20] [--work DIR]

Simulated: each is an agent in processes and a folder of its own on this machine (`transport: local` with `folder:`), with 1, 2 or all
threads. All of them share its CPUs, so that next to no window is undisturbed: rows are there and say that they are not valid, and the
command's exit code would be 3 without the failures. The model is a random BERT of one layer; fewer mixed policies, sessions and windows
than a real table has. The three: an installed agent of another version; an interpreter that is killed two seconds into
every timing; an ssh host where nobody listens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from toolchain.costs.operations import working_set
from toolchain.costs.rows import ModelRow, Row, UnitRow
from toolchain.costs.table import CostTable, open_table
from toolchain.graph.build import build
from toolchain.graph.model import Graph
from toolchain.kernels import candidates, runs_as
from toolchain.profiler import bundle, model_rows, unit_rows
from toolchain.profiler.profile import default_workload

FEWER = "model_rows.MIXED, model_rows.SESSIONS, model_rows.WINDOWS, unit_rows.WINDOWS = 2, 1, 5, 5"
_COMMAND = (
    f"import sys; from toolchain.profiler import model_rows, unit_rows; {FEWER}; from toolchain.cli import main; sys.exit(main())"
)
SECONDS = 2
_TIRED = """#!/bin/sh
if [ -f request.json ] && grep -q '"action": "time"' request.json; then (sleep {seconds}; kill -9 $$) & fi
exec {python} "$@"
"""
"""The process keeps its number when it becomes Python: two seconds into every timing it is killed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--work", type=Path, help="keep the devices' folders and the tables here")
    arguments = parser.parse_args()
    model_rows.MIXED = 2  # what `missing` asks for
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        model = random_bert(work / "bert")
        files = devices(work, arguments.devices)
        words = [word for path in files for word in ("--device", str(path))]
        start = time.monotonic()
        command = [
            sys.executable,
            "-X",
            "faulthandler",
            "-c",
            _COMMAND,
            "profile",
            str(model),
            "--profiles",
            str(work / "profiles"),
            "--json",
            *words,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE)
        seconds = time.monotonic() - start
        if not done.stdout:
            raise SystemExit(f"the command ended without a result: exit code {done.returncode}")
        said = json.loads(done.stdout)
        graph = build(str(model), _empty(work / "graph"))
        print("\n| device | threads | rows | of them valid | missing | jobs | more than once | failed because |\n|" + "---|" * 8)
        for path in files:
            print(f"| {path.stem} | {' | '.join(map(str, state(work, path.stem, graph, said['failed'].get(path.stem, ''))))} |")
        complete, failed = len(said["devices"]), len(said["failed"])
        print(f"\n{complete} of {len(files)} devices complete, {failed} failed, exit code {done.returncode}, {seconds:.0f} s")


def random_bert(folder: Path) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, max_position_embeddings=256)).save_pretrained(folder)
    return folder


def devices(work: Path, count: int) -> list[Path]:
    """The devices' files; the last three describe what will fail."""
    fields = [
        {"transport": "local", "folder": work / f"device-{place:02}", "threads": (1, 2, 0)[place % 3]} for place in range(count)
    ]
    tired = work / "tired-python"
    tired.write_text(_TIRED.format(seconds=SECONDS, python=sys.executable))
    tired.chmod(0o755)
    fields[-3]["agent"] = old_agent(work)
    fields[-2]["python"] = tired
    fields[-1] = {"transport": "ssh", "host": "127.0.0.1", "port": 9, "threads": 1}
    paths = []
    for place, device in enumerate(fields):
        path = work / f"device-{place:02}.yaml"
        path.write_text("".join(f"{name}: {value}\n" for name, value in {"name": path.stem, **device}.items()))
        paths.append(path)
    return paths


def old_agent(work: Path) -> Path:
    """The agent of a checkout that differs in its version alone."""
    root = _empty(work / "old")
    shutil.copytree(Path(bundle.__file__).parents[1], root / "toolchain", ignore=shutil.ignore_patterns("models", "__pycache__"))
    (root / "toolchain" / "__init__.py").write_text('"""An older one."""\n__version__ = "0.0.9"\n')
    words = [sys.executable, "-P", "-m", "toolchain.cli", "agent", "--out", str(work / "old.pyz")]
    subprocess.run(words, env={**os.environ, "PYTHONPATH": str(root)}, check=True, capture_output=True)
    return work / "old.pyz"


def state(work: Path, name: str, graph: Graph, failure: str) -> tuple[object, ...]:
    """(threads, rows, valid ones, missing rows, jobs started on the device, jobs started twice, why it failed)."""
    path, journal = work / "profiles" / name / "table.jsonl", work / name / "journal.txt"
    started = (
        Counter(line.split()[1] for line in journal.read_text().splitlines() if "identify" not in line) if journal.exists() else {}
    )
    jobs, repeated = sum(started.values()), sum(count > 1 for count in started.values())
    if not path.exists():
        return ("", 0, 0, "all", jobs, repeated, failure)
    table = open_table(path)
    timed = [*table.of(UnitRow), *table.of(ModelRow)]
    return (table.header.threads, len(table.rows), sum(row.valid for row in timed), missing(graph, table), jobs, repeated, failure)


def missing(graph: Graph, table: CostTable) -> int:
    """Rows that the table lacks, valid or not."""
    workload, cache = default_workload(graph), table.header.cache_bytes
    rows: list[Row] = [replace(row, valid=True) for row in [*table.of(UnitRow), *table.of(ModelRow)]]
    table = table.adding(rows)
    count = sum(len(wanted.times) + len(wanted.memory) for wanted in model_rows.missing(graph, workload, table))
    for unit in {unit.shape: unit for unit in graph.units}.values():
        names = dict.fromkeys(runs_as(name) for name in candidates(unit, table.header.kernels))
        cases = unit_rows.cases(graph, unit, {name: working_set(graph.units, name, cache) for name in names}, workload, cache)
        count += sum(map(len, unit_rows.missing(unit, cases, table, workload)))
    return count


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
