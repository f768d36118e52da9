"""Devices behind Android's adb: files are pushed, the agent is run, its answer is pulled.

    adb [-s serial] push FILE FOLDER/incoming/<sha256>.<caller>
    adb [-s serial] shell -T COMMAND
    adb [-s serial] pull FOLDER/jobs/<id>/answer.json FILE

`python` of the device's file is an interpreter on the phone that finds onnxruntime and numpy; Android has none of its own.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.errors import LostLinkError, UnreachableError
from toolchain.files import scratch, sha256
from toolchain.profiler.transports.pipe import COMMAND, Piece, Pipe, last_line, missing_program
from toolchain.profiler.transports.replies import LONGEST_BYTES, malformed

_LOOK_SECONDS = 0.1


class Adb(Pipe):
    """One adb process for each step; adb's own server keeps the connection."""

    def words(self) -> list[str]:
        return [*self._adb(), "shell", "-T", COMMAND]

    def exchange(self, header: Mapping[str, Any], patience_s: float) -> dict[str, Any]:
        reply = super().exchange({**header, "pull": True}, patience_s)
        if "done" not in reply:
            return reply
        with scratch() as folder:
            path = folder / "answer.json"
            self._run("pull", str(reply["done"]), str(path), bounded=path)
            if sha256(path) != reply["sha256"]:
                raise LostLinkError(f"expected the answer of {self.device.name!r} as it was written, got it cut short")
            return {**reply, "answer": path.read_text(errors="replace"), "settled": False}

    def send(self, header: Mapping[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
        for piece in pieces:
            self._run("push", str(Path(piece.path)), f"{header['root']}/incoming/{piece.sha256}.{header['caller']}")
        return super().exchange({**header, "op": "adopt", "files": [piece.described() for piece in pieces]}, patience_s=600)

    def failure(self, code: int, said: str) -> UnreachableError:
        name, wanted = self.device.name, f"serial {self.device.serial}" if self.device.serial else "one device"
        line = last_line(said, code)
        if "unauthorized" in said:
            return UnreachableError(f"expected {name!r} to trust this machine, got: {line}", "allow USB debugging on its screen")
        if "more than one device" in said:
            return UnreachableError(
                f"expected one device behind adb, got several ({line})", f"set serial: for {name!r}; see: adb devices"
            )
        if "no devices" in said or "not found" in said or "offline" in said:
            return LostLinkError(f"expected {wanted} behind adb for {name!r}, got: {line}", "type: adb devices")
        return LostLinkError(f"expected adb to reach {name!r}, got: {line}", "type: adb devices")

    def _adb(self) -> list[str]:
        return ["adb", *(["-s", self.device.serial] if self.device.serial else [])]

    def _run(self, *words: str, bounded: Path | None = None) -> None:
        """One adb command. bounded: the file it writes here, which may not become longer than a reply may be."""
        with tempfile.TemporaryFile() as said:
            try:
                child = subprocess.Popen([*self._adb(), *words], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            except FileNotFoundError:
                raise missing_program("adb") from None
            try:
                while True:
                    ended = child.poll() is not None
                    if bounded and bounded.exists() and bounded.stat().st_size > LONGEST_BYTES:
                        raise malformed(self.device, f"an answer of at most {LONGEST_BYTES} bytes", "a longer one")
                    if ended:
                        break
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(_LOOK_SECONDS)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
            if child.returncode:
                said.seek(0)
                raise self.failure(child.returncode, said.read().decode(errors="replace"))
