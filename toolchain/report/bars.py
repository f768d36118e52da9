"""Bars: each limit against what was measured, and what each kind of unit is predicted to cost against the measured whole."""

from __future__ import annotations

from markupsafe import Markup

from toolchain.check import COULD_NOT_TELL, OVER, WITHIN
from toolchain.report.drawing import GRID, LIMIT, MEASURED, MUTED, PREDICTED, SURFACE, drawing, finished, interval, shorten
from toolchain.report.drawing import OVER as OVER_COLOUR
from toolchain.report.text import MISSING
from toolchain.report.view import QUANTITIES, Cell, Figure, View, quantity_of

SIGNS = {WITHIN: "✓", OVER: "✗", COULD_NOT_TELL: "?"}
"""Beside the word, so that no verdict is told by its colour."""
_ROW = 46
_BAR = 20


def budget(package: View, key: str) -> Figure:
    """Each limit as a line at 100%, with the measured value, its interval, and the prediction."""
    title = f"Budget of {package['name']}"
    columns = ("limit on", "unit", "limit", "predicted", "measured", "low", "high", "verdict", "why")
    limits = package.each("limits")
    if not limits:
        return Figure(key, title, Markup(), "", columns, reason="the package has no budget")
    rows, said = [], []
    for limit in limits:
        quantity = quantity_of(limit["name"])
        numbers = [limit.cell(name, factor=quantity.factor) for name in ("limit", "measured", "low", "high")]
        known = limit["name"] in package["predicted"]
        forecast = package.cell("predicted", limit["name"], "value", factor=quantity.factor) if known else Cell(MISSING)
        rows.append(
            [
                Cell(quantity.name),
                Cell(quantity.unit),
                numbers[0],
                forecast,
                *numbers[1:],
                limit.cell("verdict"),
                limit.cell("reason"),
            ]
        )
        said.append(f"{quantity.name}: {limit['verdict']}, measured {numbers[1].text} of {numbers[0].text} {quantity.unit}")
    widest = max([1.0, *(share for limit in limits for share in _shares(package, limit))])
    with drawing(_ROW * len(limits) + 34, (12, 12, 26, 8)) as (figure, axes):
        for place, limit in enumerate(limits):
            quantity, top = quantity_of(limit["name"]), -place
            text = (
                f"{limit.text('measured', factor=quantity.factor)} of {limit.text('limit', factor=quantity.factor)} {quantity.unit}"
            )
            verdict = f"{SIGNS.get(limit['verdict'], '–')} {limit['verdict']}"
            axes.text(0, top + 0.36, shorten(quantity.name, 22), ha="left", va="center", fontsize=11, fontweight="bold")
            axes.text(1.0 if widest < 1.15 else widest, top + 0.36, f"{text} · {verdict}", ha="right", va="center", fontsize=11)
            axes.barh(top - 0.08, 1.0, height=0.36, color=GRID, zorder=1)
            if limit["measured"] is not None:
                colour = OVER_COLOUR if limit["verdict"] == OVER else MEASURED
                axes.barh(
                    top - 0.08,
                    limit["measured"] / limit["limit"],
                    height=0.36,
                    color=colour,
                    zorder=2,
                    gid=limit.pointer("measured"),
                )
                if limit["low"] is not None and limit["high"] is not None and limit["high"] > limit["low"]:
                    interval(axes, limit["low"] / limit["limit"], limit["high"] / limit["limit"], top - 0.08)
            expected = _predicted(package, limit)
            if expected is not None:
                axes.plot(
                    [expected / limit["limit"]],
                    [top - 0.08],
                    "D",
                    markersize=7,
                    markerfacecolor=SURFACE,
                    markeredgecolor=PREDICTED,
                    markeredgewidth=2,
                    zorder=3,
                    gid=package.pointer("predicted", limit["name"], "value"),
                )
            axes.plot([1, 1], [top - 0.34, top + 0.18], color=LIMIT, linewidth=2.4, zorder=5)
        axes.set_xlim(0, max(1.01, widest * 1.02))
        axes.set_ylim(-len(limits) + 0.42, 0.62)
        axes.set_yticks([])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "limit"])
        axes.tick_params(length=0, pad=4)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        svg = finished(figure, key, title, f"{'. '.join(said)}.")
    return Figure(key, title, svg, f"{'. '.join(said)}.", columns, rows)


def _shares(package: View, limit: View) -> list[float]:
    values = (limit["measured"], limit["high"], _predicted(package, limit))
    return [value / limit["limit"] for value in values if value is not None]


def _predicted(package: View, limit: View) -> float | None:
    """What the package was predicted to take of what is limited; None where nothing predicts it."""
    return package["predicted"].get(limit["name"], {}).get("value")


def breakdown(package: View, resource: str, key: str) -> Figure:
    """A waterfall: what each kind of unit is predicted to add, their sum with its spread, and the measured whole below it."""
    quantity = QUANTITIES[resource]
    title = f"Where {quantity.name.lower()} goes: {package['name']}"
    parts = package.at("breakdown", resource)
    columns = ("part", f"{quantity.name}, {quantity.unit}")
    if not parts["parts"]:
        return Figure(key, title, Markup(), "", columns, reason=parts["reason"])
    rows = [
        [
            Cell(f"{part['kind']} × {part['units']}" if part["units"] > 1 else part["kind"]),
            part.cell("value", factor=quantity.factor),
        ]
        for part in parts.each("parts")
    ]
    steps: list[tuple[str, float, str]] = [
        (cells[0].text, part["value"], part.pointer("value")) for cells, part in zip(rows, parts.each("parts"), strict=True)
    ]
    for name, label in (("remainder", "remainder"), ("shared", "shared tensor")):
        if parts[name]:
            steps.append((label, parts[name], parts.pointer(name)))
            rows.append([Cell(label), parts.cell(name, factor=quantity.factor)])
    rows.append([Cell("predicted whole"), parts.cell("total", factor=quantity.factor)])
    rows.append([Cell("measured whole"), package.cell("measured", resource, "value", factor=quantity.factor)])
    units = [
        [Cell(f"{unit['unit']} ({unit['kernel']})"), unit.cell("value", factor=quantity.factor)] for unit in parts.each("units")
    ]
    whole, seen = parts["total"] * quantity.factor, package["measured", resource, "value"]
    spread = (package["predicted", resource, "spread"] or 0.0) * quantity.factor
    count = len(steps) + 2
    widest = max(
        whole + spread, (package["measured", resource, "high"] or seen or 0.0) * quantity.factor, _highest(steps) * quantity.factor
    )
    with drawing(_BAR * count + 50, (112, 52, 38, 6)) as (figure, axes):
        reached = 0.0
        for place, (_, value, pointer) in enumerate(steps):
            amount = value * quantity.factor
            axes.barh(-place, amount, left=reached, height=0.62, color=PREDICTED, zorder=2, gid=pointer)
            reached += amount
            axes.plot([reached, reached], [-place - 0.31, -place - 1.31], color=MUTED, linewidth=0.8, zorder=1)
        bottom = -len(steps)
        axes.barh(
            bottom, whole, height=0.56, facecolor=SURFACE, edgecolor=PREDICTED, linewidth=1.8, zorder=2, gid=parts.pointer("total")
        )
        interval(axes, whole - spread, whole + spread, bottom)
        if seen is not None:
            axes.barh(
                bottom - 1,
                seen * quantity.factor,
                height=0.62,
                color=MEASURED,
                zorder=2,
                gid=package.pointer("measured", resource, "value"),
            )
            low, high = package["measured", resource, "low"], package["measured", resource, "high"]
            if low is not None and high is not None and high > low:
                interval(axes, low * quantity.factor, high * quantity.factor, bottom - 1)
        for place, row in enumerate(rows):
            if row[1].missing:
                axes.text(0, -place, " not measured", ha="left", va="center", fontsize=10, color=MUTED)
            else:
                axes.text(1.02, -place, row[1].text, ha="left", va="center", fontsize=10, transform=axes.get_yaxis_transform())
        axes.set_yticks([-place for place in range(count)], [shorten(row[0].text, 18) for row in rows])
        for tick in axes.get_yticklabels()[-2:]:
            tick.set_fontweight("bold")
        axes.set_xlim(0, widest * 1.03)
        axes.set_ylim(-count + 0.4, 0.6)
        axes.set_xlabel(f"{quantity.name.lower()}, {quantity.unit}", labelpad=4)
        axes.grid(visible=True, axis="x", color=GRID)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        said = ", ".join(f"{row[0].text} {row[1].text if not row[1].missing else 'not measured'}" for row in rows)
        svg = finished(figure, key, title, f"In {quantity.unit}: {said}.")
    return Figure(key, title, svg, f"In {quantity.unit}: {said}.", columns, [*rows, *units])


def _highest(steps: list[tuple[str, float, str]]) -> float:
    """The furthest that a running sum reaches: a shared tensor takes some of it back."""
    reached = highest = 0.0
    for _, value, _ in steps:
        reached += value
        highest = max(highest, reached)
    return highest
