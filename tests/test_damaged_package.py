"""Packages that are not what their manifest says are refused, in one line, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import copied, edited
from fast_host import FastHost

pytest.importorskip("random_models")

from toolchain.errors import DamagedFileError, InputError
from toolchain.package.manifest import open_package

Cli = Callable[..., Any]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (lambda folder: _flip(folder / "model.onnx.data"), "model.onnx.data"),
    "a bit of the graph": (lambda folder: _flip(folder / "model.onnx"), "model.onnx"),
    "a file gone": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "the manifest gone": (lambda folder: (folder / "manifest.yaml").unlink(), "manifest.yaml"),
    "the manifest not YAML": (lambda folder: (folder / "manifest.yaml").write_text("a: [b"), "manifest.yaml"),
    "the manifest not text": (lambda folder: (folder / "manifest.yaml").write_bytes(b"\xff\xfe\x00"), "manifest.yaml"),
    "the manifest a list": (lambda folder: (folder / "manifest.yaml").write_text("[1]"), "manifest.yaml"),
    "another format": (lambda folder: edited(folder, lambda data: {**data, "format": "x"}), "format"),
    "no policy": (lambda folder: edited(folder, lambda data: {**data, "policy": None}), "manifest.yaml"),
    "no files": (lambda folder: edited(folder, lambda data: {key: data[key] for key in data if key != "files"}), "manifest.yaml"),
    "no model among the files": (lambda folder: edited(folder, lambda data: {**data, "files": {}}), "manifest.yaml"),
    "a budget of words": (lambda folder: edited(folder, lambda data: {**data, "budget": {"latency_ms": "low"}}), "latency_ms"),
    "a budget below zero": (lambda folder: edited(folder, lambda data: {**data, "budget": {"latency_ms": -1}}), "latency_ms"),
    "a workload of words": (lambda folder: edited(folder, lambda data: {**data, "workload": "all of it"}), "workload"),
    "no prediction": (lambda folder: edited(folder, lambda data: {key: data[key] for key in data if key != "predicted"}), "predicted"),
    "a share of words": (
        lambda folder: edited(folder, lambda data: {**data, "follows": {"latency_ms": {"share": "all", "unknown": 0.1}}}),
        "follows",
    ),
    "a share that nobody doubts": (
        lambda folder: edited(folder, lambda data: {**data, "follows": {"latency_ms": {"share": 1.0, "unknown": 1e-200}}}),
        "follows",
    ),
    "a share as no machine shows it": (
        lambda folder: edited(folder, lambda data: {**data, "follows": {"latency_ms": {"share": 3.9, "unknown": 0.1}}}),
        "follows",
    ),
    "a share of no reference": (
        lambda folder: edited(folder, lambda data: {**data, "follows": {"latency": {"share": 1.0, "unknown": 0.1}}}),
        "follows",
    ),
    "a reference of words": (lambda folder: edited(folder, lambda data: {**data, "reference_ns": "fast"}), "reference_ns"),
    "a reference of no known work": (
        lambda folder: edited(folder, lambda data: {**data, "reference_ns": {"latency_ms": {"hard": 1.0}}}),
        "reference_ns",
    ),
    "a path that leaves": (lambda folder: edited(folder, lambda data: {**data, "files": {**data["files"], "../secret": "0"}}), "inside"),
    "an absolute path": (lambda folder: edited(folder, lambda data: {**data, "files": {**data["files"], "/etc/hostname": "0"}}), "inside"),
    "a name that is a number": (lambda folder: edited(folder, lambda data: {**data, "files": {**data["files"], 5: "0"}}), "expected 5 in"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_package_is_refused_in_one_line(packages: Any, tmp_path: Path, cli: Cli, fast: FastHost, name: str) -> None:
    damage, word = DAMAGES[name]
    folder = copied(packages("bert"), tmp_path / "package")
    (tmp_path / "secret").write_text("secret")
    damage(folder)
    assert word in cli("check", folder).error
    assert fast.timed == []


def test_a_file_that_is_a_link_out_of_the_package_is_refused(packages: Any, tmp_path: Path) -> None:
    folder = copied(packages("bert"), tmp_path / "package")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(InputError, match="inside"):
        open_package(folder)


def test_not_verifying_is_possible_and_not_the_default(packages: Any, tmp_path: Path) -> None:
    folder = copied(packages("bert"), tmp_path / "package")
    _flip(folder / "model.onnx.data")
    assert open_package(folder, verify=False).directory == folder
    with pytest.raises(DamagedFileError):
        open_package(folder)
