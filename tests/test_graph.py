"""The fp32 graphs against the models they were made from: units, numbers, the cache, and what tells one model from another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import copied

pytest.importorskip("random_models")

import torch
from numerics import relative_error, run_graph, run_torch, tokens
from random_models import CONTEXT, DECODERS, ENCODERS, HIDDEN, VOCABULARY, random_model

from toolchain.decoding import Decoder
from toolchain.errors import DamagedFileError
from toolchain.graph.build import fingerprint
from toolchain.graph.model import Graph

Graphs = Callable[..., Graph]

# name, architecture, changes: every builder path that differs
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, "", {}) for name in (*DECODERS, *ENCODERS)),
    ("llama", "", {"tie_word_embeddings": True}),
    ("mistral", "", {"sliding_window": 16, "head_dim": 32}),
    ("llama", "", {"num_key_value_heads": 4}),
    ("bert", "BertForMaskedLM", {}),
    ("bert", "BertForSequenceClassification", {}),
    ("roberta", "RobertaForSequenceClassification", {}),
    ("distilbert", "DistilBertForMaskedLM", {}),
]
_IDS = ["-".join([name, architecture, *changes]).replace("--", "-").strip("-") for name, architecture, changes in VARIANTS]


# ---- units


def test_units_of_a_decoder(graphs: Graphs) -> None:
    graph = graphs("qwen2")
    expected = [("embed_tokens", "Gather", HIDDEN, VOCABULARY, "embedding")]
    for layer in range(4):
        expected += [
            (f"layers.{layer}.attn.qkv_proj", "MatMul", HIDDEN, HIDDEN + 2 * HIDDEN // 2, "linear"),
            (f"layers.{layer}.attn.o_proj", "MatMul", HIDDEN, HIDDEN, "linear"),
            (f"layers.{layer}.mlp.gate_proj", "MatMul", HIDDEN, 160, "linear"),
            (f"layers.{layer}.mlp.up_proj", "MatMul", HIDDEN, 160, "linear"),
            (f"layers.{layer}.mlp.down_proj", "MatMul", 160, HIDDEN, "linear"),
        ]
    expected.append(("lm_head", "MatMul", HIDDEN, VOCABULARY, "head"))
    assert sorted((unit.name, unit.op, unit.K, unit.N, unit.role) for unit in graph.units) == sorted(expected)
    assert (graph.kind, graph.layers, graph.kv_heads, graph.head_dim) == ("decoder", 4, 2, 16)
    assert (graph.hidden, graph.vocabulary, graph.context) == (HIDDEN, VOCABULARY, CONTEXT)


def test_a_graph_folder_stands_for_its_model(graphs: Graphs, cli: Any) -> None:
    """Where there is no torch, a supernet's own graph is what can be profiled."""
    graph = graphs("llama")
    again = cli("units", graph.directory, "--json")
    assert again.code == 0
    assert again.out == cli("units", graph.source, "--json").out


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_the_context_is_the_longest_sequence_that_runs(graphs: Graphs, name: str) -> None:
    """RoBERTa's position table is two longer than that."""
    assert graphs(name).context == CONTEXT
    assert np.isfinite(run_graph(graphs(name).directory, tokens(1, CONTEXT))).all()


def test_the_attention_width_is_the_heads_not_the_hidden_size(graphs: Graphs) -> None:
    assert graphs("mistral", sliding_window=16, head_dim=32).attention_width == 4 * 32
    assert graphs("mistral").attention_width == graphs("bert").attention_width == HIDDEN


def test_units_of_an_encoder(graphs: Graphs) -> None:
    graph = graphs("bert")
    expected = [("embeddings.word_embeddings", "Gather", HIDDEN, VOCABULARY)]
    for layer in range(2):
        place = f"encoder.layer.{layer}"
        expected += [(f"{place}.attention.self.{name}", "MatMul", HIDDEN, HIDDEN) for name in ("query", "key", "value")]
        expected += [
            (f"{place}.attention.output.dense", "MatMul", HIDDEN, HIDDEN),
            (f"{place}.intermediate.dense", "MatMul", HIDDEN, 128),
            (f"{place}.output.dense", "MatMul", 128, HIDDEN),
        ]
    assert sorted((unit.name, unit.op, unit.K, unit.N) for unit in graph.units) == sorted(expected)
    assert (graph.kind, graph.layers, graph.hidden, graph.vocabulary, graph.context) == ("encoder", 2, HIDDEN, VOCABULARY, CONTEXT)


@pytest.mark.parametrize(("name", "architecture", "changes"), VARIANTS, ids=_IDS)
def test_a_units_weight_is_the_rows_of_its_modules(graphs: Graphs, name: str, architecture: str, changes: dict[str, Any]) -> None:
    """Also: no linear of the model is forgotten, and none is in two units."""
    graph = graphs(name, architecture, **changes)
    modules = dict(random_model(name, architecture, **changes).named_modules())
    seen = []
    for unit in graph.units:
        rows = np.concatenate([modules[module].weight.detach().numpy() for module in unit.modules])
        np.testing.assert_array_equal(graph.weight(unit), rows)
        assert rows.shape == (unit.N, unit.K)
        seen += unit.modules
    linears = {path for path, module in modules.items() if isinstance(module, torch.nn.Linear)}
    if architecture == "" and name in ENCODERS:
        linears -= {"pooler.dense"}  # of the classification head that `BertModel` carries: not in the hidden states
    assert len(seen) == len(set(seen))
    assert {path for path in seen if "embed" not in path} == linears


def test_tied_units_name_each_other(graphs: Graphs) -> None:
    tied = {unit.name: unit.tied_to for unit in graphs("llama", tie_word_embeddings=True).units if unit.tied_to}
    assert tied == {"embed_tokens": "lm_head", "lm_head": "embed_tokens"}
    assert not any(unit.tied_to for unit in graphs("llama").units)


def test_a_graph_folder_reads_back(graphs: Graphs, tmp_path: Path) -> None:
    graph = graphs("llama")
    assert Graph.open(graph.directory) == graph
    damaged = copied(graph.directory, tmp_path / "graph")
    (damaged / "graph.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"graph\.json"):
        Graph.open(damaged)


# ---- fp32


@pytest.mark.parametrize(("name", "architecture", "changes"), VARIANTS, ids=_IDS)
def test_the_fp32_graph_computes_what_torch_computes(graphs: Graphs, name: str, architecture: str, changes: dict[str, Any]) -> None:
    """Tolerance 1e-5 relative: float32 sums in another order were seen to differ by 3e-7 to 6e-7 here, a dropped bias by 1e-1."""
    graph = graphs(name, architecture, **changes)
    ids = tokens(2, 40)
    got, expected = run_graph(graph.directory, ids), run_torch(random_model(name, architecture, **changes), ids)
    assert got.shape == expected.shape
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_does_not_change_an_encoders_tokens(graphs: Graphs, name: str) -> None:
    ids, mask = tokens(2, 24), np.ones((2, 24), np.int64)
    mask[1, 9:] = 0
    got, expected = run_graph(graphs(name).directory, ids, mask), run_torch(random_model(name), ids, mask)
    assert relative_error(got[0], expected[0]) < 1e-5
    assert relative_error(got[1, :9], expected[1, :9]) < 1e-5


@pytest.mark.parametrize("name", DECODERS)
def test_token_by_token_with_a_bound_cache_equals_torch(graphs: Graphs, name: str) -> None:
    ids = tokens(1, 20)
    expected = run_torch(random_model(name), ids)[0]
    decoder = Decoder(graphs(name).directory, threads=1, capacity=CONTEXT)
    got = [decoder.prefill(ids[0, :12]), *(decoder.step(int(token)) for token in ids[0, 12:])]
    assert relative_error(np.stack(got), expected[11:]) < 1e-5


# ---- which model it is


def test_the_fingerprint_follows_the_weights_and_nothing_else(models: Any, graphs: Graphs, tmp_path: Path) -> None:
    folder = copied(models("llama"), tmp_path / "model")
    assert fingerprint(folder) == graphs("llama").fingerprint
    (folder / "README.md").write_text("more")
    assert fingerprint(folder) == graphs("llama").fingerprint
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    assert fingerprint(folder) != graphs("llama").fingerprint
