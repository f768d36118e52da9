"""One exchange with a device's doorkeeper over the pipes of a child process: what every transport has in common.

Every transport runs the same constant command there (`COMMAND`). What differs from device to device, its interpreter included, goes
down the pipe as data: no shell string is ever made from a device's file.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event, Timer
from typing import IO, Any, Protocol

from toolchain.errors import LostLinkError, UnreachableError
from toolchain.profiler.transports import doorkeeper
from toolchain.profiler.transports.replies import LONGEST_BYTES, malformed, plain, reply_of
from toolchain.spec import Device

COMMAND = (
    "exec sh -c 'cd 2>/dev/null; IFS= read -r p && "
    'exec "$p" -I -c "import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"\''
)
"""Runs in any login shell: reads the interpreter's path, from the home folder (Android has none, and stays where it is), then has it run
what follows on stdin. -I: whatever the home folder holds."""
NO_INTERPRETER = (126, 127)
_PIECE = 1 << 20
_MOST_SAID = 1 << 18
"""Bytes of a login shell's greeting, or of what went wrong, that are read."""


@dataclass(frozen=True)
class Piece:
    """A file to send: its digest, where it is, and how much of it the device has."""

    sha256: str
    path: Path
    offset: int = 0

    def described(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "size": self.path.stat().st_size, "offset": self.offset}


class Transport(Protocol):
    """A way to a device. Raises LostLinkError where another try may help, UnreachableError where none will."""

    def exchange(self, header: Mapping[str, Any], patience_s: float) -> dict[str, Any]:
        """The doorkeeper's reply; with an answer, "settled" says whether the device knows that we have it."""

    def send(self, header: Mapping[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
        """Have the files stored under their digests."""


class Pipe(ABC):
    """A transport that is a child process here; subclasses say which, and what its failures mean."""

    def __init__(self, device: Device) -> None:
        self.device = device

    @abstractmethod
    def words(self) -> list[str]:
        """The child process's arguments."""

    @abstractmethod
    def failure(self, code: int, said: str) -> UnreachableError:
        """What an exit code and the lines on stderr mean."""

    @property
    def python(self) -> str:
        """As the shell there finds it: from the home folder, where `COMMAND` goes."""
        return self._from_home(self.device.python) or "python3"

    @staticmethod
    def _from_home(path: str) -> str:
        return path.removeprefix("~/")

    def exchange(self, header: Mapping[str, Any], patience_s: float) -> dict[str, Any]:
        return self._talk(header, (), patience_s)

    def send(self, header: Mapping[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
        return self._talk({**header, "op": "put", "files": [piece.described() for piece in pieces]}, pieces, None)

    def _talk(self, header: Mapping[str, Any], pieces: Sequence[Piece], patience_s: float | None) -> dict[str, Any]:
        words = self.words()
        with tempfile.TemporaryFile() as errors:
            try:
                child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            except FileNotFoundError:
                raise missing_program(words[0]) from None
            assert child.stdin
            assert child.stdout
            expired = Event()
            timer = Timer(patience_s, _expire, (child, expired)) if patience_s is not None else None
            reply: dict[str, Any] | None = None
            try:
                if timer:
                    timer.start()
                with contextlib.suppress(BrokenPipeError):  # the exit code tells more
                    self._say(child.stdin, header, pieces)
                if (data := _reply(child.stdout, self.device)) is not None:
                    reply = reply_of(data, header["op"], self.device)
                if reply and "answer" in reply:
                    reply["settled"] = _received(child.stdin, child.stdout)
                _close(child.stdin)
                child.stdout.close()
                code = child.wait()
            finally:
                if timer:
                    timer.cancel()
                if child.poll() is None:
                    child.kill()
                    child.wait()
            if reply is not None:
                return reply
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - _MOST_SAID))
            said = errors.read().decode(errors="replace").replace("\r", "")
        if code in NO_INTERPRETER:
            problem = f"expected the Python {self.python!r} on {self.device.name!r}, got: {last_line(said, code)}"
            raise UnreachableError(problem, f"set python: in the file of {self.device.name!r}")
        if expired.is_set():
            raise LostLinkError(f"expected an answer from {self.device.name!r} within {patience_s:.0f} s, got none")
        raise self.failure(code, said)

    def _say(self, stream: IO[bytes], header: Mapping[str, Any], pieces: Sequence[Piece]) -> None:
        source = _doorkeeper()
        data = json.dumps({**header, "python": self.python}).encode()
        stream.write(b"%s\n%d\n%s%d\n%s" % (self.python.encode(), len(source), source, len(data), data))
        for piece in pieces:
            with open(piece.path, "rb") as file:
                file.seek(piece.offset)
                for block in _blocks(file):
                    stream.write(block)
        stream.flush()


def missing_program(name: str) -> UnreachableError:
    package = {"ssh": "openssh-client", "adb": "adb"}.get(name, name)
    return UnreachableError(f"expected the program {name} on this machine, found none", f"type: apt-get install {package}")


def last_line(said: str, code: int) -> str:
    """What a program said last, or its exit code."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return str(plain(lines[-1][:300])) if lines else f"exit code {code}"


def _reply(stream: IO[bytes], device: Device) -> bytes | None:
    """What is behind the mark, whatever a login shell printed before; None if the stream ends without it."""
    before = 0
    while line := stream.readline(_MOST_SAID):
        if line.startswith(doorkeeper.MARK + b" "):
            number = line[len(doorkeeper.MARK) :].strip()
            length = int(number) if number.isdigit() and len(number) < 20 else LONGEST_BYTES + 1
            if length > LONGEST_BYTES:
                raise malformed(
                    device, f"a reply of at most {LONGEST_BYTES} bytes", f"the length {number[:40].decode(errors='replace')!r}"
                )
            data = stream.read(length)
            return data if len(data) == length else None
        before += len(line)
        if before > _MOST_SAID:
            raise malformed(device, "the doorkeeper's reply", f"more than {_MOST_SAID} bytes of something else")
    return None


def _received(stdin: IO[bytes], stdout: IO[bytes]) -> bool:
    """Tell the doorkeeper that we have the answer; whether it says that it knows."""
    try:
        stdin.write(b"received\n")
        stdin.flush()
    except BrokenPipeError:
        return False
    return stdout.readline(16) == b"settled\n"


def _expire(child: subprocess.Popen[bytes], expired: Event) -> None:
    expired.set()
    child.kill()


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_PIECE):
        yield block


def _close(stream: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):
        stream.close()


@cache
def _doorkeeper() -> bytes:
    return Path(doorkeeper.__file__).read_bytes()
