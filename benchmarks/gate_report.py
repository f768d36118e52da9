"""What `gate.py report` says of WORK: how often a check erred, and how far what it says still moves with the machine's speed."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

from toolchain.blocks import Block, Share, Speed, at_speed, compared, middle
from toolchain.report import table

ANCHORS = 16
"""Undisturbed processes whose middle is the truth."""


def report(arguments: argparse.Namespace) -> None:
    work, found = arguments.work, {}
    if rows := rows_of(work / "curve.jsonl"):
        anchors = rows_of(work / "anchors.jsonl")
        for row in rows:
            before = [one for one in anchors if one["t"] < row["t"]][-ANCHORS // 2 :]
            after = [one for one in anchors if one["t"] > row["t"]][: ANCHORS // 2]
            speed = Speed(row["work"], row["speed_ns"], Share(*row.get("share", ())))
            row["true_distance"] = 100 * (level_of([*before, *after], speed) / row["limit"] - 1)
        found["real checks"] = summary(rows)
        found["what they say, by the machine's speed (a slope of 0: the share is right)"] = [
            left_of_speed("idle", [row for row in rows if not row["load"]]),
            left_of_speed("beside a load", [row for row in rows if row["load"]]),
        ]
    if rows := rows_of(work / "replay.jsonl"):
        found["replayed, not real checks"] = summary([{**row, "true_distance": row["distance"]} for row in rows])
    if rows := rows_of(work / "baseline.jsonl"):
        swapped = json.loads((work / "slowed.json").read_text())
        print(
            f"slowed: {swapped['unit']} from {swapped['from']} to {swapped['to']}, {swapped['ratio']:.3f} times as long before the runs"
        )
        if len(pair := rows_of(work / "pair.jsonl")) > 1:
            ratio, low, high = slower(*([Block.from_json(row[name]) for row in pair] for name in ("slowed", "plain")))
            print(f"between the runs: {ratio:.3f} [{low:.3f}, {high:.3f}] in {len(pair)} processes of each\n")
        found["against the baseline"] = [
            {"package": name, **counts([row for row in rows if row["package"] == name])} for name in ("plain", "slowed")
        ]
    if arguments.json:
        print(json.dumps(found))
        return
    for title, lines in found.items():
        print(f"{title}\n\n{table(lines, list(lines[0]), markdown=True)}\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def level_of(anchors: Sequence[dict[str, Any]], speed: Speed) -> float:
    """The package's latency in ms by these processes, at this speed."""
    return middle(at_speed([Block.from_json(row["block"]) for row in anchors], "latency_ms", speed)[0])


def slower(now: Sequence[Block], then: Sequence[Block]) -> tuple[float, float, float]:
    """(ratio, low, high) of two packages' latencies, as `check --baseline` compares them."""
    seen = compared(now, then, "latency_ms", 0.05, 0.05)
    return seen.value, seen.low, seen.high


def left_of_speed(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The slope of log (what a check says at the table's speed) over log (how slow the machine was meanwhile), with its standard error."""
    x, y = ([math.log(row[what]) for row in rows] for what in ("slowness", "measured"))
    if len(rows) < 3 or len(set(x)) == 1:
        return {"runs": name, "slowness": "–", "slope": None, "±": None}
    slope, level = linear_regression(x, y)
    left = math.fsum((each - slope * at - level) ** 2 for at, each in zip(x, y, strict=True)) / (len(x) - 2)
    apart = math.fsum((at - fmean(x)) ** 2 for at in x)
    return {
        "runs": name,
        "slowness": f"{math.exp(min(x)):.2f} to {math.exp(max(x)):.2f}",
        "slope": slope,
        "±": math.sqrt(left / apart),
    }


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    said = [row["verdict"] for row in rows]
    seconds = sorted(row["seconds"] for row in rows)
    return {
        "runs": len(rows),
        **{name: said.count(name) for name in ("within", "over", "could not tell")},
        "open, idle": sum(row["verdict"] == "could not tell" and not row["load"] for row in rows),
        "median s": seconds[len(seconds) // 2],
        "longest s": seconds[-1],
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for distance in sorted({row["distance"] for row in rows}):
        these = [row for row in rows if row["distance"] == distance]
        wrong = sum(row["verdict"] == ("over" if row["true_distance"] < 0 else "within") for row in these)
        spread = [row["true_distance"] for row in these]
        true = f"{min(spread):+.1f} to {max(spread):+.1f}"
        lines.append({"distance %": f"{distance:+d}", "re-anchored %": true, **counts(these), "wrong": wrong})
    return lines
