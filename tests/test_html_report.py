"""`bittailor report`: what the page shows is what its JSON says, cell by cell and mark by mark, and it needs nothing but itself."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import yaml
from report_fleet import NAMES, Fleet, done, few_points  # noqa: F401 - a fixture that every test here uses
from report_page import Element, Page

from toolchain.kernels import CATALOGUE
from toolchain.report import MISSING, number


def _at(data: Any, pointer: str) -> Any:
    """RFC 6901, written again: the page's own reader could be wrong in the same way twice."""
    for step in pointer.split("/")[1:]:
        data = data[int(step)] if isinstance(data, list) else data[step.replace("~1", "/").replace("~0", "~")]
    return data


@pytest.fixture(scope="module")
def shown(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any], str]:
    """(the page of all three packages, what --json said, the page's text)."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    said = done(["report", *fleet.words(*NAMES), "--out", out])
    text = out.read_text()
    return Page(text), said, text


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
