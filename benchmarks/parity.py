"""Is what was exported what was trained? Packages on onnxruntime against the torch subnets of their supernet.

    python benchmarks/parity.py SUPERNET [PACKAGE ...] [--random 10] [--windows 20]

Per policy: perplexity on the supernet's held-out windows (goal: within 0.5%), and 64 greedy tokens from 10 prompts (goal: equal in 8 of
10), torch decoding token by token with a cache as the package does. Where they part: at which step, and how far apart the package's own
two best logits were there. Then two columns that say why:

* the same codes with float activations on both sides. The int8 activation quantiser is a step function: a difference of 1e-7 in an
  input can move one activation by a whole step, and that moves others behind it. Without it nothing should part.
* the package against itself, cached decoding both times, the weights of its first norm moved by one unit in the last place (1e-7).
  What parts here, no second implementation of the same sums can hold together.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from toolchain.decoding import Decoder
from toolchain.evaluate.perplexity import perplexity
from toolchain.graph.assemble import assemble
from toolchain.graph.external import load_array
from toolchain.graph.model import Graph
from toolchain.package.manifest import open_package
from toolchain.spec import Policy
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.store import SupernetFolder
from toolchain.text import load_tokenizer

STEPS, CAPACITY = 64, 128
PROMPTS = (
    "It was a cold morning in November, and the old man",
    "The captain looked across the water and said",
    "My dear sister, I have received your letter of the",
    "When the king heard of this, he sent his",
    "In the first chapter of this book we have seen that",
    "She opened the door very slowly, and there stood",
    "The children ran down to the river, where",
    "Of all the virtues which a man may possess,",
    "At the beginning of the war the army was",
    "The house stood at the end of a long road, and",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("supernet", type=Path)
    parser.add_argument("packages", type=Path, nargs="*")
    parser.add_argument("--random", type=int, default=10)
    parser.add_argument("--windows", type=int, default=20)
    arguments = parser.parse_args()
    folder = SupernetFolder.open(arguments.supernet)
    graph = Graph.open(folder.graph_directory)
    supernet = Supernet(
        load_model(folder.model_directory), graph.units, folder.kernels, rank=folder.description["rank"], start=False
    )
    supernet.load(folder.trained())
    windows = folder.heldout()[: arguments.windows]
    tokenizer = load_tokenizer(graph.directory)
    prompts = [np.array(tokenizer.encode(text).ids, np.int64) for text in PROMPTS]
    rng = random.Random(0)
    subjects = [(path.name, open_package(path).policy, path) for path in arguments.packages]
    for number in range(arguments.random):
        policy = Policy.of({unit.name: rng.choice(folder.description["kernels"][unit.name]) for unit in graph.units})
        subjects.append((f"random {number}", policy, None))
    heads = (
        "policy",
        "perplexity onnx",
        "torch",
        "difference",
        "equal greedy runs",
        "parted at step (logit gap)",
        "float activations",
        "itself, one norm 1e-7 off",
    )
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|---|")
    for name, policy, path in subjects:
        with tempfile.TemporaryDirectory() as scratch:
            if path is None:
                path = Path(scratch) / "package"
                path.mkdir()
                assemble(graph, policy, folder.quantized, path)
            float_path = Path(scratch) / "float"
            float_activations(path, float_path)
            onnx_value, _ = perplexity(path, windows, 2)
            torch_value = torch_perplexity(supernet, policy, windows)
            where = [first_difference(supernet, policy, path, prompt, True) for prompt in prompts]
            plain = [first_difference(supernet, policy, float_path, prompt, False) for prompt in prompts]
            nudged = Path(scratch) / "nudged"
            nudge_first_norm(path, nudged)
            itself = [first_difference_of_two(path, nudged, prompt) for prompt in prompts]
        at = ", ".join(f"{seen[0]} ({seen[1]:.2g})" for seen in where if seen) or "-"
        change = f"{100 * (onnx_value / torch_value - 1):+.3f}%"
        equal, equal_plain, equal_itself = (f"{runs.count(None)}/{len(runs)}" for runs in (where, plain, itself))
        cells = (name, f"{onnx_value:.3f}", f"{torch_value:.3f}", change, equal, at, equal_plain, equal_itself)
        print(f"| {' | '.join(cells)} |", flush=True)


def torch_perplexity(supernet: Supernet, policy: Policy, windows: np.ndarray) -> float:
    total, weights = 0.0, supernet.weights(policy)
    with torch.no_grad():
        for window in torch.from_numpy(windows):
            logits = supernet(policy, window[None], weights=weights)[0]
            total += torch.nn.functional.cross_entropy(logits[:-1].double(), window[1:], reduction="sum").item()
    return float(np.exp(total / (windows.shape[0] * (windows.shape[1] - 1))))


@torch.no_grad()
def first_difference(supernet: Supernet, policy: Policy, path: Path, prompt: np.ndarray, activations: bool):
    """(the first of 64 greedy steps at which package and subnet part, the gap of the package's two best logits there), or None."""
    from transformers import DynamicCache

    decoder = Decoder(path, 2, capacity=CAPACITY)
    cache, weights = DynamicCache(), supernet.weights(policy)
    scores = decoder.prefill(prompt)
    logits = supernet(policy, torch.from_numpy(prompt[None]), activations=activations, weights=weights, cache=cache)
    for step in range(STEPS):
        token, expected = int(scores.argmax()), int(logits[0, -1].argmax())
        if token != expected:
            best = np.sort(scores)[-2:]
            return step, float(best[1] - best[0])
        scores = decoder.step(token)
        logits = supernet(policy, torch.tensor([[token]]), activations=activations, weights=weights, cache=cache)
    return None


def first_difference_of_two(first: Path, second: Path, prompt: np.ndarray) -> int | None:
    """The first of 64 greedy steps at which two packages part, or None."""
    one, other = Decoder(first, 2, capacity=CAPACITY), Decoder(second, 2, capacity=CAPACITY)
    scores, others = one.prefill(prompt), other.prefill(prompt)
    for step in range(STEPS):
        token = int(scores.argmax())
        if token != int(others.argmax()):
            return step
        scores, others = one.step(token), other.step(token)
    return None


def nudge_first_norm(package: Path, out: Path, units: int = 1) -> None:
    """A copy whose first norm has every weight so many units in the last place higher; lower if negative."""
    shutil.copytree(package, out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type.endswith("LayerNormalization"))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == norm.input[1])
    weight = load_array(tensor, out)
    for _ in range(abs(units)):
        weight = np.nextafter(weight, np.float32(units * np.inf))
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, out / "model.onnx")


def float_activations(package: Path, out: Path) -> None:
    """The same codes with float activations: accuracy level 0; int8 dynamic as a float product with the dequantised weights."""
    shutil.copytree(package, out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "DynamicQuantizeMatMul":
            x, codes, scales = node.input[:3]
            weight = load_array(stored[codes], out).astype(np.float32) * load_array(stored[scales], out)
            model.graph.initializer.append(numpy_helper.from_array(weight, f"{codes}.float"))
            nodes.append(helper.make_node("MatMul", [x, f"{codes}.float"], node.output, name=node.name))
            continue
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("accuracy_level", 0)])
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, out / "model.onnx")


if __name__ == "__main__":
    main()
