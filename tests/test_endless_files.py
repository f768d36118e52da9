"""What the user names may be a link to what never ends: read within bounds, refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import copied
from fast_host import FastHost

from toolchain.errors import BittailorError
from toolchain.text import documents

Cli = Callable[..., Any]


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    return tmp_path / "endless.json"


@pytest.fixture
def package(packages: Callable[[str], Path], tmp_path: Path) -> Path:
    pytest.importorskip("random_models")
    return copied(packages("qwen2"), tmp_path / "package")


def test_a_baseline_is_read_within_bounds(package: Path, endless: Path, cli: Cli, fast: FastHost, tmp_path: Path) -> None:
    said = cli("check", package, "--latency-ms", "5", "--baseline", endless)
    assert (said.code, "MiB" in said.error) == (2, True)
    report = cli("check", package, "--latency-ms", "5", "--json").json
    (tmp_path / "many.json").write_text(json.dumps({**report, "blocks": report["blocks"][:1] * 2001}))
    said = cli("check", package, "--latency-ms", "5", "--baseline", tmp_path / "many.json")
    assert (said.code, "2001 processes" in said.error) == (2, True)


def test_a_measured_report_is_read_within_bounds(package: Path, endless: Path, cli: Cli, tmp_path: Path) -> None:
    said = cli("report", package, "--measured", endless, "--out", tmp_path / "report.html")
    assert (said.code, "MiB" in said.error, (tmp_path / "report.html").exists()) == (2, True, False)


def test_a_signature_is_read_within_bounds(package: Path, cli: Cli, fast: FastHost, tmp_path: Path) -> None:
    assert cli("check", package, "--latency-ms", "5", "--seal").code == 0
    with (package / "seal.json.minisig").open("wb") as file:
        file.truncate(2**27)
    assert cli("verify", package).code == 2
    said = cli("report", package, "--out", tmp_path / "report.html")
    assert (said.code, (tmp_path / "report.html").exists()) == (2, False)


def test_text_is_read_within_bounds(endless: Path) -> None:
    with pytest.raises(BittailorError, match="256 MiB"):
        documents([endless])
