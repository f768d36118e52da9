"""`bittailor quickstart`: the whole idea on the embedded model and this machine: profile, train, cut three packages, measure each.

Every step writes below one folder and goes on where a killed run stopped. The figures in the report were all measured here, now, except
the columns that say "predicted", and a time "at that speed", which is what was measured brought to the machine's speed during the profile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.check import COULD_NOT_TELL, OVER, WITHIN
from toolchain.commands import acceptance, choosing, workflow
from toolchain.commands.deciding import Patience
from toolchain.commands.training import train_supernet
from toolchain.evaluate.perplexity import perplexity
from toolchain.files import scratch, write_atomic
from toolchain.graph.assemble import assemble, round_to_nearest
from toolchain.graph.build import EMBEDDED
from toolchain.hardware import load, thread_count
from toolchain.kernels import uniform
from toolchain.package.manifest import Package
from toolchain.policy.budgets import FRACTIONS
from toolchain.progress import note
from toolchain.report import table
from toolchain.spec import Budget, Device, Policy
from toolchain.supernet.store import SupernetFolder

STEPS = 200
PATIENCE = Patience(most_s=60)
TRIES = 3
"""How often a package is measured again while the verdict is "could not tell" because others used the CPU."""


def quickstart(out: Path, steps: int | None) -> tuple[dict[str, Any], str]:
    """(report as data, report as text). The verdict is the worst of the three packages'. Writes report.json and report.md to `out`."""
    seconds: dict[str, float] = {}
    device = load("local")
    tables = [out / "profiles"]
    with _stage("1/5 profile", seconds), workflow.opened(EMBEDDED) as model:
        workflow.measure_costs(model.graph, device, tables[0], None, f"bittailor profile {EMBEDDED}", renew=False, energy=False)
    with _stage("2/5 train", seconds):
        trained = _finished(out / "supernet", steps or STEPS)
        if trained is None:
            trained = train_supernet(EMBEDDED, device, tables, None, None, out / "supernet", steps or STEPS, seed=0)
    folder = SupernetFolder.open(out / "supernet")
    with workflow.opened(str(out / "supernet")) as source:
        costs = workflow.find_costs(source.graph, device, tables, None)
        with _stage("3/5 export three packages", seconds):
            packages, budgets = {}, [_budget(name, source, costs, device) for name in FRACTIONS]
            for name, budget in zip(FRACTIONS, budgets, strict=True):
                choice = choosing.choose(source, costs, budget)
                packages[name] = workflow.cut(source, choice, out / name, device, budget, costs, costs.model.workload)
        rows = []
        with _stage("4/5 measure each against its budget", seconds):
            rows.append(_full_precision(source, costs, device, budgets[-1]))
            for name, package in packages.items():
                checked = _patient_check(out / name, device)
                rows.append(_row(package, checked))
        with _stage("5/5 perplexity", seconds):
            heldout = folder.heldout()
            threads = thread_count(device)
            for row, policy in zip(rows, [_fp32(source), *(package.policy for package in packages.values())], strict=True):
                row["untrained perplexity"] = _untrained(source, policy, heldout, threads)
                trained_here = row["budget"] in packages
                row["perplexity"] = (
                    perplexity(out / row["budget"], heldout, threads)[0] if trained_here else row["untrained perplexity"]
                )
    verdicts = [row["verdict"] for row in rows[1:]]
    verdict = OVER if OVER in verdicts else COULD_NOT_TELL if COULD_NOT_TELL in verdicts else WITHIN
    data = {
        "verdict": verdict,
        "rows": rows,
        "workload": str(costs.model.workload),
        "training": trained,
        "perplexity_text": f"{trained['heldout']} ({heldout.shape[0]} windows of {heldout.shape[1]} tokens)",
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    text = _report(data)
    write_atomic(out / "report.json", json.dumps(data, indent=1) + "\n")
    write_atomic(out / "report.md", text + "\n")
    return data, text


def _finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """What an earlier, killed quickstart trained with these settings, if it came that far."""
    if not (folder / "supernet.yaml").is_file():
        return None
    training = dict(SupernetFolder.open(folder).description["training"])
    if (training.get("steps"), training.get("seed")) != (steps, 0):
        return None
    return training


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    note(f"quickstart {name}")
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def _fp32(source: workflow.Source) -> Policy:
    return uniform("fp32", source.graph.units)


def _budget(name: str, source: workflow.Source, costs: workflow.Costs, device: Device) -> Budget:
    budget = workflow.find_budget(name, {}, source.graph, costs, device)
    assert budget
    return budget


def _full_precision(source: workflow.Source, costs: workflow.Costs, device: Device, budget: Budget) -> dict[str, Any]:
    """The row every other is compared with. budget: one of the device's, so that it is held at the same speed; its limits are not shown."""
    with scratch() as folder:
        choice = workflow.Choice(_fp32(source), "full precision", None)
        package = workflow.cut(source, choice, folder / "fp32", device, budget, costs, costs.model.workload)
        row = _row(package, acceptance.check_package(package.directory, device, {}, PATIENCE))
    return row | {"limit ms": None, "limit MB": None, "verdict": "no budget"}


def _patient_check(package: Path, device: Device) -> acceptance.Checked:
    for attempt in range(TRIES):
        checked = acceptance.check_package(package, device, {}, PATIENCE)
        if checked.verdict != COULD_NOT_TELL or attempt == TRIES - 1:
            break
        note(f"{package.name}: could not tell (the machine was busy or slower than before); measuring again")
    return checked


def _row(package: Package, checked: acceptance.Checked) -> dict[str, Any]:
    predicted = package.data["predicted"]
    held = {verdict.name: verdict for verdict in checked.limits}
    return {
        "budget": package.directory.name,
        "mean bits": package.data["mean_bits"],
        "predicted ms/token": predicted["latency_ms"]["value"],
        "measured ms/token, at that speed": held["latency_ms"].measured,
        "measured ms/token, now": checked.measured["latency_ms"].value,
        "limit ms": held["latency_ms"].limit,
        "predicted MB": predicted["peak_memory_bytes"]["value"] / 1e6,
        "measured MB": max(checked.measured["peak_memory_bytes"].trials) / 1e6,
        "limit MB": held["peak_memory_bytes"].limit / 1e6,
        "package MB": sum(path.stat().st_size for path in package.directory.iterdir()) / 1e6,
        "verdict": checked.verdict,
    }


def _untrained(source: workflow.Source, policy: Policy, heldout: np.ndarray, threads: int) -> float:
    """Perplexity of the same policy with the model's own weights rounded to nearest."""
    with scratch() as folder:
        assemble(source.graph, policy, round_to_nearest(source.graph), folder)
        return perplexity(folder, heldout, threads)[0]


def _report(data: dict[str, Any]) -> str:
    columns = list(data["rows"][0])
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in data["seconds"].items())
    order = [name for name in columns if name != "verdict"] + ["verdict"]
    lines = [
        table(data["rows"], order),
        "",
        f"workload {data['workload']} (ms per generated token; MB = rise of a fresh process's peak memory over a bare runtime)",
        "predictions and limits are of the machine's speed during the profile; times measured now stand at that speed and as they were",
        f"trained {data['training']['steps']} steps on {data['training']['text']}",
        f"perplexity on {data['perplexity_text']}; untrained = the same policy, rounded to nearest",
        f"wall time {sum(data['seconds'].values()):.0f} s: {stages}",
        f"verdict: {data['verdict']}",
    ]
    return "\n".join(lines)
