"""Which small graph tells how fast the machine is now? Candidates beside whole models in one rotation, for some minutes.

    python benchmarks/references.py [--seconds 420] [--models MODEL ...]    measure
    python benchmarks/references.py --write                                make those of toolchain/profiler/graphs/

A neighbour on the same host slows down what we time; a reference timed beside it is to say by how much. In blocks of 25 rounds: the
standard deviation of log(model), and of log(model / reference), root mean square over the models of one kind of work. A reference pays
where the second is smaller. `small`, `float` and `int8` are what the agent uses (`toolchain/profiler/subjects.py`); the others lost.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from toolchain.commands.workflow import opened
from toolchain.graph.assemble import assemble
from toolchain.graph.oneunit import drawn
from toolchain.kernels import uniform
from toolchain.profiler.model_rows import subject
from toolchain.profiler.phases import DecoderPhases, EncoderPhases
from toolchain.profiler.profile import default_workload
from toolchain.profiler.subjects import GRAPHS, Subject, Unit

CANDIDATES = {
    "small": ("fp32", 256, 1, 1),
    "float": ("fp32", 512, 4, 64),
    "int8": ("int8", 512, 4, 64),
    "4 bits": ("w4", 512, 4, 64),
    "1 MB, one token": ("fp32", 256, 4, 1),
    "8 MB, one token": ("fp32", 512, 8, 1),
    "64 MB, one token": ("fp32", 1024, 16, 1),
}
"""Name → number format, width, products, tokens."""
OTHERS = {"large": ("fp32", 4096, 2, 1), "launches": ("chain", 256, 64, 1), "bare": ("fp32", 8, 1, 1)}
"""large: a GPU's reference, 128 MB, more than its L2 cache holds, and enough arithmetic to fill it. launches: another one, kernels that
wait for each other and do next to nothing, as a small decoder's do: where a neighbour slowed the CPU that launches them, a step took 1.6
times as long, one small product alone 1.35 times. bare: what a process with a runtime and nothing in it weighs."""
CHOSEN = ("small", "float", "int8")
STEP = "step"
"""Two blocks of a small model, one token: what `check` brings small models to one speed by."""
KERNELS = ("w8g128", "w4g32", "w8a8")
BLOCK = 25


def graph(form: str, width: int, products: int) -> onnx.ModelProto:
    """`products` square products of one input, or a chain of as many sums and products of vectors. Weights are constants that onnxruntime
    folds when it loads, so the file is small."""
    nodes, outputs, constants = [], [], []

    def constant(name: str, dtype: int, shape: list[int], value: float) -> str:
        constants.append(helper.make_tensor(f"{name}.shape", TensorProto.INT64, [len(shape)], shape))
        tensor = helper.make_tensor("value", dtype, [1], [value])
        nodes.append(helper.make_node("ConstantOfShape", [f"{name}.shape"], [name], value=tensor))
        return name

    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.01])
    for place in range(products if form == "chain" else 0):
        value = constant(f"w{place}", TensorProto.FLOAT, [width], 0.01 * (place + 1))
        nodes.append(helper.make_node(("Add", "Mul")[place % 2], [f"y{place - 1}" if place else "x", value], [f"y{place}"]))
    for place in range(products if form != "chain" else 0):
        if form == "fp32":
            weight = constant(f"w{place}", TensorProto.FLOAT, [width, width], 0.01 * (place + 1))
            node = helper.make_node("MatMul", ["x", weight], [f"y{place}"])
        elif form == "int8":
            weight = constant(f"w{place}", TensorProto.INT8, [width, width], place + 3)
            node = helper.make_node("DynamicQuantizeMatMul", ["x", weight, "scale"], [f"y{place}"], domain="com.microsoft")
        else:
            codes = constant(f"w{place}", TensorProto.UINT8, [width, width // 32, 16], place + 17)
            scales = constant(f"s{place}", TensorProto.FLOAT, [width * width // 32], 0.01)
            sizes = {"K": width, "N": width, "bits": 4, "block_size": 32, "accuracy_level": 4}
            node = helper.make_node("MatMulNBits", ["x", codes, scales], [f"y{place}"], domain="com.microsoft", **sizes)
        nodes.append(node)
        outputs.append(helper.make_tensor_value_info(f"y{place}", TensorProto.FLOAT, ["M", width]))
    if form == "chain":
        outputs.append(helper.make_tensor_value_info(f"y{products - 1}", TensorProto.FLOAT, ["M", width]))
    if form == "int8":
        constants.append(scale)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", width])]
    body = helper.make_graph(nodes, "products", inputs, outputs, constants)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=versions, ir_version=10, producer_name="bittailor")


def step_graph(blocks: int = 2, width: int = 256, inner: int = 768) -> onnx.ModelProto:
    """A chain as a decoder's step is one: norm, two 4-bit products, sum, two more, gate, product, sum. Weights as in `graph`."""
    nodes, constants = [], []

    def constant(name: str, dtype: int, shape: list[int], value: float) -> str:
        constants.append(helper.make_tensor(f"{name}.shape", TensorProto.INT64, [len(shape)], shape))
        tensor = helper.make_tensor("value", dtype, [1], [value])
        nodes.append(helper.make_node("ConstantOfShape", [f"{name}.shape"], [name], value=tensor))
        return name

    def product(x: str, inputs: int, outputs: int, name: str, turn: int) -> str:
        codes = constant(f"{name}.codes", TensorProto.UINT8, [outputs, inputs // 32, 16], turn + 17)
        scales = constant(f"{name}.scales", TensorProto.FLOAT, [outputs * inputs // 32], 0.001 * (turn + 1))
        sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": 32, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", [x, codes, scales], [name], domain="com.microsoft", **sizes))
        return name

    def plain(op: str, inputs: list[str], name: str) -> str:
        nodes.append(helper.make_node(op, inputs, [name]))
        return name

    x = "x"
    for block in range(blocks):
        gain = constant(f"{block}.gain", TensorProto.FLOAT, [width], 1.0)
        nodes.append(helper.make_node("SimplifiedLayerNormalization", [x, gain], [f"{block}.norm"], axis=-1, epsilon=1e-5))
        first = product(f"{block}.norm", width, width, f"{block}.first", block)
        x = plain("Add", [x, product(first, width, width, f"{block}.second", block)], f"{block}.middle")
        gate = plain("Sigmoid", [product(x, width, inner, f"{block}.gate", block)], f"{block}.open")
        gated = plain("Mul", [gate, product(x, width, inner, f"{block}.up", block + 1)], f"{block}.gated")
        x = plain("Add", [x, product(gated, inner, width, f"{block}.down", block)], f"{block}.out")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", width]) for name in ("x", x)]
    body = helper.make_graph(nodes, "step", ends[:1], ends[1:], constants)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=versions, ir_version=10, producer_name="bittailor")


def written(name: str, folder: Path) -> Path:
    """The candidate's graph as a folder's model.onnx."""
    folder.mkdir(exist_ok=True)
    if name == STEP:
        model = step_graph()
    else:
        form, width, products, _ = {**CANDIDATES, **OTHERS}[name]
        model = graph(form, width, products)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--models", nargs="+", default=["pocket-llama-6m"], metavar="MODEL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write:
        for name in (*CHOSEN, *OTHERS, STEP):
            written(name, GRAPHS / name)
        return
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        graphs = {model: stack.enter_context(opened(model)).graph for model in arguments.models}
        onnxruntime.set_global_thread_pool_sizes(arguments.threads, 1)  # only now: building a graph opens sessions of its own
        subjects: dict[str, Subject] = {}
        for name, tokens in {**{name: tokens for name, (*_, tokens) in CANDIDATES.items()}, STEP: 1}.items():
            described = {"folder": written(name, Path(folder) / name), "tokens": tokens, "rows": 1}
            subjects[name] = Unit(described, arguments.threads, shared_pool=True)
        for (model, source), kernel in itertools.product(graphs.items(), KERNELS):
            place = Path(folder) / f"{Path(model).name} {kernel}"
            place.mkdir()
            assemble(source, uniform(kernel, source.units), drawn, place, sync=False)
            kind = EncoderPhases if source.kind == "encoder" else DecoderPhases
            described = subject(source, place.name, place, default_workload(source).phases)
            subjects[place.name] = kind(described, arguments.threads, True)
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            for name, what in subjects.items():
                trials = [what.trial() for _ in range(5 if name in (*CANDIDATES, STEP) else 1)]
                for phase in trials[0]:
                    seen.setdefault(name if name in (*CANDIDATES, STEP) else f"{name} {phase}", []).append(
                        median(trial[phase] for trial in trials)
                    )
            print(f"{len(next(iter(seen.values())))} rounds", end="\r", file=sys.stderr)
    show(seen)


def show(seen: dict[str, list[float]]) -> None:
    rounds = len(next(iter(seen.values()))) // BLOCK * BLOCK
    logs = {name: np.median(np.log(times[:rounds]).reshape(-1, BLOCK), axis=1) for name, times in seen.items()}
    models = [name for name in logs if name not in (*CANDIDATES, STEP)]
    works = {
        "decode": [name for name in models if "decode" in name],
        "several tokens": [name for name in models if "decode" not in name],
    }
    pairs = [(name,) for name in (*CANDIDATES, STEP)] + list(itertools.combinations(CHOSEN, 2))
    print(f"{rounds // BLOCK} blocks of {BLOCK} rounds; standard deviation of log(time)")
    print(f"| model | alone | {' | '.join('/ ' + ' × '.join(pair) for pair in pairs)} |\n|---" + "|---" * (len(pairs) + 1) + "|")
    for name in models:
        cells = [float((logs[name] - sum(logs[part] for part in pair) / len(pair)).std()) for pair in pairs]
        print(f"| {name} | {logs[name].std():.3f} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    for work, names in works.items():
        if names:
            alone = np.mean([logs[name].var() for name in names]) ** 0.5
            cells = [
                np.mean([(logs[name] - sum(logs[part] for part in pair) / len(pair)).var() for name in names]) ** 0.5
                for pair in pairs
            ]
            print(f"| **{work}** | {alone:.3f} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
