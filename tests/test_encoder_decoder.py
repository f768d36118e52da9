"""Encoder-decoders (T5) by the road that decoders and encoders take: units, fp32 numbers, kernels, tied weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("random_models")

import torch
from numerics import greedy, mixed_policy, relative_error, source_tokens, with_kernels
from random_models import CONTEXT, HIDDEN, TIED_T5, VOCABULARY, random_model

from toolchain.decoding import EncoderDecoder
from toolchain.errors import InputError
from toolchain.graph.assemble import assemble, package_bytes, round_to_nearest
from toolchain.graph.external import DATA_NAME, read_model
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, uniform
from toolchain.quantize.packing import packed_bytes
from toolchain.session import ENCODER, FIRST_STEP, STEP
from toolchain.spec import Policy

Graphs = Callable[..., Graph]
VARIANTS = [
    pytest.param("t5", {}, id="version 1.1"),
    pytest.param("t5", TIED_T5, id="tied"),
    pytest.param("mt5", {}, id="mt5", marks=pytest.mark.slow),  # the same modules under another name
]
TIED_OR_NOT = [pytest.param({}, id="version 1.1"), pytest.param(TIED_T5, id="tied")]
NOTHING = np.array([], np.int64)


def _forced(folder: Path, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Logits [T + 1, V] after the start token and after each target token."""
    model = EncoderDecoder(folder, threads=1, capacity=CONTEXT)
    return np.stack([model.prefill(source), *(model.step(int(token)) for token in target)])


def _torch(model: Any, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(source)[None], decoder_input_ids=torch.tensor([[0, *target]])).logits[0].numpy()


def _generated(model: Any, source: np.ndarray, count: int) -> list[int]:
    """What transformers makes of it; without its cache, which takes both stacks to be equally deep."""
    settings = {"do_sample": False, "num_beams": 1, "use_cache": False, "max_new_tokens": count, "min_new_tokens": 0}
    with torch.no_grad():
        return model.generate(torch.from_numpy(source)[None], eos_token_id=None, **settings)[0, 1:].tolist()


# ---- units


def test_units_of_an_encoder_decoder(graphs: Graphs) -> None:
    graph = graphs("t5", **TIED_T5)
    expected = [
        ("shared", "Gather", HIDDEN, VOCABULARY, "embedding", ""),
        ("lm_head", "MatMul", HIDDEN, VOCABULARY, "head", "target"),
    ]
    attention = [("q", HIDDEN, 32), ("k", HIDDEN, 32), ("v", HIDDEN, 32), ("o", 32, HIDDEN)]
    forward = [("DenseReluDense.wi", HIDDEN, 160), ("DenseReluDense.wo", 160, HIDDEN)]
    for stack, layers, side in (("encoder", 2, "source"), ("decoder", 3, "target")):
        for layer in range(layers):
            place = f"{stack}.block.{layer}"
            expected += [(f"{place}.SelfAttention.{name}", "MatMul", K, N, "linear", side) for name, K, N in attention]
            expected += [(f"{place}.{name}", "MatMul", K, N, "linear", side) for name, K, N in forward]
            for name, K, N in attention if stack == "decoder" else []:
                cross = "source" if name in "kv" else "target"
                expected.append((f"{place}.EncDecAttention.{name}", "MatMul", K, N, "linear", cross))
    assert sorted((unit.name, unit.op, unit.K, unit.N, unit.role, unit.side) for unit in graph.units) == sorted(expected)
    assert (graph.kind, graph.encoder_layers, graph.layers, graph.kv_heads, graph.head_dim) == ("encoder-decoder", 2, 3, 4, 8)
    assert (graph.hidden, graph.vocabulary, graph.context, graph.attention_width) == (HIDDEN, VOCABULARY, CONTEXT, 32)
    assert Graph.open(graph.directory) == graph


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_a_units_weight_is_its_modules(graphs: Graphs, name: str, changes: dict[str, Any]) -> None:
    """Also: no linear of the model is forgotten, and none is in two units."""
    graph, modules = graphs(name, **changes), dict(random_model(name, **changes).named_modules())
    for unit in graph.units:
        np.testing.assert_array_equal(graph.weight(unit), modules[unit.modules[0]].weight.detach().numpy())
        np.testing.assert_array_equal(graph.first_row(unit), graph.weight(unit)[0])
    seen = [unit.modules[0] for unit in graph.units]
    linears = {path for path, module in modules.items() if isinstance(module, torch.nn.Linear)}
    assert len(seen) == len(set(seen))
    assert set(seen) == {*linears, "shared"}


def test_every_unit_is_where_it_runs_under_one_name(graphs: Graphs) -> None:
    graph = graphs("t5")
    nodes = {name: {node.name for node in read_model(graph.directory, name).graph.node} for name in (ENCODER, FIRST_STEP, STEP)}
    for unit in graph.units:
        cross = unit.side == "source" and unit.name.startswith("decoder")
        runs_in = {ENCODER} if unit.side == "source" else {STEP} if unit.side == "target" else {ENCODER, STEP}
        present = {name for name in nodes if unit.node in nodes[name]}
        # optimum's first step: all of the decoder, with the keys and values that our encoder makes already.
        assert present == runs_in | ({FIRST_STEP} if cross or STEP in runs_in else set())


def test_equal_tensors_of_the_three_graphs_are_stored_once(graphs: Graphs, tmp_path: Path) -> None:
    for kernel in ("fp32", "w8g32"):
        for changes in ({}, TIED_T5):
            graph, folder = graphs("t5", **changes), tmp_path / f"{kernel}-{len(changes)}"
            folder.mkdir()
            assemble(graph, uniform(kernel, graph.units), round_to_nearest(graph), folder)
            units = [unit for unit in graph.units if not (changes and unit.name == "lm_head")]
            expected = sum(packed_bytes(unit, CATALOGUE[kernel]) for unit in units)
            # Tensors below 1 KiB (norms, position biases, some scales) are inline instead; the others are aligned to 64 bytes.
            assert 0.9 * expected < (folder / DATA_NAME).stat().st_size < expected + 64 * 3 * len(units)


# ---- numbers


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_fp32_computes_what_torch_computes(graphs: Graphs, name: str, changes: dict[str, Any]) -> None:
    """Tolerance 1e-5 relative: float32 sums in another order differ by some 1e-6 here, wrong position biases by 1e-2 or more."""
    source, target = source_tokens(), source_tokens(40, seed=1)
    got = _forced(graphs(name, **changes).directory, source, target)
    assert relative_error(got, _torch(random_model(name, **changes), source, target)) < 1e-5


@pytest.mark.parametrize("changes", TIED_OR_NOT)
def test_greedy_tokens_are_those_of_transformers(graphs: Graphs, changes: dict[str, Any]) -> None:
    directory, model = graphs("t5", **changes).directory, random_model("t5", **changes)
    for seed in range(3):
        assert greedy(directory, source_tokens(9, seed), 24) == _generated(model, source_tokens(9, seed), 24)


def test_a_new_source_does_not_see_the_one_before(graphs: Graphs) -> None:
    model = EncoderDecoder(graphs("t5").directory, threads=1, capacity=8)
    with pytest.raises(InputError, match="source"):
        model.step(3)
    first = model.prefill(source_tokens(5))
    model.step(7)
    assert model.used == 2
    model.prefill(source_tokens(30, seed=2))
    np.testing.assert_array_equal(model.prefill(source_tokens(5)), first)
    model.reset()
    np.testing.assert_array_equal(model.step(0), first)
    model.seek(7, source=3)
    model.step(1)
    with pytest.raises(InputError, match="at most 8"):
        model.step(1)
    with pytest.raises(InputError, match="from 0 to 8"):
        model.seek(9)
    with pytest.raises(InputError, match="got 0"):
        model.prefill(NOTHING)


def _errors(graph: Graph, changes: dict[str, Any], policy: Policy, folder: Path, count: int) -> list[float]:
    """Sorted errors of the first logits after each of `count` short sources, of the policy's graphs, which are left in `folder`."""
    assemble(graph, policy, round_to_nearest(graph), folder)
    expecting, model = with_kernels(random_model("t5", **changes), graph, policy), EncoderDecoder(folder, threads=1, capacity=2)
    sources = [source_tokens(4, seed) for seed in range(count)]
    return sorted(relative_error(model.prefill(source), _torch(expecting, source, NOTHING)[0]) for source in sources)


def _package_size(graph: Graph, folder: Path) -> int:
    """Bytes of what was assembled and of what goes beside it."""
    return sum(path.stat().st_size for path in [*folder.iterdir(), *graph.companions()])


@pytest.mark.parametrize("kernel", ["w4g32", "w8a8", "w2g32", "mixed"])
@pytest.mark.parametrize("changes", TIED_OR_NOT)
def test_quantised_graphs_compute_what_their_numbers_mean(
    graphs: Graphs, tmp_path: Path, changes: dict[str, Any], kernel: str
) -> None:
    """Median over sequences 1e-5, as in test_graph_kernels: a sequence in which one activation lies in the middle between two int8 codes
    is off by 1e-2 from there on. Sources and targets are short, since int8_tensor rounds by the range of everything that is in flight."""
    graph = graphs("t5", **changes)
    policy = mixed_policy(graph) if kernel == "mixed" else uniform(kernel, graph.units)
    assert kernel != "mixed" or len(set(policy.values())) >= 7
    assert _errors(graph, changes, policy, tmp_path, 24)[12] < 1e-5
    assert package_bytes(graph, policy) == _package_size(graph, tmp_path)


_TIES = [("fp32", "w4g32"), ("w4g32", "fp32"), ("w4g32", "w4g32"), ("w8g32", "w2g32")]


@pytest.mark.parametrize(("embedding", "head"), _TIES)
def test_tied_units_may_take_different_kernels(graphs: Graphs, tmp_path: Path, embedding: str, head: str) -> None:
    graph = graphs("t5", **TIED_T5)
    policy = Policy.of({**uniform("fp32", graph.units), "shared": embedding, "lm_head": head})
    assert _errors(graph, TIED_T5, policy, tmp_path, 9)[4] < 1e-5
    assert package_bytes(graph, policy) == _package_size(graph, tmp_path)
