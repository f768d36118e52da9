"""From a model to a package by a budget, through the commands: a supernet of a tiny model, trained for two steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_tables import complete_table, with_energy

import toolchain
from toolchain.cli import main
from toolchain.commands.choosing import METHODS, restricted
from toolchain.commands.training import CALIBRATION
from toolchain.costs.from_table import cost_model
from toolchain.costs.table import open_table
from toolchain.graph.build import build
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE
from toolchain.package.manifest import open_package
from toolchain.spec import Workload
from toolchain.supernet.store import SupernetFolder
from toolchain.text import documents, load_tokenizer, separator_id, windows

pytestmark = pytest.mark.usefixtures("quick_training")


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


@pytest.fixture(scope="module")
def profiles(speaking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiles")
    complete_table(build(str(speaking), tmp_path_factory.mktemp("graph"))).save(folder / "local" / "table.jsonl")
    return folder


@pytest.fixture(scope="module")
def supernet(quick_training: None, speaking: Path, profiles: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for two steps."""
    out = tmp_path_factory.mktemp("trained") / "supernet"
    assert main(["train", *map(str, (speaking, "--profiles", profiles, "--text", words, "--steps", 2, "--out", out))]) == 0
    return out


def test_training_says_what_it_made_of_every_kernel(speaking: Path, profiles: Path, words: Path, tmp_path: Path, cli: Any) -> None:
    """What ruins a kernel is told, and a hundredth of those steps ruins none."""
    asked = ("train", speaking, "--profiles", profiles, "--text", words, "--steps", 4)
    kept = cli(*asked, "--rate", 0.1, "--out", tmp_path / "kept", "--json").json["distance"]
    said = cli(*asked, "--rate", 10, "--out", tmp_path / "ruined").out.splitlines()
    ruined = {name: tuple(map(float, numbers)) for name, *numbers in map(str.split, said[2 : 2 + len(kept)])}
    assert list(ruined) == list(kept)
    for name, (start, now) in ruined.items():
        assert kept[name][0] == pytest.approx(start, rel=1e-3)
        assert kept[name][1] < now, name
    assert ruined["w4g32"][1] > ruined["w4g32"][0]
    assert said[-1].startswith("farther than at the start: ")
    assert "w4g32" in said[-1]
    assert said[-1].endswith("--rate 2.5")
    refused = cli(*asked, "--rate", 0, "--out", tmp_path / "none")
    assert (refused.code, "--rate above 0" in refused.err, (tmp_path / "none").exists()) == (2, True, False)


SLOW = {"search"}  # it scores 150 subnets; what it takes of them is tested in test_choosing


@pytest.mark.parametrize("method", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS])
def test_every_method_keeps_the_budget(method: str, supernet: Path, profiles: Path, tmp_path: Path, cli: Any) -> None:
    done = cli(
        "export", supernet, "--budget", "low", "--method", method, "--profiles", profiles, "--out", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["chosen_by"] == METHODS[method]
    assert done.json["predicted"]["peak_memory_bytes"]["value"] <= done.json["budget"]["peak_memory_bytes"]
    assert done.json["predicted"]["latency_ms"]["value"] <= done.json["budget"]["latency_ms"]
    assert done.json["gap_to_optimum"] >= -1e-9
    if method == "solver":
        assert done.json["gap_to_optimum"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("method", ["solver", "meta-network"])
def test_a_limit_on_energy_is_kept_or_said_to_be_out_of_reach(
    method: str, supernet: Path, profiles: Path, tmp_path: Path, cli: Any
) -> None:
    """The table is the other tests' with made-up energy rows of a meter."""
    graph = SupernetFolder.open(supernet)
    table = open_table(profiles / "local" / "table.jsonl")
    opened, workload = Graph.open(graph.graph_directory), Workload.parse("generate:64+32")
    powered = with_energy(opened, table, workload)
    powered.save(tmp_path / "profiles" / "local" / "table.jsonl")
    least, most = restricted(cost_model(opened, powered, workload), graph).bounds("energy_mj")
    limit = least + 0.4 * (most - least)
    words = ("export", supernet, "--method", method, "--profiles", tmp_path / "profiles", "--out", tmp_path / "out", "--json")
    done = cli(*words, "--energy-mj", limit)
    assert done.code == 0, done.err
    assert done.json["budget"]["energy_mj"] == limit
    assert least <= done.json["predicted"]["energy_mj"]["value"] <= limit
    assert len(set(done.json["policy"]["units"].values())) > 1  # neither the cheapest everywhere nor the best
    line = cli(*words, "--energy-mj", 0.9 * least).error
    assert "energy_mj must be at least" in line
    done = cli(*words[:-5], "--profiles", profiles, "--out", tmp_path / "other", "--energy-mj", limit)  # no meter was read there
    assert done.code == 0
    assert "energy_mj is not measured" in done.err


def test_an_unknown_method_is_refused(supernet: Path, profiles: Path, tmp_path: Path, cli: Any) -> None:
    line = cli(
        "export", supernet, "--budget", "low", "--method", "folklore", "--profiles", profiles, "--out", tmp_path / "out"
    ).error
    assert "'folklore'" in line
    assert "solver, meta-network, prices, search" in line
    both = ("--policy", "w4g32", "--method", "solver")
    assert "got both" in cli("export", supernet, *both, "--profiles", profiles, "--out", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_a_trained_supernet_is_cut_to_budgets(speaking: Path, supernet: Path, profiles: Path, tmp_path: Path, cli: Any) -> None:
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
    # As fast in the prompt as int8 dynamic, and in decoding as 4 bits: no single kernel of 4 bits or more is both. A random model hardly
    # minds 2 bits, so the losses are written by hand; most on embedding and head, which are most of a tiny model.
    supernet = shutil.copytree(supernet, tmp_path / "by-bits")
    description = yaml.safe_load((supernet / "supernet.yaml").read_text())
    description["sensitivity"] = {
        unit: {kernel: (1 if unit.startswith("layers.") else 1000) / CATALOGUE[kernel].weight_bits for kernel in row}
        for unit, row in description["sensitivity"].items()
    }
    (supernet / "supernet.yaml").write_text(yaml.safe_dump(description))
    both = cli("predict", speaking, "--policy", "w4g128+w8a8", "--profiles", profiles, "--json").json
    tight = [f"--{name.replace('_', '-')}={2.0002 * both[name]['value']}" for name in ("latency_ms", "first_token_ms")]
    done = cli("export", supernet, *tight, "--method", "solver", "--profiles", profiles, "--out", tmp_path / "tight", "--json")
    assert done.code == 0, done.err
    assert any(CATALOGUE[kernel].prefill for kernel in open_package(tmp_path / "tight").policy.values())


def test_a_package_can_be_polished_and_says_so(supernet: Path, profiles: Path, words: Path, tmp_path: Path, cli: Any) -> None:
    """Polished on the text it is then judged by, the tiny model's 2-bit package comes nearer to the model; the supernet stays as it was."""
    policy = ("--policy", "w2g32", "--profiles", profiles)
    before = {path: path.read_bytes() for path in supernet.rglob("*.safetensors")}
    plain = cli("export", supernet, *policy, "--out", tmp_path / "plain", "--json")
    done = cli("export", supernet, *policy, "--polish", "12", "--text", words, "--out", tmp_path / "polished", "--json")
    assert (plain.code, done.code) == (0, 0), done.err
    polish = done.json["training"]["polish"]
    assert polish["taken"]
    folder = SupernetFolder.open(supernet)
    heldout, tokenizer = folder.heldout(), load_tokenizer(supernet / "graph")
    every = windows(tokenizer, documents([words]), heldout.shape[1], separator_id(supernet / "graph"))
    unseen = {row.tobytes() for row in heldout}
    assert polish["windows"] == sum(row.tobytes() not in unseen for row in every) - CALIBRATION < len(every) - CALIBRATION
    assert (polish["steps"], polish["text"]) == (12, "words.txt")
    assert polish["distance_after"] < 0.95 * polish["distance_before"]
    assert "polish" not in plain.json["training"]
    seen = {
        name: cli("evaluate", tmp_path / name, "--text", words, "--window", "32", "--json").json["perplexity"]
        for name in ("plain", "polished")
    }
    assert seen["polished"] != seen["plain"]  # it is the polished weights that were exported
    assert {path: path.read_bytes() for path in supernet.rglob("*.safetensors")} == before


def test_a_package_is_polished_at_its_supernets_rate(supernet: Path, profiles: Path, words: Path, tmp_path: Path, cli: Any) -> None:
    supernet = shutil.copytree(supernet, tmp_path / "supernet")
    description = yaml.safe_load((supernet / "supernet.yaml").read_text())
    asked = ("--policy", "w2g32", "--profiles", profiles, "--polish", "2", "--text", words)
    for rate, moved in ((1e-9, False), (1, True)):
        description["training"]["rate"] = rate
        (supernet / "supernet.yaml").write_text(yaml.safe_dump(description))
        polish = cli("export", supernet, *asked, "--out", tmp_path / f"{rate}", "--json").json["training"]["polish"]
        assert (polish["distance_before"] != polish["distance_after"]) == moved
        assert polish.get("rate", 1) == rate
    description["training"]["rate"] = "fast"
    (supernet / "supernet.yaml").write_text(yaml.safe_dump(description))
    assert "'fast'" in cli("export", supernet, *asked, "--out", tmp_path / "none").error


def test_a_kernel_that_a_supernet_lacks_is_refused(supernet: Path, profiles: Path, tmp_path: Path, cli: Any) -> None:
    """As after training with the table of a device whose runtime lacks it."""
    supernet = shutil.copytree(supernet, tmp_path / "supernet")
    description = yaml.safe_load((supernet / "supernet.yaml").read_text())
    for row in description["kernels"].values():
        row.remove("w2g32")
    (supernet / "supernet.yaml").write_text(yaml.safe_dump(description))
    line = cli("export", supernet, "--policy", "w2g32", "--profiles", profiles, "--out", tmp_path / "out").error
    assert "w2g32" in line


def test_of_several_processes_the_first_one_answers(speaking: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("units", speaking).out
    monkeypatch.setenv("RANK", "1")
    assert not cli("units", speaking).out


def test_only_a_supernet_is_polished(speaking: Path, supernet: Path, profiles: Path, tmp_path: Path, cli: Any) -> None:
    rest = ("--policy", "w2g32", "--profiles", profiles, "--out", tmp_path / "out")
    assert "got a model" in cli("export", speaking, *rest, "--polish", "3").error
    assert "one step or more" in cli("export", supernet, *rest, "--polish", "0").error
    assert "--polish 40" in cli("export", supernet, *rest, "--text", "words.txt").error
    short = tmp_path / "short.txt"
    short.write_text("the old man went down to the sea. " * 40)
    assert "windows" in cli("export", supernet, *rest, "--polish", "3", "--text", short).error
    assert not (tmp_path / "out").exists()
