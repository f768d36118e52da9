"""A package's policy as layers × kinds of unit, for the heat map. Reads names and the catalogue alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.errors import InputError
from toolchain.kernels import CATALOGUE

_IN_A_LAYER = re.compile(r"(.*?)\.?\b(\d{1,6})\.(.+)", re.DOTALL)


def place(unit: str) -> tuple[str, int, str] | None:
    """("layers", 3, "mlp.up_proj") of layers.3.mlp.up_proj; None for a unit outside the layers."""
    found = _IN_A_LAYER.fullmatch(unit)
    return (found[1], int(found[2]), found[3]) if found else None


def kinds(units: Sequence[str]) -> dict[str, str]:
    """unit → what it is, whichever layer it is in: mlp.up_proj, lm_head; where there are several stacks, with its stack's name."""
    places = {unit: place(unit) for unit in units}
    several = len({found[0] for found in places.values() if found}) > 1
    return {unit: unit if found is None else f"{found[0]} {found[2]}" if several else found[2] for unit, found in places.items()}


def layers(policy: Mapping[str, str], order: Sequence[str] = ()) -> dict[str, Any]:
    """{"kinds": columns, "rows": [{"layer", "cells": [cell or None]}], "outside": [cell]}; a cell is {"unit", "kernel", "bits"}.

    bits are what the weights' codes need; of a kernel of two phases those it decodes with. order: the model's own order of units, where it
    is known. Raises InputError for a kernel that the catalogue does not have.
    """
    if unknown := sorted({kernel for kernel in policy.values() if kernel not in CATALOGUE}):
        raise InputError(
            f"expected kernels of the catalogue in a package's policy, got {unknown[0]!r}", "type: bittailor units MODEL"
        )
    names = [name for name in order if name in policy]
    names += [name for name in policy if name not in set(names)]
    cells = {name: {"unit": name, "kernel": policy[name], "bits": CATALOGUE[policy[name]].weight_bits} for name in names}
    places = {name: found for name in names if (found := place(name))}
    kinds = list(dict.fromkeys(found[2] for found in places.values()))
    by_place = {found: cells[name] for name, found in places.items()}
    stacks = list(dict.fromkeys(found[0] for found in places.values()))
    positions = sorted({found[:2] for found in places.values()}, key=lambda found: (stacks.index(found[0]), found[1]))
    rows = [
        {
            "layer": f"{stack} {layer}" if len(stacks) > 1 else str(layer),
            "cells": [by_place.get((stack, layer, name)) for name in kinds],
        }
        for stack, layer in positions
    ]
    return {"kinds": kinds, "rows": rows, "outside": [cells[name] for name in names if name not in places]}
