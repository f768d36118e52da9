"""What a CI is shown of a check. The schema's rules are those of junit-10.xsd of Jenkins' xunit plugin, read there."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from toolchain.ci import append, junit, markdown
from toolchain.spec import Verdict

_TOTALS = {"name", "tests", "failures", "errors", "time"}
ATTRIBUTES = {  # element → (may have, must have)
    "testsuites": (_TOTALS, set()),
    "testsuite": (_TOTALS | {"skipped", "timestamp", "hostname", "id", "package", "file"}, _TOTALS - {"time"}),
    "properties": (set(), set()),
    "property": ({"name", "value"}, {"name", "value"}),
    "testcase": ({"name", "classname", "time", "group"}, {"name"}),
    "failure": ({"type", "message"}, set()),
    "error": ({"type", "message"}, set()),
    "system-out": (set(), set()),
}
INSIDE = {
    "testsuites": {"testsuite"},
    "testsuite": {"testsuite", "properties", "testcase", "system-out", "system-err"},
    "properties": {"property"},
    "testcase": {"skipped", "error", "failure", "system-out", "system-err"},
}


def _keeps_the_schema(element: ElementTree.Element) -> None:
    may, must = ATTRIBUTES[element.tag]
    assert must <= set(element.attrib) <= may, element.attrib
    if "time" in element.attrib:
        assert re.fullmatch(r"[0-9]+\.[0-9]+", element.attrib["time"])
    assert {child.tag for child in element} <= INSIDE.get(element.tag, set())
    for child in element:
        _keeps_the_schema(child)


def _report(*found: str, reason: str = "", package: str = "packages/low", **more: Any) -> dict[str, Any]:
    names = ("peak_memory_bytes", "latency_ms", "first_token_ms", "energy_mj")
    limits = [Verdict(name, 1.0, 0.5, 0.4, 0.6, verdict, reason).to_json() for name, verdict in zip(names, found, strict=False)]
    verdict = next((worst for worst in ("over", "could not tell") if worst in found), "within")
    return {"package": package, "verdict": verdict, "limits": limits, **more}


EVIDENCE = {
    "date": "2026-11-26T11:00:45Z",
    "workload": "generate:64+32",
    "package_digest": "ab" * 32,
    "budget": {"name": "low"},
    "budget_from": "manifest",
    "device": {"name": "pi", "cpu": "aarch64", "threads": 4},
    "runtime": "onnxruntime 1.32.0",
    "protocol": "p",
    "meter": {"value": None, "reason": "no RAPL"},
    "state": {"before": {"load": {"value": 0.5}}, "after": {"load": {"value": None, "reason": "not told"}}},
    "seconds": {"first_token_ms + latency_ms + peak_memory_bytes": 12.5, "energy_mj": 60.25},
    "command": "bittailor check packages/low",
}


def test_junit_has_a_case_per_limit_and_keeps_the_schema() -> None:
    root = ElementTree.fromstring(junit(_report("within", "over", "within", "could not tell", evidence=EVIDENCE)))
    _keeps_the_schema(root)
    (suite,) = root
    totals = {"name": "bittailor check low", "tests": "4", "failures": "1", "errors": "1", "time": "72.750"}
    assert root.attrib == totals
    assert suite.attrib == {**totals, "skipped": "0", "timestamp": "2026-11-26T11:00:45"}
    cases = suite.findall("testcase")
    assert [[child.tag for child in case] for case in cases] == [["system-out"], ["failure"], ["system-out"], ["error"]]
    assert [case.get("time") for case in cases] == ["12.500", "0.000", "0.000", "60.250"], "the sum is what it took"
    properties = {one.get("name"): one.get("value") for one in suite.iter("property")}
    assert properties["package"] == "ab" * 32
    assert properties["device"] == "pi · aarch64 · 4 threads"
    assert (properties["load before"], properties["load after"]) == ("0.5", "none: not told")
    assert "measured 0.5 [0.4, 0.6], limit 1" in cases[1][0].attrib["message"]


def test_junit_holds_any_text_and_a_report_without_evidence() -> None:
    text = junit(_report("could not tell", reason='no <meter> & "\0\x1b', package="x/pocket <low> & \ud800co"))
    root = ElementTree.fromstring(text)
    _keeps_the_schema(root)
    assert root[0].get("name") == "bittailor check pocket <low> & \ufffdco"
    assert 'no <meter> & "\ufffd\ufffd' in root.find(".//error").attrib["message"]  # type: ignore[union-attr]


@pytest.mark.parametrize("verdict", ["within", "over", "could not tell"])
def test_markdown_shows_the_verdict_and_every_limit(verdict: str) -> None:
    text = markdown(_report("within", verdict, evidence=EVIDENCE))
    assert text.splitlines()[0].endswith(verdict)
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    assert [row[6].strip() for row in rows] == ["verdict", "within", verdict]
    assert "- meter: none: no RAPL\n" in text


def test_markdown_does_not_let_a_name_in_that_writes_markdown() -> None:
    text = markdown(_report("over", reason="<img src=x> a|b\n# head [l](u)", package="x/`<b>*p*"))
    assert "<img" not in text
    assert "<b>" not in text
    assert "\n# head" not in text
    assert "\\[l\\](u)" in text
    assert "a\\|b" in text
    assert "check \\`&lt;b&gt;\\*p\\*:" in text


def test_a_summary_is_added_to_what_is_there(tmp_path: Any) -> None:
    append(tmp_path / "new" / "summary.md", "one\n")
    append(tmp_path / "new" / "summary.md", "two\n")
    assert (tmp_path / "new" / "summary.md").read_text() == "one\ntwo\n"
