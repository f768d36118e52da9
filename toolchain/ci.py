"""What a CI shows of a check: JUnit XML, which GitHub's test reporters, GitLab and Jenkins read, and Markdown for a job's summary.

Both are made from the report, the one `check --json` prints and `check --seal` seals: what is shown is what was recorded. JUnit has no
standard; what is written keeps the schema of Jenkins' xunit plugin (junit-10.xsd), which the other two read a part of.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.check import COULD_NOT_TELL, OVER, WITHIN
from toolchain.report import table

_MARKS = {WITHIN: "✅", OVER: "❌", COULD_NOT_TELL: "❔"}


def junit(report: Mapping[str, Any]) -> str:
    """A suite with one test case per limit; over is a failure, "could not tell" an error, so that a gate on either stops.

    Times are seconds. Limits that one measurement serves share its time: it stands with the first of them, the others have 0, so that
    the sum is what the check took.
    """
    name, rows = f"bittailor check {_name(report)}", list(report["limits"])
    evidence = report.get("evidence", {})
    seconds = _seconds([str(row["name"]) for row in rows], evidence.get("seconds", {}))
    counts = {"failures": OVER, "errors": COULD_NOT_TELL}
    stamp = {"timestamp": str(evidence["date"]).removesuffix("Z")} if "date" in evidence else {}
    totals = {
        "tests": str(len(rows)),
        **{key: str(sum(row["verdict"] == verdict for row in rows)) for key, verdict in counts.items()},
        "time": f"{sum(evidence.get('seconds', {}).values()):.3f}",
    }
    root = ElementTree.Element("testsuites", {"name": _clean(name), **totals})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _clean(name), **totals, "skipped": "0", **stamp})
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in facts(report).items():
        ElementTree.SubElement(properties, "property", name=key, value=_clean(value))
    for row, spent in zip(rows, seconds, strict=True):
        case = ElementTree.SubElement(suite, "testcase", classname=_clean(name), name=_clean(str(row["name"])), time=f"{spent:.3f}")
        line = _clean(_line(row))
        if row["verdict"] == WITHIN:
            ElementTree.SubElement(case, "system-out").text = line
        else:
            tag = "failure" if row["verdict"] == OVER else "error"
            ElementTree.SubElement(case, tag, message=line, type=row["verdict"]).text = line
    ElementTree.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def markdown(report: Mapping[str, Any]) -> str:
    """A heading with the verdict, a table of the limits, and what they rest on; names from outside are escaped."""
    rows = [
        {
            "resource": f"{_MARKS.get(row['verdict'], '')} `{re.sub('[`|]', '', str(row['name']))}`",
            **{key: row[key] for key in ("measured", "low", "high", "limit")},
            "verdict": row["verdict"],
            "why": _escaped(str(row["reason"])),
        }
        for row in report["limits"]
    ]
    head = f"### bittailor check {_escaped(_name(report))}: {_MARKS.get(report['verdict'], '')} {report['verdict']}"
    columns = ["resource", "measured", "low", "high", "limit", "verdict", "why"]
    lines = [f"- {key}: {_escaped(value)}" for key, value in facts(report).items() if key != "verdict"]
    return "\n".join([head, "", table(rows, columns, markdown=True), "", *lines, ""]) + "\n"


def append(path: Path, text: str) -> None:
    """Add to a file that others add to as well, as $GITHUB_STEP_SUMMARY is: it cannot be written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(text)


def facts(report: Mapping[str, Any]) -> dict[str, str]:
    """What the verdict rests on, in words: only what the report says."""
    evidence = report.get("evidence", {})
    device = evidence.get("device", {})
    state = evidence.get("state", {})
    found = {
        "verdict": report["verdict"],
        "device": " · ".join(
            str(part) for part in (device.get("name"), device.get("cpu"), f"{device.get('threads')} threads") if part
        ),
        "runtime": evidence.get("runtime"),
        "workload": evidence.get("workload"),
        "budget": f"{evidence.get('budget', {}).get('name')}, from the {evidence.get('budget_from')}",
        "package": evidence.get("package_digest"),
        "protocol": evidence.get("protocol"),
        "meter": _said(evidence.get("meter", {})),
        **{f"{name} {when}": _said(state[when].get(name, {})) for when in state for name in ("load", "clock_mhz", "governor")},
        "date": evidence.get("date"),
        "command": evidence.get("command"),
    }
    return {key: str(value) for key, value in found.items() if value} if evidence else {"verdict": str(report["verdict"])}


def _said(entry: Mapping[str, Any]) -> str:
    return str(entry["value"]) if entry.get("value") is not None else f"none: {entry.get('reason', 'not read')}"


def _name(report: Mapping[str, Any]) -> str:
    return Path(str(report.get("package", "package"))).name


def _line(row: Mapping[str, Any]) -> str:
    measured = "nothing" if row["measured"] is None else f"{row['measured']:.6g}"
    bounds = "" if row["low"] is None or row["high"] is None else f" [{row['low']:.6g}, {row['high']:.6g}]"
    return f"{row['verdict']}: measured {measured}{bounds}, limit {row['limit']:.6g}. {row['reason']}".rstrip(". ")


def _seconds(names: list[str], spent: Mapping[str, float]) -> list[float]:
    left = dict(spent)
    found = []
    for name in names:
        key = next((key for key in left if name in key.split(" + ")), "")
        found.append(left.pop(key, 0.0))
    return found


def _clean(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold, escaped or not."""
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _escaped(text: str) -> str:
    """As Markdown shows it letter by letter, in one line."""
    return re.sub(r"([\\`*_\[\]#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
