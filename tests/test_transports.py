"""What is run for a device: the command lines, whatever its file says; adb with a real server and no phone, and with a phone played by
a program that runs, pushes and pulls here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ssh_server import free_port

from toolchain.errors import BittailorError, UnreachableError
from toolchain.profiler import agent, bundle
from toolchain.profiler.transports import replies, transport_of
from toolchain.profiler.transports.adb import Adb
from toolchain.profiler.transports.jobs import Link
from toolchain.profiler.transports.pipe import COMMAND, Pipe, last_line
from toolchain.profiler.transports.ssh import Ssh
from toolchain.spec import Device

DEVICES = (
    Device("a", transport="ssh", host="pi"),
    Device(
        "b", transport="ssh", host="10.0.0.7", user="me", port=2222, identity=__file__, known_hosts="/known", python="p", folder="f"
    ),
)


def test_a_transport_is_what_the_file_names() -> None:
    kinds = [type(transport_of(Device("x", transport=name))).__name__ for name in ("local", "ssh", "adb")]
    assert kinds == ["Local", "Ssh", "Adb"]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_ssh_is_told_to_check_and_never_to_ask(device: Device) -> None:
    """What it does with the options is seen by asking it (-G prints what they come to)."""
    words = Ssh(device).words()
    assert words[-3:] == ["--", device.host, COMMAND], "the host is never read as an option, the command is always the same"
    if shutil.which("ssh") is None:
        pytest.skip("needs ssh: apt-get install openssh-client")
    printed = subprocess.run([words[0], "-G", "-F", "none", *words[1:-1]], capture_output=True, text=True, check=True).stdout
    seen = dict(line.split(" ", 1) for line in printed.splitlines() if " " in line)
    assert (seen["batchmode"], seen["stricthostkeychecking"], seen["forwardagent"]) == ("yes", "true", "no")
    assert (seen["serveraliveinterval"], seen["serveralivecountmax"], seen["connecttimeout"]) == ("5", "3", "10")
    if device.user:
        assert (seen["user"], seen["port"], seen["userknownhostsfile"]) == ("me", "2222", "/known")
        assert f"identityfile {__file__}" in printed.splitlines()


@pytest.mark.parametrize("python", ["$(touch mark)", "`touch mark`", "x; touch mark", "sh -c 'touch mark'", "x' || touch mark '"])
def test_what_a_file_says_is_never_read_by_a_shell(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file is refused where it is read; here it gets through all the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the shell would go
    for field in ({"python": python}, {"python": "python3", "folder": f"{tmp_path}/{python}"}):
        device = Device("board", **{"folder": str(tmp_path / "board"), **field})
        if field["python"] == python:
            with pytest.raises(UnreachableError, match="expected the Python"):
                Link(device).ask({"action": "identify"})
        else:
            assert Link(device).machine["folder"] == f"{tmp_path}/{python}"
    assert not (tmp_path / "mark").exists()


# ---- adb


@pytest.fixture
def adb_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real adb server of our own, which no phone is plugged into."""
    if shutil.which("adb") is None:
        pytest.skip("needs adb: apt-get install adb")
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
    yield
    subprocess.run(["adb", "kill-server"], capture_output=True)


PHONE = Device("phone", transport="adb", python="/data/local/tmp/python/bin/python3")


@pytest.mark.parametrize(("serial", "words"), [("", "one device"), ("R58M12ABCDE", "serial R58M12ABCDE")])
@pytest.mark.usefixtures("adb_server")
def test_without_a_phone_adb_says_so_in_one_line(serial: str, words: str, tmp_path: Path, cli: Any) -> None:
    serials = f"serial: {serial}\n" if serial else ""
    (tmp_path / "phone.yaml").write_text(f"name: phone\ntransport: adb\npython: /data/local/tmp/p\n{serials}")
    (row,) = cli("devices", "--device", tmp_path / "phone.yaml", "--json").json["devices"]
    assert f"no: expected {words} behind adb for 'phone', got: " in row["reachable"]
    assert "type: adb devices" in row["reachable"]
    assert "daemon" not in row["reachable"]


def test_without_adb_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnreachableError, match="expected the program adb on this machine, found none; type: apt-get install adb"):
        Link(PHONE).ask({"action": "identify"})


_PLAYED = """#!/bin/sh
# adb with a phone whose shell and files are this machine's.
printf '%s\\n' "$@" '' >>"$ADB_LOG"
[ "$1" = -s ] && shift 2
case "$1" in
shell) exec sh -c "$3" ;;
push) mkdir -p "$(dirname "$3")" && cp "$2" "$3" ;;
pull) cp "$2" "$3" ;;
esac
"""


@pytest.mark.parametrize("serial", ["", "R58M12ABCDE"])
def test_a_job_behind_adb_is_pushed_run_and_pulled(serial: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "adb").write_text(_PLAYED)
    (tools / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("ADB_LOG", str(tmp_path / "log"))
    phone = Device("phone", transport="adb", python=sys.executable, folder=str(tmp_path / "phone"), threads=1, serial=serial)
    answer = Link(phone).ask(
        {
            "action": "peak",
            "threads": 1,
            "subject": {"name": "x", "kind": "unit", "folder": str(agent.BARE), "tokens": 1, "rows": 1},
        }
    )
    assert answer["peak_bytes"] >= 0
    assert os.listdir(tmp_path / "phone" / "jobs") == []
    calls = [call.splitlines() for call in (tmp_path / "log").read_text().split("\n\n") if call.strip()]
    before = ["-s", serial] if serial else []
    assert all(call[: len(before)] == before for call in calls)
    calls = [call[len(before) :] for call in calls]
    assert {call[0] for call in calls} == {"push", "shell", "pull"}
    assert all(call[1:] == ["-T", COMMAND] for call in calls if call[0] == "shell")
    pushed = [call[2] for call in calls if call[0] == "push"]
    assert re.fullmatch(re.escape(f"{tmp_path}/phone/incoming/{bundle.agent_sha256()}.") + "[0-9a-f]{32}", pushed[0])
    assert len(pushed) == len(set(pushed)) == 2
    assert [Adb(phone).words()[-3:]] == [["shell", "-T", COMMAND]]


# ---- what a device says that is not ours

_DEEP = "[" * 100_000
_SAYS = {
    "length is no number": "bittailor-reply x\n{}",
    "length is negative": "bittailor-reply -1\n{}",
    "longer than it may be": f"bittailor-reply {1 << 40}\n{{}}",
    "no JSON": "bittailor-reply 3\nabc",
    "no UTF-8": "bittailor-reply 3\n\\377\\377\\377",
    "too deep": f"bittailor-reply {len(_DEEP)}\n{_DEEP}",
    "a list": "bittailor-reply 2\n[]",
    "nothing of a hello": "bittailor-reply 2\n{}",
    "wrong types": 'bittailor-reply 60\n{"python": 3, "machine": "m", "cpus": "2", "folder": "/f"}     ',
    "a version that is none": 'bittailor-reply 62\n{"python": "3.x", "machine": "m", "cpus": 2, "folder": "/f"}     ',
    "no end of greeting": "hello " * 100_000,
    "a steered terminal": 'bittailor-reply 32\n{"error": "\\u001b[2J\\u0007gone"}   ',
}


class Says(Pipe):
    """A device that says the same to everything."""

    def __init__(self, device: Device, path: Path) -> None:
        super().__init__(device)
        self._path = path

    def words(self) -> list[str]:
        return ["sh", "-c", f"cat {self._path}; cat >/dev/null"]

    def failure(self, code: int, said: str) -> UnreachableError:
        return UnreachableError(f"ended without a reply: {last_line(said, code)}")


@pytest.mark.parametrize("case", _SAYS)
def test_what_is_no_reply_is_one_line(case: str, tmp_path: Path) -> None:
    (tmp_path / "said").write_bytes(_SAYS[case].replace("\\377", "\udcff").encode(errors="surrogateescape"))
    board = Device("board", transport="ssh", host="pi")
    with pytest.raises(BittailorError, match="board") as caught:
        assert Link(board, Says(board, tmp_path / "said"), patience_s=0).machine
    assert str(caught.value).isprintable()


def _reply(**fields: object) -> dict[str, object]:
    return {"of_another": False, "age_s": 0.0, "settled": True, **fields}


class Answers:
    """A transport of a device that says it is fine, and then this."""

    def __init__(self, reply: dict[str, object], sent: list[object]) -> None:
        self._reply, self._sent = reply, sent

    def exchange(self, header: Any, patience_s: float) -> dict[str, Any]:
        hello = {"python": "3.11.2", "machine": "m", "cpus": 1, "folder": "/f"}
        return replies.reply_of(json.dumps(hello if header["op"] == "hello" else self._reply).encode(), header["op"], PHONE)

    def send(self, header: Any, pieces: Any) -> dict[str, Any]:
        self._sent += pieces
        return {"stored": len(pieces)}


@pytest.mark.parametrize(
    "reply",
    [
        {"missing": {"0" * 64: 0}},
        {"missing": {"../../etc/passwd": 0}},
        {"missing": {bundle.agent_sha256(): 1 << 40}},
        {"missing": {bundle.agent_sha256(): -1}},
        {"missing": [bundle.agent_sha256()]},
        {"colour": "red"},
        {"died": ["x"]},
        _reply(answer=7),
        _reply(answer="[]"),
        _reply(answer=_DEEP),
        _reply(answer=json.dumps({"cpu": "x"})),
        _reply(answer=json.dumps(dict.fromkeys(("cpu", "cache_bytes", "runtime", "protocol", "providers", "meters"), 1))),
    ],
)
def test_what_is_no_answer_is_one_line_and_nothing_is_sent(reply: dict[str, object]) -> None:
    sent: list[object] = []
    with pytest.raises(BittailorError, match="'phone'"):
        Link(PHONE, Answers(reply, sent), patience_s=0).identify()
    assert sent == []


def test_what_steers_a_terminal_is_taken_out_of_an_answer() -> None:
    identity = {"cpu": "\x1b[2J\x07a CPU", "cache_bytes": 1, "runtime": "r", "protocol": "p", "providers": ["\n"], "meters": {}}
    got = Link(PHONE, Answers(_reply(answer=json.dumps(identity)), []), patience_s=0).identify()
    assert (got["cpu"], got["providers"]) == ("\ufffd[2J\ufffda CPU", ["\ufffd"])


def test_a_file_without_end_is_not_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adb").write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys, time\nwith open(sys.argv[3], chr(119)) as f:\n'
        ' while True: f.write(chr(120) * 1000); f.flush(); time.sleep(0.001)" "$@"\n'
    )
    (tmp_path / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("toolchain.profiler.transports.adb.LONGEST_BYTES", 100_000)
    with pytest.raises(BittailorError, match="at most 100000 bytes from 'phone', got a longer one"):
        Adb(PHONE)._run("pull", "/there", str(tmp_path / "here"), bounded=tmp_path / "here")
    assert (tmp_path / "here").stat().st_size < 10_000_000
