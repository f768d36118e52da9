"""What is mutated: a model, its graph, table, package, supernet and checkpoint, made by the commands' own code, as small as they come."""

from __future__ import annotations

import json
import lzma
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from constructed_sysfs import package as rapl_package
from constructed_sysfs import write
from fast_host import FastHost
from fuzz_readers import WORKLOAD
from random_models import save_random_model
from small_tables import complete_table
from tiny_graphs import POCKET

from toolchain.cli import main
from toolchain.costs.from_table import cost_model
from toolchain.graph.assemble import round_to_nearest
from toolchain.graph.build import build
from toolchain.hardware import shipped
from toolchain.kernels import uniform
from toolchain.package.export import export_package
from toolchain.policy import budgets, prices
from toolchain.policy.meta_network import MetaNetwork
from toolchain.profiler.ask import Host
from toolchain.spec import Budget
from toolchain.supernet import saving, store
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.train import checkpoint

KERNELS = ("fp32", "w8a8", "w4g32")
_TINY = {
    "vocab_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def make(root: Path) -> Path:
    """All of it in `root`, which is returned: devices/ tables/ model/ graph/ package/ sealed/ reports/ supernet/ ..."""
    torch.set_num_threads(1)
    model = save_random_model("llama", root / "model", **_TINY)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(POCKET / name, model / name)
    (model / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (root / "graph").mkdir()
    graph = build(str(model), root / "graph")
    workload = WORKLOAD
    table = complete_table(graph, workload)
    table.save(root / "tables" / "local" / "table.jsonl")
    costs = cost_model(graph, table, workload)
    stored = {name: budget.to_json() for name, budget in budgets.derive(costs).items()}
    name = f"budgets-{graph.fingerprint[:12]}-{str(WORKLOAD).replace(':', '-')}.json"
    (root / "tables" / "local" / name).write_text(json.dumps({"workload": str(WORKLOAD), **stored}, indent=1))
    policy = uniform("w4g32", graph.units)
    export_package(
        graph,
        policy,
        round_to_nearest(graph),
        root / "package",
        workload=workload,
        device="local",
        provider="CPUExecutionProvider",
        budget=Budget(latency_ms=5.0, peak_memory_bytes=1e7, name="low"),
        predicted=costs.predict(policy),
        gap_to_optimum=0.0,
        runtime="onnxruntime",
        evidence={"reference_ns": {"latency_ms": {"token": 1000.0}}, "measured_on": table.header.identity},
    )
    _supernet(root, graph, policy)
    values = {"a": torch.nn.Parameter(torch.ones(4, 4)), "b": torch.nn.Parameter(torch.zeros(4))}
    optimiser = torch.optim.AdamW(values.values())
    sum(value.sum() for value in values.values()).backward()
    optimiser.step()
    (root / "checkpoint").mkdir()
    checkpoint.save(root / "checkpoint", "id", checkpoint.State(3, {"x": [1, 2]}), values, [optimiser])
    _others(root, dict(policy))
    _reports(root)
    return root


def _reports(root: Path) -> None:
    """sealed/: the package with a report in it; reports/: what the commands print. Measured by nobody (`fast_host.py`)."""
    shutil.copytree(root / "package", root / "sealed")
    (root / "reports").mkdir()
    fast = FastHost()
    with (
        patch.object(Host, "time", lambda self, *words: fast.time(self, *words)),
        patch.object(Host, "peak", lambda self, subject: fast.peak(self, subject)),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()),
    ):
        assert main(["check", str(root / "sealed"), "--json", "--seal"]) in (0, 1, 3)
    (root / "reports" / "check.json").write_text(out.getvalue())
    (root / "sealed" / "seal.json.minisig").write_bytes(b"untrusted comment: x\nRUQ=\ntrusted comment: y\nAA==\n")
    said = {"what": "package", "perplexity": 42.5, "tokens": 100, "window": 16, "text": "text.txt", "text_sha256": "0" * 64}
    (root / "reports" / "evaluate.json").write_text(json.dumps(said))


def _tokenizer() -> dict[str, Any]:
    """The pocket model's, with its first few merges: read in a millisecond."""
    whole = json.loads((POCKET / "tokenizer.json").read_text())
    model = whole["model"]
    made = {token: number for token, number in model["vocab"].items() if number < 330}
    parts = [(merge, merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"]]
    kept = [merge for merge, pair in parts if {*pair, "".join(pair)} <= set(made)]
    whole["model"] = {**model, "vocab": made, "merges": kept}
    return whole


def _supernet(root: Path, graph, policy) -> None:
    folder = root / "supernet"
    folder.mkdir()
    supernet = Supernet(load_model(root / "model"), graph.units, KERNELS, rank=2)
    shutil.copytree(root / "graph", folder / "graph")
    shutil.copytree(root / "model", folder / "model")
    MetaNetwork(supernet.kernels, width=8).save(folder / "meta_network.safetensors")
    windows = np.zeros((2, 16), np.int64)
    store.write_arrays(folder / "heldout.safetensors", {"tokens": windows})
    losses = {unit: {name: 0.1 * place for place, name in enumerate(names)} for unit, names in supernet.kernels.items()}
    training = {"text": "none", "steps": 1, "workload": str(WORKLOAD), "device": "local"}
    saving.save(supernet, folder, "model", losses, training, windows)


def _others(root: Path, policy: dict[str, str]) -> None:
    devices = root / "devices"
    (devices / "presets").mkdir(parents=True)
    shutil.copyfile(shipped("hardware") / "local.yaml", devices / "local.yaml")
    for path in [*(shipped("hardware") / "presets").glob("*.yaml")]:
        shutil.copyfile(path, devices / "presets" / path.name)
    (devices / "board.yaml").write_text(
        "name: board\ntitle: a board\ntransport: ssh\nhost: board.lan\nuser: pi\nport: 22\nidentity: ~/.ssh/id\npython: venv/bin/python\n"
        "folder: /data/bittailor\nthreads: 4\nmeter: auto\nbudgets:\n"
        "  small: {latency_ms: 5, memory_mb: 20.5}\n  large:\n    energy_mj: 1000.0\n"
    )
    other = root / "other"
    other.mkdir()
    (other / "policy.json").write_text(json.dumps({"units": policy}))
    (other / "policy.yaml").write_text("units:\n" + "".join(f"  {unit}: {kernel}\n" for unit, kernel in policy.items()))
    (other / "budget.yaml").write_text("latency_ms: 5\nmemory_mb: 20\n")
    shutil.copyfile(prices.SHIPPED, other / "prices.safetensors")
    (other / "config.json").write_text(json.dumps({"n_positions": 512, "eos_token_id": 1, "decoder_start_token_id": 0}))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    text = "One document.\n<|doc|>\nAnother, \u00e4 longer one.\n" * 20
    (other / "text.txt").write_text(text)
    (other / "text.txt.xz").write_bytes(lzma.compress(text.encode()))
    hwmon, battery = "class/hwmon/hwmon0", "class/power_supply/BAT0"
    files: dict[str, object] = {**rapl_package(0, 1000), f"{hwmon}/name": "ina3221", f"{hwmon}/update_interval": 20}
    files |= {f"{hwmon}/in1_label": "VDD_IN", f"{hwmon}/in1_input": 5000, f"{hwmon}/curr1_input": 900, f"{hwmon}/in1_enable": 1}
    files |= {f"{battery}/type": "Battery", f"{battery}/status": "Discharging", f"{battery}/present": 1}
    files |= {f"{battery}/current_now": -500000, f"{battery}/voltage_now": 3_800_000}
    gauge = "class/power_supply/BAT1"
    write(root / "sys", files)
    energy = {f"{gauge}/type": "Battery", f"{gauge}/status": "Discharging", f"{gauge}/energy_now": 40_000_000}
    write(root / "gauge", energy)
