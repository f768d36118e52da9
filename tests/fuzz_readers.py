"""Every reader of what strangers write, each as its command calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fuzz_devices import OF_DEVICES, add_valid
from fuzz_sandbox import Reader

from toolchain import hardware
from toolchain.blocks import Block
from toolchain.check import hold_peak_ratio, hold_ratio
from toolchain.commands import workflow
from toolchain.commands.baseline import Baseline
from toolchain.commands.verification import verify
from toolchain.costs.from_table import cost_model
from toolchain.costs.table import open_table
from toolchain.evaluate.spans import read_squad
from toolchain.evaluate.tasks import TASKS
from toolchain.graph import build
from toolchain.graph.assemble import package_bytes, round_to_nearest
from toolchain.graph.external import load_array, read_model
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, uniform
from toolchain.package import generate
from toolchain.package.manifest import open_package
from toolchain.policy import prices, proposal
from toolchain.profiler.measure import summarise
from toolchain.report import records
from toolchain.session import cache_slots, open_session
from toolchain.spec import Device, Workload
from toolchain.supernet.store import SupernetFolder
from toolchain.text import documents, load_tokenizer, separator_id

WORKLOAD = Workload.parse("generate:8+4")
"""Of the seeds."""


def _device(folder: Path) -> object:
    device = hardware.load(str(folder / "board.yaml"))
    hash(device)
    return json.dumps([device.title, {name: budget.to_json() for name, budget in device.budgets.items()}]), hardware.meter(
        device, {}
    )


def _devices(folder: Path) -> object:
    found = hardware.list_devices(folder)
    return [hardware.named_budget("sources/low", device, folder) for device in found]


def _budget(folder: Path) -> object:
    return json.dumps(hardware.read_budget(folder / "budget.yaml").to_json())


class _Known:
    """Read once from the seeds, for readers that need a graph beside the file they read."""

    graph: Graph
    source: workflow.Source
    kernels: tuple[str, ...]
    blocks: tuple[Block, ...]


def _policy(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        return workflow.read_policy(str(folder / name), _Known.source, Device("nobody", transport="ssh", host="nobody"), [folder])

    return read


def _table(folder: Path) -> object:
    table = open_table(folder / "table.jsonl")
    model = cost_model(_Known.graph, table, WORKLOAD)
    cost = model.predict(uniform("w4g32", _Known.graph.units, table.header.kernels))
    json.dumps(cost.to_json())
    return model.predict(uniform("fp32", _Known.graph.units, table.header.kernels))


def _stored_budget(folder: Path) -> object:
    path = next(folder.glob("budgets-*.json"))
    return [workflow._stored_budget(path, name).to_json() for name in ("low", "high")]


def _manifest(folder: Path) -> object:
    package = open_package(folder)
    said = (
        package.policy,
        package.workload,
        package.budget,
        package.vocabulary,
        package.predicted,
        package.speeds,
        package.provider,
    )
    json.dumps([str(one) for one in said])
    package.predicted.get("compute_flop", {}).get("value")
    return json.dumps(package.predicted), [CATALOGUE[name].prefill for name in package.policy.values()]


def _session(folder: Path) -> object:
    package = open_package(folder)
    session = open_session(package.directory, threads=1)
    return cache_slots(session)


def _graph(folder: Path) -> object:
    graph = Graph.open(folder)
    policy = uniform("w4g32", graph.units)
    bytes_ = package_bytes(graph, policy)
    return (
        bytes_,
        [graph.first_row(unit) for unit in graph.units],
        graph.cache_bytes_per_layer(16),
        [graph.weight(unit).sum() for unit in graph.units],
    )


def _external(folder: Path) -> object:
    model = read_model(folder)
    return [load_array(tensor, folder).shape for tensor in model.graph.initializer]


def _supernet(folder: Path) -> object:
    supernet = SupernetFolder.open(folder)
    supernet.calibration(), supernet.heldout(), supernet.sensitivity
    json.dumps(dict(supernet.description["training"]))
    workflow.trained_workload(workflow.Source(_Known.graph, supernet.quantized, supernet))
    for unit in _Known.graph.units:
        for name in supernet.kernels:
            if CATALOGUE[name].quantised and name in supernet.description["kernels"].get(unit.name, ()):
                supernet.quantized(unit, CATALOGUE[name])
    return supernet.trained()


def _meta_network(folder: Path) -> object:
    proposal.log_probabilities(folder / "meta_network.safetensors", [0.5] * 4)
    from toolchain.policy.meta_network import MetaNetwork

    return MetaNetwork.load(folder / "meta_network.safetensors")


def _checkpoint(folder: Path) -> object:
    import torch

    from toolchain.train import checkpoint

    values = {"a": torch.nn.Parameter(torch.ones(4, 4)), "b": torch.nn.Parameter(torch.zeros(4))}
    state = checkpoint.load(folder, "id", values, [torch.optim.AdamW(values.values())])
    return state and (state.step + 1, dict(state.extra))


def _tokenizer(folder: Path) -> object:
    tokenizer = load_tokenizer(folder)
    return tokenizer.encode("Once upon a time").ids, separator_id(folder), tokenizer.decode([1, 2, 3])


def _settings(folder: Path) -> object:
    return generate._settings(folder)


def _encoder_decoder(folder: Path) -> object:
    return generate._encoder_decoder_settings(folder)


def _config(folder: Path) -> object:
    build.resolve(str(folder))
    return build.read_config(folder)


def _torch_model(folder: Path) -> object:
    from toolchain.supernet.loading import load_model

    return load_model(folder)


def _index(folder: Path) -> object:
    return build._weight_files(folder)


def _text(folder: Path) -> object:
    return documents([folder / "text.txt"])


def _sealed(folder: Path) -> object:
    said = verify(folder)
    return json.dumps(said.to_json())


def _baseline(folder: Path) -> object:
    read = Baseline.read(folder / "check.json")
    now = _Known.blocks
    return [hold_ratio(name, now, read.blocks, 1) for name in ("latency_ms", "first_token_ms") if name in read.blocks[0].trials], [
        hold_peak_ratio(summarise([1e6] * 3, True), read.peak_bytes)
    ]


def _record(name: str) -> Callable[[Path], object]:
    return lambda folder: json.dumps(records.read(folder / name).said)


EVERY = (
    Reader("device file", "devices", ("board.yaml",), _device, 1, closed=False),
    Reader("device folder, presets", "devices", ("board.yaml", "local.yaml", "presets/sources.yaml"), _devices, 0.3, closed=False),
    Reader("budget file", "other", ("budget.yaml",), _budget, 2, closed=False),
    Reader("policy file, YAML", "other", ("policy.yaml",), _policy("policy.yaml"), 0.6, closed=False),
    Reader("policy file, JSON", "other", ("policy.json",), _policy("policy.json"), 1.5, closed=False),
    Reader("cost table", "tables/local", ("table.jsonl",), _table, 0.7, closed=False, honest=True),
    Reader("stored budgets", "tables/local", ("budgets-*.json",), _stored_budget, 2, closed=False),
    Reader("manifest", "package", ("manifest.yaml",), _manifest, 1, honest=True),
    Reader("package's graph, onnxruntime", "package", ("model.onnx",), _session, 0.7, honest=True),
    Reader("package's graph, external data", "package", ("model.onnx",), _external, 2),
    Reader("sealed report", "sealed", ("seal.json", "seal.json.minisig"), _sealed, 0.7, honest=True),
    Reader("baseline", "reports", ("check.json",), _baseline, 1, closed=False),
    Reader("measured, check's report", "reports", ("check.json",), _record("check.json"), 1, closed=False),
    Reader("measured, evaluate's report", "reports", ("evaluate.json",), _record("evaluate.json"), 1.5, closed=False),
    Reader("graph folder", "graph", ("graph.json", "model.onnx"), _graph, 1),
    Reader("supernet.yaml", "supernet", ("supernet.yaml",), _supernet, 0.3),
    Reader(
        "supernet's tensors",
        "supernet",
        ("quantised/*.safetensors", "adapters/**/*.safetensors", "*.safetensors"),
        _supernet,
        0.4,
        honest=True,
    ),
    Reader("meta-network", "supernet", ("meta_network.safetensors",), _meta_network, 2),
    Reader("prices", "other", ("prices.safetensors",), lambda folder: prices.read(folder / "prices.safetensors"), 2),
    Reader("checkpoint", "checkpoint", ("checkpoint.safetensors",), _checkpoint, 2),
    Reader("tokenizer", "package", ("tokenizer.json", "tokenizer_config.json"), _tokenizer, 1),
    Reader("genai_config.json", "package", ("genai_config.json",), _settings, 2),
    Reader("encoder-decoder's configs", "other", ("config.json", "generation_config.json"), _encoder_decoder, 2),
    Reader("model's config.json", "model", ("config.json",), _config, 2, closed=False),
    Reader("model, transformers", "model", ("config.json", "model.safetensors"), _torch_model, 0.1, closed=False),
    Reader("index of weights", "other", ("model.safetensors.index.json",), _index, 2, closed=False),
    Reader("text", "other", ("text.txt",), _text, 2, links=False),
    Reader("text, packed", "other", ("text.txt.xz",), lambda folder: documents([folder / "text.txt.xz"]), 2, links=False),
    Reader("questions", "tasks", ("squad.json",), lambda folder: read_squad(folder / "squad.json"), 2, closed=False),
    *(Reader(f"examples of {task.name}", "tasks", task.files[1:], task.examples, 0.7, closed=False) for task in TASKS.values()),
    *OF_DEVICES,
)


def readers(seeds: Path) -> dict[str, Reader]:
    """`EVERY` by name, ready to read. seeds: what `fuzz_seeds.make` made, to which the inputs of some readers are added."""
    _Known.graph = Graph.open(seeds / "graph")
    _Known.source = workflow.Source(_Known.graph, round_to_nearest(_Known.graph), None)
    _Known.blocks = Baseline.read(seeds / "reports" / "check.json").blocks
    if not (seeds / "talk").is_dir():
        (seeds / "tasks").mkdir()
        for task in TASKS.values():
            places = dict(zip(task.columns, ("1", "a film of parts", "not this one"), strict=True))
            line = "\t".join(places.get(column, "x") for column in range(task.width))
            (seeds / "tasks" / task.files[1]).write_text(f"{line}\n" * (3 if task.header else 2))
        question = {"question": "When?", "answers": [{"text": "1973", "answer_start": 3}]}
        paragraph = {"context": "In 1973 it rose.", "qas": [question]}
        (seeds / "tasks" / "squad.json").write_text(json.dumps({"data": [{"title": "Oil", "paragraphs": [paragraph]}]}))
        add_valid(seeds)
    return {reader.name: reader for reader in EVERY}
