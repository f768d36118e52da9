"""What answers on the device: its source goes down the link with every exchange, so that it is always the desk's own version.

stdin    length of the header, the header (JSON), then the bytes of the files it names
stdout   `bittailor-reply LENGTH` and a JSON object. After one with an answer: `received` comes on stdin, and `settled` goes back

    FOLDER/files/<sha256>       graphs, packages and the agent, read-only; <sha256>.<caller>.part while half of it is here, locked while
                                it is written: what a desk left of another's is gone on with, unless that one still writes
    FOLDER/jobs/<id>/           request.json, inputs/, stderr.txt, answer.json; `alive` is locked for as long as the job's agent lives
    FOLDER/journal.txt          one line for each agent that was started

A job is started once, however often it is asked for, and goes on without the link. Its folder goes when the desk says it has the
answer; desks that waited for the same job start it anew then. A desk that comes later takes no answer older than it says.
What nobody came back for goes after a week, and files beyond 2 GiB that no job names sooner, the longest unused first, but never within
the hour.
Standard library only, Python 3.8 or newer; imports nothing of ours, because nothing of ours need be here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import select
import shutil
import subprocess
import sys
import time
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

MARK = b"bittailor-reply"
POLL_SECONDS, RECEIVED_SECONDS = 0.1, 10.0
KEPT_SECONDS, KEPT_BYTES = 7 * 24 * 3600, 2 << 30
SPARED_SECONDS = 3600
"""However large: it is being sent, or the job that names it starts with the next exchange."""
_PIECE = 1 << 20


class Refused(Exception):
    """One line that the desk shows."""


def main() -> None:
    """One exchange. Everything that goes wrong on purpose is a reply, not an exit code."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    assert isinstance(source, BufferedReader)
    header, reply = answered(source)
    data = json.dumps(reply).encode()
    out.write(b"\n%s %d\n%s" % (MARK, len(data), data))
    out.flush()
    if "answer" in reply and select.select([source], [], [], RECEIVED_SECONDS)[0] and source.readline() == b"received\n":
        _remove_job(_from_home(header["folder"]), header["job"])
        out.write(b"settled\n")


def answered(source: BufferedReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the header that came, the reply to it)."""
    header: dict[str, Any] = {}
    try:
        header = json.loads(source.read(int(source.readline())))
        root = _root(header["folder"])
        operations = {"hello": hello, "put": put, "adopt": adopt, "job": job, "settle": settle}
        return header, operations[header["op"]](root, header, source)
    except Refused as error:
        return header, {"error": str(error)}
    except OSError as error:
        return header, {"error": f"expected to read and write in {header['folder']}, got: {error}"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return {}, {"error": f"expected what this version's desk and agent write, got {type(error).__name__}: {error}"}


def _root(folder: str) -> Path:
    """The agent's folder, of the user who logged in and closed to others: what lies there is run."""
    root = _from_home(folder)
    for place in (root, root / "files", root / "incoming", root / "jobs"):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = root.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise Refused(f"expected {root} to belong to this user alone, others may write there; type there: chmod go-w {root}")
    return root


def _from_home(path: str) -> Path:
    return Path(os.path.expanduser("~"), os.path.expanduser(path))


def hello(root: Path, header: dict[str, Any], source: BufferedReader) -> dict[str, Any]:
    """What can be told without onnxruntime; sweeps what nobody came back for."""
    _sweep(root, time.time())
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"python": platform.python_version(), "machine": platform.machine(), "cpus": cpus, "folder": str(root)}


def put(root: Path, header: dict[str, Any], source: BufferedReader) -> dict[str, Any]:
    """Receive files [{sha256, size, offset}], each from `offset` on. One that came out wrong is dropped: the job will find it missing."""
    for item in header["files"]:
        part = _part(root, item["sha256"], header["caller"])
        with open(part, "r+b" if part.exists() else "wb") as stream:
            _taken(
                stream
            )  # says that somebody writes; an earlier self that hangs in a dead link may still hold it, and goes on nowhere
            stream.truncate(item["offset"])
            stream.seek(item["offset"])
            left = item["size"] - item["offset"]
            while left:
                piece = source.read1(min(left, _PIECE))  # what has come, not what may never come
                if not piece:
                    raise Refused("the link was cut")  # into the void: what has come stays, the next exchange goes on from there
                stream.write(piece)
                stream.flush()
                left -= len(piece)
        _adopt(root, part, item["sha256"])
    return {"stored": len(header["files"])}


def adopt(root: Path, header: dict[str, Any], source: BufferedReader) -> dict[str, Any]:
    """Take over files that something else has put into incoming/ (`adb push`)."""
    for item in header["files"]:
        _adopt(root, root / "incoming" / f"{_digest_name(item['sha256'])}.{_hex(header['caller'])}", item["sha256"])
    return {"stored": len(header["files"])}


def _adopt(root: Path, part: Path, digest: str) -> None:
    """Give a file its name if it is what it is said to be; else, or if another desk was faster, it goes."""
    try:
        if (root / "files" / digest).is_file() or _sha256(part) != digest:
            part.unlink()
            return
        os.chmod(part, 0o444)
        os.replace(part, root / "files" / digest)
    except FileNotFoundError:
        pass  # an earlier self of the same desk was faster


def _part(root: Path, digest: str, caller: str) -> Path:
    return root / "files" / f"{_digest_name(digest)}.{_hex(caller)}.part"


def _own_part(root: Path, digest: str, caller: str) -> Path:
    """The caller's part of a file; what another left of it becomes that, if nobody writes it."""
    own = _part(root, digest, caller)
    for other in () if own.exists() else (root / "files").glob(f"{digest}*.part"):
        try:
            with open(other, "r+b") as stream:
                if _taken(stream):
                    os.rename(other, own)
                    break
        except FileNotFoundError:
            continue
    return own


def settle(root: Path, header: dict[str, Any], source: BufferedReader) -> dict[str, Any]:
    """Remove the jobs whose answers the desk has. One without an answer is another desk's, which started it since."""
    for name in header["settled"]:
        if (root / "jobs" / _digest_name(name) / "answer.json").exists():
            _remove_job(root, name)
    return {}


def job(root: Path, header: dict[str, Any], source: BufferedReader) -> dict[str, Any]:
    """Start the job unless it runs or has run, and wait for its answer: {"answer", "of_another", "age_s"}, {"running"},
    {"missing": {sha256: bytes here}} or {"died": last line}. A death is told to the caller it happened to; the next starts anew."""
    settle(root, header, source)
    place = root / "jobs" / _digest_name(header["job"])
    place.mkdir(exist_ok=True)
    try:
        first = open(place / "alive", "a")  # noqa: SIM115 - tells whether the folder is still the one that we found
    except FileNotFoundError:
        return {"running": True}  # removed in this instant, by who had its answer: asked again, it is started anew
    with first:
        try:
            reply = _asked(root, place, header)
        except FileNotFoundError:
            if _here(place, first):
                raise
            return {"running": True}
        return {"running": True} if "died" in reply and not _here(place, first) else reply


def _asked(root: Path, place: Path, header: dict[str, Any]) -> dict[str, Any]:
    """`job`, for as long as nobody removes it."""
    answer = place / "answer.json"
    if answer.exists() and _caller(place) != header["caller"] and _age(answer) > header["oldest_s"]:
        _remove_job(root, header["job"])
        return {"running": True}
    with open(place / "alive", "a") as alive:  # closed before we wait: the lock is to live as long as the agent does
        if not answer.exists() and _taken(alive) and not answer.exists():
            if not _here(place, alive):
                return {"running": True}
            if _caller(place) == header["caller"]:
                return {"died": _last_words(place)}
            missing = _missing(root, header)
            if missing:
                return {"missing": missing}
            _start(root, place, header, alive.fileno())
    deadline = time.monotonic() + header["wait_s"]
    while not answer.exists():
        if not _running(place) and not answer.exists():
            return {"died": _last_words(place)}
        if time.monotonic() > deadline:
            return {"running": True}
        time.sleep(POLL_SECONDS)
    made = {"of_another": _caller(place) != header["caller"], "age_s": _age(answer)}
    if header.get("pull"):  # may be gone before it is pulled: a pull that fails is a cut link, and asked again
        return {"done": str(answer), "sha256": _sha256(answer), **made}
    return {"answer": answer.read_text(), **made}


def _missing(root: Path, header: dict[str, Any]) -> dict[str, int]:
    wanted = dict.fromkeys(header["inputs"].values())
    if "sha256" in header["agent"]:
        wanted[header["agent"]["sha256"]] = None
    absent = [digest for digest in wanted if not (root / "files" / _digest_name(digest)).is_file()]
    parts = {digest: _own_part(root, digest, header["caller"]) for digest in absent}
    return {digest: part.stat().st_size if part.is_file() else 0 for digest, part in parts.items()}


def _start(root: Path, place: Path, header: dict[str, Any], alive: int) -> None:
    """Run the agent on this job, detached, with `alive` locked for as long as it lives."""
    agent, python = _agent(root, header["agent"]), header["python"]
    for name, digest in header["inputs"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Refused(f"expected a file inside the job's folder, got {name!r}")
        _place(root / "files" / digest, place / name)
    (place / "tmp").mkdir(exist_ok=True)
    (place / "request.json").write_text(json.dumps(header["request"]))
    with open(place / "stderr.txt", "wb") as errors:
        subprocess.Popen(
            [str(_from_home(python)) if "/" in python else python, str(agent), "request.json", "answer.json"],
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=dict(os.environ, TMPDIR=str(place / "tmp")),
            start_new_session=True,
            pass_fds=(alive,),
        )
    # Only now: where a doorkeeper dies sooner, the job is started when it is asked for again, unless its agent lives (`alive` tells).
    (place / "caller").write_text(header["caller"])
    with open(root / "journal.txt", "a") as journal:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        journal.write(f"{now} {place.name} {header['request'].get('action')}\n")


def _agent(root: Path, agent: dict[str, str]) -> Path:
    """The agent's file. One that was sent is run only if its bytes are still those that were sent."""
    if "path" in agent:
        path = _from_home(agent["path"])
        if not path.is_file():
            raise Refused(f"expected the installed agent {path}, found no such file")
        return path
    path = root / "files" / _digest_name(agent["sha256"])
    found = _sha256(path)
    if found != agent["sha256"]:
        raise Refused(
            f"expected the agent in {path} to have the sha256 it was sent with, got {found}: somebody changed it, it was not run; "
            "look who can write there, and delete it"
        )
    return path


def _place(source: Path, target: Path) -> None:
    """The file under the name that the graph's reader expects: a link, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.utime(source)  # when it was used last
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _taken(alive: IO[Any]) -> bool:
    """Whether we got the lock: nobody runs the job, or writes the part. Who only looks at the lock holds it for an instant."""
    for _ in range(5):
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.02)
    return False


def _running(place: Path) -> bool:
    with open(place / "alive", "a") as alive:
        try:
            fcntl.flock(alive, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _here(place: Path, alive: IO[str]) -> bool:
    """Whether the folder is the one in which `alive` was opened, and not gone, or another of the same name."""
    try:
        return os.path.samestat(os.stat(place / "alive"), os.fstat(alive.fileno()))
    except FileNotFoundError:
        return False


def _age(answer: Path) -> float:
    return max(0.0, time.time() - answer.stat().st_mtime)


def _caller(place: Path) -> str:
    path = place / "caller"
    return path.read_text() if path.is_file() else ""


def _last_words(place: Path) -> str:
    path = place / "stderr.txt"
    lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1][:300] if lines else "it left no word (killed from outside, or out of memory)"


def _remove_job(root: Path, name: str) -> None:
    """All of it at once, for who looks there: an answer that is gone beside a lock that is free would be a death."""
    gone = root / "jobs" / f"{_digest_name(name)}.{os.getpid()}"
    try:
        os.rename(root / "jobs" / name, gone)
    except OSError:
        return  # another was faster
    shutil.rmtree(gone, ignore_errors=True)


def _sweep(root: Path, now: float) -> None:
    """The rule of the module's docstring."""
    for place, state in _found(root / "jobs"):
        if now - state.st_mtime > KEPT_SECONDS and not ((place / "alive").exists() and _running(place)):
            shutil.rmtree(place, ignore_errors=True)
    files = [*_found(root / "files"), *_found(root / "incoming")]
    kept = 0
    for path, state in sorted(files, key=lambda found: found[1].st_mtime, reverse=True):
        age = now - state.st_mtime
        if state.st_nlink > 1 or age < SPARED_SECONDS:  # a job names it, or will
            continue
        kept += state.st_size
        if kept > KEPT_BYTES or age > KEPT_SECONDS:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _found(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """What is there, with its state; what another exchange removes meanwhile, is not."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found


def _hex(text: str) -> str:
    if not text or set(text) - set("0123456789abcdef"):
        raise Refused(f"expected a hexadecimal number, got {text!r}")
    return text


def _digest_name(text: str) -> str:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise Refused(f"expected a sha256, got {text!r}")
    return text


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for piece in iter(lambda: stream.read(_PIECE), b""):
            digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
