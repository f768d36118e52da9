"""What each command answers: its data, the same in words for a terminal, and its exit code, from the arguments as they were typed.

Owns the words; refuses to parse and to print. Each command's modules are imported inside that command, as `toolchain.cli` says.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import InputError


@dataclass(frozen=True)
class Answer:
    """What a command found: `data` for --json, `text` for people. Exit codes as in `toolchain.cli`."""

    data: dict[str, Any]
    text: str
    exit_code: int = 0


def _limits(arguments: Namespace) -> dict[str, float]:
    names = ("latency_ms", "first_token_ms", "memory_mb", "energy_mj", "gflop")
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _workload(arguments: Namespace) -> Any:
    from toolchain.spec import Workload

    return None if arguments.workload is None else Workload.parse(arguments.workload)


def devices(arguments: Namespace) -> Answer:
    from toolchain import hardware
    from toolchain.profiler.reach import reach_all
    from toolchain.report import table

    named = [hardware.load(name) for name in arguments.device or []]
    rows = [
        {
            "device": found.device.name,
            "transport": found.device.transport,
            "provider": found.device.provider,
            "threads": found.threads,
            "reachable": "yes" if found.state.usable else f"no: {found.state.reason}",
            "meter": found.meter,
        }
        for found in reach_all(named or hardware.list_devices())
    ]
    return Answer({"devices": rows}, table(rows, list(rows[0]) if rows else []))


def units(arguments: Namespace) -> Answer:
    from toolchain import hardware
    from toolchain.commands import workflow
    from toolchain.kernels import candidates
    from toolchain.report import table

    available = workflow.kernels_of(hardware.load(arguments.device), workflow.profile_folders(None))
    with workflow.opened(arguments.model) as source:
        rows: list[dict[str, Any]] = [
            {
                "name": unit.name,
                "op": unit.op,
                "K": unit.K,
                "N": unit.N,
                "parameters": unit.parameters,
                "kernels": list(candidates(unit, available)),
            }
            for unit in source.graph.units
        ]
    text = table([{**row, "kernels": " ".join(row["kernels"])} for row in rows], list(rows[0]))
    return Answer({"units": rows}, text)


def profile(arguments: Namespace) -> Answer:
    from toolchain import hardware
    from toolchain.commands import fleet, workflow

    names = arguments.device or ["local"]
    devices = [hardware.load(name) for name in names]
    folder = Path(arguments.profiles or "profiles")
    with workflow.opened(arguments.model) as source:
        model = Path(arguments.model).name
        profiled = fleet.profile_all(source.graph, devices, folder, _workload(arguments), model, arguments.renew, arguments.follow)
    if len(devices) == 1:
        return _profiled(profiled[0].costs(), source.graph.fingerprint)
    answers = {one.device.name: _profiled(one.costs(), source.graph.fingerprint) for one in profiled if not one.failure}
    failures = {one.device.name: one.failure for one in profiled if one.failure}
    lines = [
        f"{name}: failed: {failures[name]}" if name in failures else f"{name}: {answers[name].text.partition(', measured')[0]}"
        for name in (device.name for device in devices)
    ]
    invalid = [name for name, answer in answers.items() if answer.exit_code]
    if invalid:
        lines.append(
            f"rows of {', '.join(invalid)} are not valid: others used the CPU. Type the same command again to repeat them."
        )
    lines.append(f"{len(answers)} of {len(devices)} devices profiled, {len(failures)} failed")
    data = {"devices": {name: answer.data for name, answer in answers.items()}, "failed": failures}
    return Answer(data, "\n".join(lines), 2 if failures else 3 if invalid else 0)


def _profiled(costs: Any, fingerprint: str) -> Answer:
    from toolchain.costs.following import told
    from toolchain.costs.rows import Energy, ModelRow, SessionRow, UnitRow
    from toolchain.report import table

    rows = [row for row in costs.table.of(ModelRow) if row.model == fingerprint]
    sessions = [row for row in costs.table.of(SessionRow) if row.model == fingerprint]
    timed = [*costs.table.of(UnitRow), *rows, *sessions, *costs.table.of(Energy)]
    follows = told(costs.table, fingerprint, costs.model.workload.phases)
    invalid = sum(not row.valid for row in timed)
    columns = ("phase", "batch", "tokens", "past", "layers", "policy", "latency_ms", "spread_ms", "valid")
    shown = [{name: getattr(row, name) for name in columns} for row in rows]
    data = {
        "table": str(costs.path),
        "rows": len(costs.table.rows),
        "invalid": invalid,
        "workload": str(costs.model.workload),
        "measured": shown,
        "follows": {
            name: {"work": work, "share": share.value, "unknown": share.unknown} for name, (work, share) in follows.items()
        },
    }
    text = f"{costs.path}: {len(costs.table.rows)} rows, measured models:\n{table(shown, columns)}"
    for name, (work, share) in follows.items():
        text += f"\n{name} follows the reference {work!r} by {share.value:.2f} ± {share.unknown:.2f}"
    if invalid:
        text += f"\n{invalid} rows are not valid: others used the CPU meanwhile. Type the same command again to repeat them."
    return Answer(data, text, 3 if invalid else 0)


def agent(arguments: Namespace) -> Answer:
    import toolchain
    from toolchain.files import write_atomic
    from toolchain.profiler.bundle import agent_bytes, agent_sha256, modules

    path = Path(arguments.out)
    write_atomic(path, agent_bytes())
    data = {
        "agent": str(path),
        "version": toolchain.__version__,
        "sha256": agent_sha256(),
        "bytes": len(agent_bytes()),
        "modules": modules(),
    }
    text = f"{path}: agent {data['version']}, {data['bytes']} bytes, {len(modules())} modules, sha256 {data['sha256']}"
    return Answer(data, text)


def predict(arguments: Namespace) -> Answer:
    from toolchain import hardware
    from toolchain.commands import workflow

    with workflow.opened(arguments.model) as source:
        device = hardware.load(arguments.device)
        folders, workload = workflow.profile_folders(arguments.profiles), _workload(arguments)
        policy = workflow.read_policy(arguments.policy, source, device, folders)
        costs = workflow.find_costs(source.graph, device, folders, workload, arguments.allow_predicted)
        data = workflow.predicted(source.graph, costs, policy).to_json()
    return Answer(data, _cost_lines(data))


def _cost_lines(data: dict[str, Any]) -> str:
    lines = [f"predicted for {data['workload']} on {data['device']}:"]
    for name, entry in data.items():
        if isinstance(entry, dict):
            value = (
                f"not measured: {entry['reason']}" if entry["value"] is None else f"{entry['value']:.6g} ± {entry['spread']:.2g}"
            )
            lines.append(f"  {name:18} {value}")
    return "\n".join([*lines, *_note_lines(data)])


def _note_lines(predicted: Mapping[str, Any]) -> list[str]:
    """One line per predicted number that rests on more than measurements."""
    return [f"{name}: {entry['note']}" for name, entry in predicted.items() if isinstance(entry, dict) and entry.get("note")]


def train(arguments: Namespace) -> Answer:
    from toolchain import hardware
    from toolchain.commands import training, workflow

    device = hardware.load(arguments.device)
    text = _paths(arguments.text)
    data = training.train_supernet(
        arguments.model,
        device,
        workflow.profile_folders(arguments.profiles),
        _workload(arguments),
        text,
        Path(arguments.out),
        arguments.steps,
        arguments.seed,
        training.Machine(
            arguments.on, arguments.precision, arguments.batch, arguments.micro_batch, arguments.compile, arguments.rate
        ),
    )
    lines = [
        f"{data['supernet']}: {data['steps']} steps on {data['text']}",
        "distance to the model on held-out text, at the start and now:",
    ]
    lines += [f"  {name:<8} {start:.4g} {now:.4g}" for name, (start, now) in data["distance"].items()]
    if worse := [name for name, (start, now) in data["distance"].items() if not now <= start]:  # nor where it is no number
        lines.append(
            f"farther than at the start: {', '.join(worse)}; smaller steps, or more of them, may help: --rate {arguments.rate / 4:g}"
        )
    return Answer(data, "\n".join(lines))


def _paths(names: list[str] | None) -> list[Path] | None:
    return [Path(name) for name in names] if names else None


def export(arguments: Namespace) -> Answer:
    from toolchain import hardware
    from toolchain.commands import choosing, workflow
    from toolchain.errors import MissingCostError, StaleTableError
    from toolchain.profiler.profile import default_workload
    from toolchain.progress import note

    device = hardware.load(arguments.device)
    folders = workflow.profile_folders(arguments.profiles)
    given = _limits(arguments)
    if not (arguments.budget or given or arguments.policy):
        raise InputError("expected --budget, a limit or --policy, got none", "type for example: --budget medium")
    if arguments.text and arguments.polish is None:
        raise InputError("expected --text beside --polish, got --text alone", "type for example: --polish 40")
    if arguments.policy and arguments.method:
        raise InputError(f"expected --policy or a --method that finds one, got both ({arguments.method})", "leave one of them out")
    with workflow.opened(arguments.model) as source:
        workload = _workload(arguments) or workflow.trained_workload(source) or default_workload(source.graph)
        policy = workflow.read_policy(arguments.policy, source, device, folders) if arguments.policy else None
        unpredicted = ""
        try:
            costs = workflow.find_costs(source.graph, device, folders, workload, arguments.allow_predicted)
        except (MissingCostError, StaleTableError) as error:
            if policy is None:
                raise
            costs, unpredicted = None, str(error)
        budget = workflow.find_budget(arguments.budget, given, source.graph, costs, device)
        if policy is not None:
            choice = workflow.Choice(policy, "the user", None)
        else:
            assert costs is not None
            assert budget is not None
            choice = choosing.choose(source, costs, budget, arguments.method or choosing.DEFAULT)
        polish = None
        if arguments.polish is not None:
            from toolchain.commands.polishing import polished

            source, polish = polished(source, choice.policy, arguments.polish, _paths(arguments.text), arguments.on)
        package = workflow.cut(source, choice, Path(arguments.out), device, budget, costs, workload, polish)
    if unpredicted:
        note(f"bittailor: exported without a prediction: {unpredicted}")
    data = {
        "package": arguments.out,
        "policy": {"units": dict(package.policy.items())},
        "mean_bits": package.data["mean_bits"],
        "predicted": package.data["predicted"],
        "budget": package.data["budget"],
        "gap_to_optimum": package.data["gap_to_optimum"],
        "chosen_by": package.data["chosen_by"],
        "training": package.data["training"],
    }
    text = f"{arguments.out}: {data['mean_bits']} mean bits, chosen by {data['chosen_by']}\nbudget {json.dumps(data['budget'])}\n"
    text += _cost_lines(data["predicted"]) if data["predicted"] else "nothing predicted: no cost table of this model"
    return Answer(data, text)


def check(arguments: Namespace) -> Answer:
    from toolchain import check, hardware
    from toolchain.commands import acceptance
    from toolchain.commands.deciding import Patience
    from toolchain.commands.quality import QualityLimits
    from toolchain.files import write_atomic
    from toolchain.package import signature
    from toolchain.package.seal import write_seal
    from toolchain.report import table

    if arguments.sign_with and not arguments.seal:
        raise InputError("expected --seal beside --sign-with, got --sign-with alone", "add --seal: the report is what is signed")
    key = signature.secret_key(arguments.sign_with) if arguments.sign_with else None
    limits = _limits(arguments) | ({"latency_p95_ms": arguments.latency_p95_ms} if arguments.latency_p95_ms is not None else {})
    least, most = arguments.least_seconds, arguments.most_seconds
    if not 0 <= least <= most < float("inf"):
        raise InputError(f"expected 0 <= --least-seconds <= --most-seconds, got {least:g} and {most:g}")
    read = tuple(_paths(arguments.text) or ())
    quality = QualityLimits(read, arguments.max_perplexity_ratio, arguments.min_fidelity, arguments.reference or "")
    checked = acceptance.check_package(
        Path(arguments.package),
        hardware.load(arguments.device),
        limits,
        Patience(least, most),
        Path(arguments.baseline) if arguments.baseline else None,
        quality,
        precedence=not arguments.no_precedence,
    )
    data = {"package": arguments.package, "device": arguments.device, **checked.to_json()}
    data["evidence"]["command"] = arguments.command_line
    if arguments.report:
        write_atomic(Path(arguments.report), json.dumps(data, indent=1) + "\n")
    _show_in_ci(arguments, data)
    rows = [verdict.to_json() for verdict in checked.limits]
    text = f"{table(rows, ['name', 'limit', 'measured', 'low', 'high', 'verdict', 'reason'])}\n{checked.verdict}"
    if checked.energy and checked.energy.total.value is not None:
        seen = checked.energy
        text += f"\nenergy by {seen.meter}: {seen.above_idle.value:.4g} mJ of it above idle, which draws {seen.idle_mw:.0f} mW"
    if checked.load_peak:
        text += f"\n{checked.load_peak}"
    text = "\n".join([text, *(f"predicted {line}" for line in _note_lines(checked.predicted or {}))])
    if arguments.seal:
        assert checked.package
        text += f"\nsealed in {write_seal(checked.package, data, key)}{', signed' if key else ''}"
    return Answer(data, text, check.exit_code(checked.verdict))


def _show_in_ci(arguments: Namespace, report: Mapping[str, Any]) -> None:
    from toolchain import ci
    from toolchain.files import write_atomic

    if arguments.junit:
        write_atomic(Path(arguments.junit), ci.junit(report))
    if arguments.summary:
        ci.append(Path(arguments.summary), ci.markdown(report))


def verify(arguments: Namespace) -> Answer:
    from toolchain import check, ci
    from toolchain.commands import verification
    from toolchain.package.manifest import open_package
    from toolchain.report import table

    if arguments.digest and arguments.public_key:
        remedy = f"a digest is of the files alone; type for the signature: bittailor verify {arguments.package} --public-key KEY"
        raise InputError("expected at most one of --digest and --public-key, got both", remedy)
    if arguments.digest:
        digest = open_package(Path(arguments.package)).digest
        return Answer({"package": arguments.package, "digest": digest}, digest)
    seen = verification.verify(Path(arguments.package), arguments.public_key)
    data = {"package": arguments.package, **seen.to_json()}
    text = f"{len(data['files'])} files as the manifest says, digest {data['digest']}\nloads: {seen.loads}"
    if seen.report is None:
        text += f"\n{seen.verdict}: no sealed report; type: bittailor check {arguments.package} --seal"
        return Answer(data, text, check.exit_code(seen.verdict))
    _show_in_ci(arguments, seen.report)
    rows = seen.report["limits"]
    facts = [
        f"{name}: {value}"
        for name, value in ci.facts(seen.report).items()
        if name in ("device", "runtime", "workload", "date", "budget")
    ]
    text += f"\nsignature: {seen.signature}\n{table(rows, ['name', 'limit', 'measured', 'low', 'high', 'verdict', 'reason'])}\n"
    if seen.as_sealed:
        facts.append(f"as sealed, since its baseline or text is not here: {', '.join(seen.as_sealed)}")
    if seen.not_held:
        facts.append(
            f"limits of the package's budget that were not held: {', '.join(seen.not_held)}; check it without limits of your own"
        )
    return Answer(data, "\n".join([text + "\n".join(facts), seen.verdict]), check.exit_code(seen.verdict))


def evaluate(arguments: Namespace) -> Answer:
    from toolchain.commands import scoring

    data = scoring.evaluate(arguments.package, [Path(name) for name in arguments.text], arguments.window, arguments.reference)
    return Answer(data, "\n".join(f"{name}: {value}" for name, value in data.items()))


def report(arguments: Namespace) -> Answer:
    from toolchain.commands import reporting

    supernet = Path(arguments.supernet) if arguments.supernet else None
    packages, measured = _paths(arguments.packages) or [], _paths(arguments.measured) or []
    return Answer(*reporting.report(packages, measured, supernet, arguments.profiles, Path(arguments.out)))


def run(arguments: Namespace) -> Answer:
    from toolchain.commands.scoring import serving_provider
    from toolchain.package.generate import generate
    from toolchain.package.manifest import open_package

    package = open_package(Path(arguments.package))
    made = generate(package.directory, arguments.prompt, arguments.tokens, provider=serving_provider(package.directory))
    # An encoder-decoder answers its source; a decoder goes on with the prompt.
    return Answer(made.to_json(), made.text if package.kind == "encoder-decoder" else arguments.prompt + made.text)
