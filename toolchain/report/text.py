"""Tables of results, aligned for a terminal or as Markdown. Knows text only: numbers come in already with their unit in the column."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"
"""What stands for a value that is absent or null: never 0, never blank."""


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], markdown: bool = False) -> str:
    """`rows` under `columns` (the keys, used as headings), one line each; columns that hold only numbers are aligned right.

    Floats have four significant digits. In Markdown, `|` is escaped. No line has trailing spaces, and there is no final newline.
    """
    cells = [[_text(row.get(column), markdown) for column in columns] for row in rows]
    right = [bool(rows) and all(_is_number(row.get(column)) for row in rows) for column in columns]
    headings = [_text(column, markdown) for column in columns]
    widths = [max([_width(heading), *(_width(line[i]) for line in cells)]) for i, heading in enumerate(headings)]
    lines = [_line(line, widths, right, markdown) for line in (headings, *cells)]
    if markdown:
        rule = "|".join("-" * (width + 1) + (":" if end else "-") for width, end in zip(widths, right, strict=True))
        lines.insert(1, f"|{rule}|")
    else:
        lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def number(value: float) -> str:
    """Four significant digits without an exponent where that is readable: 0.001234, 12.35, 1235, 1.235e+09 → 1235000000."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e15:
        digits = f"{value:.4g}"
        return f"{float(digits):.0f}" if "e" in digits else digits
    return f"{value:.3e}"


def _text(value: Any, markdown: bool) -> str:
    if value is None:
        return MISSING
    text = number(value) if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return text.replace("|", "\\|") if markdown else text


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _width(text: str) -> int:
    """Columns on a terminal: wide East Asian characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], markdown: bool) -> str:
    padded = [
        " " * (width - _width(cell)) + cell if end else cell + " " * (width - _width(cell))
        for cell, width, end in zip(cells, widths, right, strict=True)
    ]
    return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()
