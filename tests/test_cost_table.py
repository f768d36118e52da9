"""The cost table's file: written, read back, damaged, of another machine, and found where there are several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_board import HEADER, board_table

from toolchain.costs.rows import UnitRow
from toolchain.costs.table import CostTable, find_table, open_table, refuse_if_stale
from toolchain.errors import DamagedFileError, MissingCostError, StaleTableError


def test_a_table_reads_back_as_it_was_written(tmp_path: Path) -> None:
    table = board_table()
    table.save(tmp_path / "table.jsonl")
    assert open_table(tmp_path / "table.jsonl") == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.jsonl"]


def test_the_text_does_not_depend_on_the_order_of_measuring(tmp_path: Path) -> None:
    table = board_table()
    backwards = CostTable(table.header, dict(reversed(list(table.rows.items()))))
    table.save(tmp_path / "a")
    backwards.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    lines = (tmp_path / "a").read_text().splitlines()
    assert len(lines) == 1 + len(table.rows)
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_a_row_measured_again_takes_the_old_ones_place() -> None:
    table = board_table()
    row = table.of(UnitRow)[0]
    again = table.adding([replace(row, latency_ms=9.0)])
    assert len(again.rows) == len(table.rows)
    assert again.rows[row.key].latency_ms == 9.0  # type: ignore[union-attr]
    assert table.rows[row.key] == row


def _rehashed(text: str) -> str:
    """The text with a header whose sha256 fits the body: damage that the hash does not tell."""
    head, _, body = text.partition("\n")
    return json.dumps({**json.loads(head), "sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body


def _line(number: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    """Line `number` (from 1) as JSON through `change`, the rest as it was and the hash right."""

    def damage(text: str) -> str:
        lines = text.splitlines()
        lines[number - 1] = json.dumps(change(json.loads(lines[number - 1])))
        return _rehashed("\n".join(lines) + "\n")

    return damage


DAMAGES: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "line 1"),
    "not a table": (lambda text: "hello\n", "line 1"),
    "a list as header": (lambda text: "[]\n", "line 1"),
    "a number as header": (lambda text: "7\n", "line 1"),
    "another format": (_line(1, lambda head: {**head, "format": "bittailor cost table 1"}), "line 1"),
    "a header with a stranger": (_line(1, lambda head: {**head, "colour": 1}), "line 1"),
    "a header that lacks its CPU": (_line(1, lambda head: {key: head[key] for key in head if key != "cpu"}), "line 1"),
    "threads in words": (_line(1, lambda head: {**head, "threads": "two"}), "line 1"),
    "a hash of nothing": (lambda text: text.replace('"sha256": "', '"sha256": "0'), "sha256"),
    "cut in a line": (lambda text: text[:-20], "line"),
    "cut between lines": (lambda text: text[: text.rstrip("\n").rindex("\n") + 1], "sha256"),
    "a digit edited": (lambda text: text.replace('"n": 7', '"n": 8', 1), "sha256"),
    "a row of another kind": (_line(3, lambda row: {**row, "row": "colour"}), "line 3"),
    "a row that is a number": (_line(4, lambda row: 5), "line 4"),
    "a row that is text": (_line(4, lambda row: "five"), "line 4"),
    "a row with a stranger": (_line(3, lambda row: {**row, "colour": 1}), "line 3"),
    "a row that lacks its kernel": (_line(2, lambda row: {key: row[key] for key in row if key != "kernel"}), "line 2"),
    "a width that is a list": (_line(2, lambda row: {**row, "K": [64]}), "line 2"),
    "a time that is text": (_line(40, lambda row: {**row, "latency_ms": "fast"}), "line 40"),
    "a time that is not a number": (_line(40, lambda row: {**row, "latency_ms": float("nan")}), "line 40"),
    "bytes that are text": (_line(2, lambda row: {**row, "peak_bytes": None}), "line 2"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_table_is_refused_whole_naming_file_and_line(tmp_path: Path, name: str) -> None:
    damage, where = DAMAGES[name]
    path = tmp_path / "table.jsonl"
    board_table().save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DamagedFileError) as caught:
        open_table(path)
    assert str(path) in str(caught.value)
    assert where in str(caught.value)
    assert "bittailor profile" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b").mkdir()
    for name in ("a", "b", "absent"):
        with pytest.raises(DamagedFileError, match=name):
            open_table(tmp_path / name)


@pytest.mark.parametrize(
    "change", [{"cpu": "another"}, {"provider": "X"}, {"threads": 3}, {"runtime": "onnxruntime 1.32.0"}, {"protocol": "2"}]
)
def test_a_table_of_another_machine_is_stale(change: dict[str, Any]) -> None:
    with pytest.raises(StaleTableError, match=r"type: bittailor profile MODEL --device board --renew"):
        refuse_if_stale(board_table(), replace(HEADER, **change))


def test_a_table_of_this_machine_is_not_stale_for_another_date_or_command() -> None:
    refuse_if_stale(board_table(), replace(HEADER, date="2027-01-01", command="x", reference_ns={}, meter="rapl"))


def test_the_first_folder_with_a_table_wins(tmp_path: Path) -> None:
    for name in ("second", "third"):
        board_table().save(tmp_path / name / "board" / "table.jsonl")
    folders = [tmp_path / name for name in ("first", "second", "third")]
    assert find_table("board", folders) == tmp_path / "second" / "board" / "table.jsonl"
    with pytest.raises(MissingCostError, match="bittailor profile MODEL --device other"):
        find_table("other", folders)
