"""Packages for tests of the report, cut by the command from a supernet that was rounded, not trained, with a made-up table."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import copied
from fast_host import FastHost
from small_tables import complete_table

import toolchain
from toolchain.cli import _parser, main
from toolchain.commands import foresight
from toolchain.commands.reporting import gather
from toolchain.graph.assemble import round_to_nearest
from toolchain.graph.build import build
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, candidates
from toolchain.profiler.ask import Host
from toolchain.supernet import store

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NAMES = ("fp32", "low", "high")
HOSTILE = "<img src=x onerror=alert(1)>'\"&$\\frac{1}{$</script>".replace("/", "∕")
"""A package's name with markup and a formula in it."""


@dataclass(frozen=True)
class Fleet:
    """A folder with supernet/, profiles/ and three packages, and reports/ with a check and an evaluation of each."""

    folder: Path

    def words(self, *names: str, reports: bool = True) -> list[Any]:
        """Arguments of the command for these packages."""
        files = [self.folder / "reports" / f"{name}.{kind}.json" for name in names for kind in ("check", "evaluate")]
        return [*(self.folder / name for name in names), *(["--measured", *files] if reports else [])]


@pytest.fixture(scope="module", autouse=True)
def few_points() -> Iterator[None]:
    """A solved programme takes a twentieth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foresight, "POINTS", 8)
        yield


def make(model: Path, folder: Path) -> Fleet:
    """From a decoder with a vocabulary of 4096."""
    speaking = copied(model, folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(toolchain.__file__).parent / "models" / "pocket-llama-6m" / name, speaking)
    (folder / "supernet" / "graph").mkdir(parents=True)
    graph = build(str(speaking), folder / "supernet" / "graph")
    complete_table(graph).save(folder / "profiles" / "local" / "table.jsonl")
    _rounded_supernet(graph, folder / "supernet")
    for name in NAMES:
        wanted = ["--policy", "fp32"] if name == "fp32" else ["--budget", name]
        done(["export", folder / "supernet", *wanted, "--profiles", folder / "profiles", "--out", folder / name])
    (folder / "reports").mkdir()
    (folder / "text.txt").write_text("the old man went down to the sea and said nothing. " * 30)
    with pytest.MonkeyPatch.context() as patch:
        made = FastHost()
        patch.setattr(Host, "time", lambda self, *words: made.time(self, *words))
        patch.setattr(Host, "peak", lambda self, subject: made.peak(self, subject))
        checked = done(["check", folder / "low"])
    scored = done(["evaluate", folder / "low", "--text", folder / "text.txt", "--window", 32])
    for index, name in enumerate(NAMES):
        check, evaluate = _as_if(checked, scored, folder / name, 1 - 0.13 * index)
        (folder / "reports" / f"{name}.check.json").write_text(json.dumps(check))
        (folder / "reports" / f"{name}.evaluate.json").write_text(json.dumps(evaluate))
    return Fleet(folder)


def _rounded_supernet(graph: Graph, folder: Path) -> None:
    """What `train` writes and `export` reads, without training: codes rounded to nearest, losses by the bits."""
    import torch

    from toolchain.policy.meta_network import MetaNetwork

    torch.manual_seed(0)
    kernels = {
        unit.name: candidates(unit, [name for name in CATALOGUE if "+" not in name and "16" not in name]) for unit in graph.units
    }
    weights = round_to_nearest(graph)
    for kernel in (CATALOGUE[name] for name in dict.fromkeys(name for names in kernels.values() for name in names)):
        if kernel.quantised:
            offered = [unit for unit in graph.units if kernel.name in kernels[unit.name]]
            store.write_quantised(folder, kernel, {unit.name: weights(unit, kernel) for unit in offered})
    MetaNetwork(kernels).save(folder / "meta_network.safetensors")
    losses = {
        unit: {name: 0.0 if name == "fp32" else (1 + index) * 2.0 ** -CATALOGUE[name].weight_bits for name in names}
        for index, (unit, names) in enumerate(kernels.items())
    }
    training = {"text": "none", "steps": 0, "workload": "generate:64+32"}
    described = {"source": graph.source, "kernels": {unit: list(names) for unit, names in kernels.items()}, "sensitivity": losses}
    store.write_description(folder, {**described, "rank": 1, "alpha": 1.0, "adapters": "own", "training": training})


def done(words: list[Any]) -> dict[str, Any]:
    """Run a command that must not refuse; its JSON."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*map(str, words), "--json"]) != 2
    return json.loads(out.getvalue())


def _as_if(checked: dict[str, Any], scored: dict[str, Any], package: Path, factor: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What check and evaluate said of one package, as if they had said it of another that takes so many times as long and reads better."""
    manifest = yaml.safe_load((package / "manifest.yaml").read_text())
    measured = {"latency_ms": 1.0 * factor, "peak_memory_bytes": 1e6 / factor}
    limits = []
    for limit in checked["limits"]:
        value = measured[limit["name"]]
        numbers = {"limit": manifest["budget"][limit["name"]], "measured": value, "low": 0.97 * value, "high": 1.04 * value}
        limits.append({**limit, **numbers})
    seen = {name: {**checked["measured"][name], "value": value} for name, value in measured.items()}
    said = {**checked, "package": str(package), "limits": limits, "predicted": manifest["predicted"]}
    said["measured"] = {**checked["measured"], **seen}
    return said, {**scored, "what": str(package), "perplexity": scored["perplexity"] / (2 - factor)}


def gathered(*words: Any) -> dict[str, Any]:
    """What the command would show, without the drawing."""
    parsed = _parser().parse_args([str(word) for word in ("report", *words, "--out", "unused")])
    supernet = Path(parsed.supernet) if parsed.supernet else None
    data = gather([Path(name) for name in parsed.packages], [Path(name) for name in parsed.measured], supernet, parsed.profiles)
    assert Counter(map(type, data.values())) == Counter([str, str, list])
    return data["groups"][0]
