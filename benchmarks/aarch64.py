"""Does a package compute on aarch64 what it computes here, and does the bare install check it there? A Debian arm64 root under qemu-user.

    python benchmarks/aarch64.py [MODEL ...] [--kernels w8g32 ...] [--cpu cortex-a76 ...] [--root DIR] [--json OUT] [--no-check]

Exit code 0: all agrees and the check ends within its limits; 1: not so; 2: something is missing, and what to type. `aarch64_board.py` makes
the root. Emulated times and bytes are the emulator's: the check is to run to its verdict, its numbers mean nothing.

Default CPUs, for what onnxruntime takes from each: cortex-a76 (Raspberry Pi 5; int8 dot products), cortex-a72 (Raspberry Pi 4; none) and
max,sme=off (i8mm, SVE2: phones, servers). With SME w8a8 is another kernel: it quantises activations token by token, not all at once (exact
to 2e-7 under qemu 10, so seen to disagree here; qemu 7.2 computes SME wrong altogether).

First each kernel by itself, against the numpy reference and the tolerance of the probe (`toolchain/profiler/probe.py`), and against the
same weights with float activations: that is what MatMulNBits computes without dot products, whatever its accuracy level asks for.

Then whole packages: logits on fixed tokens against the desk's onnxruntime, relative to their norm. Tolerances:

* float activations on both sides (fp32, and what the first table found to be float: the desk's package is then held with float activations
  too): 1e-4. Only the order of sums differs, 1e-6 was seen, and any wrong step shows in the third digit.
* int8 activations: rounding is a step function. A difference of 1e-7 in a sum moves some activation by a whole step, and others behind it,
  so what a package's logits can keep is the package's own affair, and the desk alone shows it: its logits with the first norm's weights
  moved by ±1, ±4 and ±16 units in the last place (2e-6; kernels differ by up to 5e-6, see the first table). Tolerance: twice the largest of
  these, and 1e-4 at least. A kernel that is wrong by little would hide in that: it is the first table that finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from aarch64_board import CHECKOUT, Board, boards

from toolchain import hardware
from toolchain.commands.workflow import Choice, cut, opened
from toolchain.errors import BittailorError, InputError
from toolchain.files import scratch, write_atomic
from toolchain.graph.oneunit import random_weights, write_one_unit
from toolchain.kernels import CATALOGUE, legal, offered, uniform
from toolchain.profiler.probe import TOLERANCE
from toolchain.progress import note
from toolchain.quantize.affine import dequantize, quantize_activation
from toolchain.spec import Unit, Workload

CPUS = ("cortex-a76", "cortex-a72", "max,sme=off")
KERNELS = ("fp32", "w8a8", "w8g32", "w4g32", "w2g32")
SINGLE = tuple(name for name in offered() if not CATALOGUE[name].prefill)
"""A kernel of two phases runs as its parts, which are here by themselves."""
UNITS = (Unit("linear", "MatMul", 256, 48), Unit("ragged", "MatMul", 200, 48), Unit("embedding", "Gather", 256, 48))
"""200 is a width that no group divides."""
FLOAT_TOLERANCE, NUDGES, ROOM = 1e-4, (1, -1, 4, -4, 16, -16), 2.0
TOKENS = 32
WORKLOADS = {"decoder": "generate:8+4", "encoder": "encode:1x16"}
LIMITS = ("--latency-ms", "600000", "--memory-mb", "4000")
NUMBERS = Path(__file__).with_name("aarch64_numbers.py")

Numbers = Mapping[str, np.ndarray]
"""What `aarch64_numbers.py` writes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["pocket-llama-6m"], metavar="MODEL", help="a decoder or an encoder")
    parser.add_argument("--kernels", nargs="+", choices=SINGLE, default=KERNELS, metavar="KERNEL", help="a package of each")
    parser.add_argument("--cpu", nargs="+", default=CPUS, help="names of `qemu-aarch64-static -cpu help`; the first checks")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--root", type=Path, default=cache / "bittailor" / "aarch64", help="where the arm64 root is, or is made")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="for each command that is emulated")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--no-check", action="store_true", help="compare only")
    arguments = parser.parse_args()
    try:
        found = examined(arguments)
    except BittailorError as error:
        print(f"aarch64: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        write_atomic(arguments.json, json.dumps(found, indent=1) + "\n")
    return 0 if found["agrees"] else 1


def examined(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that was found; its tables are printed. Raises InputError for what is missing."""
    with boards(arguments.root.resolve(), arguments.cpu) as machines, scratch() as folder:
        expected = write_units(folder / "units")
        packages = [name for model in arguments.models for name in write_packages(model, arguments.kernels, arguments.seed, folder)]
        note("computing here")
        here = computed_here(folder)
        found: dict[str, Any] = {"machines": [identity("here", here)], "units": [], "packages": []}
        for machine in machines:
            note(f"computing under {machine.cpu}")
            there = computed_there(machine, folder, arguments.timeout)
            units = unit_rows(machine.cpu, expected, there)
            found["machines"].append(identity(machine.cpu, there))
            activations = {row["kernel"]: row["activations"] for row in units}
            found["units"] += units
            found["packages"] += package_rows(machine.cpu, packages, activations, here, there)
        subject = packages[len(arguments.kernels) - 1]  # of the first model, the last kernel
        found["check"] = [] if arguments.no_check else [checked(machines[0], folder, subject, arguments.timeout)]
    for rows in found.values():
        show(rows)
    agrees = all(row["agrees"] for row in [*found["units"], *found["packages"]])
    return {"agrees": agrees and all(row["verdict"] == "within" for row in found["check"]), **found}


def write_units(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One-unit graphs of every kernel; name/input → what it should be (as the catalogue says, with float activations), each [M, N]."""
    rng, expected = np.random.default_rng(0), {}
    for unit in UNITS:
        for name in (name for name in SINGLE if legal(unit, CATALOGUE[name])):
            kernel, place = CATALOGUE[name], folder / f"{name}~{unit.name}"
            place.mkdir(parents=True)
            weights = random_weights(unit, kernel)
            write_one_unit(unit, kernel, weights, 1, place)
            plain = weights if isinstance(weights, np.ndarray) else dequantize(weights[0])
            inputs: dict[str, np.ndarray] = {}
            for tokens in (1, 5):  # one token takes other code paths than several
                x: np.ndarray
                if unit.op == "Gather":
                    x = rng.integers(0, unit.N, tokens)
                    both = plain[x], plain[x]
                else:
                    x = rng.standard_normal((tokens, unit.K), dtype=np.float32)
                    both = quantize_activation(x, kernel) @ plain.T, x @ plain.T
                inputs[str(tokens)] = x
                expected[f"{place.name}/{tokens}"] = both
            np.savez(place / "inputs.npz", **inputs)
    return expected


def write_packages(model: str, kernels: Sequence[str], seed: int, folder: Path) -> list[str]:
    """Packages of one kernel each into packages/, their twins for the desk alone into twins/; returns the packages' names.

    Raises InputError for a model whose folder has the name of another's, and for an encoder-decoder.
    """
    from parity import float_activations, nudge_first_norm  # loads torch, which what is missing need not wait for

    names = []
    with opened(model) as source:
        if source.graph.kind not in WORKLOADS:
            raise InputError(f"expected a decoder or an encoder, got the {source.graph.kind} {model}")
        ids = np.random.default_rng(seed).integers(0, source.graph.vocabulary, TOKENS)
        for kernel in kernels:
            name = f"{Path(source.graph.source).name}~{kernel}"
            package = folder / "packages" / name
            if package.exists():
                raise InputError(f"expected models of different names, got {name.rpartition('~')[0]!r} twice")
            choice = Choice(uniform(kernel, source.graph.units, SINGLE), "the user", None)
            workload = Workload.parse(WORKLOADS[source.graph.kind])
            cut(source, choice, package, hardware.load("local"), None, None, workload)
            (folder / "twins").mkdir(exist_ok=True)
            for units in NUDGES:
                nudge_first_norm(package, folder / "twins" / f"{name}~{units:+d}", units)
            if CATALOGUE[kernel].quantised:
                float_activations(package, folder / "twins" / f"{name}~float")
            twins = [path for path in (folder / "twins").glob(f"{name}~*") if path.is_dir()]
            for place in (package, *twins):
                np.save(place.with_name(f"{place.name}.npy"), ids)  # beside it: a package holds what its manifest names
            names.append(name)
    return names


def computed_here(folder: Path) -> Numbers:
    words = [sys.executable, "-P", str(NUMBERS), str(folder), str(folder / "here.npz"), "units", "packages", "twins"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    return _read(done, folder / "here.npz", "the desk")


def computed_there(machine: Board, folder: Path, timeout_s: float) -> Numbers:
    words = ["-P", str(NUMBERS), str(folder), str(folder / "there.npz"), "units", "packages"]
    return _read(machine.run(words, timeout_s), folder / "there.npz", machine.cpu)


def _read(done: subprocess.CompletedProcess[str], out: Path, where: str) -> Numbers:
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        # Exit code 1, not 2: nothing is missing, this is what we came to find out.
        raise SystemExit(f"aarch64: expected numbers of {where}, it died: {last[:300]}")
    with np.load(out) as arrays:
        return dict(arrays)


def identity(name: str, numbers: Numbers) -> dict[str, Any]:
    seen = json.loads(str(numbers["identity"]))
    return {"where": name, **{key: seen[key] for key in ("machine", "cpu", "runtime", "cache_bytes")}}


def unit_rows(cpu: str, expected: Mapping[str, tuple[np.ndarray, np.ndarray]], there: Numbers) -> list[dict[str, Any]]:
    """By kernel: its largest relative error over shapes and tokens against both references, and so what activations it has there."""
    rows = []
    for kernel in SINGLE:
        pairs = [(there[f"units/{name}"], both) for name, both in expected.items() if name.startswith(f"{kernel}~")]
        catalogued, plain = (max(relative(got, both[place]) for got, both in pairs) for place in (0, 1))
        own = CATALOGUE[kernel].activation
        activations = own if catalogued < TOLERANCE else "fp32" if plain < TOLERANCE else "unknown"
        rows.append(
            {
                "cpu": cpu,
                "kernel": kernel,
                "error": catalogued,
                "error, float activations": plain,
                "activations": activations,
                "agrees": activations != "unknown",
            }
        )
    return rows


def package_rows(
    cpu: str, packages: Sequence[str], activations: Mapping[str, str], here: Numbers, there: Numbers
) -> list[dict[str, Any]]:
    """By package and phase: largest difference of logits, absolute and relative, and whether it is within its tolerance."""
    rows = []
    for name in packages:
        kernel = name.rpartition("~")[2]
        own, found = CATALOGUE[kernel].activation, activations[kernel]
        twin = f"twins/{name}~float" if own != "fp32" and found == "fp32" else f"packages/{name}"
        for key in (key for key in there if key.startswith(f"packages/{name}/")):
            phase = key.rpartition("/")[2]
            got, wanted = there[key], here[f"{twin}/{phase}"]
            itself = max(relative(here[f"twins/{name}~{units:+d}/{phase}"], here[key]) for units in NUDGES)
            tolerance = FLOAT_TOLERANCE if found == "fp32" else max(FLOAT_TOLERANCE, ROOM * itself)
            difference = relative(got, wanted)
            rows.append(
                {
                    "cpu": cpu,
                    "package": name,
                    "phase": phase,
                    "activations here": "fp32" if twin.endswith("~float") else own,
                    "largest difference": float(np.abs(got - wanted).max()),
                    "largest logit": float(np.abs(wanted).max()),
                    "relative": difference,
                    "desk, nudged": itself,
                    "tolerance": tolerance,
                    "same best": float((got.argmax(-1) == wanted.argmax(-1)).mean()),
                    "agrees": bool(difference <= tolerance),
                }
            )
    return rows


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """‖got − wanted‖ / ‖wanted‖; infinite for other shapes or what is not a number."""
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(np.subtract(got, wanted, dtype=np.float64)) / np.linalg.norm(wanted.astype(np.float64)))


def checked(machine: Board, folder: Path, package: str, timeout_s: float) -> dict[str, Any]:
    """`bittailor check` of the package there, on one thread and with limits that an emulator keeps."""
    note(f"bittailor check under {machine.cpu}: minutes")
    write_atomic(folder / "board.yaml", "name: board\ntitle: emulated\nthreads: 1\n")
    words = ["check", str(folder / "packages" / package), "--device", str(folder / "board.yaml"), *LIMITS, "--json"]
    done = machine.run(["-P", "-m", "toolchain.cli", *words], timeout_s)
    row: dict[str, Any] = {"cpu": machine.cpu, "package": package, "exit code": done.returncode, "verdict": "none"}
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return {**row, "reason": (done.stderr.strip().splitlines() or ["no answer"])[-1][:300]}
    measured = {name: seen["value"] for name, seen in answer["measured"].items()}
    reasons = "; ".join(f"{limit['name']} {limit['verdict']} {limit['reason']}".rstrip() for limit in answer["limits"])
    return {**row, "verdict": answer["verdict"], **measured, "reason": reasons}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """One Markdown table; nothing for no rows."""
    if not rows:
        return
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(_cell, row.values()))} |", flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
