"""`bittailor`: arguments in, one result on stdout, progress on stderr, an exit code: 0 within, 1 over, 2 usage or input, 3 could not tell.

Each command's modules are imported inside that command, so that a device without torch runs what needs none.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import toolchain
from toolchain.errors import BittailorError, InputError


class _Parser(argparse.ArgumentParser):
    """Usage errors as one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; type: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bittailor", description="Fit one transformer to many devices by measured cost.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"bittailor {toolchain.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], help_: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help_,
            description=help_,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return sub

    def common(sub: argparse.ArgumentParser, workload: bool = True) -> None:
        sub.add_argument("--device", default="local", help="a device of hardware/ (default: local)")
        sub.add_argument("--profiles", metavar="DIR", help="folder of cost tables (default: profiles/ here, then those shipped)")
        if workload:
            sub.add_argument("--workload", help="generate:P+N or encode:BxT (default: generate:64+32, encode:1x128)")

    def predicting(sub: argparse.ArgumentParser) -> None:
        what = "predict shapes and models that the cost table lacks from those it has; the output says so, with the error"
        sub.add_argument("--allow-predicted", action="store_true", help=what)

    def limits(sub: argparse.ArgumentParser) -> None:
        for name in ("latency-ms", "first-token-ms", "memory-mb", "energy-mj", "gflop"):
            sub.add_argument(f"--{name}", type=float, metavar="X", help="limit for one inference")

    command("devices", _devices, "what hardware/ describes, what is reachable, which meter it has", "bittailor devices")

    sub = command("units", _units, "every unit: name, op, K, N, parameters, candidate kernels", "bittailor units pocket-llama-6m")
    sub.add_argument("model", metavar="MODEL", help="folder, hub id, pocket-llama-6m, or a supernet")

    sub = command(
        "profile",
        _profile,
        "measure what the device's cost table lacks for MODEL",
        "bittailor profile pocket-llama-6m --device local",
    )
    sub.add_argument("model", metavar="MODEL")
    common(sub)
    sub.add_argument("--missing", action="store_true", default=True, help="measure only what is missing (the default)")
    sub.add_argument("--renew", action="store_true", help="start a stale table over")

    sub = command("predict", _predict, "cost of a policy, with spread", "bittailor predict pocket-llama-6m --policy w4g32")
    sub.add_argument("model", metavar="MODEL")
    common(sub)
    predicting(sub)
    sub.add_argument("--policy", required=True, metavar="FILE|KERNEL")

    sub = command(
        "train", _train, "train one supernet for every budget of the device", "bittailor train pocket-llama-6m --out supernet"
    )
    sub.add_argument("model", metavar="MODEL")
    common(sub)
    sub.add_argument(
        "--text", nargs="+", metavar="FILE", help="training text (default: what the model writes itself, and pydoc's prose)"
    )
    sub.add_argument("--out", required=True, metavar="SUPERNET")
    sub.add_argument("--steps", type=int, default=200, metavar="N", help="training steps (default: 200)")
    sub.add_argument("--seed", type=int, default=0)

    example = "bittailor export supernet --device local --budget low --out package"
    sub = command("export", _export, "cut one ONNX package for a budget, or for a policy", example)
    sub.add_argument("model", metavar="SUPERNET|MODEL")
    common(sub)
    predicting(sub)
    sub.add_argument("--budget", metavar="low|medium|high|FILE")
    limits(sub)
    sub.add_argument("--policy", metavar="FILE|KERNEL", help="export this policy (of a MODEL: post-training quantisation)")
    sub.add_argument("--out", required=True, metavar="PACKAGE")

    sub = command(
        "check",
        _check,
        "measure a package against its budget: exit code 0 within, 1 over, 3 could not tell",
        "bittailor check package",
    )
    sub.add_argument("package", metavar="PACKAGE")
    sub.add_argument("--device", default="local")
    sub.add_argument("--junit", metavar="FILE", help="also write the verdicts as JUnit XML")
    limits(sub)

    example = "bittailor evaluate package --text heldout.txt"
    sub = command("evaluate", _evaluate, "perplexity of a decoder, or an encoder's fidelity to fp32", example)
    sub.add_argument("package", metavar="PACKAGE|MODEL")
    sub.add_argument("--text", nargs="+", required=True, metavar="FILE")
    sub.add_argument(
        "--reference",
        metavar="MODEL",
        help="fp32 model that an encoder's outputs are compared with (default: the package's source)",
    )
    sub.add_argument("--window", type=int, default=256, help="tokens per window (default: 256)")

    sub = command("run", _run, "generate with a package", 'bittailor run package "Once upon a time"')
    sub.add_argument("package", metavar="PACKAGE")
    sub.add_argument("prompt")
    sub.add_argument("--tokens", type=int, default=64, help="new tokens at most (default: 64)")

    sub = command(
        "quickstart", _quickstart, "all of the above on the embedded model, in minutes", "bittailor quickstart --out quickstart"
    )
    sub.add_argument("--out", default="quickstart", metavar="DIR")
    sub.add_argument("--steps", type=int, metavar="N", help="training steps (default: what takes a few minutes on 2 cores)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Never lets a traceback out for what a user can mend."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except BittailorError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "toolchain"):
            raise
        return _fail(
            f"this command needs the Python package {package!r}, which is not installed; type: pip install 'bittailor[train]'"
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted; the same command again goes on where it can", 130)
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            return _fail(
                f"expected room on the disk of {error.filename or 'the output'}, got none; free some, and type the same command"
            )
        return _fail(f"expected {error.filename or 'a file'} to be readable and writable, got: {error.strerror or error}")


def _fail(line: str, code: int = 2) -> int:
    print(f"bittailor: {' '.join(line.split())}", file=sys.stderr)
    return code


def _show(arguments: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    print(json.dumps(data) if arguments.json else text)


def _limits(arguments: argparse.Namespace) -> dict[str, float]:
    names = ("latency_ms", "first_token_ms", "memory_mb", "energy_mj", "gflop")
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _workload(arguments: argparse.Namespace) -> Any:
    from toolchain.spec import Workload

    return None if arguments.workload is None else Workload.parse(arguments.workload)


def _devices(arguments: argparse.Namespace) -> int:
    from toolchain import hardware
    from toolchain.report import table

    rows = []
    for device in hardware.list_devices():
        state, (meter, reason) = hardware.reachable(device), hardware.meter(device)
        rows.append(
            {
                "device": device.name,
                "transport": device.transport,
                "provider": device.provider,
                "threads": hardware.thread_count(device),
                "reachable": "yes" if state.usable else f"no: {state.reason}",
                "meter": meter if not reason else f"none: {reason}",
            }
        )
    _show(arguments, {"devices": rows}, table(rows, list(rows[0]) if rows else []))
    return 0


def _units(arguments: argparse.Namespace) -> int:
    from toolchain.commands import workflow
    from toolchain.kernels import candidates
    from toolchain.profiler.probe import working_kernels
    from toolchain.report import table

    with workflow.opened(arguments.model) as source:
        rows: list[dict[str, Any]] = [
            {
                "name": unit.name,
                "op": unit.op,
                "K": unit.K,
                "N": unit.N,
                "parameters": unit.parameters,
                "kernels": list(candidates(unit, working_kernels())),
            }
            for unit in source.graph.units
        ]
    text = table([{**row, "kernels": " ".join(row["kernels"])} for row in rows], list(rows[0]))
    _show(arguments, {"units": rows}, text)
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from toolchain import hardware
    from toolchain.commands import workflow
    from toolchain.costs.rows import ModelRow, UnitRow
    from toolchain.report import table

    device = hardware.load(arguments.device)
    folder = Path(arguments.profiles or "profiles")
    with workflow.opened(arguments.model) as source:
        command = "bittailor " + shlex.join(["profile", Path(arguments.model).name, "--device", device.name])
        costs = workflow.measure_costs(source.graph, device, folder, _workload(arguments), command, arguments.renew)
    rows = [row for row in costs.table.of(ModelRow) if row.model == source.graph.fingerprint]
    timed = [*costs.table.of(UnitRow), *rows]
    invalid = sum(not row.valid for row in timed)
    columns = ("phase", "batch", "tokens", "past", "layers", "policy", "latency_ms", "spread_ms", "valid")
    shown = [{name: getattr(row, name) for name in columns} for row in rows]
    data = {
        "table": str(costs.path),
        "rows": len(costs.table.rows),
        "invalid": invalid,
        "workload": str(costs.model.workload),
        "measured": shown,
    }
    text = f"{costs.path}: {len(costs.table.rows)} rows, measured models:\n{table(shown, columns)}"
    if invalid:
        text += f"\n{invalid} rows are not valid: others used the CPU meanwhile. Type the same command again to repeat them."
    _show(arguments, data, text)
    return 3 if invalid else 0


def _predict(arguments: argparse.Namespace) -> int:
    from toolchain import hardware
    from toolchain.commands import workflow

    with workflow.opened(arguments.model) as source:
        policy = workflow.read_policy(arguments.policy, source.graph)
        device = hardware.load(arguments.device)
        folders, workload = workflow.profile_folders(arguments.profiles), _workload(arguments)
        costs = workflow.find_costs(source.graph, device, folders, workload, arguments.allow_predicted)
        data = workflow.predicted(source.graph, costs, policy).to_json()
    _show(arguments, data, _cost_lines(data))
    return 0


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


def _train(arguments: argparse.Namespace) -> int:
    from toolchain import hardware
    from toolchain.commands import training, workflow

    device = hardware.load(arguments.device)
    text = [Path(name) for name in arguments.text] if arguments.text else None
    data = training.train_supernet(
        arguments.model,
        device,
        workflow.profile_folders(arguments.profiles),
        _workload(arguments),
        text,
        Path(arguments.out),
        arguments.steps,
        arguments.seed,
    )
    _show(arguments, data, f"{data['supernet']}: {data['steps']} steps on {data['text']}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from toolchain import hardware
    from toolchain.commands import workflow
    from toolchain.errors import MissingCostError, StaleTableError
    from toolchain.profiler.profile import default_workload
    from toolchain.progress import note

    device = hardware.load(arguments.device)
    folders = workflow.profile_folders(arguments.profiles)
    given = _limits(arguments)
    if not (arguments.budget or given or arguments.policy):
        raise InputError("expected --budget, a limit or --policy, got none", "type for example: --budget medium")
    with workflow.opened(arguments.model) as source:
        workload = _workload(arguments) or workflow.trained_workload(source) or default_workload(source.graph)
        policy = workflow.read_policy(arguments.policy, source.graph) if arguments.policy else None
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
            choice = workflow.choose(source, costs, budget)
        package = workflow.cut(source, choice, Path(arguments.out), device, budget, costs, workload)
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
    _show(
        arguments,
        data,
        text + (_cost_lines(data["predicted"]) if data["predicted"] else "nothing predicted: no cost table of this model"),
    )
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from toolchain import check, hardware
    from toolchain.commands import acceptance
    from toolchain.files import write_atomic
    from toolchain.report import table

    checked = acceptance.check_package(Path(arguments.package), hardware.load(arguments.device), _limits(arguments))
    if arguments.junit:
        write_atomic(Path(arguments.junit), check.junit(checked.limits, f"bittailor check {Path(arguments.package).name}"))
    rows = [verdict.to_json() for verdict in checked.limits]
    text = f"{table(rows, ['name', 'limit', 'measured', 'low', 'high', 'verdict', 'reason'])}\n{checked.verdict}"
    if checked.load_peak:
        text += f"\n{checked.load_peak}"
    text = "\n".join([text, *(f"predicted {line}" for line in _note_lines(checked.predicted or {}))])
    _show(arguments, {"package": arguments.package, "device": arguments.device, **checked.to_json()}, text)
    return check.exit_code(checked.verdict)


def _evaluate(arguments: argparse.Namespace) -> int:
    from toolchain.commands import scoring

    data = scoring.evaluate(arguments.package, [Path(name) for name in arguments.text], arguments.window, arguments.reference)
    _show(arguments, data, "\n".join(f"{name}: {value}" for name, value in data.items()))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from toolchain.package.generate import generate
    from toolchain.package.manifest import open_package

    package = open_package(Path(arguments.package))
    made = generate(package.directory, arguments.prompt, arguments.tokens)
    # An encoder-decoder answers its source; a decoder goes on with the prompt.
    _show(arguments, made.to_json(), made.text if package.kind == "encoder-decoder" else arguments.prompt + made.text)
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from toolchain.check import exit_code
    from toolchain.quickstart import quickstart

    data, text = quickstart(Path(arguments.out), arguments.steps)
    _show(arguments, data, text)
    return exit_code(data["verdict"])


if __name__ == "__main__":
    sys.exit(main())
