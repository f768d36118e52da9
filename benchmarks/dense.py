"""The third study's synthetic dense models (arXiv:2411.06084, tables I to V) of 10M, 100M and 1B parameters, measured on this machine.

    python benchmarks/dense.py run --out DIR [--device local] [--models 10M 100M 1B] [--kernels fp32 w8a8 w8g32 w4g32 w3g32 w2g32]
    python benchmarks/dense.py report --out DIR [OTHER_DEVICES_DIR ...] --results results

A model is a chain of layers y = relu(W x), all of one width, weights drawn so that activations keep their size (He et al. 2015). For each
kernel on all layers:

    file, memory      bytes of the files; what a fresh process takes at most over a bare runtime: resident, on a GPU of its memory
    latency           of one token and of 64, all kernels of a model in rotation; on a CPU those of 1B each in a process with fp32,
                      whose least and most the table shows. Throughput is 64 tokens over their time
    energy            of such runs, a kernel's one after the other, idle power included, by the device's meter; without one null,
                      with the reason. mJ/ms, in watts: of two measurements
    C_q / C_f         the study's cost, b_w b_a / (32 · 32), beside latency over fp32's: what is measured and what the formula says
    error             ‖y − ŷ‖ / ‖y‖ at the chain's end for 64 random inputs, in torch, with the kernel's codes and its int8 or fp16
                      activations; with γ: every layer's outputs scaled to their second moment (equation 18), on 256 other inputs
    bound             Π (1 + ε_l) − 1, ε_l = ‖W − Ŵ‖₂ / ‖W‖₂ (equation 13): of the weights alone

DIR keeps what was measured of each model, and a killed run goes on. --device local-cuda: on the GPU. fp32 is a plain MatMul there (the
runtime may take TF32), which no package has, for the study's comparison; the other kernels are of fp16.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from scipy.sparse.linalg import LinearOperator, svds

from toolchain import hardware
from toolchain.files import scratch, write_atomic
from toolchain.graph.external import DATA_NAME, MODEL_NAME, DataWriter
from toolchain.graph.nodes import quantised_node
from toolchain.kernels import CATALOGUE
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import levelled, summarise
from toolchain.progress import track
from toolchain.quantize.fake import codes, fake_quantise, fake_quantise_activation
from toolchain.quantize.post_training import gamma
from toolchain.report import table
from toolchain.spec import CPU, CUDA, Kernel, Unit
from toolchain.train.team import Team

MODELS = {"10M": (10, 1024), "100M": (24, 2048), "1B": (60, 4096)}
"""Name → (layers, width)."""
KERNELS = {
    CPU: ("fp32", "w8a8", "w8g32", "w4g32", "w3g32", "w2g32"),
    CUDA: ("fp32", "fp16", "w8g32-fp16", "w4g32-fp16", "w3g32-fp16", "w2g32-fp16"),
}
TOKENS, CALIBRATION = 64, 256
WINDOWS, ENERGY_WINDOWS = 9, 3


def layer(width: int, place: int) -> np.ndarray:
    """Weight [width, width] float32 of a layer, the same on every call."""
    rng = np.random.default_rng([width, place])
    return rng.standard_normal((width, width), dtype=np.float32) * np.float32(math.sqrt(2 / width))


def write(width: int, layers: int, kernel: Kernel, out: Path) -> None:
    """The chain as an ONNX folder: input "x" [M, width], output "y0", of the kernel's float type."""
    unit, nodes, tensors, data = Unit("layer", "MatMul", width, width), [], [], "x"
    device = Team("auto").device
    with DataWriter(out / DATA_NAME, sync=False) as writer:
        for place in range(layers):
            weight, name = layer(width, place), f"layer{place}"
            if kernel.quantised:
                made = codes(torch.from_numpy(weight).to(device), kernel)
                node, parts = quantised_node(unit, kernel, made, data, f"{name}/sum", name)
                tensors += [writer.tensor(tensor, array) for tensor, array in parts]
            else:
                tensors.append(writer.tensor(f"{name}.weight", weight.T.astype(kernel.float_type)))
                node = helper.make_node("MatMul", [data, f"{name}.weight"], [f"{name}/sum"], name=name)
            data = "y0" if place == layers - 1 else f"{name}/relu"
            nodes += [node, helper.make_node("Relu", [f"{name}/sum"], [data], name=f"{name}/act")]
    floats = helper.np_dtype_to_tensor_dtype(np.dtype(kernel.float_type))
    value, output = (helper.make_tensor_value_info(name, floats, ["M", width]) for name in ("x", "y0"))
    graph = helper.make_graph(nodes, "dense", [value], [output], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="bittailor"), out / MODEL_NAME)


def errors(width: int, layers: int, names: list[str]) -> dict[str, dict[str, float]]:
    """kernel → {"error", "error_gamma", "bound"}. All kernels go through the layers together, so that each weight is drawn once."""
    device = Team("auto").device
    rng = np.random.default_rng(7)
    exact, calibration = (
        torch.from_numpy(rng.standard_normal((count, width), dtype=np.float32)).to(device) for count in (TOKENS, CALIBRATION)
    )
    plain, scaled = ({name: exact.clone() for name in names} for _ in range(2))
    grown = dict.fromkeys(names, 1.0)
    for place in track(range(layers), layers, f"errors of {layers} layers"):
        weight = torch.from_numpy(layer(width, place)).to(device)
        moments = calibration.T @ calibration / len(calibration)
        norm = _spectral(weight)
        for name in names:
            kernel = CATALOGUE[name]
            made = fake_quantise(weight, kernel)
            grown[name] *= 1 + _spectral(weight - made) / norm
            factor = gamma(weight, made, moments)
            plain[name] = (fake_quantise_activation(plain[name], kernel) @ made.T).relu()
            scaled[name] = (factor * (fake_quantise_activation(scaled[name], kernel) @ made.T)).relu()
        exact, calibration = ((x @ weight.T).relu() for x in (exact, calibration))
    return {
        name: {"error": _distance(plain[name], exact), "error_gamma": _distance(scaled[name], exact), "bound": grown[name] - 1}
        for name in names
    }


def _spectral(matrix: torch.Tensor) -> float:
    """Largest singular value, by Lanczos' iteration; the products where the matrix is."""

    def times(by: torch.Tensor, vector: np.ndarray) -> np.ndarray:
        made = by @ torch.from_numpy(vector.astype(np.float32).ravel()).to(by.device)
        return made.cpu().numpy()

    shown = LinearOperator(matrix.shape, partial(times, matrix), partial(times, matrix.T), dtype=np.float32)
    return float(svds(shown, 1, return_singular_vectors=False, random_state=0)[0])


def _distance(said: torch.Tensor, exact: torch.Tensor) -> float:
    return float((said.double() - exact.double()).norm() / exact.double().norm())


def measured(host: Host, model: str, names: list[str], meter: str) -> dict[str, dict[str, Any]]:
    """kernel → bytes, times and energy (meter "none": no energy), all kernels in rotation; a model too large for that in turn, two at a
    time with fp32."""
    layers, width = MODELS[model]
    seen: dict[str, dict[str, Any]] = {}
    with scratch() as folder:
        subjects = []
        for name in names:
            (folder / name).mkdir()
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(write, width, layers, CATALOGUE[name], folder / name) for name in names]
            for job in track(jobs, len(jobs), f"writing {model}"):
                job.result()
        for name in names:
            place = folder / name
            seen[name] = {"file_bytes": sum(path.stat().st_size for path in place.iterdir())}
            common = {"kind": "unit", "folder": str(place), "rows": 1}
            subjects += [{**common, "name": f"{name}@{tokens}", "tokens": tokens} for tokens in (1, TOKENS)]
        in_turn = model == "1B" and host.device.provider == CPU
        groups = [["fp32", name] for name in names if name != "fp32"] if in_turn else [names]
        for group in groups:
            rotation = [subject for subject in subjects if subject["name"].partition("@")[0] in group]
            answer = host.time(random.Random(0).sample(rotation, len(rotation)), WINDOWS)
            times = {}
            for label, trials in levelled(answer["trials"]).items():
                name, _, tokens = label.partition("@")
                found = summarise((trial["run_ns"] / 1e6 for trial in trials), answer["valid"])
                times[name, tokens] = {"value": found.value, "spread": found.spread, "n": found.n, "valid": found.valid}
            for (name, tokens), time in times.items():
                seen[name] |= {f"ms_{tokens}": time, f"of_fp32_{tokens}": time["value"] / times["fp32", tokens]["value"]}
        for name in names:
            seen[name]["peak_bytes"] = host.peak(next(one for one in subjects if one["name"] == f"{name}@{TOKENS}"))["peak_bytes"]
        if meter != "none":
            answer = host.energy(subjects, meter, ENERGY_WINDOWS)
            for label, phases in answer.get("measured", {}).items():
                name, _, tokens = label.partition("@")
                found = phases["run"]
                made = summarise(found["energy_mj"], found["valid"])
                seen[name][f"mj_{tokens}"] = {"value": made.value, "spread": made.spread, "n": made.n, "valid": made.valid}
            seen["fp32"]["energy_reason"] = answer["reason"]
    return seen


def run(arguments: argparse.Namespace) -> None:
    device = hardware.load(arguments.device)
    kernels = arguments.kernels or KERNELS[device.provider]
    if strange := [name for name in kernels if name != "fp32" and CATALOGUE[name].provider != device.provider]:
        raise SystemExit(f"expected kernels of {device.provider}, got {strange[0]}")
    host = Host.of(device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    meter, reason = host.meter()
    for model in arguments.models:
        kept = arguments.out / f"{model}.json"
        if kept.is_file():
            continue
        layers, width = MODELS[model]
        names = list(dict.fromkeys(["fp32", *kernels]))
        rows = measured(host, model, names, meter)
        why = rows["fp32"].pop("energy_reason", reason)
        for name, found in errors(width, layers, [name for name in names if CATALOGUE[name].quantised]).items():
            rows[name] |= found
        here = host.identify()
        about = {"cpu": here["cpu"], "runtime": here["runtime"], "threads": host.threads, "commit": commit}
        about |= {"errors_on": str(Team("auto").device), "meter": meter, "energy_reason": why}
        write_atomic(kept, json.dumps({"model": model, "layers": layers, "width": width, **about, "rows": rows}, indent=1) + "\n")
        print(f"{model}: done", file=sys.stderr)


def report(arguments: argparse.Namespace) -> None:
    found = [
        json.loads(path.read_text()) for place in arguments.out for name in MODELS if (path := place / f"{name}.json").is_file()
    ]
    if not found:
        places = " ".join(map(str, arguments.out))
        raise SystemExit(f"expected measurements in {places}, found none; type: python benchmarks/dense.py run --out {places}")
    arguments.results.mkdir(exist_ok=True)
    write_atomic(arguments.results / "dense.md", page(found))
    write_atomic(arguments.results / "dense.json", json.dumps(found, indent=1) + "\n")
    print(page(found))


def page(found: list[dict[str, Any]]) -> str:
    """The measurements as Markdown, a table for each device."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for model in found:
        energy = f"mJ by {model['meter']}" if not model["energy_reason"] else f"no energy: {model['energy_reason']}"
        where = f"{model['cpu']}, {model['threads']} threads, {model['runtime']}, commit {model['commit']}; {energy}"
        where += f"; errors in torch on {model['errors_on']}"
        sections.setdefault(where, []).extend(lines_of(model))
    return "\n".join(f"{where}\n\n{table(lines, list(lines[0]), markdown=True)}\n" for where, lines in sections.items())


def lines_of(model: dict[str, Any]) -> list[dict[str, str]]:
    """A row of the table for each kernel."""
    lines, full = [], model["rows"]["fp32"]
    for name, row in model["rows"].items():
        kernel = CATALOGUE[name]
        one, many = row["ms_1"], row[f"ms_{TOKENS}"]
        activation_bits = {"fp32": 32, "fp16": 16}.get(kernel.activation, 8)
        line = {"model": model["model"], "kernel": name, "file MB": f"{row['file_bytes'] / 1e6:.1f}"}
        line |= {"of fp32": f"{row['file_bytes'] / full['file_bytes']:.1%}", "memory MB": f"{row['peak_bytes'] / 1e6:.0f}"}
        line |= {"ms, 1 token": shown(one, 3), "ms, 64": shown(many, 2), "tokens/s": f"{TOKENS / many['value'] * 1e3:.0f}"}
        apart = name == "fp32" and by_process(model["rows"])
        if apart:
            line |= {"ms, 1 token": ranged(apart[1], 3), "ms, 64": ranged(apart[TOKENS], 2)}
            line["tokens/s"] = ranged([TOKENS / ms * 1e3 for ms in apart[TOKENS]], 0)
        line["C_q/C_f"] = f"{kernel.weight_bits * activation_bits / 32**2:.3f}"
        line |= {f"{tokens} measured": f"{row[f'of_fp32_{tokens}']:.3f}" for tokens in (1, TOKENS)}
        for tokens in (1, TOKENS) if not model["energy_reason"] else ():
            energy, whole = (one.get(f"mj_{tokens}") or {"value": None} for one in (row, full))
            share = f"{energy['value'] / whole['value']:.1%}" if energy["value"] and whole["value"] else "–"
            watts = f"{energy['value'] / row[f'ms_{tokens}']['value']:.0f}" if energy["value"] and not apart else "–"
            line |= {f"mJ, {tokens}": shown(energy, 2), f"mJ, {tokens}, of fp32": share, f"mJ/ms, {tokens}": watts}
        for head, key in (("error", "error"), ("with γ", "error_gamma"), ("bound", "bound")):
            line[head] = f"{row[key]:.3g}" if key in row else "–"
        lines.append(line)
    return lines


def by_process(rows: dict[str, Any]) -> dict[int, list[float]]:
    """Tokens → fp32's ms in each process that ran it, a kernel beside it in each; {} if all kernels ran in one."""
    others = [row for name, row in rows.items() if name != "fp32"]
    times = {tokens: [row[f"ms_{tokens}"]["value"] / row[f"of_fp32_{tokens}"] for row in others] for tokens in (1, TOKENS)}
    return times if any(not math.isclose(ms, times[1][0]) for ms in times[1]) else {}


def ranged(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def shown(found: dict[str, Any], digits: int) -> str:
    """A measurement with its spread; "?" behind one that others disturbed, "–" for none."""
    if found["value"] is None:
        return "–"
    return f"{found['value']:.{digits}f} ± {found['spread']:.{digits}f}{'' if found['valid'] else ' ?'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for act in (run, report):
        sub = commands.add_parser(act.__name__)
        sub.set_defaults(act=act)
        sub.add_argument("--out", type=Path, required=True, nargs="+" if act is report else None)
        if act is report:
            sub.add_argument("--results", type=Path, default=Path("results"))
            continue
        sub.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
        sub.add_argument("--device", default="local", help="a file of hardware/ or its name; of this machine")
        sub.add_argument("--kernels", nargs="+", choices=CATALOGUE)
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
