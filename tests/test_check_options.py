"""`check` held against a baseline, the 95th percentile and quality limits, through the command, on a host that answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fast_host import FastHost
from tiny_graphs import attention, encoder

from toolchain.commands.deciding import LOOKS
from toolchain.hardware import load
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import measure_block
from toolchain.spec import WORKS, Workload


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No agent is asked who it is either: a second for each check."""
    if "fast" in request.fixturenames:
        identity = {"cpu": "made up", "runtime": "onnxruntime", "protocol": "p", "meters": {}, "cache_bytes": 1, "providers": []}
        monkeypatch.setattr(Host, "identify", lambda _: identity)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A random decoder of one layer."""
    return _written(attention(tmp_path / "package"), "decoder")


def _table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)


def _written(folder: Path, kind: str, **changes: Any) -> Path:
    from toolchain.package.manifest import write_manifest

    if kind == "encoder":
        _word_tokenizer(folder)
    model = {"vocabulary": 4096 if kind == "decoder" else 8, "kind": kind, "context": 48, "source": "gone"}
    manifest = {"model": model, "workload": "generate:2+2" if kind == "decoder" else "encode:1x4", "policy": {}, "predicted": None}
    write_manifest(folder, {**manifest, "budget": {"latency_ms": 5.0}, **changes}, ())
    return folder


def _word_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: place for place, word in enumerate(["[UNK]", *"abcdefg"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text(" ".join(rng.choice(list("abcdefg"), 400)))
    return tmp_path / "text.txt"


def test_the_report_of_a_check_is_a_baseline(package: Path, tmp_path: Path, cli: Any, fast: FastHost, monkeypatch: Any) -> None:
    said = cli("check", package, "--json").json
    assert said["decision"]["processes"] == len(said["blocks"]) == LOOKS[0]
    (tmp_path / "report.json").write_text(json.dumps(said))
    same = cli("check", package, "--baseline", tmp_path / "report.json", "--json")
    assert same.code == 0, same.out
    assert [one["name"] for one in same.json["limits"]] == [
        "latency_ms",
        "latency_ms / baseline",
        "first_token_ms / baseline",
        "peak_memory_bytes / baseline",
    ]

    def slower(data: Any) -> None:  # as if the package had been faster then
        for block in data["blocks"]:
            block["trials"]["latency_ms"] = [time / 1.2 for time in block["trials"]["latency_ms"]]

    changed = json.loads(json.dumps(said))
    slower(changed)
    (tmp_path / "faster.json").write_text(json.dumps(changed))
    found = cli("check", package, "--baseline", tmp_path / "faster.json", "--json", "--junit", tmp_path / "junit.xml")
    assert found.code == 1
    limits = {one["name"]: one for one in found.json["limits"]}
    assert limits["latency_ms"]["verdict"] == "within"  # and said so although the budget is kept
    assert limits["latency_ms / baseline"]["verdict"] == "over"
    assert "+20.0%" in limits["latency_ms / baseline"]["reason"]
    assert 'failures="1"' in (tmp_path / "junit.xml").read_text()
    changed = {**said, "measured": {"peak_memory_bytes": {"trials": [9e5] * 3}}}
    (tmp_path / "lighter.json").write_text(json.dumps(changed))
    assert cli("check", package, "--baseline", tmp_path / "lighter.json").code == 1


def test_a_package_without_a_budget_is_held_against_its_baseline_alone(
    package: Path, tmp_path: Path, cli: Any, fast: FastHost
) -> None:
    (tmp_path / "report.json").write_text(cli("check", package, "--latency-ms", 5, "--json").out)
    bare = _written(package, "decoder", budget=None)
    assert "budget" in cli("check", bare).error
    found = cli("check", bare, "--baseline", tmp_path / "report.json", "--json")
    assert found.code == 0, found.err
    assert {one["name"].partition(" / ")[2] for one in found.json["limits"]} == {"baseline"}


def test_a_device_in_service_keeps_its_order(package: Path, cli: Any, fast: FastHost) -> None:
    for words, niceness in ((), -20), (("--no-precedence",), 0):
        said = cli("check", package, "--json", *words).json
        assert {block["niceness"] for block in said["blocks"]} == {niceness}


def test_a_baseline_of_something_else_is_refused(package: Path, tmp_path: Path, cli: Any, fast: FastHost) -> None:
    report = tmp_path / "report.json"
    said = cli("check", package, "--json").json

    def refused(content: str) -> str:
        report.write_text(content)
        return cli("check", package, "--baseline", report).error

    assert "with cpu " in refused(json.dumps({**said, "machine": {**said["machine"], "cpu": "another"}}))
    assert "with threads " in refused(json.dumps({**said, "machine": {**said["machine"], "threads": 99}}))
    assert "with workload generate:2+2, as now, got generate:9+9" in refused(json.dumps({**said, "workload": "generate:9+9"}))
    assert "bittailor check" in refused("{")
    assert "no 'machine'" in refused("{}")
    assert "expected a block" in refused(json.dumps({**said, "blocks": [{"trials": {"latency_ms": [-1]}}]}))
    for text in ("[]", "[" * 5000, '"x"', json.dumps({**said, "blocks": 3}), json.dumps({**said, "measured": []})):
        assert "expected" in refused(text)
    assert "nowhere" in cli("check", package, "--baseline", tmp_path / "nowhere").error


def test_a_limit_on_the_95th_percentile(package: Path, cli: Any, fast: FastHost) -> None:
    """The made-up host says 1 ms, and 1.5 ms for the 95th percentile."""
    assert cli("check", package, "--latency-p95-ms", 2).code == 0
    found = cli("check", package, "--latency-p95-ms", 1.2, "--latency-ms", 1.2, "--json")
    assert [(one["name"], one["verdict"]) for one in found.json["limits"]] == [("latency_ms", "within"), ("latency_p95_ms", "over")]
    assert found.json["measured"]["latency_p95_ms"]["value"] == 1.5
    assert "latency_p95_ms" not in cli("check", package, "--latency-ms", 1.2, "--json").json["measured"]


def test_single_runs_make_the_95th_percentile(package: Path) -> None:
    """Really measured: the tail of single steps is above their median and below the slowest."""
    block = measure_block(package, Workload.parse("generate:4+40"), Host(load("local"), 1), 4096, tail=True)
    assert len(block.trials["latency_ms"]) >= 5
    assert block.p95_ms is not None
    assert block.p95_ms > 0.9 * np.median(block.trials["latency_ms"])
    assert set(block.reference_ns) >= {*WORKS, "model token", "model tokens"}


def test_quality_limits_of_a_decoder(package: Path, text: Path, tmp_path: Path, cli: Any, fast: FastHost) -> None:
    other = _written(attention(tmp_path / "fp32", seed=1), "decoder")
    words = ("--text", text, "--reference", other, "--json")
    own, theirs = (
        cli("evaluate", folder, "--text", text, "--window", 48, "--json").json["perplexity"] for folder in (package, other)
    )
    ratio = own / theirs
    found = cli("check", package, "--max-perplexity-ratio", ratio * 1.001, *words)
    assert found.code == 0, found.out + found.err
    quality = found.json["limits"][-1]
    assert (quality["name"], quality["measured"]) == ("perplexity_ratio", pytest.approx(ratio))
    assert "text.txt" in quality["reason"]
    assert cli("check", package, "--max-perplexity-ratio", ratio * 0.999, *words).code == 1
    assert "--reference MODEL" in cli("check", package, "--max-perplexity-ratio", 1.1, "--text", text).error
    assert "--text FILE" in cli("check", package, "--max-perplexity-ratio", 1.1).error
    assert "--max-perplexity-ratio" in cli("check", package, "--text", text).error
    assert "got --min-fidelity" in cli("check", package, "--min-fidelity", 0.9, *words).error
    assert "positive" in cli("check", package, "--max-perplexity-ratio", "nan", *words).error
    assert (
        "expected a text file"
        in cli("check", package, "--max-perplexity-ratio", 1.1, "--text", tmp_path / "no.txt", "--reference", other).error
    )


def test_quality_limits_of_an_encoder(text: Path, tmp_path: Path, cli: Any, fast: FastHost) -> None:
    vectors = _table(1)
    exact = _written(encoder(tmp_path / "exact", vectors), "encoder")
    rough = _written(encoder(tmp_path / "rough", vectors + 0.3 * _table(2)), "encoder", budget=None)
    words = ("--text", text, "--reference", exact, "--json")
    found = cli("check", rough, "--min-fidelity", 0.5, *words)
    assert found.code == 0, found.out + found.err  # quality alone is a limit too
    (quality,) = found.json["limits"]
    assert 0.5 < quality["measured"] < 0.999
    assert "a lower limit" in quality["reason"]
    assert cli("check", rough, "--min-fidelity", 0.999, *words).code == 1
    assert cli("check", exact, "--min-fidelity", 0.999, *words).code == 0


def test_patience_must_make_sense(package: Path, cli: Any, fast: FastHost) -> None:
    assert "--least-seconds" in cli("check", package, "--least-seconds", 9, "--most-seconds", 5).error
    assert "--most-seconds" in cli("check", package, "--most-seconds", "nan").error
