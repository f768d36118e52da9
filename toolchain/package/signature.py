"""Signatures over a package's sealed report, made and checked by the user's own `minisign`. Refuses to know keys and cryptography.

The report names the package's digest, and that every file's: one signature covers them all. minisign, because it is one small program
that distributions ship, works without a network or an account, and signs files as they are.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from toolchain.errors import InputError, MissingPackageError
from toolchain.files import scratch
from toolchain.package.integrity import SEAL, SIGNATURE

_TOOL = "minisign"
_FIRST_LINE = "untrusted comment: of bittailor's sealed report"
"""minisign neither signs nor checks it, so that it must be this one."""
_PUBLIC_KEY = re.compile(r"RW[A-Za-z0-9+/]{54}")


def secret_key(text: str) -> Path:
    """The key file of `--sign-with minisign:KEY`. Raises InputError, so that nobody measures for minutes first."""
    tool, _, key = text.partition(":")
    if tool != _TOOL or not key:
        raise InputError(f"expected --sign-with minisign:KEY, got {text!r}", "make a key: minisign -G")
    if not Path(key).is_file():
        raise InputError(f"expected minisign's secret key in {key}, found no such file", "make a key: minisign -G")
    _run(["-v"])
    return Path(key)


def sign(text: bytes, key: Path, comment: str) -> bytes:
    """minisign's signature of the bytes. `comment` is signed with them. A password is asked for by minisign itself, on a terminal.

    Raises InputError with what minisign says, MissingPackageError where it is not installed.
    """
    with scratch() as folder:
        (folder / SEAL).write_bytes(text)
        words = ["-S", "-s", str(key), "-m", str(folder / SEAL), "-x", str(folder / SIGNATURE), "-t", comment]
        words += ["-c", _FIRST_LINE.removeprefix("untrusted comment: ")]
        code, said = _run(words, asks=sys.stdin.isatty())
        if code or not (folder / SIGNATURE).is_file():
            raise InputError(
                f"expected minisign to sign with {key}, got: {said or f'exit code {code}'}", "try: minisign -S -m FILE"
            )
        return (folder / SIGNATURE).read_bytes()


def check(text: bytes, signature: bytes, public_key: str) -> str:
    """The comment that was signed with the bytes, if the signature is of this key (a file, or the key itself). Raises as `sign` does."""
    if Path(public_key).is_file():
        given = ["-p", public_key]
    elif _PUBLIC_KEY.fullmatch(public_key):
        given = ["-P", public_key]
    else:
        raise InputError(f"expected minisign's public key (RW...) or its file, got {public_key!r}")
    if signature.partition(b"\n")[0] != _FIRST_LINE.encode():
        raise InputError(f"expected {SIGNATURE} to begin with {_FIRST_LINE!r}, got another first line")
    with scratch() as folder:
        (folder / SEAL).write_bytes(text)
        (folder / SIGNATURE).write_bytes(signature)
        code, said = _run(["-V", "-Q", "-m", str(folder / SEAL), "-x", str(folder / SIGNATURE), *given])
    if code:
        raise InputError(
            f"expected {SEAL} and {SIGNATURE} as {public_key} signed them, minisign says: {said or f'exit code {code}'}"
        )
    return said


def _run(words: Sequence[str], asks: bool = False) -> tuple[int, str]:
    """(exit code, what it said in one line). asks: it may talk with the user, and what it says is not kept."""
    try:
        if asks:
            return subprocess.run([_TOOL, *words], stdout=sys.stderr, check=False).returncode, ""
        done = subprocess.run(
            [_TOOL, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        raise MissingPackageError(
            "expected the program minisign for signatures, found none on PATH",
            "type: apt install minisign, or brew install minisign",
        ) from None
    return done.returncode, " ".join((done.stdout + done.stderr).split())
