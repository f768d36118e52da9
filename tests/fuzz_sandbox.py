"""The sandbox in which a case is given to a reader: what it writes, reads, takes and raises is seen, and bounded."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from toolchain.errors import BittailorError
from toolchain.files import sha256
from toolchain.package.integrity import JSON_TAIL, MANIFEST, SEAL, YAML_TAIL
from toolchain.profiler.transports import doorkeeper

MOST_SECONDS = 10.0
"""Of this process's CPU time, so that a busy machine makes no crash."""
MOST_BYTES = 400 << 20
"""By which one case may raise this process's peak: the largest valid input here is below 2 MB."""
ROOM_BYTES = 3 << 30
"""Address space beyond what the process has when it begins."""
LONGEST_LINE = 2000
"""Characters of a refusal."""
DRIVER = "libcuda.so.1"
"""What the agent asks for a GPU's name, whatever the request says."""
_DIGESTS = ("manifest.yaml", "supernet.yaml")


class TooSlow(BaseException):
    """Not an Exception: no reader may swallow it."""


@dataclass(frozen=True)
class Reader:
    """One reader: the folder of `fuzz_seeds.make` that it reads, which files in it (patterns) are mutated, and the call.

    links: the files may become links, and not only other bytes.
    closed: what it reads must lie in the folder, links or not; a file that the user names may be a link.
    honest: after the mutation the digests are made to fit again, as a stranger would; of half of the cases.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    call: Callable[[Path], object]
    weight: float = 1.0
    links: bool = True
    honest: bool = False
    closed: bool = True

    def names(self, seeds: Path) -> tuple[str, ...]:
        """The files that are mutated."""
        return _names(seeds / self.folder, self.files)


@cache
def _names(folder: Path, patterns: tuple[str, ...]) -> tuple[str, ...]:
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(found))


class Sandbox:
    """A folder that a case may read, beside others that it may not touch.

    A case is the name of one file of a valid folder and its new content (`NAME\\nCONTENT`), or `@link NAME\\nTARGET`. It ends well if
    the reader gives a value, or refuses by a BittailorError of one line. Anything else is a crash: another exception, a file written or
    read outside the folder, more than `MOST_BYTES` of memory, more than `MOST_SECONDS`.
    """

    def __init__(self, root: Path, seeds: Path, reader: Reader, most_seconds: float = MOST_SECONDS) -> None:
        self.root, self.seeds, self.reader, self.most_seconds = root, seeds, reader, most_seconds
        tempfile.gettempdir()  # looks for a folder where it may write
        self.inside = root / "inside"
        root.mkdir(parents=True)
        (root / "secret").write_bytes(b"\0" * 4096)
        self.fresh()
        self.names = reader.names(seeds)
        self._around = self._listing()
        self.risen = 0
        self._offence = ""
        self._watching = False
        sys.modules["pynvml"] = None  # type: ignore[assignment] # a GPU of this machine is none of the folder's
        sys.addaudithook(self._audit)

    def fresh(self) -> None:
        shutil.rmtree(self.inside, ignore_errors=True)
        shutil.copytree(self.seeds / self.reader.folder, self.inside)

    def _listing(self) -> list[tuple[str, int]]:
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(self.root) if entry.name != "inside")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (
                bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
                if isinstance(flags, int)
                else bool(set(mode or "") & set("wax+"))
            )
            if isinstance(path, str | bytes) and self._outside(path, writes):
                self._offence = self._offence or f"{'writes' if writes else 'reads'} {os.fsdecode(path)[-80:]!r}"
        elif event in (
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "os.symlink",
            "os.link",
            "os.truncate",
            "shutil.rmtree",
            "os.chmod",
        ):
            if any(isinstance(path, str | bytes) and self._outside(path, True) for path in arguments[:2]):
                self._offence = self._offence or f"{event} {arguments[:2]!r}"[:120]
        elif event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "ctypes.dlopen") and arguments[:1] != (
            DRIVER,
        ):
            self._offence = self._offence or f"{event} {arguments[:1]!r}"[:120]

    def _outside(self, path: str | bytes, writes: bool) -> bool:
        full = os.path.realpath(os.fsdecode(path))
        if full.startswith((f"{self.inside}/", "/dev/null", os.path.join(os.path.realpath("/tmp"), "bittailor-"))) or full == str(
            self.inside
        ):
            return False
        return writes or (self.reader.closed and full.startswith(f"{self.root}/"))

    def run(self, case: bytes, show: bool = False) -> str:
        """ "accepted", "refused", or how it crashed: one line, the same for the same fault. show: print what was raised."""
        first, _, content = case.partition(b"\n")
        name = os.fsdecode(first)
        link = name.startswith("@link ")
        name = name.removeprefix("@link ")
        if name not in self.names:
            return "accepted"
        target = self.inside / name
        if link:
            target.unlink()
            try:
                os.symlink(content.replace(b"\0", b"") or b".", target)
            except OSError:
                target.write_bytes(b"")
        else:
            target.write_bytes(content)
        if self.reader.honest and not link and hashlib.blake2b(case).digest()[0] % 4:
            _refit(self.inside, name)
        try:
            return self._outcome(show)
        finally:
            self._watching = False
            if self._listing() != self._around:
                raise SystemExit(f"{self.reader.name}: something was written beside its folder")
            self._restore(name)

    def _restore(self, name: str) -> None:
        whole = self.seeds / self.reader.folder
        if self.reader.folder == "incoming":
            self.fresh()
            return
        for other in {name, *_DIGESTS, "table.jsonl"}:
            if (whole / other).is_file():
                (self.inside / other).unlink(missing_ok=True)
                shutil.copyfile(whole / other, self.inside / other)

    def valid(self) -> str:
        """How the seeds themselves end. Called first unwatched: what is imported late, makes folders of its own."""
        self.reader.call(self.inside)
        return self._outcome(show=True)

    def _outcome(self, show: bool = False) -> str:
        before = _peak_bytes(anew=True)
        self._offence, self._watching = "", True
        signal.setitimer(signal.ITIMER_PROF, self.most_seconds)
        try:
            self.reader.call(self.inside)
            outcome = "accepted"
        except BittailorError as error:
            line = str(error)
            if show:
                traceback.print_exception(error)
            bad = "\n" in line or len(line) > LONGEST_LINE or not line.strip()
            outcome = f"refuses in {len(line)} characters: {_where(error)}" if bad else "refused"
        except TooSlow as error:
            outcome = f"too slow: {_where(error)}"
        except doorkeeper.Refused:
            outcome = "refused"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - what a crash is
            if show:
                traceback.print_exception(error)
            outcome = f"{type(error).__name__}: {_where(error)}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._watching = False
        if self._offence:
            return self._offence
        self.risen = _peak_bytes() - before
        return f"{max(self.risen >> 29 << 9, MOST_BYTES >> 20)} MB more" if self.risen > MOST_BYTES else outcome


def _peak_bytes(anew: bool = False) -> int:
    """The highest resident set of this process. anew: since now, or a peak of long ago would hide a case's."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _where(error: BaseException) -> str:
    """The innermost line of ours, and what was called from there."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/toolchain/" in frame.filename]
    if not ours:
        return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{ours[-1].filename.rpartition('/toolchain/')[2]}:{ours[-1].lineno} ({str(error)[:60]!r})".replace("\n", " ")


def _refit(folder: Path, name: str) -> None:
    """Make the digests fit, as whoever made the file would have."""
    if name == "table.jsonl":
        head, _, body = (folder / name).read_bytes().partition(b"\n")
        try:
            data = json.loads(head)
            data["sha256"] = hashlib.sha256(body).hexdigest()
            (folder / name).write_bytes(json.dumps(data).encode() + b"\n" + body)
        except (ValueError, TypeError, RecursionError):
            pass
        return
    for description in _DIGESTS:
        path = folder / description
        if path.is_file() and name not in _DIGESTS:
            listed = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
            if name in listed["files"] and (folder / name).is_file():
                path.write_bytes(path.read_bytes().replace(listed["files"][name].encode(), sha256(folder / name).encode()))
    if name == SEAL:
        path = folder / name
        body, _, _ = path.read_bytes().rpartition(JSON_TAIL.before)
        if body:
            path.write_bytes(JSON_TAIL.append(body))
        return
    manifest = folder / MANIFEST
    if manifest.is_file():  # its last line is its own digest
        body, _, _ = manifest.read_bytes().rpartition(YAML_TAIL.before)
        if body:
            manifest.write_bytes(YAML_TAIL.append(body))


@contextmanager
def limited() -> Iterator[None]:
    """Address space and time are bounded for cases in this process."""

    def late(*_: object) -> None:
        raise TooSlow

    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, old)
