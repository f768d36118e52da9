"""What people get wrong, through the command: exactly one line on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import copied, listing
from fast_host import FastHost

pytest.importorskip("random_models")

Cli = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the command; temporary folders go into it too, so that one left behind is seen."""
    folder = tmp_path / "place"
    (folder / "tmp").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    return folder


@pytest.fixture
def refused(place: Path, cli: Cli, fast: FastHost) -> Callable[..., str]:
    """`refused("export", ...)` → the line; fails the test for anything else, anything left behind, anything measured."""

    def run(*words: object) -> str:
        before = {path: (place / path).read_bytes() for path in listing(place) if (place / path).is_file()}
        entries = listing(place)
        line = cli(*words).error
        assert listing(place) == entries
        assert {path: (place / path).read_bytes() for path in before} == before
        assert fast.timed == []
        assert "Traceback" not in line
        return line

    return run


Refused = Callable[..., str]


def _commands(model: str) -> list[tuple[str, ...]]:
    """Every command that takes a model, as somebody would type it."""
    return [
        ("units", model),
        ("profile", model, "--profiles", "profiles"),
        ("predict", model, "--policy", "w4g32", "--profiles", "profiles"),
        ("export", model, "--policy", "w4g32", "--out", "deep/out", "--profiles", "profiles"),
        ("evaluate", model, "--text", "text.txt"),
    ]


# ---- models


def _config(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04\x95")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, "does not exist"),
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "config.json"),
    "pickle checkpoint": (_pickle_only, "pytorch_model.bin"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "code of its own": (lambda folder: _config(folder, auto_map={"AutoModel": "evil.Model"}), "its own code"),
    "unknown architecture": (lambda folder: _config(folder, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "no architecture": (lambda folder: _config(folder, architectures=[]), "architectures"),
    "config that is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "weights cut short": (lambda folder: _cut(folder / "model.safetensors"), "model"),
    "another width than the weights": (lambda folder: _config(folder, hidden_size=96, num_attention_heads=6), "model"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_bad_models(models: Any, place: Path, refused: Refused, base: str, name: str) -> None:
    damage, word = MODELS[name]
    damage(copied(models(base), place / "model"))
    (place / "text.txt").write_text("some text\n" * 200)
    commands = _commands("model") if name in ("missing folder", "pickle checkpoint") else _commands("model")[3:4]
    for words in commands:
        assert word in refused(*words)


def test_a_model_that_is_a_file(place: Path, refused: Refused) -> None:
    (place / "model").write_text("weights")
    assert "model" in refused("units", "model")


def test_a_hub_id_without_a_network(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nobody/nothing-like-this" in refused("units", "nobody/nothing-like-this")


# ---- policies


def _units(graphs: Any) -> dict[str, str]:
    return {unit.name: "w4g32" for unit in graphs("bert").units}


def _policy_files(units: dict[str, str]) -> dict[str, tuple[str | bytes, str]]:
    first = next(iter(units))
    missing = {unit: kernel for unit, kernel in units.items() if unit != first}
    return {
        "unknown unit": (json.dumps({"units": {**units, "layers.99.attn": "w4g32"}}), "layers.99.attn"),
        "unknown kernel": (json.dumps({"units": {**units, first: "w5g7"}}), "w5g7"),
        "a linear's kernel on the embedding": (json.dumps({"units": {**units, first: "w8a8"}}), first),
        "missing unit": (json.dumps({"units": missing}), first),
        "empty": ("", "units"),
        "not YAML": ("units: [a, {", "policy"),
        "no units": (json.dumps({"layers": units}), "units"),
        "units as a list": (json.dumps({"units": list(units)}), "policy"),
        "kernels as numbers": (json.dumps({"units": dict.fromkeys(units, 4)}), "'4'"),
        "not text": (b"\xff\xfe\x00\x01", "policy"),
        "a tag that would run": ("units: !!python/object/apply:os.system ['touch ran']", "policy"),
    }


@pytest.mark.parametrize("name", _policy_files({"x": ""}))
def test_bad_policy_files(graphs: Any, place: Path, refused: Refused, name: str) -> None:
    content, word = _policy_files(_units(graphs))[name]
    (place / "policy.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("export", graphs("bert").directory, "--policy", "policy.json", "--out", "deep/out", "--profiles", "profiles")
    assert word in line


def test_a_policy_that_is_neither_a_kernel_nor_a_file(graphs: Any, refused: Refused) -> None:
    line = refused("export", graphs("bert").directory, "--policy", "w5", "--out", "out")
    assert "w4g32" in line
    assert "'w5'" in line


# ---- tables


@pytest.mark.parametrize("damage", ["cut", "edited", "empty"])
def test_a_damaged_table(graphs: Any, place: Path, refused: Refused, damage: str) -> None:
    from small_tables import complete_table

    path = place / "profiles" / "local" / "table.jsonl"
    complete_table(graphs("bert")).save(path)
    text = path.read_text()
    path.write_text({"cut": text[:-30], "edited": text.replace('"n": 7', '"n": 9', 1), "empty": ""}[damage])
    for words in _commands(str(graphs("bert").directory))[1:4]:
        assert str(Path("profiles", "local", "table.jsonl")) in refused(*words)


def test_no_table_names_the_command_that_makes_one(models: Any, refused: Refused) -> None:
    for words in (
        ("predict", "--policy", "w4g32"),
        ("export", "--budget", "low", "--out", "out"),
        ("export", "--latency-ms", "5", "--out", "out"),
    ):
        assert "type: bittailor profile" in refused(words[0], models("bert"), *words[1:], "--profiles", "none")


def test_a_model_without_a_supernet_has_no_policy_to_choose(models: Any, graphs: Any, place: Path, refused: Refused) -> None:
    from small_tables import complete_table

    complete_table(graphs("bert")).save(place / "profiles" / "local" / "table.jsonl")
    line = refused("export", models("bert"), "--budget", "low", "--out", "out", "--profiles", "profiles")
    assert "bittailor train" in line


# ---- budgets and numbers


@pytest.mark.parametrize("option", ["--latency-ms", "--memory-mb", "--energy-mj", "--gflop"])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "-inf", "1e999", "fast", ""])
def test_limits_that_are_not_positive_finite_numbers(graphs: Any, refused: Refused, option: str, value: str) -> None:
    line = refused(
        "export", graphs("bert").directory, "--policy", "w4g32", "--out", "out", "--profiles", "none", f"{option}={value}"
    )
    assert option.lstrip("-").partition("-")[0] in line


def test_a_limit_that_overflows(models: Any, refused: Refused) -> None:
    assert "memory_mb" in refused(
        "export", models("bert"), "--policy", "w4g32", "--out", "out", "--profiles", "none", "--memory-mb", "1e305"
    )


BUDGETS: dict[str, tuple[str, str]] = {
    "a typo": ("latency_msec: 5\n", "latency_msec"),
    "a negative limit": ("memory_mb: 10\nlatency_ms: -5\n", "line 2"),
    "not a number": ("latency_ms: .nan\n", "line 1"),
    "infinite": ("latency_ms: .inf\n", "line 1"),
    "words": ("latency_ms: fast\n", "line 1"),
    "yes": ("latency_ms: yes\n", "line 1"),
    "twice": ("latency_ms: 5\nlatency_ms: 6\n", "twice"),
    "empty": ("", "budget.yaml"),
    "no limit": ("name: mine\n", "limit"),
    "a list": ("- 5\n", "mapping"),
    "not YAML": ("latency_ms: [5\n", "budget.yaml"),
    "a tag that would run": ("latency_ms: !!python/object/apply:os.system ['touch ran']\n", "budget.yaml"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_bad_budget_files(graphs: Any, place: Path, refused: Refused, name: str) -> None:
    text, word = BUDGETS[name]
    (place / "budget.yaml").write_text(text)
    assert word in refused(
        "export", graphs("bert").directory, "--policy", "w4g32", "--budget", "budget.yaml", "--out", "out", "--profiles", "none"
    )


def test_a_budget_that_nobody_knows(models: Any, refused: Refused) -> None:
    words = ("export", models("bert"), "--policy", "w4g32", "--out", "out", "--profiles", "none")
    assert "'lowest'" in refused(*words, "--budget", "lowest")
    assert "sources/none" in refused(*words, "--budget", "sources/none")


@pytest.mark.parametrize("text", ["", "[]", '{"low": 5}', '{"low": {"latency_ms": -1}}', "{"])
def test_a_damaged_file_of_derived_budgets(graphs: Any, place: Path, refused: Refused, text: str) -> None:
    from small_tables import complete_table

    complete_table(graphs("bert")).save(place / "profiles" / "local" / "table.jsonl")
    path = place / "profiles" / "local" / f"budgets-{graphs('bert').fingerprint[:12]}-encode-1x128.json"
    path.write_text(text)
    line = refused(
        "export", graphs("bert").directory, "--policy", "w4g32", "--budget", "low", "--out", "out", "--profiles", "profiles"
    )
    assert path.name in line


@pytest.mark.parametrize("workload", ["words", "generate:8", "generate:8+8", "encode:1x0", "encode:1x99999", "encode:-1x8", ""])
def test_bad_workloads(graphs: Any, refused: Refused, workload: str) -> None:
    for words in _commands(str(graphs("bert").directory))[1:4]:
        line = refused(*words, f"--workload={workload}")
        assert "expected" in line


# ---- other words


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("fly",),
        ("units",),
        ("units", "a", "b"),
        ("units", "a", "--colour", "red"),
        ("profile", "pocket-llama-6m", "--device", "toaster"),
        ("profile", "pocket-llama-6m", "--device", "../hardware/local"),
        ("export", "pocket-llama-6m", "--out", "out"),
        ("export", "pocket-llama-6m", "--policy", "w4g32"),
        ("check", "nowhere"),
        ("check", "."),
        ("run", "nowhere", "a prompt"),
        ("evaluate", "nowhere", "--text", "nothing.txt"),
        ("train", "nowhere", "--out", "supernet"),
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_other_words(refused: Refused, words: tuple[str, ...]) -> None:
    refused(*words)


def test_profiles_that_are_a_file(models: Any, place: Path, cli: Cli, fast: FastHost) -> None:
    (place / "profiles").write_text("mine")
    assert "profiles" in cli("profile", models("bert"), "--profiles", "profiles/below").error
    assert listing(place) == {"tmp", "profiles"}


def test_a_result_that_is_no_folder(models: Any, place: Path, refused: Refused) -> None:
    (place / "file").write_text("mine")
    assert "file" in refused("export", models("bert"), "--policy", "w4g32", "--out", "file/out", "--profiles", "none")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(models: Any, place: Path, refused: Refused) -> None:
    (place / "locked").mkdir(mode=0o500)
    assert "locked" in refused("export", models("bert"), "--policy", "w4g32", "--out", "locked/out", "--profiles", "none")


def test_training_that_cannot_start_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "made" / "supernet"
    assert "cost table" in cli("train", "pocket-llama-6m", "--profiles", tmp_path / "none", "--out", out).error
    assert "missing.txt" in cli("train", "pocket-llama-6m", "--text", tmp_path / "missing.txt", "--out", out).error
    assert not out.with_name("supernet.training").exists()


def test_training_compiled_without_a_compiler(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    line = refused("train", "pocket-llama-6m", "--compile", "--out", "supernet")
    assert "expected a C++ compiler for --compile, found none; install g++" in line


def test_a_device_whose_provider_is_not_measured_is_refused(cli: Cli, models: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text("name: gpu\ntransport: local\nprovider: CUDAExecutionProvider\n")
    line = cli("profile", models("bert"), "--device", file, "--profiles", tmp_path / "profiles").error
    assert "CPUExecutionProvider" in line
