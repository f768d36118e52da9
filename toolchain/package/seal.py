"""`seal.json`: a check's report put into the package it is about. The package's own files and digest stay as they were.

    {"format", "package": the package's digest, "report": what `check --json` printed, "digest": sha256 of all before it}

Written whole or not at all; a signature, where there is one, lies beside it. Refuses to know what a report says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import DamagedFileError, InputError
from toolchain.files import write_atomic
from toolchain.package import signature
from toolchain.package.integrity import JSON_TAIL, SEAL, SIGNATURE, read_bounded
from toolchain.package.manifest import Package, open_package
from toolchain.reading import json_of

FORMAT = "bittailor seal 3"
_MOST_SIGNATURE_BYTES = 2**16
"""minisign's have some 300, and a comment of ours."""
_REMEDY = "remove it, and type: bittailor check PACKAGE --seal"


@dataclass(frozen=True)
class Seal:
    """A sealed report as it lies in a package: its bytes, what it says, and the signature's bytes or None."""

    text: bytes
    report: Mapping[str, Any]
    signature: bytes | None

    def signed_by(self, public_key: str) -> str:
        """The signed comment, if the signature is of this key. Raises InputError."""
        if self.signature is None:
            raise InputError(
                f"expected a signature in {SIGNATURE}, found none", "type: bittailor check PACKAGE --seal --sign-with minisign:KEY"
            )
        return signature.check(self.text, self.signature, public_key)


def write_seal(package: Package, report: Mapping[str, Any], key: Path | None = None) -> Path:
    """Seal the report of a package that has just been checked, and sign it with minisign's `key`. Returns the file.

    The package is read again first: what was measured is what is sealed. Raises DamagedFileError if it changed meanwhile.
    """
    folder = package.directory
    if open_package(folder).digest != package.digest:
        raise DamagedFileError(f"expected {folder} as it was when the check began, got another package", "check it again")
    body = json.dumps({"format": FORMAT, "package": package.digest, "report": report}, indent=1)
    text = JSON_TAIL.append(body.removesuffix("\n}").encode())
    signed = signature.sign(text, key, f"bittailor package {package.digest}") if key else None
    (folder / SIGNATURE).unlink(missing_ok=True)  # of the report before: rather none than one that does not fit
    write_atomic(folder / SEAL, text)
    if signed:
        write_atomic(folder / SIGNATURE, signed)
    return folder / SEAL


def read_seal(package: Package) -> Seal | None:
    """The report sealed in a package that was opened, or None. Raises DamagedFileError for one that is no report, or another package's."""
    path = package.directory / SEAL
    if not path.is_file():
        return None
    try:
        text = read_bounded(path)
        data = json_of(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} instead of {FORMAT!r}")
        if not isinstance(data["report"], dict):
            raise ValueError("no report")
        about = str(data["package"])
        signed = package.directory / SIGNATURE
        found = read_bounded(signed, _MOST_SIGNATURE_BYTES) if signed.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(
            f"expected a sealed report in {path}, got {type(error).__name__}: {str(error)[:200]}", _REMEDY
        ) from error
    if about != package.digest:
        raise DamagedFileError(
            f"expected {path} to be about this package ({package.digest[:12]}…), got one about {about[:12]}…", _REMEDY
        )
    return Seal(text, data["report"], found)
