"""The report's JSON → one HTML page: no script, no network, no file beside it.

Jinja2 with autoescape writes every text, since names and reasons come from strangers' packages; a Content-Security-Policy in the page
forbids scripts all the same. The JSON is in the page, so that what is shown can be held against it. Refuses to compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from toolchain.check import COULD_NOT_TELL, OVER, WITHIN
from toolchain.report import bars, pareto
from toolchain.report.comparison import COSTS
from toolchain.report.radar import radar
from toolchain.report.view import QUANTITIES, Cell, View

_CLASSES = {WITHIN: "within", OVER: "over", COULD_NOT_TELL: "untold"}


def page(data: Mapping[str, Any]) -> str:
    """The whole page. data: what `commands.reporting.gather` returned; the page holds it as JSON, unchanged."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    here = files("toolchain.report")
    template = environment.from_string(here.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    groups = [_group(group, f"g{index}") for index, group in enumerate(View(data).each("groups"))]
    return template.render(
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),  # ours
        data=data,
        groups=groups,
        signs=bars.SIGNS,
        classes=_CLASSES,
    )


def _group(group: View, key: str) -> dict[str, Any]:
    packages = group.each("packages")
    return {
        "view": group,
        "key": key,
        "summary": _summary(group, packages),
        "costs": [
            (
                QUANTITIES[resource].name,
                pareto.predicted(group, resource, f"{key}-{resource}-p"),
                pareto.measured(group, resource, f"{key}-{resource}-m"),
            )
            for resource in COSTS
        ],
        "packages": [_package(package, f"{key}-{index}") for index, package in enumerate(packages)],
        "missing": _missing(group, packages),
    }


def _package(package: View, key: str) -> dict[str, Any]:
    return {
        "view": package,
        "key": key,
        "radar": radar(package, f"{key}-radar"),
        "budget": bars.budget(package, f"{key}-budget"),
        "breakdowns": [(QUANTITIES[resource].name, bars.breakdown(package, resource, f"{key}-{resource}")) for resource in COSTS],
    }


def _summary(group: View, packages: list[View]) -> tuple[list[str], list[list[Cell]]]:
    """(column headings, one row a package): what was measured, beside what was predicted."""
    latency, memory, energy = (QUANTITIES[name] for name in COSTS)
    columns = [
        "package", "verdict", "mean bits", "package MB", "ms predicted", "ms measured", "MB predicted", "MB measured", "mJ predicted",
        "mJ measured", group["quality", "metric"] or "quality",
    ]  # fmt: skip
    rows = [
        [
            view.cell("name"),
            view.cell("verdict"),
            view.cell("mean_bits"),
            view.cell("bytes", factor=1e-6),
            *(
                view.cell(kind, name, "value", factor=quantity.factor)
                for name, quantity in zip(COSTS, (latency, memory, energy), strict=True)
                for kind in ("predicted", "measured")
            ),
            view.cell("quality", "value"),
        ]
        for view in packages
    ]
    return columns, rows


def _missing(group: View, packages: list[View]) -> list[tuple[str, str]]:
    """(what is missing of which packages, why), each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for package in packages:
        reasons = [
            (f"{kind} {QUANTITIES[name].name.lower()}", package[kind, name, "reason"])
            for kind in ("predicted", "measured")
            for name in COSTS
            if package[kind, name, "value"] is None
        ]
        reasons += [
            (what, package[where, "reason"])
            for what, where in (("quality", "quality"), ("predicted loss", "predicted_loss"))
            if package[where, "value"] is None
        ]
        reasons += [
            ("cost of each unit", reason) for reason in {package["breakdown", name, "reason"] for name in COSTS[:2]} if reason
        ]
        reasons += [("verdict", limit["reason"]) for limit in package.each("limits")[:1] if limit["measured"] is None]
        for what, reason in reasons:
            found.setdefault((what, reason), []).append(package["name"])
    lines = [
        (f"{what}: {'every package' if len(names) == len(packages) > 1 else ', '.join(names)}", reason)
        for (what, reason), names in found.items()
    ]
    fronts: dict[str, list[str]] = {}
    for name in COSTS:
        fronts.setdefault(group["front", "resources", name, "reason"], []).append(QUANTITIES[name].name.lower())
    return lines + [(f"exact front of {', '.join(names)}", reason) for reason, names in fronts.items() if reason]
