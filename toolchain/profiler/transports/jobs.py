"""The desk's side of a job: one request with its files, measured once on the device, however often the link is cut meanwhile.

    request + digests of its files + agent + what runs there + how often it was asked before  →  the job's id (of `identify`: and who asks)
    ask      sent files that are missing → the agent started, detached → its answer awaited, 20 s at a time
    cut      asked again, after 1, 2, 4, ... at most 15 s, for 300 s without a word from the device
    answered the device is told, and forgets the job; the next request of the same words is a measurement of its own

A desk that is killed finds what it had started when the same command comes again within the hour. The device's half is `doorkeeper.py`.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import toolchain
from toolchain.errors import BittailorError, InputError, LostLinkError, UnreachableError
from toolchain.files import scratch, sha256, write_atomic
from toolchain.profiler.agent import PROTOCOL
from toolchain.profiler.bundle import agent_bytes, agent_sha256
from toolchain.profiler.transports import transport_of
from toolchain.profiler.transports.pipe import Piece, Transport
from toolchain.profiler.transports.replies import answer_of, malformed
from toolchain.progress import note
from toolchain.spec import Device

FOLDERS = {"adb": "/data/local/tmp/bittailor"}
DEFAULT_FOLDER = ".cache/bittailor"
"""Of the agent on the device, from the home folder, where the device's file names none."""
RECONNECT_SECONDS, FIRST_PATIENCE_SECONDS = 300.0, 3.0
FIRST_DELAY, LONGEST_DELAY = 1.0, 15.0
HELLO_SECONDS, WAIT_SECONDS = 30.0, 20.0
LIMIT_SECONDS, IDENTIFY_SECONDS = 1800.0, 60.0
"""How long a job may take on the device, once it is its turn there."""
OLDEST_SECONDS = 3600.0
"""An answer that waited longer for another desk is no measurement of this machine's now: it is taken anew."""
IDENTIFY = {"action": "identify"}
_SENDING_ROUNDS = 5
"""So often in a row may the same bytes be missing."""
_OLDEST_PYTHON = (3, 11)
T = TypeVar("T")


class Link:
    """A device as this desk talks to it. Not for several threads at once."""

    def __init__(
        self,
        device: Device,
        transport: Transport | None = None,
        patience_s: float = RECONNECT_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.device = device
        self._patience_s = patience_s
        self._transport = transport or transport_of(device)
        self._sleep = sleep
        self._caller = uuid.uuid4().hex
        self._asked: Counter[str] = Counter()
        self._owed: list[str] = []
        self._machine: dict[str, Any] | None = None
        self._identities: dict[str, dict[str, Any]] = {}
        self._digests: dict[tuple[Path, int, int], str] = {}

    @property
    def machine(self) -> dict[str, Any]:
        """{"python", "machine", "cpus", "folder"}: the first exchange, which is not tried for long.

        Raises UnreachableError where nobody answers, BittailorError where the Python there is too old.
        """
        if self._machine is None:  # cached_property would have every thread's Link wait for this one's (Python 3.11)
            self._machine = self._hello()
        return self._machine

    def _hello(self) -> dict[str, Any]:
        patience = min(self._patience_s, FIRST_PATIENCE_SECONDS)
        found = self._patiently(lambda: self._transport.exchange(self._header("hello"), HELLO_SECONDS), patience, first=True)
        if tuple(int(part) for part in found["python"].split(".")[:2]) < _OLDEST_PYTHON:
            wanted = ".".join(map(str, _OLDEST_PYTHON))
            problem = f"expected Python {wanted} or newer on {self.device.name!r}, got {found['python']}"
            raise BittailorError(problem, f"set python: in the file of {self.device.name!r}")
        return found

    def identify(self, request: Mapping[str, Any] = IDENTIFY) -> dict[str, Any]:
        """What the agent there says of its machine and runtime (`agent.identify`); asked once."""
        words = json.dumps(request, sort_keys=True)
        if words not in self._identities:
            # With the caller in its words: who the device is now, nobody else has asked.
            self._identities[words] = self._job(request, {}, {"caller": self._caller}, IDENTIFY_SECONDS)
        return self._identities[words]

    def ask(self, request: Mapping[str, Any], identify: Mapping[str, Any] = IDENTIFY) -> dict[str, Any]:
        """The agent's answer to a request. Raises UnreachableError, or BittailorError for what the agent refuses or dies of.

        identify: how the device is asked who it is, so that what it measured under another runtime is not taken for the answer.
        """
        if request["action"] == "identify":
            return self.identify(request)
        machine = self.identify(identify)
        files: dict[str, Path] = {}
        described = _described(request, files)
        return self._job(described, files, {name: machine.get(name) for name in ("cpu", "runtime", "protocol")})

    def _job(
        self, request: Mapping[str, Any], files: Mapping[str, Path], machine: Mapping[str, Any], limit_s: float = LIMIT_SECONDS
    ) -> dict[str, Any]:
        root = self.machine["folder"]
        digests = {name: self._sha256(path) for name, path in files.items()}
        sources = {digests[name]: path for name, path in files.items()}
        agent = {"path": self.device.agent} if self.device.agent else {"sha256": agent_sha256()}
        desk = {"version": toolchain.__version__, "protocol": PROTOCOL}
        words = json.dumps([request, digests, agent, desk, machine], sort_keys=True)
        turn = self._asked[words]
        self._asked[words] += 1
        number = hashlib.sha256(f"{words} {turn}".encode()).hexdigest()
        header = {
            **self._header("job"),
            "root": root,
            "job": number,
            "agent": agent,
            "request": {**request, "desk": desk, "limit_s": limit_s},
            "inputs": digests,
            "wait_s": WAIT_SECONDS,
            "oldest_s": OLDEST_SECONDS,
        }
        deadline = time.monotonic() + 2 * limit_s
        lacking: list[Mapping[str, int]] = []
        while time.monotonic() < deadline:
            reply = self._patiently(lambda: self._exchange(header), self._patience_s)
            if missing := reply.get("missing"):
                self._check_missing(missing, sources)
                lacking.append(missing)
                if lacking[-_SENDING_ROUNDS:].count(missing) == _SENDING_ROUNDS:  # not one byte more each time
                    problem = (
                        f"expected {self.device.name!r} to keep the files it was sent, it lacked the same {_SENDING_ROUNDS} times"
                    )
                    raise BittailorError(problem, f"look whether the disk of {root} is full, or damaged")
                self._send(header, missing, sources)
            elif "died" in reply:
                raise BittailorError(f"expected an answer from the agent on {self.device.name!r}, it died: {reply['died']}")
            elif "answer" in reply:
                if reply["of_another"]:
                    note(f"bittailor: {self.device.name}: an earlier run's answer was waiting there, {reply['age_s']:.0f} s old")
                if not reply["settled"]:
                    self._owed.append(number)
                    self._settle()
                return answer_of(reply["answer"], str(request["action"]), self.device)
        raise BittailorError(f"expected an answer from the agent on {self.device.name!r} within {2 * limit_s:.0f} s, got none")

    def _check_missing(self, missing: Mapping[str, int], sources: Mapping[str, Path]) -> None:
        """Raise BittailorError where the device lacks what it was never told of, or has more of it than there is."""
        sizes = {**{digest: path.stat().st_size for digest, path in sources.items()}, agent_sha256(): len(agent_bytes())}
        for digest, there in missing.items():
            if there > sizes.get(digest, -1):
                raise malformed(self.device, "the name and length of a file that we have", f"{digest[:12]}... of {there} bytes")

    def _exchange(self, header: Mapping[str, Any]) -> dict[str, Any]:
        owed = list(self._owed)
        reply = self._transport.exchange({**header, "settled": owed}, WAIT_SECONDS + HELLO_SECONDS)
        self._owed = [number for number in self._owed if number not in owed]
        return reply

    def _send(self, header: Mapping[str, Any], missing: Mapping[str, int], sources: Mapping[str, Path]) -> None:
        """Send what the device lacks, each file from where it broke off. A cut is left to the next exchange, which knows what came."""
        with scratch() as folder:
            places = {**sources, agent_sha256(): folder / "agent.pyz"}
            if agent_sha256() in missing:
                write_atomic(folder / "agent.pyz", agent_bytes())
            pieces = [Piece(digest, places[digest], offset) for digest, offset in missing.items()]
            try:
                self._transport.send({**self._header("put"), "root": header["root"]}, pieces)
            except LostLinkError as error:
                note(f"bittailor: {self.device.name}: {error.problem}")

    def _patiently(self, step: Callable[[], T], patience_s: float, first: bool = False) -> T:
        """`step()`, again after every cut, until the device was silent for `patience_s`. first: it has not been heard of yet."""
        waited, delay = 0.0, FIRST_DELAY
        while True:
            try:
                return step()
            except LostLinkError as error:
                if waited >= patience_s:
                    if first:
                        raise
                    problem = f"{error.problem}: {self.device.name!r} did not answer again for {waited:.0f} s"
                    raise UnreachableError(
                        problem, "what it measured is kept there for an hour; type the same command again"
                    ) from error
                note(f"bittailor: {self.device.name}: {error.problem}; trying again in {delay:.0f} s")
                self._sleep(delay)
                waited, delay = waited + delay, min(2 * delay, LONGEST_DELAY)

    def _header(self, operation: str) -> dict[str, Any]:
        folder = self.device.folder or FOLDERS.get(self.device.transport, DEFAULT_FOLDER)
        return {"op": operation, "folder": folder, "caller": self._caller}

    def _sha256(self, path: Path) -> str:
        state = path.stat()
        key = (path, state.st_size, state.st_mtime_ns)
        if key not in self._digests:
            self._digests[key] = sha256(path)
        return self._digests[key]

    def _settle(self) -> None:
        """Tell the device which answers we have; if that fails, the next exchange says it."""
        try:
            self._exchange(self._header("settle"))
        except LostLinkError as error:
            note(f"bittailor: {self.device.name}: {error.problem}")


def _described(request: Mapping[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """The request with every "folder" in it, however deep, named as the job will have it; `files`: name there → file here."""
    names: dict[str, str] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: named(item) if key == "folder" else walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list | tuple) else value

    def named(folder: Any) -> str:
        root = Path(folder)
        if str(root) not in names:
            there = names[str(root)] = f"inputs/{len(names)}"
            found = [path for path in sorted(root.rglob("*")) if path.is_file()]
            if not found:
                raise InputError(f"expected a folder with a graph, got {root}, where there is no file")
            files.update({f"{there}/{path.relative_to(root).as_posix()}": path for path in found})
        return names[str(root)]

    return walk(request)
