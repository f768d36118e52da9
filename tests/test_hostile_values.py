"""Values of another kind than their reader expects, or none: refused in one line, and nothing is half done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import copied

pytest.importorskip("random_models")

import torch
import yaml
from refusals import refused

from toolchain.costs.table import open_table
from toolchain.errors import BittailorError, DamagedFileError, InputError
from toolchain.files import sha256
from toolchain.graph.model import Graph
from toolchain.package.manifest import manifest_text, open_package
from toolchain.profiler import agent, meters
from toolchain.profiler.meters import hwmon, rapl
from toolchain.profiler.transports import replies
from toolchain.spec import Device, Workload
from toolchain.supernet.store import SupernetFolder
from toolchain.train import checkpoint


def _rehashed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "supernet" / "supernet.yaml"
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data))


SUPERNETS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a sensitivity of words": lambda data: data["sensitivity"].update(lm_head="much"),
    "a sensitivity that is a list": lambda data: data["sensitivity"]["lm_head"].update(w4g32=[1]),
    "kernels that are a number": lambda data: data["kernels"].update(lm_head=4),
    "a kernel nobody knows": lambda data: data["kernels"]["lm_head"].append("w5g7"),
    "no training": lambda data: data.pop("training"),
    "a workload of words": lambda data: data["training"].update(workload="all of it"),
    "a rank below zero": lambda data: data.update(rank=-1),
    "a file with a long name": lambda data: data["files"].update({"a" * 5000: "0"}),
    "a date": lambda data: data["training"].update(text=__import__("datetime").date(2026, 1, 1)),
}


@pytest.mark.parametrize("name", SUPERNETS)
def test_supernets_that_say_something_else(place: Path, name: str) -> None:
    _rehashed(place, SUPERNETS[name])
    with refused():
        SupernetFolder.open(place / "supernet")


def test_an_adapter_that_is_none(place: Path) -> None:
    path = place / "supernet" / "adapters" / "w4g32" / "bounds.safetensors"
    path.write_bytes(b"not this")
    before = yaml.safe_load((place / "supernet" / "supernet.yaml").read_text())["files"]["adapters/w4g32/bounds.safetensors"]
    text = (place / "supernet" / "supernet.yaml").read_text()
    (place / "supernet" / "supernet.yaml").write_text(text.replace(before, sha256(path)))
    with refused("adapters"):
        SupernetFolder.open(place / "supernet").trained()


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "an infinite vocabulary": lambda data: data["model"].update(vocabulary=float("inf")),
    "a vocabulary of words": lambda data: data["model"].update(vocabulary="many"),
    "no context": lambda data: data["model"].pop("context"),
    "a kernel nobody knows": lambda data: data["policy"].update(lm_head="w5g7"),
    "a kernel that is a list": lambda data: data["policy"].update(lm_head=["w4g32"]),
    "a workload that nobody allocates": lambda data: data.update(workload="generate:99999999999+1"),
    "a prediction that is a number": lambda data: data["predicted"].update(compute_flop=5),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_say_something_else(place: Path, name: str) -> None:
    path = place / "package" / "manifest.yaml"
    data = yaml.safe_load(path.read_text())
    MANIFESTS[name](data)
    path.write_bytes(manifest_text(data))
    with refused():
        open_package(place / "package")


def test_a_checkpoint_that_lacks_a_moment_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    path = place / "checkpoint" / checkpoint.FILE
    tensors = load_file(path)
    del tensors["exp_avg_sq:b"]
    save_file(tensors, path, {"identity": "id", "state": '{"step": 3, "extra": {}}'})
    values = {"a": torch.nn.Parameter(torch.full((4, 4), 7.0)), "b": torch.nn.Parameter(torch.full((4,), 7.0))}
    optimiser = torch.optim.AdamW(values.values())
    assert checkpoint.load(place / "checkpoint", "id", values, [optimiser]) is None
    assert "starting over" in capsys.readouterr().err
    assert all(bool((value == 7).all()) for value in values.values())
    assert not optimiser.state


def test_a_table_whose_model_rows_lack_a_unit(place: Path) -> None:
    from toolchain.costs.from_table import cost_model

    path = place / "tables" / "local" / "table.jsonl"
    table, graph = open_table(path), Graph.open(place / "graph")
    for row in table.rows.values():
        if row.key[0] in ("model", "model memory"):
            row.units.pop(next(iter(row.units)))  # type: ignore[union-attr]
    with refused("kernel"):
        cost_model(graph, table, Workload.parse("generate:8+4"))


@pytest.mark.parametrize("said", ["\u00b2", "9" * 5000, "1e9", ""])
def test_sensors_that_say_something_else(strangers: Path, tmp_path: Path, said: str) -> None:
    sys_ = copied(strangers / "sys", tmp_path / "sys")
    (sys_ / "class/hwmon/hwmon0/update_interval").write_text(said)
    assert hwmon.Hwmon(sys_, threaded=False).step_s > 0
    (sys_ / "class/powercap/intel-rapl:0/max_energy_range_uj").write_text(said)
    with refused(kind=BittailorError):
        rapl.Rapl(sys_)
    assert re.search("answer", meters.states(sys_)["rapl"])


def test_an_error_is_one_line_however_long_and_strange_its_cause() -> None:
    line = str(DamagedFileError(f"expected text, got {'x' * 10**6} \x1b[31m", "type: bittailor --help"))
    assert len(line) < 1200
    assert line.endswith("type: bittailor --help")
    assert str(InputError("red \x1b[31m\n text")) == "red \ufffd[31m text"


_PHASE = {
    "energy_mj": [1.0],
    "above_idle_mj": [0.5],
    "run_ms": [1.0],
    "reference_ns": {"token": [1.0]},
    "error": 0.0,
    "valid": True,
}
_ENERGY = {"reason": "", "meter": "rapl: x", "step_s": 0.1, "window_s": 5.0, "idle_mw": 1.0}


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        ("energy", {"reason": ""}),
        ("energy", {**_ENERGY, "measured": {"m": {"run": {**_PHASE, "reason": "", "energy_mj": "much"}}}}),
        ("energy", {**_ENERGY, "measured": {"m": {"run": {"reason": ""}}}}),
        ("time", {"trials": {"m": [{"x_ns": 1}]}, "reference_ns": {"token": [1]}, "dropped": 0, "valid": True, "quantiles": 5}),
    ],
)
def test_half_an_answer_is_none(action: str, answer: dict[str, object]) -> None:
    with pytest.raises(BittailorError, match=r"expected an answer with '.*' from 'phone', got"):
        replies.answer_of(json.dumps(answer), action, Device("phone"))
    whole = {**_ENERGY, "measured": {"m": {"run": {**_PHASE, "reason": ""}}}}
    assert replies.answer_of(json.dumps(whole), "energy", Device("phone")) == whole


def test_a_kernel_that_makes_no_numbers_there_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    """NaN is no JSON: the answer as a whole would be refused."""
    import onnx
    from onnx import TensorProto, helper

    for name, op in (("well", "Identity"), ("ill", "Log")):
        (tmp_path / name).mkdir()
        ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["M"]) for end in ("x", "y")]
        graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "one", ends[:1], ends[1:])
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / name / "model.onnx"
        )
        np.save(tmp_path / name / "x.npy", np.array([-1.0, 2.0], np.float32))
    subjects = [
        {"name": name, "folder": str(tmp_path / name), "inputs": ["x.npy"], "provider": "CPUExecutionProvider"}
        for name in ("well", "ill")
    ]
    made = agent.outputs({"subjects": subjects})
    assert replies.answer_of(json.dumps(made), "outputs", Device("phone"))["outputs"] == {"well": [[-1.0, 2.0]], "ill": None}
