"""The agent's protocol by itself: what it says of its machine, which windows it keeps, what it weighs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import environment

from toolchain.errors import BittailorError, InputError
from toolchain.hardware import load
from toolchain.profiler import agent, ask, contention, subjects
from toolchain.profiler.ask import Host
from toolchain.profiler.machine import cpu_name

HOST = Host(load("local"), 1)


def test_the_agent_says_what_it_runs_on() -> None:
    import onnxruntime

    answer = HOST.identify()
    assert answer["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert answer["cache_bytes"] > 2**16
    assert answer["cpu"]


X86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 sha_ni\n\n"
ARM = "processor\t: {}\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {}\nCPU revision\t: 1\n\n"
BOARD = "".join(ARM.format(core, "fp asimd asimdhp asimddp", "0xd0b") for core in range(4))
PHONE = "".join(ARM.format(core, "asimd asimddp i8mm", part) for core, part in enumerate(["0xd46"] * 4 + ["0xd4d"] * 3 + ["0xd4e"]))


@pytest.mark.parametrize(
    ("machine", "lines", "expected"),
    [
        ("x86_64", X86 * 2, "AMD EPYC family 25 model 1 (avx2)"),
        ("aarch64", BOARD + "Revision\t: c04170\n", "aarch64 implementer 0x41 part 0xd0b (asimddp)"),
        (
            "aarch64",
            PHONE,
            "aarch64 implementer 0x41 part 0xd46, implementer 0x41 part 0xd4d, implementer 0x41 part 0xd4e (asimddp i8mm)",
        ),
        ("armv7l", ARM.format(0, "half thumb neon", "0xd03"), "armv7l implementer 0x41 part 0xd03 ()"),
        ("aarch64", X86, "aarch64 emulated on AMD EPYC"),  # qemu before 8.1
        ("x86_64", BOARD, "x86_64 emulated on x86_64"),
    ],
)
def test_cpus_that_run_other_kernels_have_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, lines: str, expected: str
) -> None:
    """Two boards of one name would share a cost table."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("toolchain.profiler.machine._CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(lines)
    assert cpu_name() == expected


def test_the_agent_is_this_version_whatever_the_working_directory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may well hold a `toolchain/`, or a `json.py`."""
    for name in ("toolchain", "numpy", "onnxruntime"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert HOST.identify()["cpu"]


def test_the_agent_finds_what_its_host_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime may have been installed with `pip install --target`, and be found through PYTHONPATH only."""
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['SEEN'] = '1'; open(os.environ['MARK'], 'w').close()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    assert HOST.identify()["cpu"]
    assert (tmp_path / "mark").exists()


NVML = """
class NVMLError(Exception):
    pass
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetHandleByIndex(index): return index
nvmlDeviceGetHandleByPciBusId = nvmlDeviceGetHandleByIndex
def nvmlDeviceGetName(gpu): return "a GPU"
def nvmlDeviceGetTotalEnergyConsumption(gpu): return 0
"""


def test_no_test_reads_a_meter_of_the_machine_it_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a laptop, or beside a GPU, the profiles of these tests would take hours and have other rows."""
    (tmp_path / "pynvml.py").write_text(NVML)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(tmp_path)])))
    states = HOST.identify()["meters"]
    assert "not installed" in states.pop("nvml")
    assert all(ask.SYSFS in reason for reason in states.values()), states
    assert Path(ask.SYSFS) != Path("/sys")
    assert HOST.meter()[0] == "none"


def test_what_the_agent_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BittailorError, match=r"model\.onnx"):
        HOST.peak({"name": "x", "kind": "unit", "folder": str(tmp_path), "tokens": 1, "rows": 1})
    with pytest.raises(BittailorError, match="colour"):
        HOST.peak({"name": "x", "kind": "colour", "folder": str(tmp_path), "rows": 1})
    with pytest.raises(BittailorError, match="died"):
        HOST.peak({"name": "x", "kind": "unit", "folder": str(agent.BARE), "rows": 1})
    with pytest.raises(InputError, match="transport"):
        Host(replace(HOST.device, transport="pigeon"), 1).identify()


def test_an_agent_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "TIMEOUT_SECONDS", 0.01)
    with pytest.raises(BittailorError, match="answer"):
        HOST.identify()


class _Constant:
    """A subject that takes no time and says it took 2 ms, the references 1, 4 and 9."""

    def __init__(self, subject: dict[str, Any], threads: int, shared_pool: bool) -> None:
        references = {subjects.GRAPHS / "small": 1e6, subjects.GRAPHS / "float": 4e6, subjects.GRAPHS / "int8": 9e6}
        self._nanoseconds = references.get(subject["folder"], 2e6)
        self.runs = 0

    def trial(self) -> dict[str, float]:
        self.runs += 1
        return {"run_ns": self._nanoseconds}


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float | None]], dict[str, Any]]:
    """`replay([0.0, 0.9, ...])` → the agent's answer on a machine whose others used that share of the CPUs, window by window."""

    def run(shares: list[float | None]) -> dict[str, Any]:
        left = iter(shares)

        class Watch:
            def __init__(self) -> None:
                self.share = next(left)

            def usage(self) -> contention.Usage:
                return contention.Usage(1.0, self.share)

        monkeypatch.setattr(agent, "Watch", Watch)
        monkeypatch.setattr(agent, "_settle", lambda *_: None)
        monkeypatch.setattr(subjects, "Unit", _Constant)
        monkeypatch.setattr(agent, "SUBJECTS", {"unit": _Constant})
        monkeypatch.setattr("onnxruntime.set_global_thread_pool_sizes", lambda *_: None)
        wanted = [{"name": name, "kind": "unit", "folder": name} for name in ("a", "b", "c")]
        return agent.time_subjects({"threads": 1, "subjects": wanted, "windows": 6})

    return run


Replay = Callable[[list[float | None]], dict[str, Any]]


def test_quiet_windows_are_kept(replay: Replay) -> None:
    answer = replay([0.0, 0.1, None, 0.14, 0.0, 0.15])
    assert answer["valid"]
    assert answer["dropped"] == 0
    assert {name: len(trials) for name, trials in answer["trials"].items()} == {"a": 6, "b": 6, "c": 6}
    coarse = {"token": [1e6] * 6, "streamed token": [4e6] * 6, "tokens": [6e6] * 6}
    assert answer["reference_ns"] == {**coarse, "model token": [2e6] * 6, "model tokens": [pytest.approx(12e12**0.5)] * 6}
    assert answer["trials"]["b"][0] == {"run_ns": 2e6}


def test_disturbed_windows_are_dropped_and_repeated(replay: Replay) -> None:
    answer = replay([0.9, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.2, 0.0])
    assert (answer["valid"], answer["dropped"], len(answer["trials"]["a"])) == (True, 3, 6)


def test_a_machine_that_stays_busy_gives_rows_that_are_not_valid(replay: Replay) -> None:
    answer = replay([0.0, 0.0] + [0.9] * 12)
    assert (answer["valid"], answer["dropped"]) == (False, 12)
    assert len(answer["trials"]["a"]) == len(answer["reference_ns"]["token"]) == 14  # shown, so that somebody can see how disturbed


def test_a_busy_neighbour_is_seen() -> None:
    """It takes one CPU: half of two. Others on this machine can only add."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        watch = contention.Watch()
        time.sleep(1.0)
        others = watch.usage().others
    finally:
        neighbour.kill()
        neighbour.wait()
    if others is None:
        pytest.skip("this system does not tell how busy it is")
    assert others > 0.5 / contention.cpu_count()


def _stat(*cpus: tuple[float, float]) -> str:
    """/proc/stat of CPUs that so many seconds were busy for users, and for the system; its first line is their sum."""
    ticks = os.sysconf("SC_CLK_TCK")
    every = [(sum(user for user, _ in cpus), sum(system for _, system in cpus)), *cpus]
    names = ["cpu", *(f"cpu{number}" for number in range(len(cpus)))]
    lines = [
        f"{name} {int(user * ticks)} 0 {int(system * ticks)} 5000 0 0 0 0 0 0"
        for name, (user, system) in zip(names, every, strict=True)
    ]
    return "\n".join([*lines, "intr 5 0", ""])


@pytest.mark.parametrize(
    ("ours", "after", "others"),
    [
        ({0, 1}, [(100.5, 0.3), (50.0, 0.0)], 0.2 / 2),
        ({0, 1}, [(100.6, 0.0), (51.0, 0.0)], 1.0 / 2),
        ({0}, [(100.6, 0.0), (51.0, 0.0)], 0.0),  # the other CPU is somebody else's
        ({0, 5}, [(100.5, 0.3), (50.2, 0.0)], 0.4 / 2),  # the system does not show the sixth: all are counted
    ],
)
def test_our_own_work_is_not_somebody_elses(
    ours: set[int], after: list[tuple[float, float]], others: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one second in which we used 0.6 s."""
    stat = tmp_path / "stat"
    own, clock = iter([10.0, 10.6]), iter([50.0, 51.0])
    stat.write_text(_stat((100.0, 0.0), (50.0, 0.0)))
    monkeypatch.setattr(contention, "_STAT", stat)
    monkeypatch.setattr(contention, "_own_seconds", lambda: next(own))
    monkeypatch.setattr(contention.os, "sched_getaffinity", lambda _: ours, raising=False)
    monkeypatch.setattr(contention.time, "monotonic", lambda: next(clock))
    watch = contention.Watch()
    stat.write_text(_stat(*after))
    assert watch.usage().others == pytest.approx(others, abs=0.02)


def test_peak_memory_sees_what_was_given_back_and_not_what_the_starter_used() -> None:
    code = """if True:
        from toolchain.profiler import agent
        from toolchain.profiler.ask import Host
        from toolchain.hardware import load
        before = agent._peak_bytes()
        block = bytearray(300_000_000)
        del block
        small = Host(load("local"), 1).peak({"name": "x", "kind": "unit", "folder": str(agent.BARE), "tokens": 1, "rows": 1})["peak_bytes"]
        print(agent._peak_bytes() - before, small)
    """
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    rise, small = map(int, done.stdout.split())
    assert 290e6 < rise < 330e6
    assert 0 <= small < 50e6
