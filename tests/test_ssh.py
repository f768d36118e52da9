"""Over a real sshd: profile, export and check, the link cut in the middle; a wrong host key.

`BITTAILOR_TEST_USER=name pytest -m slow tests/test_ssh.py`, as root, logs in as another user of this machine.
"""

from __future__ import annotations

import getpass
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ssh_server import SSHD, USER, Cable, Server, other_key, serving
from test_profile import _rows, _wanted

from toolchain.costs.rows import ModelMemoryRow, ModelRow
from toolchain.costs.table import open_table
from toolchain.profiler import model_rows, unit_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(SSHD is None, reason="needs sshd: apt-get install openssh-server")]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Not below pytest's folder: another user could not read the key that is let in."""
    with tempfile.TemporaryDirectory(prefix="sshd-") as folder, serving(Path(folder)) as running:
        yield running


Board = Callable[..., Path]


@pytest.fixture
def board(server: Server, tmp_path: Path) -> Board:
    """`board(port)` → the file of a device behind that port, which the server's host key is known for."""

    def write(port: int, key: str = "", **more: object) -> Path:
        fields = {
            "name": "board",
            "transport": "ssh",
            "host": "127.0.0.1",
            "port": port,
            "user": USER,
            "identity": server.identity,
            "known_hosts": server.known_hosts(tmp_path / "known_hosts", port, key),
            "threads": 1,
            **more,
        }
        if getpass.getuser() == USER:  # another user has a Python of their own
            fields = {"python": sys.executable, "folder": tmp_path / "agent", **fields}
        (tmp_path / "board.yaml").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
        return tmp_path / "board.yaml"

    return write


def _journal(tmp_path: Path) -> list[list[str]]:
    folder = tmp_path / "agent" if getpass.getuser() == USER else Path(f"~{USER}/.cache/bittailor").expanduser()
    path = folder / "journal.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_profile_export_and_check_while_the_link_is_cut(
    board: Board, server: Server, tiny_bert: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_rows, "WINDOWS", 5)
    monkeypatch.setattr(model_rows, "WINDOWS", 5)
    monkeypatch.setattr(model_rows, "SESSIONS", 1)
    monkeypatch.setattr(model_rows, "MIXED", 2)
    left = {"while sending": 2, "while measuring": 2}
    longest = [2.0]

    def cut(number: int, sent: int, seconds: float) -> bool:
        """Two uploads after 100 kB; two connections that wait for a measurement, after two seconds (of a check, half a second)."""
        kind = "while sending" if sent > 100_000 else "while measuring" if seconds > longest[0] else ""
        if number < 4 or not left.get(kind):  # what the desk says first is not tried again
            return False
        left[kind] -= 1
        return True

    if getpass.getuser() != USER:  # what an earlier run sent would not be sent again
        shutil.rmtree(Path(f"~{USER}/.cache/bittailor").expanduser(), ignore_errors=True)
    cable = Cable(server.port, cut)
    device = board(cable.port)
    before = len(_journal(tmp_path))  # of another user's home, where earlier runs were
    profiles = tmp_path / "profiles"
    result = cli("profile", tiny_bert, "--device", device, "--profiles", profiles, "--json")
    assert result.code in (0, 3), result.err
    assert cable.cuts == 4, left
    assert result.err.count("no link to") >= 2, result.err  # one that is cut with its answer already here says nothing
    table = open_table(profiles / "board" / "table.jsonl")
    assert _rows(table) == _wanted(table)
    assert {row.policy for row in table.of(ModelRow)} >= {"fp32", "w8a8", "w4g32", "mixed-0", "mixed-1"}
    assert {row.policy for row in table.of(ModelMemoryRow)} == {row.policy for row in table.of(ModelRow)}

    jobs = [job for _, job, action in _journal(tmp_path)[before:] if action != "identify"]
    assert len(jobs) > 20
    assert len(set(jobs)) == len(jobs), "something was measured twice"

    package = tmp_path / "package"
    words = ("--device", device, "--profiles", profiles)
    assert cli("export", tiny_bert, *words, "--policy", "w4g32", "--out", package).code == 0
    left["while measuring"], longest[0] = 1, 0.5
    checked = cli("check", package, "--device", device, "--latency-ms", "1000", "--memory-mb", "1000", "--json")
    assert checked.code == 0, checked.err
    assert cable.cuts == 5
    assert [limit["verdict"] for limit in checked.json["limits"]] == ["within", "within"]
    asked = [(job, action) for _, job, action in _journal(tmp_path)[before:] if job not in jobs and action in ("time", "peak")]
    assert len({job for job, _ in asked}) == len(asked), "something was measured twice"
    actions = [action for _, action in asked]
    assert (actions.count("peak"), actions.count("time")) == (3, checked.json["decision"]["processes"])
    cable.close()


def test_a_wrong_host_key_is_refused_with_one_line(board: Board, server: Server, tmp_path: Path, cli: Any, tiny_bert: Path) -> None:
    device = board(server.port, other_key(tmp_path))
    line = cli("profile", tiny_bert, "--device", device, "--profiles", tmp_path / "profiles").error
    assert f"expected 127.0.0.1:{server.port} to have the host key that known_hosts holds, got another" in line
    assert "nothing was sent" in line
    assert not (tmp_path / "agent").exists()
    (tmp_path / "known_hosts").write_text("")
    assert "expected a host key of 127.0.0.1" in cli("profile", tiny_bert, "--device", device).error


def test_a_server_that_is_not_there_and_a_key_that_is_not_taken_are_one_line(
    board: Board, server: Server, tmp_path: Path, cli: Any
) -> None:
    for (port, more), words in [((1, {}), "Connection refused"), ((server.port, {"identity": tmp_path / "none"}), "with a key")]:
        (row,) = cli("devices", "--device", board(port, **more), "--json").json["devices"]
        assert row["reachable"].startswith("no: ")
        assert words in row["reachable"]
