"""Files that state sizes which are not there, or unpack to more than they should: refused before anything is allocated."""

from __future__ import annotations

import json
import lzma
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("random_models")

import yaml
from onnx import TensorProto
from refusals import external, refused

from toolchain.commands import workflow
from toolchain.costs.table import open_table
from toolchain.evaluate.spans import read_squad
from toolchain.graph.build import build
from toolchain.graph.external import load_array
from toolchain.graph.model import Graph
from toolchain.policy import proposal
from toolchain.profiler import agent
from toolchain.spec import Workload
from toolchain.supernet.loading import load_model
from toolchain.supernet.store import SupernetFolder
from toolchain.text import documents


@pytest.mark.parametrize("line", ["first", "second"])
def test_a_table_of_a_gigabyte(place: Path, line: str) -> None:
    path = place / "tables" / "local" / "table.jsonl"
    if line == "first":
        path.write_bytes(b"")
    with path.open("r+b") as stream:
        stream.truncate(1 << 30)  # zeros without a newline, and without room on the disk
    with refused("MiB"):
        open_table(path)


def _header(name: str, shape: list[int], end: int) -> bytes:
    made = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return len(made).to_bytes(8, "little") + made


@pytest.mark.parametrize("shape", [[2_500_000_000], [1 << 32, 1 << 32], [50_000, 50_000]])
@pytest.mark.parametrize("name", ["meta_network", "heldout", "quantised/w4g32", "adapters/w4g32/adapter_model"])
def test_ten_gigabytes_in_a_kilobyte_of_safetensors(place: Path, name: str, shape: list[int]) -> None:
    path = place / "supernet" / f"{name}.safetensors"
    path.write_bytes(_header("tokens", shape, min(4 * shape[0] * shape[-1], 10**10)))
    supernet = SupernetFolder(place / "supernet", yaml.safe_load((place / "supernet" / "supernet.yaml").read_text()))
    unit = next(unit for unit in Graph.open(place / "graph").units if unit.op == "MatMul")
    with refused():
        supernet.heldout()
        supernet.trained()
        supernet.quantized(unit, workflow.CATALOGUE["w4g32"])
        proposal.read(path)


TENSORS = {
    "inline, 10 GB": TensorProto(name="w", dims=[2_500_000_000], data_type=TensorProto.FLOAT, raw_data=b"\0" * 64),
    "inline, numbers": TensorProto(name="w", dims=[2_500_000_000], data_type=TensorProto.FLOAT, float_data=[1.0]),
    "inline, below nothing": TensorProto(name="w", dims=[-1, -16], data_type=TensorProto.FLOAT, raw_data=b"\0" * 64),
    "inline, no type": TensorProto(name="w", dims=[16], data_type=99, raw_data=b"\0" * 64),
    "inline, text": TensorProto(name="w", dims=[200], data_type=TensorProto.STRING, string_data=[b"a"] * 200),
    "external, 10 GB": external([2_500_000_000]),
    "external, a product that wraps to nothing": external([1 << 32, 1 << 32]),
    "external, below nothing": external([-16]),
    "external, an offset beyond the end": external([16], offset=1 << 40),
    "external, an offset below nothing": external([16], offset=-8),
    "external, an offset of 5000 digits": external([16], offset="9" * 5000),
    "external, a name of 5000 letters": external([16], location="a" * 5000),
    "external, a name with a zero": external([16], location="da\0ta"),
    "external, no name": external([16], location=""),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").write_bytes(b"\0" * 64)
    with refused():
        load_array(TENSORS[name], tmp_path)


def test_ten_gigabytes_in_a_header_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the agent is asked to compute on."""
    shutil.copytree(agent.BARE, tmp_path / "unit")
    np.save(tmp_path / "unit" / "x.npy", np.ones((1, 8), np.float32))
    data = (tmp_path / "unit" / "x.npy").read_bytes()
    (tmp_path / "unit" / "x.npy").write_bytes(data.replace(b"(1, 8), }          ", b"(2500000000,), }   "))
    request = {"action": "outputs", "subjects": [{"name": "x", "folder": "unit", "inputs": ["x.npy"]}]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    monkeypatch.setattr("sys.stdout.write", said.append)
    assert agent.main(["request.json"]) == 2
    assert "expected" in json.loads("".join(said))["error"]


def test_an_xz_that_unpacks_to_what_no_text_is(tmp_path: Path) -> None:
    packer = lzma.LZMACompressor(preset=0)
    zeros = bytes(1 << 20)
    (tmp_path / "text.xz").write_bytes(b"".join(packer.compress(zeros) for _ in range(80)) + packer.flush())
    with refused("become more than"):
        documents([tmp_path / "text.xz"])


def test_an_xz_of_more_streams_than_anybody_writes(tmp_path: Path) -> None:
    """What is behind a stream is copied for each: 64 MiB of empty ones would take days."""
    (tmp_path / "text.xz").write_bytes(lzma.compress(b"") * 30_000)
    with refused("streams"):
        documents([tmp_path / "text.xz"])


@pytest.mark.parametrize("form", [lzma.FORMAT_XZ, lzma.FORMAT_ALONE])
def test_an_xz_that_asks_for_a_gigabyte_to_be_unpacked(tmp_path: Path, form: int) -> None:
    data = bytearray(lzma.compress(b"text\n", form))
    if form == lzma.FORMAT_XZ:  # a block's header: its size, flags, LZMA2, one byte of properties, which is the dictionary's size
        data[16] = 36
        data[20:24] = zlib.crc32(data[12:20]).to_bytes(4, "little")
    else:
        data[1:5] = (1 << 30).to_bytes(4, "little")
    (tmp_path / "text.xz").write_bytes(data)
    with refused("xz data"):
        documents([tmp_path / "text.xz"])
    with refused("LZMAError"):
        read_squad(tmp_path / "text.xz")


def test_an_xz_of_several_streams_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "text.xz").write_bytes(lzma.compress(b"one\n") + b"\0" * 4 + lzma.compress(b"two\n"))
    assert documents([tmp_path / "text.xz"]) == ["one\ntwo"]


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**6}, {"vocab_size": 10**6}, {"hidden_size": 1 << 30}, {"intermediate_size": 1 << 20}]
)
def test_a_config_of_a_larger_model_than_the_weights(place: Path, change: dict[str, int]) -> None:
    """What the weights lack, transformers allocates."""
    path = place / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (place / "out").mkdir()
    for read in (lambda: build(str(place / "model"), place / "out"), lambda: load_model(place / "model")):
        with refused():
            read()


@pytest.mark.parametrize(
    "text", ["generate:99999999999+1", "encode:9999999x9999999", "generate:" + "9" * 5000 + "+1", "encode:\u0661x1"]
)
def test_a_workload_that_nobody_allocates(text: str) -> None:
    with refused("workload"):
        Workload.parse(text)


def test_a_unit_that_is_larger_than_its_weights(place: Path) -> None:
    """graph.json says how much is allocated for a package's bytes."""
    path = place / "graph" / "graph.json"
    data = json.loads(path.read_text())
    data["units"][1]["K"] = 1 << 32
    path.write_text(json.dumps(data))
    graph = Graph.open(place / "graph")
    with refused("4294967296"):
        graph.weight(graph.units[1])
