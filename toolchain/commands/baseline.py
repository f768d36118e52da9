"""An earlier report of `check --json` to compare with: its processes and memory, if it speaks of the same machine and workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.blocks import Block
from toolchain.errors import InputError
from toolchain.reading import read_json

_MOST_PROCESSES = 2000
"""Of an hour or so; each is compared with each."""
_AGAIN = "make it again on this machine: bittailor check PACKAGE --json > REPORT"


@dataclass(frozen=True)
class Baseline:
    """The processes of an earlier check, its peak memory per process in bytes, what it was measured on and for which workload."""

    blocks: tuple[Block, ...]
    peak_bytes: tuple[float, ...]
    machine: Mapping[str, Any]
    workload: str

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Raises InputError for a file that is no report of `check --json`, or one of a version that kept no processes."""
        try:
            data = read_json(path)
            machine = dict(data["machine"])
            if len(data["blocks"]) > _MOST_PROCESSES:
                raise ValueError(f"{len(data['blocks'])} processes, at most {_MOST_PROCESSES} are compared with")
            blocks = tuple(map(Block.from_json, data["blocks"]))
            peaks = tuple(float(peak) for peak in data["measured"]["peak_memory_bytes"]["trials"])
            return cls(blocks, tuple(peak for peak in peaks if 0 < peak < float("inf")), machine, str(data["workload"]))
        except OSError as error:
            raise InputError(f"expected a report of check --json in {path}, got: {error.strerror or error}", _AGAIN) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {str(error)[:80]}"
            raise InputError(f"expected a report of check --json in {path}, got {what}", _AGAIN) from error

    def refuse_others(self, machine: Mapping[str, Any], workload: str) -> None:
        """Raise InputError where it was measured on something else: a ratio to that would say nothing of the package."""
        here = {**machine, "workload": workload}
        there = {**self.machine, "workload": self.workload}
        for name, value in here.items():
            if there.get(name) != value:
                raise InputError(f"expected a baseline with {name} {value}, as now, got {there.get(name)}", _AGAIN)
