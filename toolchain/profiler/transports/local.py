"""A device of this machine with a folder of its own: everything as on a distant one, but for the link."""

from __future__ import annotations

import sys

from toolchain.errors import LostLinkError, UnreachableError
from toolchain.profiler.transports.pipe import COMMAND, Pipe, last_line


class Local(Pipe):
    """Another Python, or one device of several that a fleet is rehearsed with."""

    @property
    def python(self) -> str:
        return self._from_home(self.device.python) or sys.executable

    def words(self) -> list[str]:
        return ["sh", "-c", COMMAND]

    def failure(self, code: int, said: str) -> UnreachableError:
        return LostLinkError(f"the doorkeeper of {self.device.name!r} ended without a reply: {last_line(said, code)}")
