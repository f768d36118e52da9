"""`bittailor`: arguments in, one result on stdout, progress on stderr, an exit code: 0 within, 1 over, 2 usage or input, 3 could not tell.

What each command answers is in `toolchain.commands.answers`. Its modules are imported inside that command, so that a device without
torch runs what needs none.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import toolchain
from toolchain.commands import answers
from toolchain.errors import BittailorError


class _Parser(argparse.ArgumentParser):
    """Usage errors as one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; type: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bittailor", description="Fit one transformer to many devices by measured cost.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"bittailor {toolchain.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(
        name: str, run: Callable[[argparse.Namespace], answers.Answer], help_: str, example: str
    ) -> argparse.ArgumentParser:
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

    def common(sub: argparse.ArgumentParser, workload: bool = True, several: bool = False) -> None:
        if several:
            what = "a device of hardware/ (default: local); repeated, all are measured at once"
            sub.add_argument("--device", action="append", help=what)
        else:
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

    def in_ci(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--junit", metavar="FILE", help="also write the verdicts as JUnit XML")
        sub.add_argument("--summary", metavar="FILE", help="also add the verdicts to this file, as Markdown")

    sub = command(
        "devices", answers.devices, "what hardware/ describes, what is reachable, which meter it has", "bittailor devices"
    )
    sub.add_argument("--device", action="append", metavar="DEVICE", help="only this one (may be repeated)")

    sub = command(
        "agent",
        answers.agent,
        "write the on-device agent as one file, for a device where it is to be installed",
        "bittailor agent --out bittailor-agent.pyz",
    )
    sub.add_argument("--out", default="bittailor-agent.pyz", metavar="FILE")

    sub = command(
        "units", answers.units, "every unit: name, op, K, N, parameters, candidate kernels", "bittailor units pocket-llama-6m"
    )
    sub.add_argument("model", metavar="MODEL", help="folder, hub id, pocket-llama-6m, or a supernet")
    sub.add_argument("--device", default="local", help="whose kernels: a device of hardware/ (default: local)")

    sub = command(
        "profile",
        answers.profile,
        "measure what the device's cost table lacks for MODEL",
        "bittailor profile pocket-llama-6m --device local",
    )
    sub.add_argument("model", metavar="MODEL")
    common(sub, several=True)
    sub.add_argument("--missing", action="store_true", default=True, help="measure only what is missing (the default)")
    sub.add_argument("--renew", action="store_true", help="start a stale table over")
    sub.add_argument(
        "--follow", action="store_true", help="measure more of how MODEL follows the machine's speed; type it when that has changed"
    )

    sub = command("predict", answers.predict, "cost of a policy, with spread", "bittailor predict pocket-llama-6m --policy w4g32")
    sub.add_argument("model", metavar="MODEL")
    common(sub)
    predicting(sub)
    sub.add_argument("--policy", required=True, metavar="FILE|KERNEL")

    sub = command(
        "train",
        answers.train,
        "train one supernet for every budget of the device",
        "bittailor train pocket-llama-6m --out supernet",
    )
    sub.add_argument("model", metavar="MODEL")
    common(sub)
    sub.add_argument(
        "--text", nargs="+", metavar="FILE", help="training text (default: pydoc's prose, and what a decoder writes itself)"
    )
    sub.add_argument("--out", required=True, metavar="SUPERNET")
    sub.add_argument("--steps", type=int, default=200, metavar="N", help="training steps (default: 200)")
    sub.add_argument("--batch", type=int, default=4, metavar="N", help="windows a step (default: 4)")
    sub.add_argument(
        "--micro-batch", type=int, default=0, metavar="N", help="windows that go through the model at once (default: all)"
    )
    sub.add_argument(
        "--compile", action="store_true", help="compile the model's passes: takes a minute, worth it for long runs on a GPU"
    )
    sub.add_argument(
        "--on", choices=("auto", "cpu", "cuda"), default="auto", help="where to train (default: a GPU if torch has one)"
    )
    sub.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the model's passes (default: bf16 on a GPU)"
    )
    sub.add_argument(
        "--rate",
        type=float,
        default=1.0,
        metavar="X",
        help="times the usual learning rates: less where training makes kernels worse",
    )
    sub.add_argument("--seed", type=int, default=0)

    example = "bittailor export supernet --device local --budget low --out package"
    sub = command("export", answers.export, "cut one ONNX package for a budget, or for a policy", example)
    sub.add_argument("model", metavar="SUPERNET|MODEL")
    common(sub)
    predicting(sub)
    sub.add_argument("--budget", metavar="low|medium|high|FILE")
    limits(sub)
    sub.add_argument("--policy", metavar="FILE|KERNEL", help="export this policy (of a MODEL: post-training quantisation)")
    sub.add_argument("--polish", type=int, metavar="N", help="train this package's own policy for N more steps")
    sub.add_argument("--text", nargs="+", metavar="FILE", help="text to polish on (default: pydoc's prose)")
    sub.add_argument(
        "--on", choices=("auto", "cpu", "cuda"), default="auto", help="where to polish (default: a GPU if torch has one)"
    )
    sub.add_argument(
        "--method",
        metavar="solver|meta-network|prices|search",
        help="how a budget's policy is found (default: solver)",
    )
    sub.add_argument("--out", required=True, metavar="PACKAGE")

    sub = command(
        "check",
        answers.check,
        "measure a package against its budget: exit code 0 within, 1 over, 3 could not tell",
        "bittailor check package",
    )
    sub.add_argument("package", metavar="PACKAGE")
    sub.add_argument("--device", default="local")
    sub.add_argument("--report", metavar="FILE", help="also write what --json prints to this file")
    in_ci(sub)
    sub.add_argument("--seal", action="store_true", help="put the report into the package, for `bittailor verify`")
    sub.add_argument("--sign-with", metavar="minisign:KEY", help="sign the sealed report with this secret key of minisign")
    limits(sub)
    sub.add_argument(
        "--latency-p95-ms", type=float, metavar="X", help="limit for the 95th percentile of single tokens or inferences"
    )
    sub.add_argument(
        "--baseline", metavar="REPORT", help="what check --json said before: a regression beyond the noise fails the check too"
    )
    sub.add_argument(
        "--max-perplexity-ratio", type=float, metavar="R", help="a decoder's perplexity over its fp32 model's, on --text"
    )
    sub.add_argument("--min-fidelity", type=float, metavar="F", help="an encoder's mean cosine to its fp32 model, on --text")
    sub.add_argument("--text", nargs="+", metavar="FILE", help="what quality is measured on")
    sub.add_argument(
        "--reference",
        metavar="MODEL",
        help="what quality is compared with: a model, an fp32 package or a graph/ folder (default: the package's source)",
    )
    sub.add_argument(
        "--most-seconds", type=float, default=120.0, metavar="S", help='then what is open is "could not tell" (default: 120)'
    )
    sub.add_argument(
        "--least-seconds", type=float, default=0.0, metavar="S", help="time at least so long: for a report that is to be a baseline"
    )
    sub.add_argument(
        "--no-precedence",
        action="store_true",
        help="do not go before the device's other processes, as a superuser's check else does: for a device in service",
    )

    sub = command(
        "verify",
        answers.verify,
        "check a package's files and its sealed report again, without a device: exit codes as check's",
        "bittailor verify package",
    )
    sub.add_argument("package", metavar="PACKAGE")
    sub.add_argument("--digest", action="store_true", help="check the files alone and print the package's digest")
    sub.add_argument("--public-key", metavar="KEY|FILE", help="the report must be signed by this key of minisign")
    in_ci(sub)

    example = "bittailor evaluate package --text heldout.txt"
    sub = command("evaluate", answers.evaluate, "perplexity of a decoder, or an encoder's fidelity to fp32", example)
    sub.add_argument("package", metavar="PACKAGE|MODEL")
    sub.add_argument("--text", nargs="+", required=True, metavar="FILE")
    sub.add_argument(
        "--reference",
        metavar="MODEL",
        help="fp32 model that an encoder's outputs are compared with (default: the package's source)",
    )
    sub.add_argument("--window", type=int, default=256, help="tokens per window (default: 256)")

    example = "bittailor report low medium high --measured *.json --out report.html"
    sub = command("report", answers.report, "one HTML page of packages: fronts, bits, costs, budgets", example)
    sub.add_argument("packages", nargs="+", metavar="PACKAGE")
    sub.add_argument(
        "--measured", nargs="+", default=[], metavar="FILE", help="what check --json and evaluate --json wrote about them"
    )
    what = "what they were cut from, for the exact front and the costs by unit (default: supernet/ beside them)"
    sub.add_argument("--supernet", metavar="DIR", help=what)
    sub.add_argument(
        "--profiles", metavar="DIR", help="folder of cost tables (default: profiles/ beside it and here, then those shipped)"
    )
    sub.add_argument("--out", required=True, metavar="FILE")

    sub = command("run", answers.run, "generate with a package", 'bittailor run package "Once upon a time"')
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
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser().parse_args(words)
    parsed.command_line = shlex.join(["bittailor", *words])
    try:
        answer = parsed.run(parsed)
        if os.environ.get("RANK", "0") == "0":  # of several processes that train as one, the first one answers
            print(json.dumps(answer.data) if parsed.json else answer.text)
        return answer.exit_code
    except BittailorError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "toolchain"):
            raise
        return _fail(
            f"this command needs the Python package {package!r}, which is not installed; type: pip install 'bittailor[train]'"
        )
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        return _fail(f"expected room in the GPU's memory, got none ({error}); type: --micro-batch 1, or --on cpu")
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


def _quickstart(arguments: argparse.Namespace) -> answers.Answer:
    """Here and not beside the others: quickstart is built on the commands, so that they cannot know it."""
    from toolchain.check import exit_code
    from toolchain.quickstart import quickstart

    data, text = quickstart(Path(arguments.out), arguments.steps)
    return answers.Answer(data, text, exit_code(data["verdict"]))


if __name__ == "__main__":
    sys.exit(main())
