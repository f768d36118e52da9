"""Jobs on a device, over a link that is really cut: pipes that are killed after so many bytes, up or down, or so many seconds."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import environment

import toolchain
from toolchain.costs.table import open_table
from toolchain.errors import BittailorError, InputError, UnreachableError
from toolchain.profiler import agent, bundle, probe
from toolchain.profiler.ask import Host
from toolchain.profiler.probe import working_kernels
from toolchain.profiler.transports import doorkeeper, jobs
from toolchain.profiler.transports.jobs import Link
from toolchain.profiler.transports.local import Local
from toolchain.profiler.transports.pipe import COMMAND, Piece
from toolchain.spec import CUDA, Device

WHOLE = ""
REPLY_LOST = "{command} | (head -c 1; kill -9 0)"
REPLY_HALVED = "{command} | (head -c 40; kill -9 0)"
WAITING_CUT = "(flock {folder}/busy sh -c 'until grep -qs peak {folder}/journal.txt; do sleep 0.02; done'; kill -9 0) & {command}"
"""The device is busy until the job was started: it has no answer before the cut."""
SENDING_CUT = "(head -c 200000; sleep 0.4; kill -9 0) | {command}"
"""Half a second more than the bytes: so that what was sent is written."""


class Cable(Local):
    """The device is this machine; exchange i goes through `cuts[i]`, later ones are whole."""

    def __init__(self, device: Device, cuts: Iterable[str] = ()) -> None:
        super().__init__(device)
        self.cuts = list(cuts)
        self.sent: list[Piece] = []

    def words(self) -> list[str]:
        cut = self.cuts.pop(0) if self.cuts else WHOLE
        # A session of its own: `kill 0` is to take this link, not the tests.
        return ["setsid", "sh", "-c", cut.format(command=COMMAND, folder=self.device.folder)] if cut else super().words()

    def send(self, header: Any, pieces: Sequence[Piece]) -> dict[str, Any]:
        self.sent += pieces
        return super().send(header, pieces)


@pytest.fixture
def board(tmp_path: Path) -> Device:
    return Device("board", folder=str(tmp_path / "board"), threads=1)


@pytest.fixture
def subject(tmp_path: Path) -> dict[str, Any]:
    """The smallest graph there is, and beside it a file that takes more than one write to send."""
    folder = tmp_path / "graph"
    folder.mkdir()
    (folder / "model.onnx").write_bytes((agent.BARE / "model.onnx").read_bytes())
    (folder / "padding.bin").write_bytes(os.urandom(400_000))
    return {"name": "x", "kind": "unit", "folder": str(folder), "tokens": 1, "rows": 1}


def _peak(subject: dict[str, Any]) -> dict[str, Any]:
    return {"action": "peak", "threads": 1, "subject": subject}


def _link(board: Device, cuts: Iterable[str] = (), patience_s: float = 5.0) -> tuple[Link, Cable]:
    cable = Cable(board, cuts)
    return Link(board, cable, patience_s, sleep=lambda _: None), cable


def _started(board: Device) -> list[str]:
    """Actions of the agents that the device started, `identify` left out."""
    lines = (Path(board.folder) / "journal.txt").read_text().splitlines()
    return [line.split()[2] for line in lines if not line.endswith(" identify")]


def _kept(board: Device) -> list[str]:
    return os.listdir(Path(board.folder) / "jobs")


@pytest.mark.parametrize(
    ("place", "cuts"),
    [*((place, [REPLY_LOST] * 2) for place in range(7)), (4, [REPLY_HALVED] * 2), (6, [REPLY_HALVED] * 2), (6, [WAITING_CUT])],
)
def test_a_job_runs_once_wherever_the_link_is_cut(board: Device, subject: dict[str, Any], place: int, cuts: list[str]) -> None:
    """Exchanges, from 0 on: hello, identify, its agent sent, identify, the job, its files sent, the job. Two in a row are cut."""
    link, cable = _link(board, [WHOLE] * place + cuts)
    answer = link.ask(_peak(subject))
    assert answer["peak_bytes"] >= 0
    assert cable.cuts == []
    assert _started(board) == ["peak"]
    assert _kept(board) == []


def test_a_file_goes_on_from_where_the_link_was_cut(board: Device, subject: dict[str, Any]) -> None:
    """The uplink carries the doorkeeper, the header, and a part of the files."""
    link, cable = _link(board, [WHOLE] * 5 + [SENDING_CUT])
    link.ask(_peak(subject))
    offsets = {piece.path.name: piece.offset for piece in cable.sent}  # of several, the last
    assert 50_000 < offsets["padding.bin"] < 200_000
    stored = [path for path in (Path(board.folder) / "files").iterdir() if path.stat().st_size == 400_000]
    assert [path.read_bytes() for path in stored] == [(Path(subject["folder"]) / "padding.bin").read_bytes()]


def test_what_is_on_the_device_is_not_sent_again(board: Device, subject: dict[str, Any]) -> None:
    first, cable = _link(board)
    first.ask(_peak(subject))
    assert sorted(piece.path.name for piece in cable.sent) == ["agent.pyz", "model.onnx", "padding.bin"]
    second, cable = _link(board)
    second.ask(_peak(subject))
    assert cable.sent == []


def test_the_same_request_twice_is_two_measurements(board: Device, subject: dict[str, Any]) -> None:
    link, _ = _link(board)
    link.ask(_peak(subject))
    link.ask(_peak(subject))
    again, _ = _link(board)
    again.ask(_peak(subject))
    assert _started(board) == ["peak"] * 3


def test_a_desk_that_comes_back_finds_what_it_had_started(
    board: Device, subject: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one is cut off as soon as the job runs, and has no patience."""
    first, _ = _link(board, [WHOLE] * 6 + [WAITING_CUT] * 9, patience_s=0)
    with pytest.raises(UnreachableError, match="type the same command again"):
        first.ask(_peak(subject))
    assert _started(board) == ["peak"]
    second, _ = _link(board)
    assert second.ask(_peak(subject))["peak_bytes"] >= 0
    assert _started(board) == ["peak"]
    assert "an earlier run's answer was waiting there" in capsys.readouterr().err
    assert _kept(board) == []


def test_a_device_that_stays_away_is_given_up_with_one_line(board: Device, subject: dict[str, Any]) -> None:
    link, _ = _link(board, [WHOLE] * 5 + [REPLY_LOST] * 99, patience_s=100)
    with pytest.raises(
        UnreachableError, match=r"'board' did not answer again for 10\d s; what it measured is kept there for an hour"
    ) as caught:
        link.ask(_peak(subject))
    assert "\n" not in str(caught.value)


def test_an_agent_that_dies_is_told_once_and_started_again_by_the_next(board: Device) -> None:
    for _ in range(2):
        link, _ = _link(board)
        with pytest.raises(BittailorError, match="on 'board', it died: KeyError: 'tokens'"):
            link.ask(_peak({"kind": "unit", "folder": str(agent.BARE), "rows": 1}))
    assert _started(board) == ["peak"] * 2


def test_a_request_that_no_desk_makes_is_refused_in_one_line(board: Device, subject: dict[str, Any]) -> None:
    link, _ = _link(board)
    for request, word in (
        ({"action": "colour"}, "colour"),
        ({"action": "peak"}, "no threads"),
        (_peak({**subject, "tokens": 10**12}), "tokens"),
        (_peak({**subject, "kind": "thing"}), "thing"),
        ({**_peak(subject), "threads": -1}, "threads"),
    ):
        with pytest.raises(BittailorError, match=f"expected a request of this version's desk, got .*{word}"):
            link.ask(request)


def test_what_the_agent_refuses_is_its_own_line(board: Device, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BittailorError, match="where there is no file"):
        _link(board)[0].ask(_peak({"name": "x", "kind": "unit", "folder": str(tmp_path / "empty"), "tokens": 1, "rows": 1}))


def test_an_agent_that_somebody_changed_is_not_run(board: Device, subject: dict[str, Any], tmp_path: Path) -> None:
    _link(board)[0].ask({"action": "identify"})
    place = Path(board.folder) / "files" / bundle.agent_sha256()
    place.chmod(0o644)
    place.write_bytes(place.read_bytes().replace(b"def identify", f"open({str(tmp_path / 'mark')!r}, 'w')\ndef identify".encode()))
    with pytest.raises(BittailorError, match=r"sha256 it was sent with, got [0-9a-f]{64}: somebody changed it, it was not run"):
        _link(board)[0].ask(_peak(subject))
    assert _started(board) == []
    assert not (tmp_path / "mark").exists()


def test_a_file_that_came_out_wrong_is_sent_again(board: Device, subject: dict[str, Any]) -> None:
    """Half of another file lies where ours broke off."""
    link, _ = _link(board)
    link.ask({"action": "identify"})
    digest = jobs.sha256(Path(subject["folder"]) / "padding.bin")
    (Path(board.folder) / "files" / f"{digest}.part").write_bytes(b"x" * 1000)
    assert link.ask(_peak(subject))["peak_bytes"] >= 0
    assert jobs.sha256(Path(board.folder) / "files" / digest) == digest


def test_a_folder_that_others_may_write_is_refused(board: Device) -> None:
    Path(board.folder).mkdir()
    Path(board.folder).chmod(0o777)
    with pytest.raises(BittailorError, match="chmod go-w"):
        _link(board)[0].ask({"action": "identify"})


def test_desks_that_ask_one_board_the_same_at_once_do_not_break_each_other(board: Device, subject: dict[str, Any]) -> None:
    """The first that has the answer removes the job; the others wait for it still."""
    at_once = threading.Barrier(4)

    def ask(_: int) -> int:
        link, _cable = _link(board)
        at_once.wait()
        return link.ask(_peak(subject))["peak_bytes"]

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(ask, range(4))) >= 0
    assert _kept(board) == []
    files = [path for path in (Path(board.folder) / "files").iterdir() if path.stat().st_nlink == 1]
    assert len(files) == 3
    assert {jobs.sha256(path) for path in files} == {path.name for path in files}, "a part stayed, or a file came out wrong"


def test_a_file_that_another_desk_sent_meanwhile_does_no_harm(board: Device, subject: dict[str, Any]) -> None:
    """One desk's upload stands still at half; another sends the whole of the file, and is done; then the first goes on."""
    padding = Path(subject["folder"]) / "padding.bin"
    digest, data = jobs.sha256(padding), padding.read_bytes()
    root = doorkeeper._root(board.folder)
    reader, writer = os.pipe()
    header = {"caller": "a" * 32, "files": [{"sha256": digest, "size": len(data), "offset": 0}]}
    with ThreadPoolExecutor(1) as pool, os.fdopen(reader, "rb") as source, os.fdopen(writer, "wb", 0) as sink:
        slow = pool.submit(doorkeeper.put, root, header, source)
        sink.write(data[:50_000])
        while sum(path.stat().st_size for path in (root / "files").iterdir()) < 50_000:
            time.sleep(0.01)
        link, cable = _link(board)
        assert link.ask(_peak(subject))["peak_bytes"] >= 0
        assert {piece.path.name: piece.offset for piece in cable.sent}["padding.bin"] == 0, "it took what was still being written"
        sink.write(data[50_000:])
        assert slow.result(timeout=30) == {"stored": 1}
    assert (root / "files" / digest).read_bytes() == data
    assert [path.name for path in (root / "files").iterdir() if path.name.endswith(".part")] == []


def test_what_a_killed_desk_had_sent_is_gone_on_with_by_the_next(board: Device, subject: dict[str, Any]) -> None:
    first, _ = _link(board, [WHOLE] * 5 + [SENDING_CUT] + [REPLY_LOST] * 9, patience_s=0)
    with pytest.raises(UnreachableError):
        first.ask(_peak(subject))
    second, cable = _link(board)
    second.ask(_peak(subject))
    assert 50_000 < {piece.path.name: piece.offset for piece in cable.sent}["padding.bin"] < 200_000


def test_nobody_takes_another_desks_word_for_who_the_device_is(
    board: Device, subject: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first never got its answer. Since then the device may have another runtime."""
    first, _ = _link(board, [WHOLE] * 3 + [REPLY_LOST] * 9, patience_s=0)
    with pytest.raises(UnreachableError):
        first.identify()
    (left,) = (Path(board.folder) / "jobs").iterdir()
    while not (left / "answer.json").exists():
        time.sleep(0.05)
    (left / "answer.json").write_text(json.dumps({"cpu": "an earlier one", "runtime": "onnxruntime 0.1"}))
    assert _link(board)[0].identify()["cpu"] != "an earlier one"


def test_an_old_answer_is_not_taken_for_a_measurement_of_now(board: Device, subject: dict[str, Any]) -> None:
    first, _ = _link(board, [WHOLE] * 6 + [WAITING_CUT] * 9, patience_s=0)
    with pytest.raises(UnreachableError):
        first.ask(_peak(subject))
    (left,) = (Path(board.folder) / "jobs").iterdir()
    while not (left / "answer.json").exists():
        time.sleep(0.05)
    os.utime(left / "answer.json", (time.time() - 2 * 3600,) * 2)
    assert _link(board)[0].ask(_peak(subject))["peak_bytes"] >= 0
    assert _started(board) == ["peak"] * 2
    assert _kept(board) == []


def test_what_nobody_came_back_for_goes_after_a_week(board: Device, subject: dict[str, Any]) -> None:
    _link(board)[0].ask(_peak(subject))
    old = Path(board.folder) / "jobs" / ("0" * 64)
    new = Path(board.folder) / "jobs" / ("1" * 64)
    for place in (old, new):
        place.mkdir()
    files = sorted((Path(board.folder) / "files").iterdir())
    assert len(files) == 3
    for path in (old, files[0]):
        os.utime(path, (time.time() - 8 * 86400,) * 2)
    assert _link(board)[0].machine
    assert _kept(board) == [new.name]
    assert sorted((Path(board.folder) / "files").iterdir()) == files[1:]


def test_another_python_and_machine_are_what_the_device_says(board: Device) -> None:
    link, _ = _link(board)
    assert link.machine["cpus"] == len(os.sched_getaffinity(0))
    assert link.identify()["protocol"] == agent.PROTOCOL
    with pytest.raises(UnreachableError, match=r"expected the Python '/no/such/python' on 'board', got: .*not found; set python:"):
        _link(Device("board", folder=board.folder, python="/no/such/python"))[0].ask({"action": "identify"})


# ---- the agent as one file


def _another_version(tmp_path: Path, version: str) -> Path:
    """An agent built from a checkout of another version."""
    root = tmp_path / "checkout"
    for name in bundle._files():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bundle._files()[name])
    (root / "toolchain" / "__init__.py").write_text(f'"""Another."""\n__version__ = "{version}"\n')
    shutil.copy(bundle.__file__, root / "toolchain" / "profiler")
    code = "import sys; from toolchain.profiler.bundle import agent_bytes; sys.stdout.buffer.write(agent_bytes())"
    words, environ = [sys.executable, "-P", "-c", code], {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(words, env=environ, capture_output=True, check=True)
    (tmp_path / "old.pyz").write_bytes(done.stdout)
    return tmp_path / "old.pyz"


def test_an_installed_agent_must_be_of_the_desks_version(board: Device, tmp_path: Path) -> None:
    (tmp_path / "mine.pyz").write_bytes(bundle.agent_bytes())
    mine = Device("board", folder=board.folder, agent=str(tmp_path / "mine.pyz"))
    assert _link(mine)[0].identify()["protocol"] == agent.PROTOCOL
    old = Device("board", folder=board.folder, agent=str(_another_version(tmp_path, "0.0.1")))
    with pytest.raises(BittailorError, match=rf"version {toolchain.__version__} \(.*\), the desk's, got 0\.0\.1 \(") as caught:
        _link(old)[0].ask({"action": "identify"})
    assert "\n" not in str(caught.value)


def test_the_agent_is_the_same_bytes_in_every_process_and_folder(tmp_path: Path) -> None:
    code = "import os; os.umask(0o077); from toolchain.profiler.bundle import agent_sha256; print(agent_sha256())"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=environment(PYTHONHASHSEED="7"), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == bundle.agent_sha256()


def test_the_agent_runs_alone_with_onnxruntime_and_numpy(cli: Any, tmp_path: Path, subject: dict[str, Any]) -> None:
    """From an empty folder, with everything else that is installed here hidden."""
    said = cli("agent", "--out", tmp_path / "agent.pyz", "--json").json
    assert said["sha256"] == bundle.agent_sha256() == jobs.sha256(tmp_path / "agent.pyz")
    hidden = ("yaml", "onnx", "torch", "transformers", "psutil", "scipy", "tokenizers", "pytest")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n")
    run = tmp_path / "run"
    run.mkdir()
    request = {"action": "time", "threads": 1, "windows": 5, "subjects": [subject]}
    for name, words in {"peak": _peak(subject), "time": request, "identify": {"action": "identify"}}.items():
        (run / "request.json").write_text(json.dumps(words))
        done = subprocess.run(
            [sys.executable, str(tmp_path / "agent.pyz"), "request.json"],
            cwd=run,
            env={**os.environ, "PYTHONPATH": str(site), "TMPDIR": str(run)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{name}: {done.stdout} {done.stderr}"
        assert set(json.loads(done.stdout)) & {"peak_bytes", "trials", "cpu"}
    assert list(run.glob("bittailor*")) == [], "the unpacked agent stayed behind"


# ---- several devices


def _device_file(tmp_path: Path, name: str, **fields: object) -> Path:
    path = tmp_path / f"{name}.yaml"
    lines = {"name": name, "folder": tmp_path / name, "threads": 1, **fields}
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


def test_devices_are_profiled_at_once_and_one_that_fails_stops_no_other(
    tiny_bert: Path, tmp_path: Path, cli: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
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
    result = cli("profile", tiny_bert, "--profiles", tmp_path / "profiles", "--json", *words)
    assert result.code == 2
    assert set(result.json["devices"]) == {"one", "two"}
    assert set(result.json["failed"]) == {"three"}
    assert "'/no/such/python' on 'three'" in result.json["failed"]["three"]
    tables = {name: open_table(tmp_path / "profiles" / name / "table.jsonl") for name in ("one", "two")}
    assert [table.header.threads for table in tables.values()] == [1, 2]
    assert {table.header.device for table in tables.values()} == {"one", "two"}
    assert set(tables["one"].rows) == set(tables["two"].rows)
    assert tables["one"].header.kernels == working_kernels()
    text = cli("profile", tiny_bert, "--profiles", tmp_path / "profiles", *words)
    assert "three: failed: expected the Python" in text.out
    assert text.out.splitlines()[-1] == "2 of 3 devices profiled, 1 failed"
    assert not (tmp_path / "profiles" / "three").exists()


def test_two_devices_of_one_name_are_refused(tiny_bert: Path, tmp_path: Path, cli: Any) -> None:
    path = _device_file(tmp_path, "one")
    assert "expected each device once, got 'one'" in cli("profile", tiny_bert, "--device", path, "--device", path).error


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
    tiny_bert: Path, tmp_path: Path, cli: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
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
    assert set(cli("profile", tiny_bert, "--profiles", tmp_path / "profiles", "--json", *words).json["devices"]) == {"one", "two"}
    changes = [(before, after) for before, after in itertools.pairwise(turns) if before != after]
    assert len(changes) == 1, turns


def test_what_nobody_expected_of_one_device_is_its_line_and_not_the_end_of_all(
    tiny_bert: Path, tmp_path: Path, cli: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{name}.yaml" for name in ("one", "two")]
    for path in paths:
        path.write_text(f"name: {path.stem}\n")
    answered = Host.peak

    def peak(host: Host, subject: dict[str, Any]) -> dict[str, int]:
        return {}["peak_bytes"] if host.device.name == "one" else answered(host, subject)

    monkeypatch.setattr(Host, "peak", peak)
    words = [word for path in paths for word in ("--device", path)]
    result = cli("profile", tiny_bert, "--profiles", tmp_path / "profiles", "--json", *words)
    assert result.code == 2
    assert (set(result.json["devices"]), result.json["failed"]) == ({"two"}, {"one": "KeyError: 'peak_bytes'"})
    assert "bittailor: one failed: KeyError: 'peak_bytes'" in result.err
    with pytest.raises(KeyError):  # alone, it is a fault that somebody wants to see whole
        cli("profile", tiny_bert, "--profiles", tmp_path / "profiles", "--device", paths[0])


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
    assert _started(board) == []


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
    assert _link(replace(board, python=python))[0].identify()["protocol"] == agent.PROTOCOL


def test_what_is_being_sent_is_not_swept(board: Device) -> None:
    """However long it is: here a part of 3 GiB (of nothing) and a file as long."""
    assert _link(board)[0].machine
    files = Path(board.folder) / "files"
    names = [f"{'1' * 64}.{'2' * 32}.part", "3" * 64, "4" * 64]
    for name in names:
        with open(files / name, "wb") as stream:
            stream.truncate(3 << 30)
    os.utime(files / names[2], (time.time() - 2 * 3600,) * 2)
    assert _link(board)[0].machine
    assert sorted(os.listdir(files)) == names[:2]


def test_one_profile_asks_a_device_once_who_it_is(
    tiny_bert: Path, tmp_path: Path, cli: Any, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One link, for the header, the kernels and the rows; the times are made up."""
    asked = []
    real = Link._job

    def job(self: Link, request: Any, *more: Any) -> dict[str, Any]:
        asked.append(request["action"])
        return real(self, request, *more)

    monkeypatch.setattr(Link, "_job", job)
    path = _device_file(tmp_path, "one")
    assert cli("profile", tiny_bert, "--profiles", tmp_path / "profiles", "--device", path, "--json").code in (0, 3)
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
