"""`bittailor report` where something is missing: not measured, not cut from the supernet, not to be compared, not installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import Result, copied, listing
from report_fleet import Fleet, few_points, gathered  # noqa: F401 - a fixture that every test here uses
from report_page import Page

import toolchain.commands
from toolchain.commands.reporting import gather
from toolchain.package.manifest import manifest_text, open_package
from toolchain.package.seal import write_seal
from toolchain.report import MISSING

Cli = Callable[..., Result]


def test_what_was_not_measured_is_missing_with_its_reason(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    pages = []
    for name in ("once.html", "again.html"):
        result = cli("report", *fleet.words("low", reports=False), "--out", tmp_path / name, "--json")
        assert result.code == 0
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1]
    assert listing(tmp_path) == {"once.html", "again.html"}
    page = Page(pages[0])
    low = result.json["groups"][0]["packages"][0]
    assert low["verdict"] == "not checked"
    assert low["measured"]["latency_ms"]["value"] is None
    assert low["quality"]["value"] is None
    assert low["radar"]["accuracy_retention"]["value"] is None
    assert low["radar"]["latency_reduction"]["basis"] == "predicted"
    words = page.root.words
    assert f"type: bittailor check {fleet.folder / 'low'} --json" in words
    assert "no evaluate report was given" in words
    assert "no energy meter was read" in words
    summary = next(found for found in page.root.all("table") if found.attributes.get("class") == "summary")
    row = dict(
        zip((head.words for head in summary.all("thead")[0].all("th")), summary.all("tbody")[0].all("tr")[0].children, strict=True)
    )
    assert {name for name, cell in row.items() if cell.words == MISSING} >= {
        "ms measured",
        "MB measured",
        "mJ predicted",
        "mJ measured",
    }
    assert row["ms predicted"].words != MISSING


def test_without_a_supernet_there_is_no_front_and_the_reason_is_said(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    copied(fleet.folder / "low", tmp_path / "low")
    result = cli("report", tmp_path / "low", "--out", tmp_path / "r.html")
    assert result.out.splitlines()[1:] == [
        "model on local, generate:64+32: no exact front: no supernet was given and none lies beside the packages;"
        " add --supernet DIR",
        "  low: not checked",
    ]
    page = Page((tmp_path / "r.html").read_text())
    front = page.data["groups"][0]["front"]
    assert front["resources"]["latency_ms"] == {"points": [], "reason": front["reason"]}
    assert page.data["groups"][0]["packages"][0]["breakdown"]["latency_ms"]["reason"] == front["reason"]
    assert "add --supernet DIR" in page.root.words


def test_a_front_of_another_table_is_not_shown_beside_the_packages(fleet: Fleet, tmp_path: Path) -> None:
    from toolchain.costs.table import open_table

    table = open_table(fleet.folder / "profiles" / "local" / "table.jsonl")
    header = replace(table.header, cpu="another")
    replace(table, header=header).save(tmp_path / "profiles" / "local" / "table.jsonl")
    group = gathered(*fleet.words("low"), "--profiles", tmp_path / "profiles")
    assert "is not the cost table that the packages were cut with" in group["front"]["reason"]
    assert group["packages"][0]["measured"]["latency_ms"]["value"] is not None


def test_a_package_that_was_not_cut_from_the_supernet_has_no_loss(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    package = copied(fleet.folder / "low", tmp_path / "low")
    manifest = yaml.safe_load((package / "manifest.yaml").read_text())
    for training, words in [
        ("none: round-to-nearest of the model's weights", "was not cut from this supernet"),
        ({**manifest["training"], "steps": 7}, "was not cut from this supernet"),
        ({**manifest["training"], "polish": {"steps": 40}}, "was polished"),
    ]:
        (package / "manifest.yaml").write_bytes(manifest_text({**manifest, "training": training}))
        group = gathered(package, "--supernet", fleet.folder / "supernet")
        assert group["packages"][0]["predicted_loss"]["value"] is None
        assert words in group["packages"][0]["predicted_loss"]["reason"]
        assert group["front"]["resources"]["latency_ms"]["points"]


def test_qualities_on_different_texts_are_not_compared(fleet: Fleet, tmp_path: Path) -> None:
    other = json.loads((fleet.folder / "reports" / "high.evaluate.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**other, "text": "poems.txt", "text_sha256": "0" * 64}))
    words = fleet.words("fp32", "low", "high")
    words[words.index(fleet.folder / "reports" / "high.evaluate.json")] = tmp_path / "other.json"
    entries = gathered(*words)["packages"]
    assert [entry["quality"]["value"] is None for entry in entries] == [False, False, True]
    assert "poems.txt" in entries[2]["quality"]["reason"]
    assert not entries[2]["measured"]["latency_ms"]["on_the_front"]


def test_a_measurement_is_never_divided_by_a_prediction(fleet: Fleet) -> None:
    measured = gathered(*fleet.words("fp32", "low"))["packages"][1]["radar"]["latency_reduction"]
    assert measured == {"value": pytest.approx(0.13), "basis": "measured", "reason": ""}
    group = gathered(*fleet.words("low"))  # measured itself, full precision only predicted
    predicted = group["packages"][0]["predicted"]["latency_ms"]["value"]
    expected = 1 - predicted / group["reference"]["latency_predicted_ms"]
    assert group["packages"][0]["radar"]["latency_reduction"] == {"value": expected, "basis": "predicted", "reason": ""}


def test_a_measurement_that_is_not_valid_is_not_drawn(fleet: Fleet, tmp_path: Path) -> None:
    checked = json.loads((fleet.folder / "reports" / "low.check.json").read_text())
    checked["measured"]["latency_ms"] |= {"valid": False, "reason": "others used the CPU"}
    (tmp_path / "check.json").write_text(json.dumps(checked))
    scored = fleet.folder / "reports" / "low.evaluate.json"
    entry = gathered(fleet.folder / "low", "--measured", tmp_path / "check.json", scored)["packages"][0]
    assert entry["measured"]["latency_ms"]["on_the_front"] is False
    assert entry["radar"]["latency_reduction"]["basis"] == "predicted"


def test_devices_are_not_compared_with_each_other(fleet: Fleet, tmp_path: Path) -> None:
    package = copied(fleet.folder / "high", tmp_path / "phone")
    manifest = yaml.safe_load((package / "manifest.yaml").read_text())
    (package / "manifest.yaml").write_bytes(manifest_text({**manifest, "device": "phone"}))
    groups = gather([fleet.folder / "low", package], [], None, str(fleet.folder / "profiles"))["groups"]
    assert [(group["device"], len(group["packages"])) for group in groups] == [("local", 1), ("phone", 1)]
    assert "no supernet was given" in groups[1]["front"]["reason"]


def test_a_sealed_check_is_shown_where_no_other_is_given(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    package = copied(fleet.folder / "low", tmp_path / "renamed")
    checked = json.loads((fleet.folder / "reports" / "low.check.json").read_text())
    checked["limits"] += [
        {
            "name": "fidelity",
            "limit": 0.9,
            "measured": 0.95,
            "low": 0.95,
            "high": 0.95,
            "verdict": "within",
            "reason": "a lower limit",
        },
        {
            "name": "latency_ms / baseline",
            "limit": 1.05,
            "measured": 1.01,
            "low": 0.99,
            "high": 1.03,
            "verdict": "within",
            "reason": "",
        },
    ]
    write_seal(open_package(package), checked)
    result = cli("report", package, "--out", tmp_path / "r.html", "--json")
    entry = result.json["groups"][0]["packages"][0]
    assert entry["measured"]["latency_ms"]["value"] == checked["measured"]["latency_ms"]["value"]
    assert [limit["name"] for limit in entry["limits"]][-2:] == ["fidelity", "latency_ms / baseline"]
    assert entry["bytes"] == sum(path.stat().st_size for path in (fleet.folder / "low").iterdir())
    words = Page((tmp_path / "r.html").read_text()).root.words
    assert "latency_ms / baseline" in words
    other = json.loads((fleet.folder / "reports" / "high.check.json").read_text())
    write_seal(open_package(package), other)
    again = cli("report", package, "--out", tmp_path / "r.html", "--json")
    assert "got one of another package" in again.err
    assert again.json["groups"][0]["packages"][0]["measured"]["latency_ms"]["value"] is None
    sealed = (package / "seal.json").read_text()
    (package / "seal.json").write_text(sealed.replace('"limit"', '"limits"', 1))
    assert "seal.json" in cli("report", package, "--out", tmp_path / "r.html").error  # what was changed is not drawn


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_without_the_extra_one_line_says_so(
    fleet: Fleet, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'bittailor[report]'" in cli("report", *fleet.words("low"), "--out", tmp_path / "r.html").error


def test_without_the_training_stack_the_page_lacks_its_front_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "toolchain.commands.foresight", raising=False)
    monkeypatch.delattr(toolchain.commands, "foresight", raising=False)
    monkeypatch.setitem(sys.modules, "toolchain.commands.choosing", None)  # which needs scipy
    group = gathered(*fleet.words("low"))
    assert "pip install 'bittailor[train]'" in group["front"]["reason"]
    assert group["packages"][0]["measured"]["latency_ms"]["value"] is not None
