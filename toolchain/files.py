"""Atomic writes: a file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolchain.errors import InputError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to a temporary name beside `path`, flush it to disk, rename it over `path`. Leaves nothing on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        if target.exists():
            old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in parents:  # only the folders made here, and only while they are empty
            try:
                parent.rmdir()
            except OSError:
                break
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in 1 MiB pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def inside(folder: Path, name: str) -> Path:
    """`folder/name`, or InputError if a name from a file we did not write would leave the folder (also through a link)."""
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or Path(name).is_absolute():
        raise InputError(f"expected a path inside {folder}, got {name!r}")
    return path
