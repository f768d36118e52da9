"""The report's page in headless Chromium, as a person meets it: at two widths, in light and dark, with the keyboard alone.

Screenshots stay in pytest's temporary folder (`--basetemp`), to be looked at. Skipped where there is no Chromium or no playwright.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from report_fleet import HOSTILE, NAMES, Fleet, few_points  # noqa: F401 - a fixture that every test here uses

from toolchain.cli import main

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
_CONTRAST = """() => {
  const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const drawn = element.tagName === 'text';
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    const box = element.getBoundingClientRect();
    if (!own || box.width < 2 || element.closest('.hidden, .skip, script, desc, title')) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(drawn ? style.fill : style.color)), light(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""
_OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('figure svg')) {
    const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    const whole = svg.closest('figure').getBoundingClientRect();
    texts.forEach(([one, a], index) => {
      if (a.left < whole.left || a.right > whole.right) found.push([one, 'leaves its card']);
      for (const [other, b] of texts.slice(index + 1)) {
        const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (width > 1 && height > 4) found.push([one, other]);
      }
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything measured; nothing measured; names that are markup and long, and every verdict."""
    folder = tmp_path_factory.mktemp("pages")
    full, bare, odd = (folder / f"{name}.html" for name in ("full", "bare", "odd"))
    assert main(["report", *map(str, fleet.words(*NAMES)), "--out", str(full)]) == 0
    assert main(["report", *map(str, fleet.words(*NAMES, reports=False)), "--out", str(bare)]) == 0
    words: list[Any] = []
    files: list[Any] = []
    for index, (name, verdict) in enumerate(zip(NAMES, ("over", "within", "could not tell"), strict=True)):
        package = folder / (HOSTILE, "a-rather-long-name-" * 5, "日本語の名前")[index]
        shutil.copytree(fleet.folder / name, package)
        checked = json.loads((fleet.folder / "reports" / f"{name}.check.json").read_text())
        limits = [{**limit, "verdict": verdict, "reason": "because " * 30} for limit in checked["limits"]]
        scored = json.loads((fleet.folder / "reports" / f"{name}.evaluate.json").read_text())
        said = {
            "check": {**checked, "package": str(package), "limits": limits, "verdict": verdict},
            "evaluate": {**scored, "what": str(package)},
        }
        for kind, data in said.items():
            files.append(folder / f"{index}.{kind}.json")
            files[-1].write_text(json.dumps(data))
        words.append(package)
    supernet = ["--supernet", fleet.folder / "supernet"]
    assert main(["report", *map(str, [*words, *supernet, "--measured", *files, "--out", odd])]) == 0
    return {"full": full, "bare": bare, "odd": odd}


@pytest.mark.parametrize("name", ["full", "bare", "odd"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_as_it_is_seen(browser: Any, pages: dict[str, Path], tmp_path: Path, name: str, width: int, scheme: str) -> None:
    """No console message, no request but the file's own, nothing wider than the window, text that stands out and does not overlap."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(_OVERLAPS) == []
    contrasts = page.evaluate(_CONTRAST)
    assert len(contrasts) > 100
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(244, 246, 248)"
    assert dark == (scheme == "dark")
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    context.close()


_REACHED = """() => {
  window.order = [...document.querySelectorAll('a[href], summary, [tabindex="0"]')];
  return window.order.filter(element => element.checkVisibility()).length;
}"""
_FOCUSED = """() => {
  const element = document.activeElement;
  return [window.order.indexOf(element), getComputedStyle(element).outlineStyle];
}"""


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(browser: Any, pages: dict[str, Path]) -> None:
    """Tab goes through the page in its order, first to a link past the contents; focus is seen; Enter opens numbers."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(pages["full"].as_uri())
    wanted = page.evaluate(_REACHED)
    seen: list[int] = []
    for _ in range(wanted):
        page.keyboard.press("Tab")
        place, outline = page.evaluate(_FOCUSED)
        seen.append(place)
        assert outline == "solid"
    assert seen[0] == 0
    assert page.evaluate("window.order[0].textContent") == "Skip to the report"
    assert -1 not in seen
    assert seen == sorted(set(seen))
    page.evaluate("document.querySelector('summary').focus()")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open")
    page.close()


def test_the_page_says_all_of_it_to_a_screen_reader(browser: Any, pages: dict[str, Path]) -> None:
    """By Chromium's own accessibility tree: every drawing is an image with a name and a description."""
    page = browser.new_page()
    page.goto(pages["full"].as_uri())
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    images = [
        node for node in nodes if node.get("role", {}).get("value") in ("image", "img", "graphics-document") and not node["ignored"]
    ]
    drawn = page.evaluate("document.querySelectorAll('figure svg').length")
    named = [node for node in images if len(node.get("name", {}).get("value", "")) > 20]
    assert len(named) == drawn > 10
    page.close()
