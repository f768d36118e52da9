"""From a model to a package by a budget, through the commands: a supernet of a tiny model, trained for two steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toolchain
from toolchain.graph.build import build
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE
from toolchain.package.manifest import open_package


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"the old man number {number} went down to the sea and said nothing. " for number in range(400)))
    return path


@pytest.fixture(scope="module")
def speaking(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("speaking") / "llama"
    shutil.copytree(models("llama", vocab_size=4096), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(toolchain.__file__).parent / "models" / "pocket-llama-6m" / name, folder)
    return folder


def test_a_trained_supernet_is_cut_to_budgets(
    speaking: Path, made_up_table: Callable[[Graph], Path], words: Path, tmp_path: Path, cli: Any
) -> None:
    (tmp_path / "graph").mkdir()
    profiles = made_up_table(build(str(speaking), tmp_path / "graph"))
    supernet = tmp_path / "supernet"
    trained = cli("train", speaking, "--profiles", profiles, "--text", words, "--steps", "2", "--out", supernet, "--json")
    assert trained.code == 0, trained.err
    sizes = {}
    for budget in ("low", "high"):
        out = tmp_path / budget
        done = cli("export", supernet, "--budget", budget, "--profiles", profiles, "--out", out, "--json")
        assert done.code == 0, done.err
        package = open_package(out)
        assert not any(CATALOGUE[kernel].prefill for kernel in package.policy.values())
        assert done.json["predicted"]["package_bytes"]["value"] == sum(
            path.stat().st_size for path in out.iterdir() if path.name != "manifest.yaml"
        )
        sizes[budget] = done.json["predicted"]["peak_memory_bytes"]["value"]
        assert sizes[budget] <= done.json["budget"]["peak_memory_bytes"]
    assert sizes["low"] < sizes["high"]
    limits = ("--latency-ms", "100", "--first-token-ms", "100")
    done = cli("export", supernet, *limits, "--profiles", profiles, "--out", tmp_path / "two", "--json")
    assert done.code == 0, done.err
    assert done.json["budget"]["first_token_ms"] == 100.0
    # Both limits are loose: a second set of weights is not taken without need.
    assert not any(CATALOGUE[kernel].prefill for kernel in open_package(tmp_path / "two").policy.values())
    # As fast in the prompt as int8 dynamic, and in decoding as 4 bits: no single kernel is both.
    both = cli("predict", speaking, "--policy", "w4g128+w8a8", "--profiles", profiles, "--json").json
    tight = [f"--{name.replace('_', '-')}={2.02 * both[name]['value']}" for name in ("latency_ms", "first_token_ms")]
    done = cli("export", supernet, *tight, "--profiles", profiles, "--out", tmp_path / "tight", "--json")
    assert done.code == 0, done.err
    assert any(CATALOGUE[kernel].prefill for kernel in open_package(tmp_path / "tight").policy.values())
