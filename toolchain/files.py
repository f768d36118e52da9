"""Atomic writes: a file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolchain.errors import InputError

_SCRATCH = "bittailor-"
_LONGEST_NAME = 255
"""Bytes; what every file system here allows."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to a temporary name beside `path`, flush it to disk, rename it over `path`. Leaves nothing on failure."""
    parents = _make_parents(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        _remove_empty(parents)
        raise


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses and that says whose it is."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _leftovers(path: Path) -> list[Path]:
    """What `_temporary(path)` named in runs that were killed. Not the files of `{path}.more`: somebody may be writing those now."""
    mine = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.tmp")
    return [other for other in path.parent.iterdir() if mine.fullmatch(other.name)]


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above `path`; returns those that were not there, the innermost first."""
    parents = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return parents


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            break


@contextmanager
def replace_folder(target: Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success it takes target's place, on error it is deleted and target is as before.

    An existing target is replaced only if it is empty or holds `marker` (the file that says it is one of ours): InputError otherwise.
    Folders that killed runs left for the same target are swept first.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not (target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))):
        raise InputError(
            f"expected {target} to be absent, empty or an earlier result (with {marker}), got something else",
            "choose another --out",
        )
    parents = _make_parents(target)
    for stale in _leftovers(target):
        _remove(stale)
    temporary = _temporary(target)
    try:
        temporary.mkdir()
        yield temporary
        if target.exists():
            old = _temporary(target)
            os.replace(target, old)
            os.replace(temporary, target)
            _remove(old)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(parents)
        raise


def _remove(path: Path) -> None:
    """A folder with all that is in it; of a link, the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, gone afterwards. Its name holds our process id, so that what killed processes left is swept by the next one."""
    for stale in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        owner = stale.name.removeprefix(_SCRATCH).split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as folder:
        yield Path(folder)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in 1 MiB pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def inside(folder: Path, name: str) -> Path:
    """`folder/name`, or InputError if a name from a file we did not write would leave the folder (also through a link)."""
    root = folder.resolve()
    unnamed = "\0" in name or not name or any(len(part.encode(errors="replace")) > _LONGEST_NAME for part in Path(name).parts)
    try:
        path = root if unnamed else (root / name).resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        path = root
    if unnamed or path == root or not path.is_relative_to(root) or Path(name).is_absolute():
        raise InputError(f"expected a path inside {folder}, got {name[:200]!r}")
    return path
