"""One way from the report's JSON to what is shown: a value is named by its JSON Pointer (RFC 6901) and shown with that name beside it.

So that a figure cannot show what the JSON does not say: marks in figures and cells in tables carry the pointer as `data-json`, and a
test resolves each one. Refuses to compute: everything shown was computed before, in `commands.reporting`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from toolchain.report.text import MISSING, number


@dataclass(frozen=True)
class Quantity:
    """How a resource is written: its name, its unit and the factor from the JSON's unit to that one."""

    name: str
    unit: str = ""
    factor: float = 1.0


QUANTITIES = {
    "latency_ms": Quantity("Latency", "ms"),
    "first_token_ms": Quantity("Time to the first token", "ms"),
    "peak_memory_bytes": Quantity("Peak memory", "MB", 1e-6),
    "package_bytes": Quantity("Package", "MB", 1e-6),
    "compute_flop": Quantity("Compute", "GFLOP", 1e-9),
    "energy_mj": Quantity("Energy", "mJ"),
    "latency_p95_ms": Quantity("Latency, 95th percentile", "ms"),
    "perplexity_ratio": Quantity("Perplexity ratio"),
    "fidelity": Quantity("Fidelity, at least"),
}


def quantity_of(limit: str) -> Quantity:
    """How what a check held is written; one that is not known here under its own name, its numbers as they are."""
    return QUANTITIES.get(limit, Quantity(limit))


@dataclass(frozen=True)
class Cell:
    """One cell of a table. pointer: where its text's value is in the JSON; factor: what it was multiplied by before it was written."""

    text: str
    pointer: str = ""
    factor: float = 1.0
    missing: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing with what it says in words and in numbers. `svg` is "" where nothing can be drawn, and `reason` says why."""

    key: str
    title: str
    svg: Markup
    alternative: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]] = field(default_factory=tuple)
    caption: str = ""
    reason: str = ""


@dataclass(frozen=True)
class View:
    """The report's JSON below `root`, a JSON Pointer ("" is all of it)."""

    data: Mapping[str, Any]
    root: str = ""

    def at(self, *path: str | int) -> View:
        return View(self.data, self.pointer(*path))

    def each(self, *path: str | int) -> list[View]:
        """The views of a list's elements."""
        return [self.at(*path, index) for index in range(len(self[path]))]

    def pointer(self, *path: str | int) -> str:
        return self.root + "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)

    def __getitem__(self, path: str | int | tuple[str | int, ...]) -> Any:
        path = path if isinstance(path, tuple) else (path,)
        return resolve(self.data, self.pointer(*path))

    def cell(self, *path: str | int, factor: float = 1.0) -> Cell:
        """A value as it is written: numbers with four digits, null as missing."""
        value = self[path]
        if value is None or value == "":
            return Cell(MISSING, self.pointer(*path), factor, missing=True)
        text = number(float(value) * factor) if isinstance(value, float | int) and not isinstance(value, bool) else str(value)
        return Cell(text, self.pointer(*path), factor)

    def text(self, *path: str | int, factor: float = 1.0) -> str:
        return self.cell(*path, factor=factor).text


def resolve(data: Any, pointer: str) -> Any:
    """The value that a JSON Pointer names. Raises KeyError or IndexError."""
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        data = data[int(step)] if isinstance(data, list) else data[step]
    return data
