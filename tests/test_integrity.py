"""A package that is not what its manifest says is refused with the file named, by whatever opens it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import copied, environment
from fast_host import FastHost

pytest.importorskip("random_models")

import onnx
from onnx import TensorProto, helper

from toolchain.errors import DamagedFileError
from toolchain.files import sha256
from toolchain.package.manifest import manifest_text, open_package

Cli = Callable[..., Any]


@pytest.fixture
def package(packages: Callable[[str], Path], tmp_path: Path) -> Path:
    """A decoder's package that a test may change."""
    return copied(packages("qwen2"), tmp_path / "package")


def _flipped(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << (place % 8)
    path.write_bytes(bytes(data))


def _rewritten(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The manifest as somebody writes it who knows how its digests are made."""
    data = yaml.safe_load((package / "manifest.yaml").read_text())
    data["files"] = {path.name: sha256(path) for path in sorted(package.iterdir()) if path.name != "manifest.yaml"}
    change(data)
    (package / "manifest.yaml").write_bytes(manifest_text(data))


def test_one_flipped_bit_in_any_file_is_refused_by_check_verify_and_run(package: Path, cli: Cli, fast: FastHost) -> None:
    assert cli("check", package, "--latency-ms", "5", "--seal").code == 0
    assert cli("verify", package).code == 3  # whole; limits of its own were not held
    files = sorted(package.iterdir())
    assert {"manifest.yaml", "model.onnx", "model.onnx.data", "seal.json"} < {path.name for path in files}
    fast.timed.clear()
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            _flipped(path, place)
            for words in (("check", package, "--latency-ms", "5"), ("verify", package), ("run", package, "once")):
                assert path.name in cli(*words).error, (path.name, place, words)
            path.write_bytes(whole)
    assert fast.timed == [], "a damaged package was measured"
    assert cli("verify", package).code == 3  # whole; limits of its own were not held


def test_every_part_of_the_manifest_counts(packages: Callable[[str], Path], tmp_path: Path) -> None:
    package = copied(packages("bert"), tmp_path / "package")
    path = package / "manifest.yaml"
    whole = path.read_bytes()
    for place in (*range(0, len(whole), 23), *range(len(whole) - 74, len(whole))):  # all of the last line: its own digest
        _flipped(path, place)
        with pytest.raises(DamagedFileError, match=r"manifest\.yaml"):
            open_package(package, verify=False)
        path.write_bytes(whole)
    path.write_bytes(whole + b"\n")
    with pytest.raises(DamagedFileError, match=r"manifest\.yaml"):
        open_package(package, verify=False)


def test_the_digest_is_the_sha256_of_all_lines_but_the_last(packages: Callable[[str], Path], cli: Cli) -> None:
    """So that anybody can check it: head -n -1 manifest.yaml | sha256sum."""
    text = (packages("bert") / "manifest.yaml").read_bytes()
    *body, last = text.splitlines(keepends=True)
    digest = hashlib.sha256(b"".join(body)).hexdigest()
    assert last == f"digest: {digest}\n".encode()
    assert cli("verify", "--digest", packages("bert")).out == f"{digest}\n"
    assert open_package(packages("bert")).digest == digest


def test_a_package_of_an_earlier_format_says_what_to_do(package: Path, cli: Cli) -> None:
    (package / "manifest.yaml").write_text("format: bittailor package 1\n")
    line = cli("verify", package).error
    assert "bittailor package 2" in line
    assert "export the package again" in line


def _pipe(package: Path) -> None:
    (package / "genai_config.json").unlink()
    os.mkfifo(package / "genai_config.json")


STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file that nobody named": (lambda package: (package / "stranger.json").write_text("{}"), "stranger.json"),
    "a hidden file": (lambda package: (package / ".stranger").write_text(""), ".stranger"),
    "a folder": (lambda package: (package / "strangers").mkdir(), "strangers"),
    "a link to a file inside": (lambda package: (package / "stranger").symlink_to("model.onnx"), "stranger"),
    "a folder in place of a file": (
        lambda package: ((package / "genai_config.json").unlink(), (package / "genai_config.json").mkdir()),
        "genai_config.json",
    ),
    "a pipe in place of a file": (_pipe, "genai_config.json"),
    "a seal that is a link": (lambda package: (package / "seal.json").symlink_to("/etc/hostname"), "seal.json"),
    "a seal of words": (lambda package: (package / "seal.json").write_text("within\n"), "seal.json"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_the_manifest_does_not_name_is_refused(package: Path, cli: Cli, name: str) -> None:
    change, word = STRANGERS[name]
    change(package)
    assert word in cli("verify", package).error.replace(str(package), "")


def test_a_file_behind_a_link_is_refused_even_with_the_right_bytes(package: Path, tmp_path: Path, cli: Cli) -> None:
    (package / "model.onnx.data").rename(tmp_path / "elsewhere")
    (package / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    assert "expected model.onnx.data to be a regular file inside" in cli("verify", package).error


def test_what_a_killed_seal_left_is_tolerated(package: Path, cli: Cli) -> None:
    (package / ".seal.json.0123abcd.tmp").write_text("half a rep")
    assert cli("verify", package, "--digest").code == 0
    assert "got both" in cli("verify", package, "--digest", "--public-key", "k.pub").error


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/b", "..", "a\\b", "", "manifest.yaml", "seal.json", "seal.json.minisig"]
)
def test_the_manifest_names_files_of_its_own_folder_only(package: Path, tmp_path: Path, cli: Cli, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    _rewritten(package, lambda data: data["files"].update({name: sha256(tmp_path / "secret")}))
    assert f"{name!r} among its files" in cli("verify", package).error


# ---- the graph is the manifest's, though every digest is right


def _graph(package: Path, change: Callable[[Any], None]) -> None:
    model = onnx.load(package / "model.onnx", load_external_data=False)
    change(model)
    onnx.save(model, package / "model.onnx")


def _external(model: Any, key: str, value: str) -> None:
    tensor = next(one for one in model.graph.initializer if one.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value


def _node(model: Any, op: str = "MatMulNBits") -> Any:
    return next(node for node in model.graph.node if node.op_type == op)


def _attribute(model: Any, name: str, value: int) -> None:
    next(one for one in _node(model).attribute if one.name == name).i = value


def _hidden_constant(model: Any) -> None:
    """A tensor in an attribute of a node in a branch of a node: onnxruntime reads its file all the same."""
    tensor = TensorProto(name="x", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["hidden"], value=tensor)
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [4])])
    model.graph.node.append(helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch))


def _second_kernel(model: Any) -> None:
    node = model.graph.node.add()
    node.CopyFrom(_node(model))
    node.name, node.output[0] = "decoy", "decoy/output"


def _same_name(model: Any) -> None:
    node = model.graph.node.add()
    node.CopyFrom(_node(model))
    node.output[0] = "decoy/output"


def _shape(model: Any) -> None:
    name = _node(model).input[1]
    next(one for one in model.graph.initializer if one.name == name).dims[0] += 1


def _ten_gigabytes(model: Any) -> None:
    tensor = next(one for one in model.graph.initializer if one.external_data)
    tensor.dims[0] = 10 * 2**30


def _renamed(model: Any) -> None:
    _node(model).name = "another"


GRAPHS: dict[str, tuple[Callable[[Any], None], str]] = {
    "data outside": (lambda model: _external(model, "location", "../secret"), "'../secret'"),
    "data at an absolute path": (lambda model: _external(model, "location", "/etc/hostname"), "'/etc/hostname'"),
    "data in memory": (lambda model: _external(model, "location", "*/_ORT_MEM_ADDR_/*"), "_ORT_MEM_ADDR_"),
    "data in a file that is not named": (lambda model: _external(model, "location", "seal.json"), "'seal.json'"),
    "data hidden in a branch": (_hidden_constant, "'../secret'"),
    "data past the end": (lambda model: _external(model, "offset", str(10**9)), "model.onnx.data, which has"),
    "data before the start": (lambda model: _external(model, "offset", "-64"), "bytes -64"),
    "data at no number": (lambda model: _external(model, "offset", "0x40"), "0x40"),
    "ten gigabytes of it": (_ten_gigabytes, "need"),
    "other bits": (lambda model: _attribute(model, "bits", 8), "bits 8"),
    "other groups": (lambda model: _attribute(model, "block_size", 64), "block_size 64"),
    "another accuracy level": (lambda model: _attribute(model, "accuracy_level", 0), "accuracy_level 0"),
    "another width": (lambda model: _attribute(model, "K", 32), "with K 32"),
    "another shape": (_shape, "model.onnx"),
    "another op's domain": (lambda model: setattr(_node(model), "domain", "strange"), "strange.MatMulNBits"),
    "a unit's node gone": (_renamed, "'another' that is no unit's"),
    "a kernel more": (_second_kernel, "'decoy' that is no unit's"),
    "an op that is no text": (lambda model: model.graph.node.add().MergeFromString(b"\x22\x02\xff\xfe"), "an op"),
    "another quantised op": (lambda model: setattr(model.graph.node.add(), "op_type", "QLinearMatMul"), "QLinearMatMul"),
    "weights that are dequantised": (
        lambda model: setattr(model.graph.node.add(), "op_type", "DequantizeLinear"),
        "DequantizeLinear",
    ),
    "two nodes of one name": (_same_name, "2 nodes"),
    "a function": (lambda model: model.functions.add(name="f", domain="com.microsoft"), "a function"),
    "no graph": (lambda model: model.Clear(), "found none"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_is_not_the_manifests_is_refused(package: Path, tmp_path: Path, cli: Cli, name: str) -> None:
    change, words = GRAPHS[name]
    (tmp_path / "secret").write_text("0123456789abcdef")
    _graph(package, change)
    _rewritten(package, lambda data: None)
    line = cli("run", package, "once").error
    assert words in line
    assert "model.onnx" in line


def test_a_graph_that_is_not_onnx_is_refused(package: Path, cli: Cli) -> None:
    (package / "model.onnx").write_bytes(b"\x08\xff" * 40)
    _rewritten(package, lambda data: None)
    assert "model.onnx" in cli("verify", package).error


UNITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another kernel": lambda data: data["policy"].update({next(iter(data["policy"])): "w8g32"}),
    "an unknown kernel": lambda data: data["policy"].update({next(iter(data["policy"])): "w5g7"}),
    "a unit without a kernel": lambda data: data["policy"].pop(next(iter(data["policy"]))),
    "a kernel without a unit": lambda data: data["policy"].update({"ghost": "w4g32"}),
    "no units": lambda data: data.update({"units": {}}),
    "another node": lambda data: next(iter(data["units"].values())).update({"node": "/nowhere"}),
    "another shape": lambda data: next(iter(data["units"].values())).update({"K": 4096}),
    "a unit of words": lambda data: data["units"].update({next(iter(data["units"])): "MatMul"}),
    "another op": lambda data: next(iter(data["units"].values())).update({"op": "Conv"}),
}


@pytest.mark.parametrize("name", UNITS)
def test_units_and_policy_are_those_of_the_graph(package: Path, cli: Cli, name: str) -> None:
    _rewritten(package, UNITS[name])
    assert str(package) in cli("verify", package).error


@pytest.mark.parametrize("policy", ["fp32", "w8a8", "w3g32", "w4g32+w8a8"])
def test_every_kind_of_kernel_passes_as_it_is_exported(graphs: Any, tmp_path: Path, cli: Cli, policy: str) -> None:
    words = ("--policy", policy, "--profiles", tmp_path / "none", "--out", tmp_path / "out")
    assert cli("export", graphs("llama").directory, *words).code == 0
    assert set(open_package(tmp_path / "out").policy.values()) >= {policy}
    result = cli("verify", tmp_path / "out", "--json")
    assert (result.code, result.json["verdict"], result.json["loads"]) == (3, "could not tell", "yes")


def test_a_package_is_checked_where_onnx_is_not_installed(packages: Any, tmp_path: Path) -> None:
    code = """if True:
        import sys
        for name in ("onnx", "torch", "transformers", "safetensors", "tokenizers"):
            sys.modules[name] = None
        from toolchain.cli import main
        sys.exit(main(["verify", sys.argv[1]]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, packages("qwen2")], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert "loads: yes" in done.stdout


def test_what_is_sealed_is_forgotten_by_the_next_export(
    packages: Any, graphs: Any, tmp_path: Path, cli: Cli, fast: FastHost
) -> None:
    folder = copied(packages("bert"), tmp_path / "out")
    assert cli("check", folder, "--latency-ms", "5", "--seal").code == 0
    profiles = packages("bert").parent / "profiles"
    assert cli("export", graphs("bert").directory, "--policy", "w4g32", "--profiles", profiles, "--out", folder).code == 0
    assert not (folder / "seal.json").exists()
