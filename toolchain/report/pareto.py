"""Quality against a cost, twice: as predicted, with the exact front, and as measured.

Two drawings and never one: a loss is no perplexity, and a predicted cost is no measured one.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from toolchain.report.drawing import (
    GRID,
    INK,
    MEASURED,
    MUTED,
    PREDICTED,
    SURFACE,
    Labelled,
    drawing,
    finished,
    label_points,
    shorten,
)
from toolchain.report.text import number
from toolchain.report.view import QUANTITIES, Cell, Figure, View

_HEIGHT, _MARGINS = 270, (58.0, 14.0, 44.0, 14.0)
_LABEL = 18
"""Characters of a package's name that fit beside its point."""


def predicted(group: View, resource: str, key: str) -> Figure:
    """The exact front as steps, and every package where its policy is predicted to lie."""
    quantity = QUANTITIES[resource]
    title = f"Predicted: loss against {quantity.name.lower()}"
    points = group.each("front", "resources", resource, "points")
    packages = [
        view
        for view in group.each("packages")
        if view["predicted", resource, "value"] is not None and view["predicted_loss", "value"] is not None
    ]
    columns = ("point", f"{quantity.name}, {quantity.unit}", f"± {quantity.unit}", "loss", "mean bits")
    if not points and not packages:
        reason = group["front", "resources", resource, "reason"] or "no package has a prediction and a loss"
        return Figure(key, title, Markup(), "", columns, reason=reason)
    rows: list[list[Cell]] = [
        [
            view.cell("name"),
            view.cell("predicted", resource, "value", factor=quantity.factor),
            view.cell("predicted", resource, "spread", factor=quantity.factor),
            view.cell("predicted_loss", "value"),
            view.cell("mean_bits"),
        ]
        for view in packages
    ]
    rows += [
        [
            Cell("exact front" if view["proven"] else "front, not proven"),
            view.cell("cost", factor=quantity.factor),
            Cell(""),
            view.cell("loss"),
            view.cell("mean_bits"),
        ]
        for view in points
    ]
    costs = [view["predicted", resource, "value"] * quantity.factor for view in packages]
    spreads = [(view["predicted", resource, "spread"] or 0.0) * quantity.factor for view in packages]
    losses = [view["predicted_loss", "value"] for view in packages]
    front = [(view["cost"] * quantity.factor, view["loss"]) for view in points]
    with drawing(_HEIGHT, _MARGINS) as (figure, axes):
        _look(axes, f"predicted {quantity.name.lower()}, {quantity.unit}", "predicted loss")
        if front:
            x, y = zip(*front, strict=True)
            axes.step(x, y, where="post", color=INK, linewidth=1.4, zorder=2)
            for view, (cost, loss) in zip(points, front, strict=True):
                axes.plot([cost], [loss], ".", color=INK, markersize=4, zorder=2, gid=view.root)
        for view, cost, spread, loss in zip(packages, costs, spreads, losses, strict=True):
            axes.plot([cost - spread, cost + spread], [loss, loss], color=PREDICTED, linewidth=1.6, zorder=3)
            axes.plot(
                [cost],
                [loss],
                "o",
                markersize=8,
                markerfacecolor=SURFACE,
                markeredgecolor=PREDICTED,
                markeredgewidth=2,
                zorder=4,
                gid=view.root,
            )
        hidden = _window(axes, front, [*zip(costs, losses, strict=True)], spreads)
        label_points(
            axes,
            [
                Labelled(cost, loss, shorten(view["name"], _LABEL), cost - spread, cost + spread)
                for view, cost, spread, loss in zip(packages, costs, spreads, losses, strict=True)
            ],
        )
        said = [f"{row[0].text}: {row[1].text} {quantity.unit}, loss {row[3].text}" for row in rows[: len(packages)]]
        ends = f"The exact front has {len(front)} points" + (
            f", from {_point(front[0], quantity.unit)} to {_point(front[-1], quantity.unit)}" if front else ""
        )
        alternative = f"{'. '.join([ends, *said])}."
        svg = finished(figure, key, title, alternative)
    caption = f"{hidden} of the front's points lie outside the drawing; the table has them." if hidden else ""
    return Figure(key, title, svg, alternative, columns, rows, caption)


def measured(group: View, resource: str, key: str) -> Figure:
    """Every package that was both checked and evaluated; the steps join those that no other one beats."""
    quantity = QUANTITIES[resource]
    metric = group["quality", "metric"] or "quality"
    title = f"Measured: {metric} against {quantity.name.lower()}"
    columns = ("package", f"{quantity.name}, {quantity.unit}", "low", "high", metric, "on the front")
    every = group.each("packages")
    packages = [
        view
        for view in every
        if view["measured", resource, "valid"]
        and view["measured", resource, "value"] is not None
        and view["quality", "value"] is not None
    ]
    if not packages:
        return Figure(key, title, Markup(), "", columns, reason=_why_not(every, resource))
    rows = [
        [
            view.cell("name"),
            view.cell("measured", resource, "value", factor=quantity.factor),
            view.cell("measured", resource, "low", factor=quantity.factor),
            view.cell("measured", resource, "high", factor=quantity.factor),
            view.cell("quality", "value"),
            Cell("yes" if view["measured", resource, "on_the_front"] else "no"),
        ]
        for view in packages
    ]
    costs = [view["measured", resource, "value"] * quantity.factor for view in packages]
    scores = [view["quality", "value"] for view in packages]
    best = sorted(
        (cost, score)
        for view, cost, score in zip(packages, costs, scores, strict=True)
        if view["measured", resource, "on_the_front"]
    )
    with drawing(_HEIGHT, _MARGINS) as (figure, axes):
        _look(axes, f"measured {quantity.name.lower()}, {quantity.unit}", f"measured {metric}")
        if len(best) > 1:
            x, y = zip(*best, strict=True)
            axes.step(x, y, where="post", color=MUTED, linewidth=1.4, linestyle=(0, (4, 3)), zorder=2)
        labels = []
        for view, cost, score in zip(packages, costs, scores, strict=True):
            low, high = view["measured", resource, "low"], view["measured", resource, "high"]
            ends = (low * quantity.factor, high * quantity.factor) if low is not None and high is not None else (cost, cost)
            labels.append(Labelled(cost, score, shorten(view["name"], _LABEL), *ends))
            axes.plot(ends, [score, score], color=MEASURED, linewidth=1.6, zorder=3)
            axes.plot([cost], [score], "s", markersize=8, color=MEASURED, markeredgewidth=0, zorder=4, gid=view.root)
        axes.margins(0.14)
        label_points(axes, labels)
        said = [
            f"{row[0].text}: {row[1].text} {quantity.unit}, {metric} {row[4].text}{', on the front' if row[5].text == 'yes' else ''}"
            for row in rows
        ]
        alternative = f"{'. '.join(said)}."
        svg = finished(figure, key, title, alternative)
    missing = [view["name"] for view in every if view.root not in {shown.root for shown in packages}]
    caption = f"Not measured: {', '.join(missing)}." if missing else ""
    return Figure(key, title, svg, alternative, columns, rows, caption)


def _why_not(packages: Sequence[View], resource: str) -> str:
    """The reason that most packages give."""
    reasons = [
        view["measured", resource, "reason"] or "not measured"
        if view["measured", resource, "value"] is None or not view["measured", resource, "valid"]
        else view["quality", "reason"]
        for view in packages
    ]
    return max(reasons, key=reasons.count)


def _look(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, labelpad=6)
    axes.set_ylabel(y, labelpad=6)
    axes.grid(visible=True, color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _window(
    axes: Axes, front: Sequence[tuple[float, float]], packages: Sequence[tuple[float, float]], spreads: Sequence[float]
) -> int:
    """Show the packages and the front about them; returns how many of the front's points are not shown."""
    shown = list(packages) or list(front)
    widest = max([cost for cost, _ in shown]) + max(spreads, default=0.0)
    left = min([cost for cost, _ in (*front, *shown)])
    worst = max(loss for _, loss in shown)
    room = 0.06 * (widest - left) or 0.05 * widest or 1.0
    top = (1.6 * worst if packages else worst) or max((loss for _, loss in front), default=0.0) or 1.0
    axes.set_xlim(left - room, widest + 2.5 * room)
    axes.set_ylim(-0.05 * top, top)
    return sum(not (cost <= widest + 2.5 * room and loss <= top) for cost, loss in front)


def _point(point: tuple[float, float], unit: str) -> str:
    return f"{number(point[0])} {unit} at loss {number(point[1])}"
