"""A disk that is full: one line, exit code 2, and what was there before is there still."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, listing
from fast_host import FastHost

pytest.importorskip("random_models")

Cli = Callable[..., Any]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB; `_fill` takes what is left of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False)
        if shutil.which("mount")
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(disk: Path, left: int) -> None:
    with open(disk / "ballast", "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"\0" * 4096)
    with open(disk / "ballast", "r+b") as stream:
        stream.truncate(max(0, stream.seek(0, os.SEEK_END) - left))


@pytest.mark.parametrize("left", [0, 100_000])
def test_export_to_a_full_disk(models: Any, disk: Path, cli: Cli, left: int) -> None:
    _fill(disk, left)
    line = cli("export", models("qwen2"), "--policy", "fp32", "--profiles", disk / "none", "--out", disk / "deep" / "out").error
    assert "room on the disk" in line
    assert listing(disk) == {"ballast"}


def test_export_to_a_full_disk_keeps_the_earlier_package(models: Any, disk: Path, cli: Cli, fast: FastHost) -> None:
    words = ("export", models("bert"), "--profiles", disk / "none", "--out", disk / "out")
    assert cli(*words, "--policy", "w2g32").code == 0
    _fill(disk, 50_000)
    before = listing(disk)
    assert "room on the disk" in cli(*words, "--policy", "fp32").error
    assert listing(disk) == before
    assert cli("check", disk / "out", "--gflop", "1").code != 2  # it opens, verified


def test_profile_to_a_full_disk(models: Any, disk: Path, cli: Cli, fast: FastHost) -> None:
    _fill(disk, 0)
    line = cli("profile", models("bert"), "--profiles", disk / "profiles").error
    assert "room on the disk" in line
    assert listing(disk) == {"ballast"}


@pytest.mark.parametrize("left", [40_000, 400_000])
@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_temporary_files_on_a_full_disk(
    models: Any, disk: Path, tmp_path: Path, cli: Cli, fast: FastHost, monkeypatch: pytest.MonkeyPatch, name: str, left: int
) -> None:
    """The fp32 graph is built in the temporary folder: it does not fit there."""
    _fill(disk, left)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    out, profiles = tmp_path / "out", tmp_path / "profiles"
    for words in (("export", "--policy", "fp32", "--out", out), ("profile", "--profiles", profiles), ("units",)):
        if left > 100_000 and (name, words[0]) != ("qwen2", "export"):
            continue  # BERT's graph may fit
        assert "room on the disk" in cli(words[0], models(name), *words[1:]).error
        assert listing(disk) == {"ballast"}
        assert not out.exists()
        assert not profiles.exists()


def test_a_full_disk_in_a_fresh_process(models: Any, disk: Path, tmp_path: Path) -> None:
    """As a shell would run it: TMPDIR and the result on the full disk, and whatever else the libraries write."""
    _fill(disk, 60_000)
    words = ["export", models("qwen2"), "--policy", "w4g32", "--profiles", disk / "none", "--out", disk / "out"]
    command = [sys.executable, "-m", "toolchain.cli", *map(str, words)]
    done = subprocess.run(command, env=environment(TMPDIR=str(disk)), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "room on the disk" in done.stderr
    assert listing(disk) - {".ses"} == {"ballast"}  # onnxruntime writes .ses into TMPDIR when it is imported
