"""`bittailor report`: what the page shows is what its JSON says, what is missing is said, and nothing from a stranger does anything.

The packages are cut by the command from a supernet that was rounded, not trained; its sensitivities and the cost table are made up.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import Result, copied, listing
from fast_host import FastHost
from small_tables import complete_table

import toolchain.commands
from toolchain.cli import _parser, main
from toolchain.commands import foresight
from toolchain.commands.reporting import gather
from toolchain.errors import BittailorError
from toolchain.graph.assemble import round_to_nearest
from toolchain.graph.build import build
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, candidates
from toolchain.package.manifest import manifest_text, open_package
from toolchain.package.seal import write_seal
from toolchain.profiler.ask import Host
from toolchain.report import MISSING, number
from toolchain.supernet import store

Cli = Callable[..., Result]
NAMES = ("fp32", "low", "high")


@dataclass(frozen=True)
class Fleet:
    """A folder with supernet/, profiles/ and four packages, and reports/ with a check and an evaluation of each."""

    folder: Path

    def words(self, *names: str, reports: bool = True) -> list[Any]:
        """Arguments of the command for these packages."""
        files = [self.folder / "reports" / f"{name}.{kind}.json" for name in names for kind in ("check", "evaluate")]
        return [*(self.folder / name for name in names), *(["--measured", *files] if reports else [])]


pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module", autouse=True)
def few_points() -> Iterator[None]:
    """A solved programme takes a twentieth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foresight, "POINTS", 8)
        yield


@pytest.fixture(scope="module")
def fleet(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    folder = tmp_path_factory.mktemp("fleet")
    speaking = copied(models("llama", vocab_size=4096), folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(toolchain.__file__).parent / "models" / "pocket-llama-6m" / name, speaking)
    (folder / "supernet" / "graph").mkdir(parents=True)
    graph = build(str(speaking), folder / "supernet" / "graph")
    complete_table(graph).save(folder / "profiles" / "local" / "table.jsonl")
    _rounded_supernet(graph, folder / "supernet")
    for name in NAMES:
        wanted = ["--policy", "fp32"] if name == "fp32" else ["--budget", name]
        _done(["export", folder / "supernet", *wanted, "--profiles", folder / "profiles", "--out", folder / name])
    (folder / "reports").mkdir()
    (folder / "text.txt").write_text("the old man went down to the sea and said nothing. " * 30)
    with pytest.MonkeyPatch.context() as patch:
        made = FastHost()
        patch.setattr(Host, "time", lambda self, *words: made.time(self, *words))
        patch.setattr(Host, "peak", lambda self, subject: made.peak(self, subject))
        checked = _done(["check", folder / "low"])
    scored = _done(["evaluate", folder / "low", "--text", folder / "text.txt", "--window", 32])
    for index, name in enumerate(NAMES):
        check, evaluate = _as_if(checked, scored, folder / name, 1 - 0.13 * index)
        (folder / "reports" / f"{name}.check.json").write_text(json.dumps(check))
        (folder / "reports" / f"{name}.evaluate.json").write_text(json.dumps(evaluate))
    return Fleet(folder)


def _rounded_supernet(graph: Graph, folder: Path) -> None:
    """What `train` writes and `export` reads, without training: codes rounded to nearest, losses by the bits."""
    import torch

    from toolchain.policy.meta_network import MetaNetwork

    torch.manual_seed(0)
    kernels = {
        unit.name: candidates(unit, [name for name in CATALOGUE if "+" not in name and "16" not in name]) for unit in graph.units
    }
    weights = round_to_nearest(graph)
    for kernel in (CATALOGUE[name] for name in dict.fromkeys(name for names in kernels.values() for name in names)):
        if kernel.quantised:
            offered = [unit for unit in graph.units if kernel.name in kernels[unit.name]]
            store.write_quantised(folder, kernel, {unit.name: weights(unit, kernel) for unit in offered})
    MetaNetwork(kernels).save(folder / "meta_network.safetensors")
    losses = {
        unit: {name: 0.0 if name == "fp32" else (1 + index) * 2.0 ** -CATALOGUE[name].weight_bits for name in names}
        for index, (unit, names) in enumerate(kernels.items())
    }
    training = {"text": "none", "steps": 0, "workload": "generate:64+32"}
    described = {"source": graph.source, "kernels": {unit: list(names) for unit, names in kernels.items()}, "sensitivity": losses}
    store.write_description(folder, {**described, "rank": 1, "alpha": 1.0, "adapters": "own", "training": training})


def _done(words: list[Any]) -> dict[str, Any]:
    """Run a command that must not refuse; its JSON."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*map(str, words), "--json"]) != 2
    return json.loads(out.getvalue())


def _as_if(checked: dict[str, Any], scored: dict[str, Any], package: Path, factor: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What check and evaluate said of one package, as if they had said it of another that takes so many times as long and reads better."""
    manifest = yaml.safe_load((package / "manifest.yaml").read_text())
    measured = {"latency_ms": 1.0 * factor, "peak_memory_bytes": 1e6 / factor}
    limits = []
    for limit in checked["limits"]:
        value = measured[limit["name"]]
        numbers = {"limit": manifest["budget"][limit["name"]], "measured": value, "low": 0.97 * value, "high": 1.04 * value}
        limits.append({**limit, **numbers})
    seen = {name: {**checked["measured"][name], "value": value} for name, value in measured.items()}
    said = {**checked, "package": str(package), "limits": limits, "predicted": manifest["predicted"]}
    said["measured"] = {**checked["measured"], **seen}
    return said, {**scored, "what": str(package), "perplexity": scored["perplexity"] / (2 - factor)}


def _gathered(*words: Any) -> dict[str, Any]:
    """What the command would show, without the drawing."""
    parsed = _parser().parse_args([str(word) for word in ("report", *words, "--out", "unused")])
    supernet = Path(parsed.supernet) if parsed.supernet else None
    data = gather([Path(name) for name in parsed.packages], [Path(name) for name in parsed.measured], supernet, parsed.profiles)
    assert Counter(map(type, data.values())) == Counter([str, str, list])
    return data["groups"][0]


# ---- reading the page back


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str = "") -> list[Element]:
        return [found for child in self.children for found in ([child] if tag in ("", child.tag) else []) + child.all(tag)]

    @property
    def words(self) -> str:
        return " ".join((self.text + " " + " ".join(child.words for child in self.children)).split())


class Page(HTMLParser):
    """A page as a tree; fails on a tag that is closed and not open, or left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root], f"left open: {[element.tag for element in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "link", "br", "img", "hr", "input"):
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(next(found for found in self.root.all("script") if found.attributes.get("id") == "report-data").text)


def _at(data: Any, pointer: str) -> Any:
    """RFC 6901, written again: the page's own reader could be wrong in the same way twice."""
    for step in pointer.split("/")[1:]:
        data = data[int(step)] if isinstance(data, list) else data[step.replace("~1", "/").replace("~0", "~")]
    return data


@pytest.fixture(scope="module")
def shown(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any], str]:
    """(the page of all four packages, what --json said, the page's text)."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    said = _done(["report", *fleet.words(*NAMES), "--out", out])
    text = out.read_text()
    return Page(text), said, text


# ---- what is shown


def test_the_page_holds_the_json_that_the_command_prints(shown) -> None:
    page, said, _ = shown
    assert page.data == said
    assert [entry["name"] for entry in said["groups"][0]["packages"]] == list(NAMES)
    assert all(len(said["groups"][0]["front"]["resources"][name]["points"]) > 3 for name in ("latency_ms", "peak_memory_bytes"))


def test_every_number_in_a_table_is_the_jsons(shown) -> None:
    page, said, _ = shown
    cells = [found for found in page.root.all() if "data-json" in found.attributes and found.tag in ("td", "th")]
    assert len(cells) > 200
    for cell in cells:
        value = _at(said, cell.attributes["data-json"])
        if value is None or value == "":
            expected = MISSING
        elif isinstance(value, str):
            expected = " ".join(value.split())
        else:
            expected = number(value * float(cell.attributes["data-factor"]))
        assert cell.words == expected, cell.attributes


@pytest.mark.parametrize(("resource", "factor"), [("latency_ms", 1.0), ("peak_memory_bytes", 1e-6)])
def test_every_mark_of_a_front_lies_where_the_json_says(shown, resource: str, factor: float) -> None:
    """Marks of one drawing have pixels that are one straight line of their values, and of the numbers along the axes."""
    page, said, _ = shown
    figures = {found.attributes["id"]: found for found in page.root.all("figure")}
    group = said["groups"][0]
    front = _marks(figures[f"g0-{resource}-p"])
    predicted = [
        (mark, (value["cost"], value["loss"]))
        if "cost" in value
        else (mark, (value["predicted"][resource]["value"], value["predicted_loss"]["value"]))
        for pointer, mark in front.items()
        for value in [_at(said, pointer)]
    ]
    points = group["front"]["resources"][resource]["points"]
    assert sum("packages" in pointer for pointer in front) == len(NAMES)
    assert len(predicted) > len(points) / 2  # what lies outside is not drawn
    across, up = _ticks(figures[f"g0-{resource}-p"])
    _on_a_line([*across, *((mark[0], x * factor) for mark, (x, _) in predicted)])
    _on_a_line([(mark[1], y) for mark, (_, y) in predicted])
    assert _rate(up) == pytest.approx(_rate([(mark[1], y) for mark, (_, y) in predicted]), rel=1e-3)
    for entry in group["packages"]:  # none below the front as it is drawn
        cost = entry["predicted"][resource]["value"] * (1 + 1e-9)
        assert min(point["loss"] for point in points if point["cost"] <= cost) <= entry["predicted_loss"]["value"] + 1e-9
    seen = [(mark, _at(said, pointer)) for pointer, mark in _marks(figures[f"g0-{resource}-m"]).items()]
    assert len(seen) == len(NAMES)
    across, up = _ticks(figures[f"g0-{resource}-m"])
    _on_a_line([*across, *((mark[0], value["measured"][resource]["value"] * factor) for mark, value in seen)])
    _on_a_line([(mark[1], value["quality"]["value"]) for mark, value in seen])
    assert _rate(up) == pytest.approx(_rate([(mark[1], value["quality"]["value"]) for mark, value in seen]), rel=1e-3)


def test_every_bar_is_as_long_as_the_json_says(shown) -> None:
    """Measured over its limit, with the prediction's mark beside it; what kinds of units cost, their sum, the measured whole."""
    page, said, _ = shown
    figures = {found.attributes["id"]: found for found in page.root.all("figure")}
    for index, entry in enumerate(said["groups"][0]["packages"]):
        budget = figures[f"g0-{index}-budget"]
        bars, (start, end) = _bars(budget), [x for x, _ in _ends(budget)]
        assert len(bars) == len(entry["limits"])
        shares = [_at(said, pointer) / _at(said, pointer.replace("measured", "limit")) for pointer in bars]
        assert list(bars.values()) == pytest.approx([share * (end - start) for share in shares], rel=2e-3)
        limits = {limit["name"]: limit["limit"] for limit in entry["limits"]}
        marks = _marks(budget)
        assert len(marks) == len(limits)
        for pointer, (x, _) in marks.items():
            name = pointer.split("/")[-2]
            assert x == pytest.approx(start + (end - start) * _at(said, pointer) / limits[name], abs=0.5)
        for resource in ("latency_ms", "peak_memory_bytes"):
            bars = _bars(figures[f"g0-{index}-{resource}"])
            rates = [width / _at(said, pointer) for pointer, width in bars.items() if width > 1]
            assert len(bars) > 3
            assert rates == pytest.approx([rates[0]] * len(rates), rel=1e-2)  # pixels have two decimals


def test_every_corner_of_a_radar_lies_where_the_json_says(shown) -> None:
    """Axes at 90, 210 and 330 degrees from one middle, all of one scale; what is below 0 is drawn in the middle."""
    page, said, _ = shown
    figures = {found.attributes["id"]: found for found in page.root.all("figure")}
    drawn = 0
    for index, name in enumerate(NAMES):
        marks = _marks(figures[f"g0-{index}-radar"])
        corners = {pointer.split("/")[-2]: (mark, max(0.0, _at(said, pointer))) for pointer, mark in marks.items()}
        assert bool(corners) == (name != "fp32")
        if len(corners) < 3:
            continue
        (x, y), up = corners["accuracy_retention"]
        (left, low), down = corners["size_reduction"]
        scale = (x - left) / (down * math.cos(math.radians(30)))
        (right, other), across = corners["latency_reduction"]
        assert right - x == pytest.approx(scale * across * math.cos(math.radians(30)), abs=0.5)
        assert low - y == pytest.approx(scale * (up + down / 2), abs=0.5)
        assert other - y == pytest.approx(scale * (up + across / 2), abs=0.5)
        drawn += 1
    assert drawn == len(NAMES) - 1


def _ticks(figure: Element) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(pixel, value) of the numbers along x and along y; the latter's pixels are their letters' feet, all as far below their tick."""
    texts = [found for found in figure.all("text") if re.fullmatch(r"[\d.]+", found.words)]
    along = {
        axis: [(float(text.attributes[axis]), float(text.words)) for text in texts if anchor in text.attributes["style"]]
        for axis, anchor in (("x", "middle"), ("y", "end"))
    }
    return along["x"], along["y"]


def _marks(figure: Element) -> dict[str, tuple[float, float]]:
    """JSON Pointer → (x, y) in pixels of what has one."""
    return {
        group.attributes["data-json"]: (float(use.attributes["x"]), float(use.attributes["y"]))
        for group in figure.all("g")
        if "data-json" in group.attributes
        for use in group.all("use")[:1]
    }


def _bars(figure: Element) -> dict[str, float]:
    """JSON Pointer → width in pixels of what is a bar."""
    found = {}
    for group in figure.all("g"):
        paths = [path for path in group.all("path") if "d" in path.attributes]
        if "data-json" in group.attributes and not group.all("use") and paths:
            xs = [float(x) for x in re.findall(r"[ML] ([\d.-]+) ", paths[0].attributes["d"])]
            found[group.attributes["data-json"]] = max(xs) - min(xs)
    return found


def _ends(figure: Element) -> list[tuple[float, str]]:
    """The pixels where a budget's scale says 0 and limit."""
    return [(float(text.attributes["x"]), text.words) for text in figure.all("text") if text.words in ("0", "limit")]


def _rate(points: list[tuple[float, float]]) -> float:
    """Pixels per unit between the outermost."""
    (p0, v0), (p1, v1) = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    return (p1 - p0) / (v1 - v0)


def _on_a_line(points: list[tuple[float, float]]) -> None:
    (p0, v0), (p1, v1) = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    assert abs(p1 - p0) > 20
    for pixel, value in points:
        assert pixel == pytest.approx(p0 + (p1 - p0) * (value - v0) / (v1 - v0), abs=0.05)


def test_the_heat_map_says_the_kernel_of_every_unit(shown, fleet: Fleet) -> None:
    page, _, _ = shown
    for index, name in enumerate(NAMES):
        policy = yaml.safe_load((fleet.folder / name / "manifest.yaml").read_text())["policy"]
        section = next(found for found in page.root.all("section") if found.attributes.get("id") == f"g0-{index}")
        layers, outside = (found for found in section.all("table") if found.attributes.get("class") == "heat")
        kinds = [found.words for found in layers.all("thead")[0].all("th")][1:]
        read = {
            f"layers.{row.all('th')[0].words}.{kind}": cell.words
            for row in layers.all("tbody")[0].all("tr")
            for kind, cell in zip(kinds, row.all("td"), strict=True)
        }
        read |= {head.words: cell.words for head, cell in zip(outside.all("th"), outside.all("td"), strict=True)}
        assert read == {unit: f"{CATALOGUE[kernel].weight_bits} {kernel}" for unit, kernel in policy.items()}


def test_the_parts_of_a_cost_sum_to_the_prediction(shown) -> None:
    _, said, _ = shown
    for entry in said["groups"][0]["packages"]:
        for resource in ("latency_ms", "peak_memory_bytes"):
            parts = entry["breakdown"][resource]
            for list_ in (parts["parts"], parts["units"]):
                total = sum(part["value"] for part in list_) + parts["remainder"] + parts["shared"]
                assert total == pytest.approx(entry["predicted"][resource]["value"], rel=1e-9)


def test_the_page_can_be_read_without_seeing_it(shown) -> None:
    """Every drawing has a role, a name and a description that exist once; every figure has numbers or a reason; headings do not skip."""
    page, _, _ = shown
    elements = page.root.all()
    ids = Counter(found.attributes["id"] for found in elements if "id" in found.attributes)
    assert max(ids.values()) == 1
    for found in elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert all(ids[target] == 1 for target in found.attributes.get(name, "").split())
        if found.attributes.get("href", "").startswith("#"):
            assert ids[found.attributes["href"][1:]] == 1, found.attributes["href"]
    figures = page.root.all("figure")
    assert len(figures) == 4 + 4 * len(NAMES)
    for figure in figures:
        assert figure.all("figcaption")[0].words
        for drawn in figure.all("svg"):
            assert drawn.attributes["role"] == "img"
            assert all(drawn.all(tag)[0].words for tag in ("title", "desc"))
            assert figure.all("details")
        assert figure.all("svg") or "Not shown:" in figure.words
    levels = [int(found.tag[1]) for found in elements if re.fullmatch("h[1-6]", found.tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(found.attributes.get("aria-label") for found in elements if found.attributes.get("tabindex") == "0")


def test_the_page_needs_nothing_but_itself(shown) -> None:
    page, _, text = shown
    assert [found.attributes["type"] for found in page.root.all("script")] == ["application/json"]
    assert not [found for found in page.root.all() if found.tag in ("img", "iframe", "object", "embed")]
    assert {found.attributes["href"] for found in page.root.all("link")} == {"data:,"}
    outside = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<]*", text)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not outside
    assert "@import" not in text
    assert not re.search(r"#0000[0-9a-f]{2}\b", text)  # a colour that the page's style does not know


# ---- what is missing


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
    group = _gathered(*fleet.words("low"), "--profiles", tmp_path / "profiles")
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
        group = _gathered(package, "--supernet", fleet.folder / "supernet")
        assert group["packages"][0]["predicted_loss"]["value"] is None
        assert words in group["packages"][0]["predicted_loss"]["reason"]
        assert group["front"]["resources"]["latency_ms"]["points"]


def test_qualities_on_different_texts_are_not_compared(fleet: Fleet, tmp_path: Path) -> None:
    other = json.loads((fleet.folder / "reports" / "high.evaluate.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**other, "text": "poems.txt", "text_sha256": "0" * 64}))
    words = fleet.words("fp32", "low", "high")
    words[words.index(fleet.folder / "reports" / "high.evaluate.json")] = tmp_path / "other.json"
    entries = _gathered(*words)["packages"]
    assert [entry["quality"]["value"] is None for entry in entries] == [False, False, True]
    assert "poems.txt" in entries[2]["quality"]["reason"]
    assert not entries[2]["measured"]["latency_ms"]["on_the_front"]


def test_a_measurement_is_never_divided_by_a_prediction(fleet: Fleet) -> None:
    measured = _gathered(*fleet.words("fp32", "low"))["packages"][1]["radar"]["latency_reduction"]
    assert measured == {"value": pytest.approx(0.13), "basis": "measured", "reason": ""}
    group = _gathered(*fleet.words("low"))  # measured itself, full precision only predicted
    predicted = group["packages"][0]["predicted"]["latency_ms"]["value"]
    expected = 1 - predicted / group["reference"]["latency_predicted_ms"]
    assert group["packages"][0]["radar"]["latency_reduction"] == {"value": expected, "basis": "predicted", "reason": ""}


def test_a_measurement_that_is_not_valid_is_not_drawn(fleet: Fleet, tmp_path: Path) -> None:
    checked = json.loads((fleet.folder / "reports" / "low.check.json").read_text())
    checked["measured"]["latency_ms"] |= {"valid": False, "reason": "others used the CPU"}
    (tmp_path / "check.json").write_text(json.dumps(checked))
    scored = fleet.folder / "reports" / "low.evaluate.json"
    entry = _gathered(fleet.folder / "low", "--measured", tmp_path / "check.json", scored)["packages"][0]
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


# ---- strangers


_PAGE = {"head", "title", "style", "script", "body", "header", "nav", "main", "section", "footer", "link", "meta", "html"}
_TEXT = {"h1", "h2", "h3", "h4", "p", "a", "b", "span", "small", "strong", "code", "ul", "li", "div", "details", "summary"}
_TABLE = {"table", "caption", "thead", "tbody", "tr", "th", "td"}
_DRAWING = {"figure", "figcaption", "svg", "desc", "g", "defs", "use", "text", "clippath", "path", "rect", "circle"}
HOSTILE = "<img src=x onerror=alert(1)>'\"&$\\frac{1}{$</script>".replace("/", "∕")


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
            assert "expected a path inside" in _gathered(*words_of_it)["front"]["reason"]


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
    if what == "manifest":
        good["policy"] = dict(list(good["policy"].items())[:2])
        good["files"] = {name: good["files"][name] for name in ("model.onnx", "tokenizer.json")}
    from toolchain.report.page import page

    shown, refused = 0, []
    for changed in _changed(good):
        file.write_bytes(manifest_text(changed) if what == "manifest" else json.dumps(changed).encode())
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
    group = _gathered(*fleet.words("low"))
    assert "pip install 'bittailor[train]'" in group["front"]["reason"]
    assert group["packages"][0]["measured"]["latency_ms"]["value"] is not None


def test_svg_of_any_text_is_well_formed() -> None:
    from toolchain.report.drawing import Labelled, drawing, finished, label_points, shorten

    with drawing(200, (20, 20, 20, 20)) as (figure, axes):
        axes.plot([0, 1], [0, 1], gid="/a/0")
        label_points(axes, [Labelled(0.5, 0.5, shorten(HOSTILE + "\x00\x08\ud800", 200), 0.4, 0.6)])
        svg = ElementTree.fromstring(finished(figure, "k", HOSTILE, HOSTILE))
    assert [element.get("data-json") for element in svg.iter() if element.get("data-json")] == ["/a/0"]
    assert "onerror" in "".join(svg.itertext())
