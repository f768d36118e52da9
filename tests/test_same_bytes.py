"""The same supernet, budget and table give the same package, byte by byte, whatever the process is like that exports it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, copied, environment
from small_tables import complete_table

pytest.importorskip("random_models")

from toolchain.graph.build import build
from toolchain.package.manifest import open_package

Cli = Callable[..., Any]

ELSEWHERE = {
    "PYTHONHASHSEED": "4242",
    "OMP_NUM_THREADS": "2",
    "OPENBLAS_NUM_THREADS": "2",
    "LC_ALL": "C",
    "TZ": "Pacific/Kiritimati",
    "ATEN_CPU_CAPABILITY": "default",
    "OPENBLAS_CORETYPE": "Prescott",
    "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3",
}
"""What differs between machines, as far as one machine can pretend: other instruction sets reduce sums in another order."""


def _exported_elsewhere(words: list[Any], folder: Path) -> None:
    command = [sys.executable, "-m", "toolchain.cli", "export", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment(**ELSEWHERE), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _same(one: Path, other: Path, cli: Cli) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()] == []
    assert cli("verify", "--digest", one).out == cli("verify", "--digest", other).out


def test_the_same_graph_policy_and_table_give_the_same_bytes_in_another_process(
    packages: Any, graphs: Any, tmp_path: Path, cli: Cli
) -> None:
    first, elsewhere = packages("qwen2"), tmp_path / "elsewhere"
    copied(graphs("qwen2").directory, elsewhere / "graph")
    here = os.path.relpath(first.parent / "profiles", elsewhere)
    _exported_elsewhere(["graph", "--policy", "w4g32", "--profiles", here, "--out", "package"], elsewhere)
    _same(first, elsewhere / "package", cli)


def test_a_digest_tells_two_packages_apart(packages: Any, models: Any, tmp_path: Path, cli: Cli) -> None:
    assert cli("export", models("bert"), "--policy", "w8a8", "--profiles", tmp_path / "none", "--out", tmp_path / "out").code == 0
    digests = {cli("verify", "--digest", "--json", folder).json["digest"] for folder in (tmp_path / "out", packages("bert"))}
    assert digests == {open_package(tmp_path / "out").digest, open_package(packages("bert")).digest}
    assert len(digests) == 2


@pytest.mark.slow
def test_the_same_supernet_budget_and_table_give_the_same_bytes(models: Any, tmp_path: Path, cli: Cli) -> None:
    """By every method but the search, which scores subnets by float sums. A polished package is trained: no machine does it alike."""
    model = copied(models("llama", vocab_size=4096), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "toolchain" / "models" / "pocket-llama-6m" / name, model)
    (tmp_path / "text.txt").write_text("".join(f"the old man number {number} went down to the sea. " for number in range(400)))
    (tmp_path / "graph").mkdir()
    complete_table(build(str(model), tmp_path / "graph")).save(tmp_path / "profiles" / "local" / "table.jsonl")
    table = ("--profiles", tmp_path / "profiles")
    net = tmp_path / "supernet"
    assert cli("train", model, *table, "--text", tmp_path / "text.txt", "--steps", "2", "--out", net).code == 0
    moved = copied(net, tmp_path / "elsewhere" / "net")
    for method in ("solver", "meta-network", "prices"):
        given = (*table, "--budget", "low", "--method", method)
        result = cli("export", net, *given, "--out", tmp_path / method)
        assert result.code == 0, result.err
        _exported_elsewhere([moved, *given, "--out", method], tmp_path / "elsewhere")
        _same(tmp_path / method, tmp_path / "elsewhere" / method, cli)
