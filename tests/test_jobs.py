"""Jobs on a device, over a link that is really cut: pipes that are killed after so many bytes, up or down, or so many seconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cables import REPLY_HALVED, REPLY_LOST, SENDING_CUT, STARTING_CUT, WAITING_CUT, WHOLE, asking_for_peak, kept, linked, started
from conftest import environment

import toolchain
from toolchain.errors import BittailorError, UnreachableError
from toolchain.profiler import agent, bundle
from toolchain.profiler.transports import doorkeeper, jobs
from toolchain.spec import Device


@pytest.fixture
def subject(tmp_path: Path) -> dict[str, Any]:
    """The smallest graph there is, and beside it a file that takes more than one write to send."""
    folder = tmp_path / "graph"
    folder.mkdir()
    (folder / "model.onnx").write_bytes((agent.BARE / "model.onnx").read_bytes())
    (folder / "padding.bin").write_bytes(os.urandom(400_000))
    return {"name": "x", "kind": "unit", "folder": str(folder), "tokens": 1, "rows": 1}


@pytest.mark.parametrize(
    ("place", "cuts"),
    [
        *((place, [REPLY_LOST] * 2) for place in range(7)),
        (4, [REPLY_HALVED] * 2),
        (6, [REPLY_HALVED] * 2),
        (6, [WAITING_CUT]),
        (6, [STARTING_CUT]),
    ],
)
def test_a_job_runs_once_wherever_the_link_is_cut(board: Device, subject: dict[str, Any], place: int, cuts: list[str]) -> None:
    """Exchanges, from 0 on: hello, identify, its agent sent, identify, the job, its files sent, the job. Two in a row are cut."""
    link, cable = linked(board, [WHOLE] * place + cuts)
    answer = link.ask(asking_for_peak(subject))
    assert answer["peak_bytes"] >= 0
    assert cable.cuts == []
    assert started(board) == ["peak"]
    assert kept(board) == []


def test_a_file_goes_on_from_where_the_link_was_cut(board: Device, subject: dict[str, Any]) -> None:
    """The uplink carries the doorkeeper, the header, and a part of the files."""
    link, cable = linked(board, [WHOLE] * 5 + [SENDING_CUT])
    link.ask(asking_for_peak(subject))
    offsets = {piece.path.name: piece.offset for piece in cable.sent}  # of several, the last
    assert 50_000 < offsets["padding.bin"] < 200_000
    stored = [path for path in (Path(board.folder) / "files").iterdir() if path.stat().st_size == 400_000]
    assert [path.read_bytes() for path in stored] == [(Path(subject["folder"]) / "padding.bin").read_bytes()]


def test_what_is_on_the_device_is_not_sent_again(board: Device, subject: dict[str, Any]) -> None:
    first, cable = linked(board)
    first.ask(asking_for_peak(subject))
    assert sorted(piece.path.name for piece in cable.sent) == ["agent.pyz", "model.onnx", "padding.bin"]
    second, cable = linked(board)
    second.ask(asking_for_peak(subject))
    assert cable.sent == []


def test_the_same_request_twice_is_two_measurements(board: Device, subject: dict[str, Any]) -> None:
    link, _ = linked(board)
    link.ask(asking_for_peak(subject))
    link.ask(asking_for_peak(subject))
    again, _ = linked(board)
    again.ask(asking_for_peak(subject))
    assert started(board) == ["peak"] * 3


def test_a_desk_that_comes_back_finds_what_it_had_started(
    board: Device, subject: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one is cut off as soon as the job runs, and has no patience."""
    first, _ = linked(board, [WHOLE] * 6 + [WAITING_CUT] * 9, patience_s=0)
    with pytest.raises(UnreachableError, match="type the same command again"):
        first.ask(asking_for_peak(subject))
    assert started(board) == ["peak"]
    second, _ = linked(board)
    assert second.ask(asking_for_peak(subject))["peak_bytes"] >= 0
    assert started(board) == ["peak"]
    assert "an earlier run's answer was waiting there" in capsys.readouterr().err
    assert kept(board) == []


def test_a_device_that_stays_away_is_given_up_with_one_line(board: Device, subject: dict[str, Any]) -> None:
    link, _ = linked(board, [WHOLE] * 5 + [REPLY_LOST] * 99, patience_s=100)
    with pytest.raises(
        UnreachableError, match=r"'board' did not answer again for 10\d s; what it measured is kept there for an hour"
    ) as caught:
        link.ask(asking_for_peak(subject))
    assert "\n" not in str(caught.value)


def test_an_agent_that_dies_is_told_once_and_started_again_by_the_next(board: Device) -> None:
    for _ in range(2):
        link, _ = linked(board)
        with pytest.raises(BittailorError, match="on 'board', it died: KeyError: 'tokens'"):
            link.ask(asking_for_peak({"kind": "unit", "folder": str(agent.BARE), "rows": 1}))
    assert started(board) == ["peak"] * 2


def test_a_request_that_no_desk_makes_is_refused_in_one_line(board: Device, subject: dict[str, Any]) -> None:
    link, _ = linked(board)
    for request, word in (
        ({"action": "colour"}, "colour"),
        ({"action": "peak"}, "no threads"),
        (asking_for_peak({**subject, "tokens": 10**12}), "tokens"),
        (asking_for_peak({**subject, "kind": "thing"}), "thing"),
        ({**asking_for_peak(subject), "threads": -1}, "threads"),
    ):
        with pytest.raises(BittailorError, match=f"expected a request of this version's desk, got .*{word}"):
            link.ask(request)


def test_what_the_agent_refuses_is_its_own_line(board: Device, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BittailorError, match="where there is no file"):
        linked(board)[0].ask(
            asking_for_peak({"name": "x", "kind": "unit", "folder": str(tmp_path / "empty"), "tokens": 1, "rows": 1})
        )


def test_an_agent_that_somebody_changed_is_not_run(board: Device, subject: dict[str, Any], tmp_path: Path) -> None:
    linked(board)[0].ask({"action": "identify"})
    place = Path(board.folder) / "files" / bundle.agent_sha256()
    place.chmod(0o644)
    place.write_bytes(place.read_bytes().replace(b"def identify", f"open({str(tmp_path / 'mark')!r}, 'w')\ndef identify".encode()))
    with pytest.raises(BittailorError, match=r"sha256 it was sent with, got [0-9a-f]{64}: somebody changed it, it was not run"):
        linked(board)[0].ask(asking_for_peak(subject))
    assert started(board) == []
    assert not (tmp_path / "mark").exists()


def test_a_file_that_came_out_wrong_is_sent_again(board: Device, subject: dict[str, Any]) -> None:
    """Half of another file lies where ours broke off."""
    link, _ = linked(board)
    link.ask({"action": "identify"})
    digest = jobs.sha256(Path(subject["folder"]) / "padding.bin")
    (Path(board.folder) / "files" / f"{digest}.part").write_bytes(b"x" * 1000)
    assert link.ask(asking_for_peak(subject))["peak_bytes"] >= 0
    assert jobs.sha256(Path(board.folder) / "files" / digest) == digest


def test_a_folder_that_others_may_write_is_refused(board: Device) -> None:
    Path(board.folder).mkdir()
    Path(board.folder).chmod(0o777)
    with pytest.raises(BittailorError, match="chmod go-w"):
        linked(board)[0].ask({"action": "identify"})


def test_desks_that_ask_one_board_the_same_at_once_do_not_break_each_other(board: Device, subject: dict[str, Any]) -> None:
    """The first that has the answer removes the job; the others wait for it still."""
    at_once = threading.Barrier(4)

    def ask(_: int) -> int:
        link, _cable = linked(board)
        at_once.wait()
        return link.ask(asking_for_peak(subject))["peak_bytes"]

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(ask, range(4))) >= 0
    assert kept(board) == []
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
        link, cable = linked(board)
        assert link.ask(asking_for_peak(subject))["peak_bytes"] >= 0
        assert {piece.path.name: piece.offset for piece in cable.sent}["padding.bin"] == 0, "it took what was still being written"
        sink.write(data[50_000:])
        assert slow.result(timeout=30) == {"stored": 1}
    assert (root / "files" / digest).read_bytes() == data
    assert [path.name for path in (root / "files").iterdir() if path.name.endswith(".part")] == []


def test_what_a_killed_desk_had_sent_is_gone_on_with_by_the_next(board: Device, subject: dict[str, Any]) -> None:
    first, _ = linked(board, [WHOLE] * 5 + [SENDING_CUT] + [REPLY_LOST] * 9, patience_s=0)
    with pytest.raises(UnreachableError):
        first.ask(asking_for_peak(subject))
    second, cable = linked(board)
    second.ask(asking_for_peak(subject))
    assert 50_000 < {piece.path.name: piece.offset for piece in cable.sent}["padding.bin"] < 200_000


def test_nobody_takes_another_desks_word_for_who_the_device_is(
    board: Device, subject: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first never got its answer. Since then the device may have another runtime."""
    first, _ = linked(board, [WHOLE] * 3 + [REPLY_LOST] * 9, patience_s=0)
    with pytest.raises(UnreachableError):
        first.identify()
    (left,) = (Path(board.folder) / "jobs").iterdir()
    while not (left / "answer.json").exists():
        time.sleep(0.05)
    (left / "answer.json").write_text(json.dumps({"cpu": "an earlier one", "runtime": "onnxruntime 0.1"}))
    assert linked(board)[0].identify()["cpu"] != "an earlier one"


def test_an_old_answer_is_not_taken_for_a_measurement_of_now(board: Device, subject: dict[str, Any]) -> None:
    first, _ = linked(board, [WHOLE] * 6 + [WAITING_CUT] * 9, patience_s=0)
    with pytest.raises(UnreachableError):
        first.ask(asking_for_peak(subject))
    (left,) = (Path(board.folder) / "jobs").iterdir()
    while not (left / "answer.json").exists():
        time.sleep(0.05)
    os.utime(left / "answer.json", (time.time() - 2 * 3600,) * 2)
    assert linked(board)[0].ask(asking_for_peak(subject))["peak_bytes"] >= 0
    assert started(board) == ["peak"] * 2
    assert kept(board) == []


def test_what_nobody_came_back_for_goes_after_a_week(board: Device, subject: dict[str, Any]) -> None:
    linked(board)[0].ask(asking_for_peak(subject))
    old = Path(board.folder) / "jobs" / ("0" * 64)
    new = Path(board.folder) / "jobs" / ("1" * 64)
    for place in (old, new):
        place.mkdir()
    files = sorted((Path(board.folder) / "files").iterdir())
    assert len(files) == 3
    for path in (old, files[0]):
        os.utime(path, (time.time() - 8 * 86400,) * 2)
    assert linked(board)[0].machine
    assert kept(board) == [new.name]
    assert sorted((Path(board.folder) / "files").iterdir()) == files[1:]


def test_another_python_and_machine_are_what_the_device_says(board: Device) -> None:
    link, _ = linked(board)
    assert link.machine["cpus"] == len(os.sched_getaffinity(0))
    assert link.identify()["protocol"] == agent.PROTOCOL
    with pytest.raises(UnreachableError, match=r"expected the Python '/no/such/python' on 'board', got: .*not found; set python:"):
        linked(Device("board", folder=board.folder, python="/no/such/python"))[0].ask({"action": "identify"})


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
    assert linked(mine)[0].identify()["protocol"] == agent.PROTOCOL
    old = Device("board", folder=board.folder, agent=str(_another_version(tmp_path, "0.0.1")))
    with pytest.raises(BittailorError, match=rf"version {toolchain.__version__} \(.*\), the desk's, got 0\.0\.1 \(") as caught:
        linked(old)[0].ask({"action": "identify"})
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
    for name, words in {"peak": asking_for_peak(subject), "time": request, "identify": {"action": "identify"}}.items():
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
