"""How a model's latency follows the machine's speed, by what the processes of a profile saw of both.

A machine that is busy elsewhere, or cooler, or clocked down, slows a package by about as much as the reference that it most resembles: the
share, about 1, is each model's own (`blocks.fitted`). A profile lies minutes apart from end to end, and the machine moves meanwhile; what
it then says of the share, a check of a few seconds need not find out anew. Where the machine stood still all the while, nothing is known.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev

from toolchain.blocks import PRIOR, Share, fitted
from toolchain.costs.rows import SessionRow
from toolchain.costs.table import CostTable
from toolchain.spec import Phase

OTHER_POLICY = 0.03
"""Least standard deviation, between policies of one model, of their shares: a package's policy is not one of those measured."""


def share_of(table: CostTable, model: str, phase: Phase, work: str) -> Share:
    """By how much this model's phase follows the reference for `work`; `blocks.PRIOR` where the table has no processes of it.

    The policies of one process share its luck, so processes count, not policies; how policies differ is what stays unknown.
    """
    at = (model, phase.name, phase.batch, phase.tokens, phase.past)
    seen: dict[int, dict[tuple[str, int], tuple[float, float]]] = {}
    for row in table.of(SessionRow):
        if row.valid and (row.model, row.phase, row.batch, row.tokens, row.past) == at and work in row.reference_ns:
            point = (math.log(row.reference_ns[work]), math.log(row.latency_ms))
            seen.setdefault(row.session, {})[row.policy, row.layers] = point
    policies = max((found.keys() for found in seen.values()), key=len, default=())
    whole = [[found[policy] for policy in policies] for found in seen.values() if found.keys() == set(policies)]
    if not whole:
        return PRIOR
    together = fitted([[(points[0][0], fmean(y for _, y in points)) for points in whole]])
    alone = [fitted([points]).value for points in zip(*whole, strict=True)]
    between = stdev(alone) if len(alone) > 1 else 0.0
    return Share(together.value, math.hypot(together.unknown, max(between, OTHER_POLICY)))
