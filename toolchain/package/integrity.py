"""A package's folder is what its manifest says: every file with its sha256, no link, no other file. Refuses to know what is in the files.

    manifest.yaml                names every file below with its sha256; its last line is the sha256 of all lines before
    model.onnx, tokenizer, ...   named by the manifest
    seal.json, seal.json.minisig beside it, not named: evidence comes after the export, and leaves the package and its digest as they
                                 were. No runtime reads them; seal.json ends with a digest of its own (`seal.py`)

So one flipped bit is found wherever it is. Against somebody who writes files *and* digests there is the signature (`signature.py`), or a
digest that came another way (`bittailor verify --digest`). Any other file is refused: tokenizers and onnxruntime-genai read files by
name, and one that nobody hashed would change what the package does.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import DamagedFileError
from toolchain.files import sha256
from toolchain.progress import track

MANIFEST = "manifest.yaml"
SEAL, SIGNATURE = "seal.json", "seal.json.minisig"
REMEDY = "export the package again"
_OURS = re.compile(rf"{re.escape(SEAL)}|{re.escape(SIGNATURE)}|\.seal\.json(?:\.minisig)?\.[0-9a-f]{{8}}\.tmp")
"""The last: what a `check --seal` that was killed left (`files.write_atomic`)."""
_MOST_BYTES = 2**26
"""Of a manifest or seal: a hundred thousand trials are three million."""
_LARGE_BYTES, _PIECE_BYTES = 2**30, 2**26
"""From the first on, hashing takes seconds and is shown."""


@dataclass(frozen=True)
class Tail:
    """How a text ends that holds the sha256 of all before: `before` + 64 hex digits + `after`."""

    before: bytes
    after: bytes

    def append(self, body: bytes) -> bytes:
        return body + self.before + hashlib.sha256(body).hexdigest().encode() + self.after

    def digest(self, text: bytes) -> str:
        """The digest, if it is that of what stands before it. Raises ValueError."""
        match = re.search(re.escape(self.before) + rb"([0-9a-f]{64})" + re.escape(self.after) + rb"\Z", text)
        if match is None:
            raise ValueError("no digest at its end")
        if hashlib.sha256(text[: match.start()]).hexdigest().encode() != match[1]:
            raise ValueError("another content than its digest says")
        return match[1].decode()


YAML_TAIL = Tail(b"digest: ", b"\n")
JSON_TAIL = Tail(b',\n "digest": "', b'"\n}\n')


def read_bounded(path: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """The bytes of a manifest, seal or signature. Raises OSError, ValueError for more than any of ours can have."""
    with open(path, "rb") as stream:
        found = stream.read(most_bytes + 1)
    if len(found) > most_bytes:
        raise ValueError(f"more than {most_bytes >> 20} MiB")
    return found


def check_names(names: Mapping[str, str]) -> None:
    """Raise ValueError for a name that is not that of a file in the package's own folder, or that is kept for ours."""
    for name in names:
        if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
            raise ValueError(f"{name!r} among its files, which is not a name inside the package's folder")
        if name == MANIFEST or _OURS.fullmatch(name):
            raise ValueError(f"{name!r} among its files, a name that bittailor keeps for itself")


def check_files(directory: Path, files: Mapping[str, str]) -> None:
    """Hold the folder against name → sha256. Raises DamagedFileError naming the first file that is missing, another, a link or unknown."""
    with os.scandir(directory) as entries:
        found = {entry.name: entry for entry in entries}
    for name in files:
        if name not in found:
            raise DamagedFileError(f"expected {name} in {directory}, which the manifest lists, found none", REMEDY)
    for name, entry in sorted(found.items()):
        if name not in files and name != MANIFEST and not _OURS.fullmatch(name):
            raise DamagedFileError(
                f"expected only files in {directory} that its manifest names, got {name!r}", f"move it elsewhere, or {REMEDY}"
            )
        if not entry.is_file(follow_symlinks=False):
            kind = "a link" if entry.is_symlink() else "none"
            raise DamagedFileError(f"expected {name} to be a regular file inside {directory}, got {kind}", REMEDY)
    for name, digest in files.items():
        if _sha256(directory / name) != digest:
            raise DamagedFileError(f"expected {name} in {directory} to have the sha256 of the manifest, got another", REMEDY)
    if SEAL in found:
        try:
            JSON_TAIL.digest(read_bounded(directory / SEAL))
        except ValueError as error:
            problem = f"expected a sealed report in {directory / SEAL}, got {error}"
            raise DamagedFileError(problem, f"remove it, and type: bittailor check {directory} --seal") from error


def _sha256(path: Path) -> str:
    size = path.stat().st_size
    if size < _LARGE_BYTES:
        return sha256(path)
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        pieces = -(-size // _PIECE_BYTES)
        for _ in track(range(pieces), pieces, f"sha256 of {path.name} ({_PIECE_BYTES >> 20} MiB pieces)"):
            found.update(stream.read(_PIECE_BYTES))
    return found.hexdigest()
