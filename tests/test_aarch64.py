"""benchmarks/aarch64.py: it tells right from wrong, says what to type without an emulator; with one and its root, all agrees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT, environment

BENCHMARKS = ROOT / "benchmarks"
KERNELS = ("fp32", "w8a8", "w4g32")


@pytest.fixture
def aarch64(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import aarch64

    return aarch64


@pytest.fixture
def here(aarch64: ModuleType, tmp_path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What one-unit graphs should give, and what this machine's runtime gives."""
    from aarch64_numbers import unit

    expected = aarch64.write_units(tmp_path)
    return expected, {f"units/{place.name}/{key}": made for place in tmp_path.iterdir() for key, made in unit(place).items()}


def test_kernels_are_held_against_both_references(aarch64: ModuleType, here: tuple[dict, dict[str, np.ndarray]]) -> None:
    """This machine's kernels agree; one with float activations is told from one that is wrong, embeddings included."""
    expected, numbers = here
    rows = {row["kernel"]: row for row in aarch64.unit_rows("here", expected, numbers)}
    assert tuple(rows) == aarch64.SINGLE
    assert all(row["agrees"] and row["activations"] == aarch64.CATALOGUE[name].activation for name, row in rows.items())
    numbers |= {f"units/{name}": both[1].astype(np.float32) for name, both in expected.items() if name.startswith("w4g32~")}
    numbers["units/w8a8~linear/5"] = numbers["units/w8a8~linear/5"] * np.float32(1.01)
    numbers["units/w2g32~embedding/1"] = np.roll(numbers["units/w2g32~embedding/1"], 1)
    numbers["units/w8g32~ragged/1"] = np.full_like(numbers["units/w8g32~ragged/1"], np.nan)
    rows = {row["kernel"]: row for row in aarch64.unit_rows("there", expected, numbers)}
    assert (rows["w4g32"]["activations"], rows["w4g32"]["agrees"]) == ("fp32", True)
    assert {name for name, row in rows.items() if not row["agrees"]} == {"w8a8", "w2g32", "w8g32"}


@pytest.mark.parametrize(
    ("activations", "off", "agrees"),
    [
        ("int8_group", 0.015, True),  # the package moves by 1e-2 when nudged
        ("int8_group", 0.025, False),
        ("fp32", 0.0, False),  # held against the package with float activations, which is another
        ("fp32", 0.1, True),
    ],
)
def test_packages_are_held_to_what_they_keep_themselves(aarch64: ModuleType, activations: str, off: float, agrees: bool) -> None:
    plain = np.ones((4, 8), np.float32)
    here = {"packages/m~w4g32/decode": plain, "twins/m~w4g32~float/decode": plain * np.float32(1.1)}
    for units in aarch64.NUDGES:
        here[f"twins/m~w4g32~{units:+d}/decode"] = plain * np.float32(1 + units / 1600)
    there = {"packages/m~w4g32/decode": plain * np.float32(1 + off)}
    (row,) = aarch64.package_rows("there", ["m~w4g32"], {"w4g32": activations}, here, there)
    assert row["agrees"] is agrees


def _run(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "aarch64.py"), *map(str, words)]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, check=False)


def test_without_an_emulator_it_says_what_to_install(tmp_path: Path) -> None:
    done = _run("--root", tmp_path / "root", PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("aarch64: expected qemu-aarch64-static on the PATH, found none; type: apt-get install")
    assert not (tmp_path / "root").exists()


@pytest.mark.slow  # minutes of emulation
def test_a_board_with_dot_products_agrees_and_checks(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("qemu-aarch64-static", "qemu-aarch64"))):
        pytest.skip("no qemu-aarch64 on the PATH")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bittailor" / "aarch64"
    if not (cache / "debian").is_dir():
        pytest.skip(f"no arm64 root in {cache}: python benchmarks/aarch64.py makes it")
    done = _run("--cpu", "cortex-a76", "--kernels", *KERNELS, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [machine["machine"] for machine in found["machines"]] == [os.uname().machine, "aarch64"]
    assert {row["package"].rpartition("~")[2] for row in found["packages"]} == set(KERNELS)
    assert found["check"][0]["verdict"] == "within"
