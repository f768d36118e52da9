"""Packages through the command: export, verify, check, kill -9, and on runtimes that do not know us."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from conftest import FEWER_PROCESSES, copied, edited, environment, listing
from fast_host import FastHost

pytest.importorskip("random_models")

from toolchain.commands import deciding
from toolchain.decoding import Decoder
from toolchain.files import sha256
from toolchain.hardware import load, thread_count
from toolchain.package.manifest import open_package
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import subject
from toolchain.session import open_session
from toolchain.spec import Workload

Cli = Callable[..., Any]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- export


def test_what_export_says_and_writes(packages: Any, graphs: Any) -> None:
    folder, graph = packages("qwen2"), graphs("qwen2")
    said = json.loads((folder.parent / "said.json").read_text())
    assert {"package", "policy", "predicted", "budget", "gap_to_optimum"} <= set(said)
    assert set(said["policy"]["units"]) == {unit.name for unit in graph.units}
    assert set(said["policy"]["units"].values()) == {"w4g32"}
    assert said["predicted"]["latency_ms"]["value"] > 0
    assert said["predicted"]["energy_mj"]["value"] is None
    assert said["gap_to_optimum"] is None
    package = open_package(folder)
    assert package.data["files"] == {path.name: sha256(path) for path in folder.iterdir() if path.name != "manifest.yaml"}
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= set(package.data["files"])
    assert package.budget is not None
    assert package.budget.limits["latency_ms"] > said["predicted"]["latency_ms"]["value"]
    text = (folder / "manifest.yaml").read_text()
    assert str(folder.parent) not in text
    assert package.data["training"].startswith("none")


def test_a_package_says_how_it_was_opened(packages: Any) -> None:
    """What was measured holds for a session opened like ours, so the manifest and genai's config name its options."""
    said = open_package(packages("qwen2")).data["session_options"]
    ours = open_session(packages("qwen2")).get_session_options()
    assert said == {"enable_mem_pattern": ours.enable_mem_pattern} == {"enable_mem_pattern": False}
    config = json.loads((packages("qwen2") / "genai_config.json").read_text())
    assert said.items() <= config["model"]["decoder"]["session_options"].items()


def test_a_script_without_our_code_weighs_about_the_same(packages: Any) -> None:
    """The agent and benchmarks/keep_budget.py share no code, and once disagreed by a tenth. The agent may count more, by what its
    interpreter has less of to spare; it may not count less."""
    folder = packages("qwen2")
    script = Path(__file__).parents[1] / "benchmarks" / "keep_budget.py"
    command = [sys.executable, str(script), "--memory", str(folder), "64", "32"]
    theirs = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    what = subject("package", folder, Workload.parse("generate:64+32"), open_package(folder).vocabulary)
    host = Host(load("local"), thread_count(load("local")))
    ours = [host.peak(what)["peak_bytes"] for _ in range(3)]
    assert -0.3e6 < median(ours) - median(theirs) < 2e6


def test_export_needs_no_table_for_a_policy(models: Any, tmp_path: Path, cli: Cli) -> None:
    result = cli("export", models("bert"), "--policy", "w8a8", "--profiles", tmp_path / "none", "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert result.json["predicted"] is None
    assert result.json["budget"] is None
    assert "--latency-ms" in cli("check", tmp_path / "out").error  # nothing to hold it against


def test_a_policy_file_is_what_is_exported(graphs: Any, tmp_path: Path, cli: Cli) -> None:
    units = graphs("bert").units
    choice = {unit.name: ("w8g32", "w4g32", "w2g32", "fp32")[turn % 4] for turn, unit in enumerate(units)}
    (tmp_path / "policy.json").write_text(json.dumps({"units": choice}))
    words = ("--policy", tmp_path / "policy.json", "--profiles", tmp_path / "none", "--out", tmp_path / "out", "--json")
    assert cli("export", graphs("bert").directory, *words).json["policy"]["units"] == choice
    assert dict(open_package(tmp_path / "out").policy) == choice


def test_a_second_export_replaces_the_first_with_the_same_bytes(graphs: Any, packages: Any, tmp_path: Path, cli: Cli) -> None:
    first = packages("bert")
    folder = copied(first, tmp_path / "out")
    (folder / "stranger").write_text("not of this package")
    profiles = first.parent / "profiles"
    assert cli("export", graphs("bert").directory, "--policy", "w4g32", "--profiles", profiles, "--out", folder).code == 0
    assert _bytes(folder) == _bytes(first)
    assert listing(tmp_path) == {"out", *(f"out/{path.name}" for path in first.iterdir())}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_export_does_not_replace_what_is_not_a_package(graphs: Any, tmp_path: Path, cli: Cli, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    before = listing(tmp_path)
    line = cli("export", graphs("bert").directory, "--policy", "w4g32", "--profiles", tmp_path / "none", "--out", out).error
    assert str(out) in line
    assert listing(tmp_path) == before
    assert (out if kind == "file" else out / "thesis.txt").read_text() == "mine"


def test_kill_9_during_export_leaves_the_old_package_and_the_next_export_sweeps(
    graphs: Any, packages: Any, tmp_path: Path, cli: Cli
) -> None:
    old = copied(packages("bert"), tmp_path / "out")
    before = _bytes(old)
    slow = """if True:
        import sys, time
        from toolchain.package import export
        real = export.assemble
        def assemble(*words):
            real(*words)
            print("written", flush=True)
            time.sleep(600)
        export.assemble = assemble
        from toolchain.cli import main
        sys.exit(main(sys.argv[1:]))
    """
    words = ["export", graphs("bert").directory, "--policy", "w2g32", "--profiles", tmp_path / "none", "--out", old]
    command = [sys.executable, "-c", slow, *map(str, words)]
    run = subprocess.Popen(
        command, env=environment(TMPDIR=str(tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert run.stdout is not None
    try:
        assert run.stdout.readline() == "written\n"
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    assert _bytes(old) == before
    assert list(tmp_path.glob(".out.*.tmp")), "the killed export was meant to leave its folder"
    assert cli(*words).code == 0
    assert not list(tmp_path.glob(".out.*.tmp"))
    assert set(open_package(old).policy.values()) == {"w2g32"}


def test_a_package_is_told_the_finest_reference_that_its_table_has(graphs: Any, tmp_path: Path, cli: Cli) -> None:
    from small_tables import complete_table, header_here

    times = {**header_here().reference_ns, "model tokens": 2e5, "model token": 3e5}
    table = complete_table(graphs("bert"), header=replace(header_here(), reference_ns=times))
    table.save(tmp_path / "profiles" / "local" / "table.jsonl")
    words = (
        "export",
        graphs("bert").directory,
        "--policy",
        "w4g32",
        "--profiles",
        tmp_path / "profiles",
        "--out",
        tmp_path / "out",
    )
    assert cli(*words).code == 0
    (speed,) = open_package(tmp_path / "out").speeds.values()
    assert (speed.work, speed.ns) == ("model tokens", 2e5)


# ---- check


def test_check_within_over_and_could_not_tell(packages: Any, tmp_path: Path, cli: Cli, fast: FastHost) -> None:
    """The made-up host says 1 ms and 1 MB."""
    folder = packages("bert")
    assert cli("check", folder, "--latency-ms", "5", "--memory-mb", "50").code == 0
    assert cli("check", folder, "--latency-ms", "0.5").code == 1
    assert cli("check", folder, "--memory-mb", "0.5", "--latency-ms", "5").code == 1
    result = cli("check", folder, "--energy-mj", "5", "--json")
    assert result.code == 3
    assert "meter" in result.json["limits"][0]["reason"]
    assert cli("check", folder, "--gflop", "1000").code == 0
    assert cli("check", folder, "--gflop", "1e-9").code == 1


def test_check_holds_a_package_against_its_own_budget(packages: Any, tmp_path: Path, cli: Cli, fast: FastHost) -> None:
    result = cli("check", packages("bert"), "--json", "--junit", tmp_path / "report" / "junit.xml")
    found = {verdict["name"]: verdict for verdict in result.json["limits"]}
    assert set(found) == {"peak_memory_bytes", "latency_ms"}
    assert found["peak_memory_bytes"]["limit"] == open_package(packages("bert")).budget.limits["peak_memory_bytes"]  # type: ignore[union-attr]
    for verdict in found.values():
        assert {"name", "limit", "measured", "low", "high", "verdict"} <= set(verdict)
    assert result.json["verdict"] in ("within", "over", "could not tell")
    suite = ElementTree.parse(tmp_path / "report" / "junit.xml").getroot()
    assert suite.get("tests") == "2"
    assert {case.get("name") for case in suite.iter("testcase")} == set(found)
    assert int(suite.get("failures", "9")) == sum(verdict["verdict"] == "over" for verdict in found.values())


def test_a_latency_over_its_limit_on_a_slower_machine_is_not_told(packages: Any, tmp_path: Path, cli: Cli, fast: FastHost) -> None:
    """The reference takes 0.1 ms now; the table says it took 0.05."""
    folder = copied(packages("bert"), tmp_path / "package")
    edited(folder, lambda data: {**data, "budget": {"latency_ms": 0.5}, "reference_ns": {"latency_ms": {"tokens": 5e4}}})
    result = cli("check", folder, "--json")
    assert (result.code, result.json["limits"][0]["verdict"]) == (3, "could not tell")
    assert "2.00 times as long" in result.json["limits"][0]["reason"]
    edited(folder, lambda data: {**data, "reference_ns": {"latency_ms": {"tokens": 1e5}}})
    assert cli("check", folder).code == 1


def test_check_measures_for_real(packages: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is told on a busy machine too; latency then is not valid, and "could not tell"."""
    monkeypatch.setattr(deciding, "LOOKS", FEWER_PROCESSES)
    result = cli("check", packages("qwen2"), "--memory-mb", "500", "--latency-ms", "1000", "--json")
    found = {verdict["name"]: verdict["verdict"] for verdict in result.json["limits"]}
    assert found["peak_memory_bytes"] == "within"
    assert found["latency_ms"] in ("within", "could not tell")
    assert result.code == {"within": 0, "could not tell": 3}[found["latency_ms"]]
    assert result.json["measured"]["first_token_ms"]["value"] > result.json["measured"]["latency_ms"]["value"] > 0
    assert result.json["measured"]["peak_memory_bytes"]["value"] > 100_000


# ---- on runtimes that do not know us


def _greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    decoder = Decoder(folder, threads=1, capacity=256)
    logits, tokens = decoder.prefill(np.array(ids)), []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = decoder.step(tokens[-1])
    return tokens


_PROMPT = [5, 77, 301, 12, 400, 9, 33, 250]

_STOCK = """if True:
    import sys
    for name in ("toolchain", "onnx", "torch", "transformers", "yaml"):
        sys.modules[name] = None
    import numpy as np, onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[int(word) for word in sys.argv[2:]]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for item in session.get_inputs():
        if item.name.startswith("past"):
            feeds[item.name] = np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
        elif item.name == "position_ids":
            feeds[item.name] = np.arange(ids.shape[1])[None]
        elif item.name == "token_type_ids":
            feeds[item.name] = np.zeros_like(ids)
    out = session.run(None, feeds)[0]
    print(*out[0, -1].argsort()[-5:])
"""


@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_a_package_runs_where_only_onnxruntime_and_numpy_are(packages: Any, tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-P", "-c", _STOCK, str(packages(name)), *map(str, _PROMPT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if name == "qwen2":
        expected = Decoder(packages(name), threads=1, capacity=64).prefill(np.array(_PROMPT)).argsort()[-5:]
        assert [int(word) for word in done.stdout.split()] == expected.tolist()


_GENAI = """if True:
    import sys
    import onnxruntime_genai as og
    model = og.Model(sys.argv[1])
    parameters = og.GeneratorParams(model)
    ids = [int(word) for word in sys.argv[2:]]
    parameters.set_search_options(do_sample=False, max_length=len(ids) + 48, min_length=len(ids) + 48)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    print(*generator.get_sequence(0)[len(ids):])
"""


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed")
@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_onnxruntime_genai_loads_a_decoder_and_says_the_same(packages: Any, name: str) -> None:
    folder = packages(name)
    done = subprocess.run(
        [sys.executable, "-c", _GENAI, str(folder), *map(str, _PROMPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    got = [int(word) for word in done.stdout.split()]
    end = json.loads((folder / "genai_config.json").read_text())["model"].get("eos_token_id", [])
    expected = _greedy(folder, _PROMPT, 48)
    stops = [index for index, token in enumerate(expected) if token in (end if isinstance(end, list) else [end])]
    length = stops[0] if stops else 48  # past its end, genai is free to do as it likes
    assert length >= 8
    assert got[:length] == expected[:length]


def test_a_package_survives_being_moved(packages: Any, tmp_path: Path) -> None:
    moved = copied(packages("qwen2"), tmp_path / "elsewhere" / "deep")
    assert _greedy(moved, _PROMPT, 8) == _greedy(packages("qwen2"), _PROMPT, 8)
