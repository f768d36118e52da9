"""Figures as SVG that belongs into a page: matplotlib draws, we make it accessible and let the page's style colour it.

matplotlib rather than a JavaScript library: what it writes needs no script, scales with the page and is text where there is text.
Colours are drawn as stand-ins and written as CSS variables, so that the page's light and dark colours are the figures' too. Nothing of
pyplot: no state outside a figure.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

WIDTH = 330
"""Pixels: as wide as a phone shows it, so that text never shrinks below what is readable."""
INK, MUTED, GRID, SURFACE, MEASURED, PREDICTED, LIMIT, OVER = (f"#0000{code:02x}" for code in range(1, 9))
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface",
    MEASURED: "measured", PREDICTED: "predicted", LIMIT: "limit", OVER: "over",
}  # fmt: skip
_STYLE: Any = {  # its type would be each of matplotlib's 300 names
    "svg.fonttype": "none",
    "svg.hashsalt": "bittailor",  # the same report twice is the same bytes
    "text.parse_math": False,  # names are not formulas
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "figure.dpi": 72,  # a point is a pixel
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.solid_capstyle": "butt",
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_KEPT = frozenset({"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect"})
_COLOUR = re.compile("|".join(_VARIABLES))


@contextmanager
def _styled() -> Iterator[None]:
    """Our style; without its warnings that a name has letters which its own font lacks: the page is shown in the reader's fonts."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")
        yield


@contextmanager
def drawing(height: float, margins: tuple[float, float, float, float]) -> Iterator[tuple[Drawing, Axes]]:
    """A figure `WIDTH` wide and `height` high with one pair of axes; margins in pixels: left, right, bottom, top."""
    left, right, bottom, top = margins
    with _styled():
        figure = Drawing(figsize=(WIDTH / 72, height / 72), dpi=72)
        box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
        yield figure, figure.add_axes(box)


def interval(axes: Axes, low: float, high: float, y: float) -> None:
    """Whiskers that can be seen on a bar of any colour."""
    look: dict[str, Any] = {"linestyle": "-", "marker": "|", "markersize": 9}
    axes.plot([low, high], [y, y], color=SURFACE, linewidth=4, markeredgewidth=4, zorder=3.5, **look)
    axes.plot([low, high], [y, y], color=INK, linewidth=1.6, markeredgewidth=1.6, zorder=4, **look)


@dataclass(frozen=True)
class Labelled:
    """A point with its label, and the ends of the bar through it (both x where it has none)."""

    x: float
    y: float
    text: str
    low: float
    high: float


def label_points(axes: Axes, points: Sequence[Labelled]) -> None:
    """Write each label beside its point, where it meets neither another label, a point, a bar nor the edge; if there is such a place."""
    renderer = FigureCanvasAgg(axes.get_figure(root=True)).get_renderer()
    axes.autoscale_view()
    inside = axes.get_window_extent(renderer)
    taken = []
    for point in points:
        (x0, y0), (x1, _) = axes.transData.transform([(point.low, point.y), (point.high, point.y)])
        x, _ = axes.transData.transform((point.x, point.y))
        taken += [Bbox.from_extents(x - 5, y0 - 5, x + 5, y0 + 5), Bbox.from_extents(x0, y0 - 3, x1, y0 + 3)]
    for point in points:
        shown: Annotation | None = None
        ends = {"left": point.high, "right": point.low, "center": point.x}
        for dx, dy, across, along in _PLACES:
            if shown is not None:
                shown.remove()
            at = (ends[across] if dy == 0 else point.x, point.y)
            shown = axes.annotate(
                point.text, at, (dx, dy), textcoords="offset pixels", ha=across, va=along, fontsize=11, annotation_clip=False
            )
            box = shown.get_window_extent(renderer)
            free = not any(box.overlaps(other) for other in taken)
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 + 8 and inside.y0 <= box.y0 and box.y1 <= inside.y1 + 8:
                break
        assert shown is not None
        taken.append(shown.get_window_extent(renderer))


_PLACES = (
    (8, 0, "left", "center"),
    (0, 9, "center", "bottom"),
    (-8, 0, "right", "center"),
    (0, -9, "center", "top"),
    (7, 9, "left", "bottom"),
    (-7, 9, "right", "bottom"),
    (7, -9, "left", "top"),
    (-7, -9, "right", "top"),
    (0, 22, "center", "bottom"),
    (0, -22, "center", "top"),
)


def shorten(text: str, length: int) -> str:
    """`text` on one line, cut in the middle to at most `length` characters."""
    text = "".join(char if char.isprintable() else "·" for char in text)
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def finished(figure: Drawing, key: str, title: str, description: str) -> Markup:
    """The figure as an <svg> element with role, title and description; ids begin with `key`, marks with a gid have it as data-json."""
    written = io.StringIO()
    with _styled():
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(written.getvalue())
    _clean(root, key)
    width, height = (float(value) for value in root.get("viewBox", "0 0 1 1").split()[2:])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-description")
    root.set("style", f"aspect-ratio: {width:g} / {height:g}")
    for position, (name, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{name}", {"id": f"{key}-{'title' if name == 'title' else 'description'}"})
        element.text = text
        root.insert(position, element)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree has escaped every text


def _clean(root: ElementTree.Element, key: str) -> None:
    """Drop what is not drawing, colour by CSS variables, keep only ids that something refers to, and make them the page's own."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] not in _KEPT:
                parent.remove(child)
    for element in root.iter():
        name = element.attrib.pop("id", "")
        if name in used:
            element.set("id", f"{key}-{name}")
        elif name.startswith("/"):
            element.set("data-json", name)
        if style := element.get("style"):
            style = _COLOUR.sub(lambda found: f"var(--{_VARIABLES[found[0]]})", style)
            style = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", style)
            element.set("style", re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", style))
        for name in ("clip-path", f"{{{_XLINK}}}href"):
            if (value := element.get(name)) is not None:
                element.set(name, value.replace("#", f"#{key}-"))
