"""The one reader, writer and validator of `profiles/<device>/table.jsonl`.

First line: the header (device, runtime, provider, threads, CPU, protocol, date, command, sha256 of the rows). Every other line is one
row, sorted by its key: text that diffs well. A row is a measurement; its key is a unit's shape, so models of equal shapes share rows.
Refuses to know how rows were measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from toolchain.costs.rows import KINDS, Header, MemoryRow, Row, UnitRow, between
from toolchain.errors import DamagedFileError, MissingCostError, StaleTableError
from toolchain.files import write_atomic
from toolchain.kernels import CATALOGUE
from toolchain.reading import json_of, read_text
from toolchain.spec import FINER, WORKS, Unit

FORMAT = "bittailor cost table 3"
FILE_NAME = "table.jsonl"


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one unit, and the relative error that interpolation may have added (0: measured)."""

    latency_ms: float
    interpolation_error: float


@dataclass(frozen=True)
class CostTable:
    """All rows of one device. Adding rows returns a new table; `save` writes it whole, under a temporary name first."""

    header: Header
    rows: Mapping[tuple[Any, ...], Row]

    def adding(self, rows: Iterable[Row]) -> CostTable:
        return replace(self, rows={**self.rows, **{row.key: row for row in rows}})

    def of(self, kind: type) -> list[Any]:
        return [row for row in self.rows.values() if isinstance(row, kind)]

    def latency(self, unit: Unit, kernel: str, tokens: int, working_set: str) -> Timed:
        """Time of a unit at `tokens` in flight: measured, or on the line between the two measured counts around it.

        Raises MissingCostError naming the command that measures it; one token is never interpolated.
        """
        rows = self._grids.get((*unit.shape, working_set, kernel), {})
        if tokens in rows:
            return Timed(rows[tokens].latency_ms, 0.0)
        below = [count for count in rows if 1 < count < tokens]
        above = [count for count in rows if count > tokens]
        if not below or not above or tokens == 1:
            raise missing(f"{unit.op} {unit.K}x{unit.N} {kernel} at {tokens} tokens ({working_set})", self.header.device)
        low, high = rows[max(below)], rows[min(above)]
        errors = [row.interpolation_error for row in (low, high) if row.interpolation_error is not None]
        return Timed(between(tokens, low.tokens, low.latency_ms, high.tokens, high.latency_ms), max(errors, default=0.0))

    @cached_property
    def _grids(self) -> dict[tuple[Any, ...], dict[int, UnitRow]]:
        grids: dict[tuple[Any, ...], dict[int, UnitRow]] = {}
        for row in self.of(UnitRow):
            grids.setdefault((row.op, row.K, row.N, row.working_set, row.kernel), {})[row.tokens] = row
        return grids

    def memory(self, unit: Unit, kernel: str) -> MemoryRow:
        """The memory row for a unit. Raises MissingCostError naming the command that measures it."""
        row = self.rows.get(("memory", *unit.shape, kernel))
        if row is None:
            raise missing(f"memory of {unit.op} {unit.K}x{unit.N} {kernel}", self.header.device)
        assert isinstance(row, MemoryRow)
        return row

    def save(self, path: Path) -> None:
        """Write header and sorted rows to `path`, atomically."""
        lines = [_line(row) for _, row in sorted(self.rows.items(), key=lambda item: json.dumps(item[0]))]
        body = "".join(f"{line}\n" for line in lines)
        head = {"format": FORMAT, **asdict(self.header), "sha256": hashlib.sha256(body.encode()).hexdigest()}
        write_atomic(path, json.dumps(head) + "\n" + body)


def _line(row: Row) -> str:
    return json.dumps({"row": row.key[0], **asdict(row)})


def missing(what: str, device: str) -> MissingCostError:
    return MissingCostError(
        f"expected {what} in the cost table of {device!r}, found no row", f"type: bittailor profile MODEL --device {device}"
    )


_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "Mapping[str, str]": dict,
    "Mapping[str, float]": dict,
    "Mapping[str, Sequence[Any]]": dict,
}
_Typed = TypeVar("_Typed", bound="Header | Row")


def _typed(made: _Typed) -> _Typed:
    """`made`, if its fields hold what their annotations say, and finite numbers only. Raises ValueError."""
    for item in fields(made):
        value, wanted = getattr(made, item.name), _TYPES.get(str(item.type), object)
        right = isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool)
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{item.name} {value!r} instead of {item.type}")
        if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= _LARGEST:
            raise ValueError(f"{item.name} {value!r} instead of a size or a count")
        if item.type == "Mapping[str, float]":
            _times(item.name, value)
        names = value if item.name == "kernels" else value.values() if item.type == "Mapping[str, str]" else ()
        if item.name == "bound" and value not in ("", *WORKS):
            raise ValueError(f"bound {value!r} instead of one of {', '.join(WORKS)}")
        for name in (value,) if item.name == "kernel" else names:
            if name not in CATALOGUE:
                raise ValueError(f"{item.name} {name!r} instead of a kernel of this version")
    return made


_LARGEST = 1 << 53
"""Of whole numbers: up to here a float holds each."""


def _times(name: str, value: Mapping[str, Any]) -> None:
    """ValueError unless these are the reference's times by kind of work, or none yet."""
    numbers = all(isinstance(time, int | float) and not isinstance(time, bool) and 0 < time < math.inf for time in value.values())
    if (value and not set(WORKS) <= set(value) <= {*WORKS, *FINER.values()}) or not numbers:
        raise ValueError(f"{name} {value!r} instead of a time for each of {', '.join(WORKS)}")


def open_table(path: Path) -> CostTable:
    """Read a table back, whole or not at all. Raises DamagedFileError naming the line."""
    try:
        head_line, _, body = read_text(path).partition("\n")
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"expected a cost table in {path}, got {error}") from error
    remedy = f"restore it, or delete {path} and type: bittailor profile MODEL"
    try:
        head = json_of(head_line)
        digest, form = head.pop("sha256"), head.pop("format")
        if form != FORMAT:
            raise ValueError(f"format {form!r} instead of {FORMAT!r}")
        header = _typed(Header(**{**head, "kernels": tuple(head["kernels"])}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"expected the header of a cost table in line 1 of {path}, got {error}", remedy) from error
    rows: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(body.splitlines(), start=2):
        try:
            data = json_of(line)
            row = _typed(KINDS[data.pop("row")](**data))
            rows[row.key] = row
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(
                f"expected a row in line {number} of {path}, got {type(error).__name__}: {error}", remedy
            ) from error
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise DamagedFileError(f"expected rows that match the header's sha256 in {path}, got others (edited or cut short)", remedy)
    return CostTable(header, rows)


def refuse_if_stale(table: CostTable, current: Header) -> None:
    """Raise StaleTableError if the table was measured on another CPU, runtime, provider, thread count or protocol."""
    for name, value in current.identity.items():
        if table.header.identity[name] != value:
            raise StaleTableError(
                f"expected a cost table for {name} {value!r}, got one measured with {table.header.identity[name]!r}",
                f"type: bittailor profile MODEL --device {current.device} --renew",
            )


def find_table(device: str, folders: Iterable[Path]) -> Path:
    """The first `<folder>/<device>/table.jsonl` that exists. Raises MissingCostError."""
    return find_tables(device, folders)[0]


def find_tables(device: str, folders: Iterable[Path]) -> list[Path]:
    """Every `<folder>/<device>/table.jsonl` that exists, one at least. Raises MissingCostError."""
    tried = [folder / device / FILE_NAME for folder in folders]
    if found := [path for path in tried if path.is_file()]:
        return found
    raise MissingCostError(
        f"expected a cost table of device {device!r} in {' or '.join(str(path.parent) for path in tried)}, found none",
        f"type: bittailor profile MODEL --device {device}",
    )
