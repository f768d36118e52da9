import pytest

from toolchain.report import MISSING, number, table

ROWS = [{"budget": "low", "latency_ms": 1.23456, "energy_mj": None}, {"budget": "日本", "latency_ms": 10, "energy_mj": None}]


def test_a_table_is_aligned_numbers_to_the_right():
    assert table(ROWS, ["budget", "latency_ms"]).splitlines() == [
        "budget  latency_ms",
        "──────  ──────────",
        "low          1.235",
        "日本            10",
    ]


def test_marks_that_take_no_column_are_not_counted():
    assert table([{"a": "e\u0301", "b": "x"}, {"a": "ee", "b": "y"}], ["a", "b"]).splitlines()[2:] == ["e\u0301   x", "ee  y"]


def test_what_is_missing_is_shown_as_missing_and_never_as_zero():
    lines = table([*ROWS, {"budget": "high"}], ["budget", "energy_mj", "latency_ms"]).splitlines()
    assert lines[2].split() == ["low", MISSING, "1.235"]
    assert lines[4].split() == ["high", MISSING, MISSING]


def test_markdown_escapes_bars_and_keeps_a_row_on_one_line():
    lines = table([{"a|b": "x|y\nz", "n": 3}], ["a|b", "n"], markdown=True).splitlines()
    assert lines == ["| a\\|b   | n |", "|--------|--:|", "| x\\|y z | 3 |"]


def test_a_table_without_rows_is_its_heading():
    assert table([], ["a", "b"]).splitlines() == ["a  b", "─  ─"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.00012345, "0.0001234"),
        (12.345, "12.35"),
        (1234.5, "1234"),
        (123456.0, "123500"),
        (1.5e-7, "1.500e-07"),
        (-2.0, "-2"),
    ],
)
def test_numbers_have_four_significant_digits(value, text):
    assert number(value) == text
    assert float(text) == pytest.approx(value, rel=5e-4)
