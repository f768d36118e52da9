"""How a model's latency follows the machine's speed, by what the processes of a profile saw of both.

A machine that is busy elsewhere, or cooler, or clocked down, slows a package by about as much as the reference that it most resembles: the
share, about 1, is each model's own (`blocks.fitted`). A profile lies minutes apart from end to end, and the machine moves meanwhile; what
it then says of the share, a check of a few seconds need not find out anew. Where the machine stood still all the while, nothing is known.

One share for all that slows a machine is a simplification: an encoder was seen to follow by 1.28 on slow cores and by 0.5 beside another
process (`blocks.compared`). LEAST is what stays unknown however many processes there are; where a table said 0.93, two hundred checks
said 0.95 (README, "How often `check` errs").
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean, stdev

from toolchain.blocks import PRIOR, SHARE, Share, fitted
from toolchain.costs.rows import SessionRow
from toolchain.costs.table import CostTable
from toolchain.spec import FINER, Phase

OTHER_POLICY, LEAST = 0.03, 0.05
"""The least standard deviation of the share between policies, since a package's is none of those followed; and of all that is unknown."""
DIGITS = 3
"""A share is rounded, so that the same table gives the same manifest whatever a machine's logarithm does with the last digit."""


def share_of(table: CostTable, model: str, phase: Phase, work: str) -> Share:
    """By how much this model's phase follows the reference for `work`; `blocks.PRIOR` where the table does not tell.

    Policies that other work bounds are left out. Those of one process share its luck, so processes count, not policies; by how much those
    differ stays unknown.
    """
    at = (model, phase.name, phase.batch, phase.tokens, phase.past)
    seen: dict[int, dict[tuple[str, int], tuple[float, float]]] = {}
    for row in table.of(SessionRow):
        about = (row.model, row.phase, row.batch, row.tokens, row.past)
        if about == at and row.valid and work in (row.bound, FINER.get(row.bound)) and work in row.reference_ns:
            point = (math.log(row.reference_ns[work]), math.log(row.latency_ms))
            seen.setdefault(row.session, {})[row.policy, row.layers] = point
    policies = max((found.keys() for found in seen.values()), key=len, default=())
    whole = [[found[policy] for policy in policies] for found in seen.values() if found.keys() == set(policies)]
    if not whole:
        return PRIOR
    together = fitted([(points[0][0], fmean(y for _, y in points)) for points in whole])
    alone = [fitted(points).value for points in zip(*whole, strict=True)]
    between = stdev(alone) if len(alone) > 1 else 0.0
    unknown = max(LEAST, math.hypot(together.unknown, max(between, OTHER_POLICY)))
    return Share(round(together.value, DIGITS), round(min(unknown, SHARE), DIGITS))


def told(table: CostTable, model: str, phases: Iterable[Phase]) -> dict[str, tuple[str, Share]]:
    """Latency → (the finest work that bounds it in the table's sessions, the share); without those that no session saw."""
    made = {}
    for phase in phases:
        at = (model, phase.name, phase.batch, phase.tokens, phase.past)
        rows = [row for row in table.of(SessionRow) if (row.model, row.phase, row.batch, row.tokens, row.past) == at]
        works = [FINER[row.bound] if FINER.get(row.bound) in row.reference_ns else row.bound for row in rows]
        if works:
            work = max(sorted(set(works)), key=works.count)
            made[phase.resource] = (work, share_of(table, model, phase, work))
    return made
