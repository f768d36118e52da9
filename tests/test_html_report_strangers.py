"""`bittailor report` of what strangers wrote: shown and does nothing, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import Result, copied, listing
from report_fleet import HOSTILE, Fleet, few_points, gathered  # noqa: F401 - a fixture that every test here uses
from report_page import Page

from toolchain.commands.reporting import gather
from toolchain.errors import BittailorError
from toolchain.package.manifest import manifest_text

Cli = Callable[..., Result]
_PAGE = {"head", "title", "style", "script", "body", "header", "nav", "main", "section", "footer", "link", "meta", "html"}
_TEXT = {"h1", "h2", "h3", "h4", "p", "a", "b", "span", "small", "strong", "code", "ul", "li", "div", "details", "summary"}
_TABLE = {"table", "caption", "thead", "tbody", "tr", "th", "td"}
_DRAWING = {"figure", "figcaption", "svg", "desc", "g", "defs", "use", "text", "clippath", "path", "rect", "circle"}


def test_hostile_names_are_shown_and_do_nothing(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    """A package's folder, its manifest's texts, its units and a report's reasons, all with markup and formulas in them."""
    bad = "</script><script>alert(1)</script><!-- ]]> {{ 7*7 }} \u2028 $x^{"
    package = copied(fleet.folder / "low", tmp_path / HOSTILE)
    manifest = yaml.safe_load((package / "manifest.yaml").read_text())
    manifest["model"] |= {"source": bad, "architecture": bad}
    manifest |= {"chosen_by": bad, "device": "<b>x"}
    manifest["budget"]["name"] = bad
    manifest["predicted"]["energy_mj"]["reason"] = bad
    unit = next(iter(manifest["policy"]))  # the nodes are another's: those of a graph are held against the manifest
    for name in (f"layers.7.{bad}", bad):
        manifest["policy"][name], manifest["units"][name] = manifest["policy"][unit], manifest["units"][unit]
    (package / "manifest.yaml").write_bytes(manifest_text(manifest))
    checked = json.loads((fleet.folder / "reports" / "low.check.json").read_text())
    checked |= {"package": str(package), "device": "<b>x", "predicted": manifest["predicted"]}
    for limit in checked["limits"]:
        limit |= {"verdict": "could not tell", "reason": bad}
    checked["measured"]["energy_mj"]["reason"] = bad
    (tmp_path / "check.json").write_text(json.dumps(checked))
    scored = json.loads((fleet.folder / "reports" / "low.evaluate.json").read_text())
    (tmp_path / "evaluate.json").write_text(json.dumps({**scored, "what": str(package), "text": bad}))
    words = ["--measured", tmp_path / "check.json", tmp_path / "evaluate.json", "--out", tmp_path / "r.html", "--json"]
    result = cli("report", package, "--supernet", fleet.folder / "supernet", *words)
    assert result.code == 0, result.err
    page = Page((tmp_path / "r.html").read_text())
    assert page.data == result.json
    assert result.json["groups"][0]["packages"][0]["name"] == HOSTILE
    elements = page.root.all()
    assert len(page.root.all("script")) == 1
    assert {found.tag for found in elements} <= _PAGE | _TEXT | _TABLE | _DRAWING
    assert not [name for found in elements for name in found.attributes if name.startswith("on")]
    assert HOSTILE in {found.text for found in elements}
    assert "{{ 7*7 }}" in page.root.words


@pytest.mark.parametrize("name", ["NaN", "list", "verdict", "limit", "text", "binary", "deep", "other keys", "no file"])
def test_a_damaged_report_is_refused_in_one_line(fleet: Fleet, cli: Cli, tmp_path: Path, name: str) -> None:
    path = fleet.folder / "reports" / "low.check.json"
    good = json.loads(path.read_text())
    damaged: dict[str, Any] = {
        "NaN": path.read_text().replace('"spread": ', '"spread": NaN, "was": ', 1),
        "list": "[1, 2]",
        "verdict": json.dumps({**good, "verdict": "<b>fine</b>"}),
        "limit": json.dumps({**good, "limits": [{**good["limits"][0], "limit": "1"}]}),
        "text": json.dumps({**good, "package": 7}),
        "binary": b"\xff\xfe\x00",
        "deep": "[" * 100_000,
        "other keys": "{}",
    }
    file = tmp_path / "bad.json"
    if name in damaged:
        content = damaged[name]
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = cli("report", fleet.folder / "low", "--measured", file, "--out", tmp_path / "r.html").error
    assert str(file) in error
    assert not (tmp_path / "r.html").exists()


def test_a_report_of_something_else_is_refused(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "r.html"]
    low = fleet.folder / "reports" / "low.check.json"
    assert "which is none of them" in cli("report", fleet.folder / "high", "--measured", low, *out).error
    assert "expected each package once" in cli("report", fleet.folder / "low", fleet.folder / "low", *out).error
    assert "expected one check report of each package" in cli("report", fleet.folder / "low", "--measured", low, low, *out).error
    # Another package that happens to be called low: its manifest predicts something else.
    copied(fleet.folder / "high", tmp_path / "low")
    assert "got one of another package" in cli("report", tmp_path / "low", "--measured", low, *out).error
    moved = json.loads(low.read_text()) | {"device": "hardware/phone.yaml"}
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    assert "got one on 'phone'" in cli("report", fleet.folder / "low", "--measured", tmp_path / "moved.json", *out).error
    assert listing(tmp_path) - listing(tmp_path / "low") >= {"moved.json"}
    assert not (tmp_path / "r.html").exists()


def test_a_hostile_manifest_is_refused_in_one_line(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    good = yaml.safe_load((fleet.folder / "low" / "manifest.yaml").read_text())
    package = copied(fleet.folder / "low", tmp_path / "low")
    unit = next(iter(good["policy"]))
    latency = good["predicted"]["latency_ms"]
    for change, words in [
        ({"mean_bits": float("nan")}, "expected finite numbers"),
        ({"mean_bits": "many"}, "expected a finite number as mean_bits"),
        ({"predicted": {**good["predicted"], "latency_ms": {**latency, "value": "much"}}}, "predicted latency_ms"),
        ({"policy": {**good["policy"], unit: "w5g32"}}, "'w5g32'"),
        ({"device": ["local"]}, "expected text as device"),
        ({"device": "../../../etc"}, ""),
    ]:
        (package / "manifest.yaml").write_bytes(manifest_text({**good, **change}))
        words_of_it = (package, "--supernet", fleet.folder / "supernet")
        if words:
            assert words in cli("report", *words_of_it, "--out", tmp_path / "r.html").error
        else:
            assert "expected a path inside" in gathered(*words_of_it)["front"]["reason"]


_WEIRD = (None, True, 5, -1.5, float("nan"), "x", "", [], {}, [{}], {"x": []})


def _changed(data: Any) -> Iterator[Any]:
    """The data with each of its values, one at a time, replaced by what nobody expects there, or left out."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        for weird in _WEIRD:
            yield {**data, key: weird} if isinstance(data, dict) else [*data[:key], weird, *data[key + 1 :]]
        if isinstance(data, dict):
            yield {name: other for name, other in data.items() if name != key}
        if isinstance(value, dict | list):
            for inner in _changed(value):
                yield {**data, key: inner} if isinstance(data, dict) else [*data[:key], inner, *data[key + 1 :]]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["manifest", "check", "evaluate"])
def test_whatever_a_file_says_it_is_shown_or_refused_in_one_line(fleet: Fleet, tmp_path: Path, what: str) -> None:
    package = copied(fleet.folder / "low", tmp_path / "low")
    file = package / "manifest.yaml" if what == "manifest" else tmp_path / "said.json"
    good = yaml.safe_load((file if what == "manifest" else fleet.folder / "reports" / f"low.{what}.json").read_text())
    rest: dict[str, dict[str, Any]] = {}
    if what == "manifest":  # changing one of its many units is like changing another; all must be there
        for part in ("policy", "units", "files"):
            kept = ("model.onnx", "tokenizer.json") if part == "files" else list(good["policy"])[:2]
            rest[part] = {name: value for name, value in good[part].items() if name not in kept}
            good[part] = {name: good[part][name] for name in kept}

    def whole(changed: dict[str, Any]) -> dict[str, Any]:
        return {key: {**rest.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changed.items()}

    from toolchain.report.page import page

    shown, refused = 0, []
    for changed in _changed(good):
        file.write_bytes(manifest_text(whole(changed)) if what == "manifest" else json.dumps(changed).encode())
        try:
            data = gather([package], [] if what == "manifest" else [file], None, None)
        except BittailorError as error:
            refused.append(str(error))
            continue
        shown += 1
        if shown % 50 == 1:  # drawing takes longer
            assert Page(page(data)).data == json.loads(json.dumps(data, allow_nan=False))
    assert shown > 5
    assert len(refused) > 50
    assert not [line for line in refused if "\n" in line]


def test_another_models_supernet_is_refused(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    other = copied(fleet.folder / "supernet", tmp_path / "other")
    graph = json.loads((other / "graph" / "graph.json").read_text())
    (other / "graph" / "graph.json").write_text(json.dumps({**graph, "fingerprint": "0" * 64}))
    error = cli("report", fleet.folder / "low", "--supernet", other, "--out", tmp_path / "r.html").error
    assert "expected the supernet that the packages were cut from" in error
    assert "expected a supernet" in cli("report", fleet.folder / "low", "--supernet", tmp_path, "--out", tmp_path / "r.html").error


def test_svg_of_any_text_is_well_formed() -> None:
    from toolchain.report.drawing import Labelled, drawing, finished, label_points, shorten

    with drawing(200, (20, 20, 20, 20)) as (figure, axes):
        axes.plot([0, 1], [0, 1], gid="/a/0")
        label_points(axes, [Labelled(0.5, 0.5, shorten(HOSTILE + "\x00\x08\ud800", 200), 0.4, 0.6)])
        svg = ElementTree.fromstring(finished(figure, "k", HOSTILE, HOSTILE))
    assert [element.get("data-json") for element in svg.iter() if element.get("data-json")] == ["/a/0"]
    assert "onerror" in "".join(svg.itertext())
