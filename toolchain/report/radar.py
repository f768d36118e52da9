"""The radar of the third source (arXiv:2411.06084, figure 2): accuracy retention, size reduction, latency; the outer edge is better."""

from __future__ import annotations

import math

from markupsafe import Markup

from toolchain.report.comparison import AXES
from toolchain.report.drawing import GRID, INK, MEASURED, MUTED, PREDICTED, SURFACE, drawing, finished
from toolchain.report.view import Cell, Figure, View

_NAMES = {"accuracy_retention": "accuracy retention", "size_reduction": "size reduction", "latency_reduction": "latency reduction"}
_ANGLES = {"accuracy_retention": 90.0, "size_reduction": 210.0, "latency_reduction": 330.0}
_RINGS = (0.25, 0.5, 0.75, 1.0)


def radar(package: View, key: str) -> Figure:
    """Three axes from 0 in the middle to 1, or as far as a value reaches. An axis without a value has no corner, and says so."""
    title = f"{package['name']} against full precision"
    columns = ("axis", "value", "basis", "why")
    shown = [package.at("radar", axis) for axis in AXES]
    rows = [
        [Cell(_NAMES[axis]), view.cell("value", factor=100), view.cell("basis"), view.cell("reason")]
        for axis, view in zip(AXES, shown, strict=True)
    ]
    rows = [[row[0], row[1], row[2], row[3]] for row in rows]
    said = [
        f"{row[0].text} {row[1].text}%, {row[2].text}" if not row[1].missing else f"{row[0].text} missing: {view['reason']}"
        for row, view in zip(rows, shown, strict=True)
    ]
    alternative = f"{'. '.join(said)}."
    columns = ("axis", "value, %", "basis", "why missing")
    if package["full_precision"]:
        return Figure(key, title, Markup(), "", columns, rows, reason="it is the full precision that the others are compared with")
    if all(view["value"] is None for view in shown):
        return Figure(key, title, Markup(), "", columns, rows, reason=shown[0]["reason"])
    edge = max([1.0, *(view["value"] for view in shown if view["value"] is not None)])
    with drawing(256, (6, 6, 6, 6)) as (figure, axes):
        axes.set_aspect("equal")
        axes.axis("off")
        for ring in _RINGS:
            axes.plot(
                *zip(*[_at(axis, ring) for axis in (*AXES, AXES[0])], strict=True),
                color=MUTED if ring == 1 else GRID,
                linewidth=1,
                zorder=1,
            )
        for axis in AXES:
            axes.plot(*zip((0, 0), _at(axis, edge), strict=True), color=GRID, linewidth=1, zorder=1)
        corners = [
            _at(axis, max(0.0, view["value"])) if view["value"] is not None else None
            for axis, view in zip(AXES, shown, strict=True)
        ]
        present = [corner for corner in corners if corner is not None]
        if len(present) == len(AXES):
            axes.fill(*zip(*present, strict=True), facecolor=MEASURED, alpha=0.18, zorder=2)
        for first, second in zip(corners, [*corners[1:], corners[0]], strict=True):
            if first is not None and second is not None:
                axes.plot(*zip(first, second, strict=True), color=INK, linewidth=1.6, zorder=3)
        for view, corner in zip(shown, corners, strict=True):
            if corner is not None:
                observed = view["basis"] != "predicted"
                look = (
                    {"marker": "s", "color": MEASURED}
                    if observed
                    else {"marker": "o", "markerfacecolor": SURFACE, "markeredgecolor": PREDICTED, "markeredgewidth": 2}
                )
                axes.plot([corner[0]], [corner[1]], markersize=8, zorder=4, gid=view.pointer("value"), linestyle="none", **look)
        for axis, row in zip(AXES, rows, strict=True):
            x, y = _at(axis, edge)
            value = f"{row[1].text}%" if not row[1].missing else "missing"
            if axis == "accuracy_retention":
                axes.text(x, y + 0.29, row[0].text, ha="center", va="bottom", fontsize=11)
                axes.text(x, y + 0.09, value, ha="center", va="bottom", fontsize=11, fontweight="bold")
            else:
                axes.text(x, y - 0.10, row[0].text, ha="center", va="top", fontsize=11)
                axes.text(x, y - 0.30, value, ha="center", va="top", fontsize=11, fontweight="bold")
        axes.set_xlim(-1.35 * edge, 1.35 * edge)
        axes.set_ylim(-1.05 * edge, 1.5 * edge)
        svg = finished(figure, key, title, alternative)
    below = [_NAMES[axis] for axis, view in zip(AXES, shown, strict=True) if view["value"] is not None and view["value"] < 0]
    return Figure(
        key,
        title,
        svg,
        alternative,
        columns,
        rows,
        f"Worse than full precision, drawn in the middle: {', '.join(below)}." if below else "",
    )


def _at(axis: str, radius: float) -> tuple[float, float]:
    angle = math.radians(_ANGLES[axis])
    return radius * math.cos(angle), radius * math.sin(angle)
