"""A device on this machine, over a link that is really cut: a pipe that is killed after so many bytes, up or down, or so many seconds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from toolchain.profiler.transports.jobs import Link
from toolchain.profiler.transports.local import Local
from toolchain.profiler.transports.pipe import COMMAND, Piece
from toolchain.spec import Device

WHOLE = ""
REPLY_LOST = "{command} | (head -c 1; kill -9 0)"
REPLY_HALVED = "{command} | (head -c 40; kill -9 0)"
WAITING_CUT = "(flock {folder}/busy sh -c 'until grep -qs peak {folder}/journal.txt; do sleep 0.02; done'; kill -9 0) & {command}"
"""The device is busy until the job was started: it has no answer before the cut."""
STARTING_CUT = (
    "(while :; do for caller in {folder}/jobs/*/caller; do"
    ' read -r job 2>/dev/null < "${{caller%caller}}request.json"; case $job in *peak*) kill -9 0;; esac;'
    " done; done) & {command}"
)
"""The doorkeeper dies as soon as it says whose the job is."""
SENDING_CUT = "(head -c 200000; sleep 0.4; kill -9 0) | {command}"
"""Half a second more than the bytes: so that what was sent is written."""


class Cable(Local):
    """The device is this machine; exchange i goes through `cuts[i]`, later ones are whole."""

    def __init__(self, device: Device, cuts: Iterable[str] = ()) -> None:
        super().__init__(device)
        self.cuts = list(cuts)
        self.sent: list[Piece] = []

    def words(self) -> list[str]:
        cut = self.cuts.pop(0) if self.cuts else WHOLE
        # A session of its own: `kill 0` is to take this link, not the tests.
        return ["setsid", "sh", "-c", cut.format(command=COMMAND, folder=self.device.folder)] if cut else super().words()

    def send(self, header: Any, pieces: Sequence[Piece]) -> dict[str, Any]:
        self.sent += pieces
        return super().send(header, pieces)


@pytest.fixture
def board(tmp_path: Path) -> Device:
    return Device("board", folder=str(tmp_path / "board"), threads=1)


def asking_for_peak(subject: dict[str, Any]) -> dict[str, Any]:
    return {"action": "peak", "threads": 1, "subject": subject}


def linked(board: Device, cuts: Iterable[str] = (), patience_s: float = 5.0) -> tuple[Link, Cable]:
    cable = Cable(board, cuts)
    return Link(board, cable, patience_s, sleep=lambda _: None), cable


def started(board: Device) -> list[str]:
    """Actions of the agents that the device started, `identify` left out."""
    lines = (Path(board.folder) / "journal.txt").read_text().splitlines()
    return [line.split()[2] for line in lines if not line.endswith(" identify")]


def kept(board: Device) -> list[str]:
    return os.listdir(Path(board.folder) / "jobs")
