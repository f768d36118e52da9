"""Encoder-decoders (T5) from their costs to a package: what is predicted, timed and weighed, and the commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FEWER_PROCESSES, copied, environment
from fast_host import FastHost
from tiny_graphs import POCKET

pytest.importorskip("random_models")

import torch
from numerics import greedy, source_tokens
from random_models import HIDDEN, TIED_T5, VOCABULARY, random_model

from toolchain.commands import deciding
from toolchain.costs.operations import flops, tokens_in_flight
from toolchain.errors import InputError
from toolchain.graph.external import DATA_NAME
from toolchain.graph.model import Graph
from toolchain.hardware import load
from toolchain.package.manifest import open_package
from toolchain.profiler import measure
from toolchain.profiler.ask import Host
from toolchain.profiler.model_rows import label, points, subject
from toolchain.profiler.phases import EncoderDecoderPhases
from toolchain.profiler.profile import check_workload
from toolchain.session import ENCODER, FIRST_STEP, STEP
from toolchain.spec import Phase, Workload

Graphs = Callable[..., Graph]
Cli = Callable[..., Any]
FILES = (ENCODER, FIRST_STEP, STEP)


# ---- costs


def test_tokens_in_flight_by_side(graphs: Graphs) -> None:
    prefill, decode = Workload.parse("generate:64+32").phases
    seen = {unit.name: (tokens_in_flight(unit, prefill), tokens_in_flight(unit, decode)) for unit in graphs("t5").units}
    assert seen["shared"] == (64, 1)
    assert seen["lm_head"] == (1, 1)
    assert seen["encoder.block.1.DenseReluDense.wo"] == (64, 0)
    assert seen["decoder.block.1.EncDecAttention.k"] == seen["decoder.block.0.EncDecAttention.v"] == (64, 0)
    assert seen["decoder.block.1.EncDecAttention.q"] == seen["decoder.block.0.SelfAttention.k"] == (1, 1)


def test_operations_are_counted_where_they_happen(graphs: Graphs) -> None:
    graph = graphs("t5", **TIED_T5)
    layer = 4 * HIDDEN * 32 + 2 * HIDDEN * 160
    source = 2 * layer + 3 * 2 * HIDDEN * 32
    target = 3 * (layer + 2 * HIDDEN * 32) + HIDDEN * VOCABULARY
    attended = 2 * 5 * 5 + 3 * (4 * 5 + (1 + 2 + 3 + 4))
    counted = flops(graph.units, Workload.parse("generate:5+3"), graph.layers, graph.attention_width, graph.encoder_layers)
    assert counted == 2 * (5 * source + 4 * target) + 4 * 32 * attended


def test_a_prediction_is_the_sum_of_what_runs(graphs: Graphs, made_up_table: Any, cli: Cli) -> None:
    """The made-up table's whole models cost their units' sum and a constant: a prediction must find both again, in each phase."""
    from small_tables import MS_PER_POSITION, OVERHEAD_MS, unit_ms

    graph = graphs("t5")
    said = cli("predict", graph.directory, "--policy", "w4g32", "--profiles", made_up_table(graph), "--json").json
    prefill, decode = Workload.parse(said["workload"]).phases
    for phase, name in ((prefill, "first_token_ms"), (decode, "latency_ms")):
        flying = [(unit, tokens_in_flight(unit, phase)) for unit in graph.units]
        expected = (
            OVERHEAD_MS + MS_PER_POSITION * phase.past + sum(unit_ms(unit, "w4g32", tokens) for unit, tokens in flying if tokens)
        )
        assert said[name]["value"] == pytest.approx(expected, rel=1e-3)
    assert said["compute_flop"]["value"] > 0


def test_a_workload_has_a_source_and_a_target_of_at_most_the_context(graphs: Graphs) -> None:
    check_workload(graphs("t5"), Workload.parse("generate:256+256"))
    for workload, word in (("generate:257+1", "256"), ("generate:1+257", "256"), ("encode:1x8", "generate")):
        with pytest.raises(InputError, match=word):
            check_workload(graphs("t5"), Workload.parse(workload))


def test_phases_are_timed_with_source_and_target_apart(graphs: Graphs) -> None:
    graph, workload = graphs("t5"), Workload.parse("generate:24+16")
    phases = points(graph, workload, everywhere=True)
    assert {(phase.past, phase.prompt) for phase in phases if phase.name == "decode"} == {(16, 12), (32, 24), (128, 96), (248, 186)}
    timed = EncoderDecoderPhases(subject(graph, "t5", graph.directory, phases), 1, False).trial()
    assert set(timed) == {label(phase) for phase in phases}
    assert min(timed.values()) > 0
    lopsided = points(graph, Workload.parse("generate:1+200"), everywhere=True)
    assert min(phase.prompt for phase in lopsided if phase.name == "decode") == 1


def test_a_memory_trial_fills_the_cache(graphs: Graphs) -> None:
    graph = graphs("t5")
    what = subject(graph, "t5", graph.directory, [Phase("prefill", 1, 24)])
    weighed = EncoderDecoderPhases({**what, "capacity": 40}, 1, False)
    weighed.trial()
    assert weighed._model.used == 40 - 24


# ---- the command


@pytest.fixture(scope="session")
def speaking(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 folder with a tokenizer: the pocket model's first words are enough."""
    folder = copied(models("t5", vocab_size=4096), tmp_path_factory.mktemp("speaking") / "t5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    return folder


@pytest.fixture(scope="session")
def package(speaking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported through the command, under a policy of two kernels."""
    from toolchain.cli import main

    place = tmp_path_factory.mktemp("package")
    graph = random_model("t5", vocab_size=4096)
    names = {
        name.replace(".layer.0", "").replace(".layer.1", "").replace(".layer.2", "")
        for name, part in graph.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    choice = {name: "w8a8" if "encoder" in name else "w4g32" for name in names} | {"shared": "w8g32"}
    (place / "policy.json").write_text(json.dumps({"units": choice}))
    words = ["export", speaking, "--policy", place / "policy.json", "--profiles", place, "--out", place / "out"]
    assert main([str(word) for word in words]) == 0
    assert dict(open_package(place / "out").policy) == choice
    return place / "out"


def test_a_package_is_complete_and_runs(package: Path, cli: Cli) -> None:
    assert {*FILES, DATA_NAME, "config.json", "generation_config.json", "tokenizer.json"} <= set(
        open_package(package).data["files"]
    )
    said = cli("run", package, "Once upon a time", "--tokens", "6", "--json").json
    assert len(said["tokens"]) == 6
    assert said["stopped"] == "new_tokens"
    from toolchain.text import load_tokenizer

    tokenizer = load_tokenizer(package)
    assert said["tokens"] == greedy(package, np.array(tokenizer.encode("Once upon a time").ids), 6)
    assert cli("run", package, "Once upon a time", "--tokens", "6").out == tokenizer.decode(said["tokens"]) + "\n"


def test_a_target_ends_with_the_end_token_or_the_context(package: Path, tmp_path: Path, cli: Cli) -> None:
    from toolchain.package.generate import generate

    folder = copied(package, tmp_path / "out")
    tokens = generate(folder, "Once", 4).tokens
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [4000, tokens[2]]}))
    found = generate(folder, "Once", 4)
    assert (found.tokens, found.stopped) == (tokens[: tokens.index(tokens[2])], "end_of_text")
    (folder / "generation_config.json").write_text(json.dumps({**settings, "n_positions": 3, "eos_token_id": 4095}))
    found = generate(folder, "Once", 9)
    assert (len(found.tokens), found.stopped) == (3, "context")
    with pytest.raises(InputError, match="1 to 3 tokens"):
        generate(folder, "Once upon a time in the west", 1)


@pytest.mark.parametrize("name", FILES)
def test_a_package_that_lacks_a_graph_is_refused(package: Path, tmp_path: Path, cli: Cli, fast: FastHost, name: str) -> None:
    folder = copied(package, tmp_path / "out")
    (folder / name).unlink()
    assert name in cli("check", folder, "--latency-ms", "5").error
    assert fast.timed == []


def test_the_agent_runs_a_package(package: Path) -> None:
    """Both stacks are in what it weighs: the data file holds them and nothing else."""
    what = measure.subject("package", package, Workload.parse("generate:24+4"), 4096)
    seen = Host(load("local"), 1).peak(what)
    assert seen["peak_bytes"] > 0.5 * (package / DATA_NAME).stat().st_size


@pytest.mark.slow  # waits for a quiet machine
def test_check_measures_an_encoder_decoder(package: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "LOOKS", FEWER_PROCESSES)
    result = cli("check", package, "--memory-mb", "500", "--latency-ms", "1000", "--json")
    found = {verdict["name"]: verdict["verdict"] for verdict in result.json["limits"]}
    assert found["peak_memory_bytes"] == "within"
    assert found["latency_ms"] in ("within", "could not tell")  # others may be using the machine
    assert result.json["measured"]["first_token_ms"]["value"] > result.json["measured"]["latency_ms"]["value"] > 0


def test_what_is_not_there_yet_is_refused_in_one_line(package: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "text.txt").write_text("some words\n")
    assert "encoder-decoder" in cli("evaluate", package, "--text", tmp_path / "text.txt").error


def test_a_checkpoint_that_lacks_a_layer_is_refused(models: Any, tmp_path: Path, cli: Cli) -> None:
    from safetensors.numpy import load_file, save_file

    folder, lost = copied(models("t5"), tmp_path / "model"), "decoder.block.1.layer.1.EncDecAttention.k"
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{lost}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert lost in cli("units", folder).error


_OPTIMUM = """if True:
    import sys, torch
    from optimum.onnxruntime import ORTModelForSeq2SeqLM
    model = ORTModelForSeq2SeqLM.from_pretrained(sys.argv[1])
    ids = torch.tensor([[int(word) for word in sys.argv[2:]]])
    made = model.generate(ids, do_sample=False, num_beams=1, max_new_tokens=16, eos_token_id=None)
    print(*made[0, 1:].tolist())
"""


@pytest.mark.slow
def test_optimum_loads_a_package_and_says_the_same(package: Path) -> None:
    command = [sys.executable, "-c", _OPTIMUM, str(package), *map(str, source_tokens())]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == greedy(package, source_tokens(), 16)
