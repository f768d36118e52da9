"""Several devices at once, and what is asked of each: kernels, threads and identity are the device's own."""

from __future__ import annotations

import _thread
import ast
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cables import linked, started

from toolchain.costs.table import open_table
from toolchain.errors import InputError
from toolchain.profiler import agent, bundle, probe
from toolchain.profiler.ask import Host
from toolchain.profiler.probe import working_kernels
from toolchain.profiler.transports.jobs import Link
from toolchain.profiler.transports.local import Local
from toolchain.spec import CUDA, Device

# ---- several devices


def _device_file(tmp_path: Path, name: str, **fields: object) -> Path:
    path = tmp_path / f"{name}.yaml"
    lines = {"name": name, "folder": tmp_path / name, "threads": 1, **fields}
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


def test_devices_are_profiled_at_once_and_one_that_fails_stops_no_other(
    tiny_graph: Path, tmp_path: Path, cli: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The times are made up, and no device has its answer before all are asked; identity and kernels are really asked of each."""
    together = threading.Barrier(2, timeout=120)
    monkeypatch.setattr("toolchain.profiler.model_rows.SESSIONS", 1)
    asked: set[str] = set()
    answered = Host.time

    def time_of(host: Host, *words: Any) -> dict[str, Any]:
        if host.device.name not in asked:
            asked.add(host.device.name)
            together.wait()
        return answered(host, *words)

    monkeypatch.setattr(Host, "time", time_of)
    good = [_device_file(tmp_path, "one"), _device_file(tmp_path, "two", threads=2)]
    bad = [_device_file(tmp_path, "three", python="/no/such/python")]
    words = [word for path in (*bad, *good) for word in ("--device", path)]
    result = cli("profile", tiny_graph, "--profiles", tmp_path / "profiles", "--json", *words)
    assert result.code == 2
    assert set(result.json["devices"]) == {"one", "two"}, result.json["failed"]
    assert set(result.json["failed"]) == {"three"}
    assert "'/no/such/python' on 'three'" in result.json["failed"]["three"]
    tables = {name: open_table(tmp_path / "profiles" / name / "table.jsonl") for name in ("one", "two")}
    assert [table.header.threads for table in tables.values()] == [1, 2]
    assert {table.header.device for table in tables.values()} == {"one", "two"}
    assert set(tables["one"].rows) == set(tables["two"].rows)
    assert tables["one"].header.kernels == working_kernels()
    text = cli("profile", tiny_graph, "--profiles", tmp_path / "profiles", *words)
    assert "three: failed: expected the Python" in text.out
    assert text.out.splitlines()[-1] == "2 of 3 devices profiled, 1 failed"
    assert not (tmp_path / "profiles" / "three").exists()


def test_ctrl_c_does_not_wait_for_the_devices(tiny_graph: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for_ever = threading.Event()

    def interrupted(graph: object, device: Device, *words: object, **more: object) -> None:
        if device.name == "two":
            _thread.interrupt_main()
        for_ever.wait(60)

    monkeypatch.setattr("toolchain.commands.fleet.measure_costs", interrupted)
    words = [word for name in ("one", "two") for word in ("--device", _device_file(tmp_path, name))]
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # whoever is started in the background inherits that it is ignored
    try:
        began = time.monotonic()
        assert cli("profile", tiny_graph, "--profiles", tmp_path / "profiles", *words).code == 130
        assert time.monotonic() - began < 30
    finally:
        signal.signal(signal.SIGINT, before)
        for_ever.set()


def test_the_agent_is_made_once_however_many_devices_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    inside = threading.Lock()

    def parse(text: str) -> ast.AST:
        assert inside.acquire(blocking=False), "two threads parse at once"
        time.sleep(0.001)
        parsed.append(text)
        tree = compile(text, "module", "exec", ast.PyCF_ONLY_AST)
        inside.release()
        return tree

    expected = bundle.agent_bytes()
    bundle._made.cache_clear()
    monkeypatch.setattr(bundle.ast, "parse", parse)
    with ThreadPoolExecutor(4) as pool:
        assert {future.result() for future in [pool.submit(bundle.agent_bytes) for _ in range(4)]} == {expected}
    assert len(parsed) > 10


def test_two_devices_of_one_name_are_refused(tiny_graph: Path, tmp_path: Path, cli: Any) -> None:
    path = _device_file(tmp_path, "one")
    assert "expected each device once, got 'one'" in cli("profile", tiny_graph, "--device", path, "--device", path).error


@pytest.mark.parametrize("broken", [KeyError("meters"), ValueError("not a number"), OSError("no such device")])
def test_a_device_that_raises_does_not_hide_the_others(
    tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    """One at hand, one in a folder."""
    (tmp_path / "here.yaml").write_text("name: here\n")
    words = [word for path in (tmp_path / "here.yaml", _device_file(tmp_path, "there")) for word in ("--device", path)]
    real = Host.identify

    def identify(host: Host) -> dict[str, Any]:
        if host.device.name in ("here", "there"):
            raise broken
        return real(host)

    monkeypatch.setattr(Host, "identify", identify)
    rows = cli("devices", "--json", *words, "--device", "local").json["devices"]
    assert [row["reachable"] for row in rows] == [f"no: {type(broken).__name__}: {broken}"] * 2 + ["yes"]


def test_devices_of_this_machine_are_measured_one_after_the_other(
    tiny_graph: Path, tmp_path: Path, cli: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{name}.yaml" for name in ("one", "two")]
    for path in paths:
        path.write_text(f"name: {path.stem}\n")
    turns: list[str] = []
    answered = Host.time

    def time_of(host: Host, *words: Any) -> dict[str, Any]:
        turns.append(host.device.name)
        time.sleep(0.05)
        return answered(host, *words)

    monkeypatch.setattr(Host, "time", time_of)
    words = [word for path in paths for word in ("--device", path)]
    assert set(cli("profile", tiny_graph, "--profiles", tmp_path / "profiles", "--json", *words).json["devices"]) == {"one", "two"}
    changes = [(before, after) for before, after in itertools.pairwise(turns) if before != after]
    assert len(changes) == 1, turns


def test_what_nobody_expected_of_one_device_is_its_line_and_not_the_end_of_all(
    tiny_graph: Path, tmp_path: Path, cli: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{name}.yaml" for name in ("one", "two")]
    for path in paths:
        path.write_text(f"name: {path.stem}\n")
    answered = Host.peak

    def peak(host: Host, subject: dict[str, Any]) -> dict[str, int]:
        return {}["peak_bytes"] if host.device.name == "one" else answered(host, subject)

    monkeypatch.setattr(Host, "peak", peak)
    words = [word for path in paths for word in ("--device", path)]
    result = cli("profile", tiny_graph, "--profiles", tmp_path / "profiles", "--json", *words)
    assert result.code == 2
    assert (set(result.json["devices"]), result.json["failed"]) == ({"two"}, {"one": "KeyError: 'peak_bytes'"})
    assert "bittailor: one failed: KeyError: 'peak_bytes'" in result.err
    with pytest.raises(KeyError):  # alone, it is a fault that somebody wants to see whole
        cli("profile", tiny_graph, "--profiles", tmp_path / "profiles", "--device", paths[0])


def test_kernels_are_those_that_work_on_the_device(board: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime there computes one kernel wrong and refuses another."""
    real = Host.outputs

    def outputs(host: Host, subjects: Sequence[dict[str, Any]]) -> dict[str, list[Any] | None]:
        made = real(host, subjects)
        for name, seen in made.items():
            if name.startswith("w4g32 ") and seen:
                seen[1] = (1.01 * np.array(seen[1])).tolist()
            if name.startswith("w2g128 "):
                made[name] = None
        return made

    monkeypatch.setattr(Host, "outputs", outputs)
    wrong = {"w4g32", "w4g32+w8a8", "w2g128"}
    assert probe.working_kernels_of(Host(board, 1)) == tuple(name for name in working_kernels() if name not in wrong)


def test_a_runtime_without_the_provider_is_not_asked_to_compute(board: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said for want of a GPU would read as kernels that compute wrong."""
    real = Host.identify

    def identify(host: Host) -> dict[str, Any]:
        return real(Host(board, 1))

    monkeypatch.setattr(Host, "identify", identify)
    with pytest.raises(InputError, match=r"onnxruntime .* on 'board' has no CUDAExecutionProvider, only .*CPUExecutionProvider"):
        probe.working_kernels_of(Host(replace(board, provider=CUDA), 1))
    assert started(board) == []


def test_what_is_asked_of_a_device_is_small_and_its_numbers_travel_as_files(board: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request goes down the link with every exchange; files go once, and from where they broke off."""
    longest = 0
    exchange = Local.exchange

    def measured(self: Local, header: Any, patience_s: float) -> dict[str, Any]:
        nonlocal longest
        longest = max(longest, len(json.dumps(header)))
        return exchange(self, header, patience_s)

    monkeypatch.setattr(Local, "exchange", measured)
    assert probe.working_kernels_of(Host(board, 1)) == working_kernels()
    assert 1_000 < longest < 100_000


@pytest.mark.parametrize("python", ["~/venv/bin/python", "venv/bin/python"])
def test_an_interpreter_is_found_from_the_home_folder(
    python: str, board: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "venv" / "bin").mkdir(parents=True)
    (home / "venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (home / "venv" / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    assert linked(replace(board, python=python))[0].identify()["protocol"] == agent.PROTOCOL


def test_what_is_being_sent_is_not_swept(board: Device) -> None:
    """However long it is: here a part of 3 GiB (of nothing) and a file as long."""
    assert linked(board)[0].machine
    files = Path(board.folder) / "files"
    names = [f"{'1' * 64}.{'2' * 32}.part", "3" * 64, "4" * 64]
    for name in names:
        with open(files / name, "wb") as stream:
            stream.truncate(3 << 30)
    os.utime(files / names[2], (time.time() - 2 * 3600,) * 2)
    assert linked(board)[0].machine
    assert sorted(os.listdir(files)) == names[:2]


def test_one_profile_asks_a_device_once_who_it_is(
    tiny_graph: Path, tmp_path: Path, cli: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One link, for the header, the kernels and the rows; the times are made up."""
    asked = []
    real = Link._job

    def job(self: Link, request: Any, *more: Any) -> dict[str, Any]:
        asked.append(request["action"])
        return real(self, request, *more)

    monkeypatch.setattr(Link, "_job", job)
    path = _device_file(tmp_path, "one")
    assert cli("profile", tiny_graph, "--profiles", tmp_path / "profiles", "--device", path, "--json").code in (0, 3)
    assert asked == ["identify", "outputs"]


def test_all_threads_are_the_devices_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter there sees one CPU, whatever this machine has."""
    if shutil.which("taskset") is None:
        pytest.skip("needs taskset")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec taskset -c 0 {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert Host.of(Device("board", folder=str(tmp_path / "board"), python=str(python))).threads == 1


def test_all_devices_are_asked_at_once(tmp_path: Path, cli: Any) -> None:
    """Neither's Python starts before the other's has been asked for."""
    words: list[object] = []
    for name in ("one", "two"):
        python = tmp_path / f"python-{name}"
        wait = f"for _ in $(seq 200); do [ -e {tmp_path}/seen-one ] && [ -e {tmp_path}/seen-two ] && break; sleep 0.1; done"
        other = "two" if name == "one" else "one"
        python.write_text(
            f'#!/bin/sh\ntouch {tmp_path}/seen-{name}\n{wait}\n[ -e {tmp_path}/seen-{other} ] && exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        words += ["--device", _device_file(tmp_path, name, python=python)]
    rows = cli("devices", "--json", *words).json["devices"]
    assert [(row["device"], row["reachable"], row["threads"]) for row in rows] == [("one", "yes", 1), ("two", "yes", 1)]
