"""Predicted against measured, as `predict_accuracy.py` measured it: how the machine's drift is taken out, and the table that is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np

from toolchain.costs.model import CostModel
from toolchain.costs.operations import working_set_of
from toolchain.costs.rows import ModelRow, work
from toolchain.costs.table import CostTable
from toolchain.graph.assemble import package_bytes
from toolchain.graph.layers import units_within
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, mean_bits
from toolchain.profiler.model_rows import Anchor
from toolchain.spec import Policy, Workload

KNOWN = ("w2g32", "w4g32", "w8g128")
"""Models that the table holds, and that tell the machine's drift since: bound by arithmetic, in between, by memory; bits rising."""


def known_models(graph: Graph, held: Sequence[Anchor]) -> list[Anchor]:
    """Of the models that a table holds: KNOWN, and all mixed ones that it holds whole. The level of its predictions is theirs: what their
    rows are off by is in a prediction and in the drift alike, and cancels."""
    return [anchor for anchor in held if anchor.name in KNOWN or (anchor.name not in CATALOGUE and anchor.layers == graph.layers)]


SHRINKAGE = (0.03 / 0.007) ** 2
"""Variance of a known model's drift, 3% (then and now two or three processes, each 1 to 2% off: `sessions.py`; and what a model has of its
own), over that of drifts from one bit to the next, 0.7%: over the six bits from 2 to 8 memory and arithmetic part by some 4%."""

Rows = Mapping[str, Mapping[str, Any]]
"""policy → what one process saw of it: latencies, the references' times, and under "known" the same of the known models beside it."""


@dataclass(frozen=True)
class Measured:
    """once: what the first processes saw; again: what the others saw of some policies. Only what all of a kind saw counts, those not yet
    begun left out."""

    once: Sequence[Rows]
    again: Sequence[Rows]

    def names(self) -> list[str]:
        return [name for name in self.once[0] if all(name in rows for rows in self.once)]

    def twice(self) -> list[str]:
        return [name for name in self.names() if self.again and all(name in rows for rows in self.again)]


@dataclass(frozen=True)
class Drift:
    """How many times as long as in the table the machine takes now, while it measured a row. known: as `known_models` gives them."""

    graph: Graph
    table: CostTable
    known: Sequence[Anchor]
    policies: Mapping[str, Policy]
    workload: Workload
    resource: str
    then_ms: Mapping[str, float]
    """known model → its time in the table."""

    @property
    def decoding(self) -> bool:
        return self.resource == "latency_ms" and self.workload.kind == "generate"

    def of(self, row: Mapping[str, Any], known: str) -> float:
        return float(row["known"][known][self.resource]) / self.then_ms[known]

    def mixed(self, row: Mapping[str, Any]) -> list[Anchor]:
        """Those that ran beside a row: measurements of before have none."""
        return [anchor for anchor in self.known if anchor.name not in KNOWN and anchor.name in row["known"]]

    def by_known(self, row: Mapping[str, Any], name: str) -> float:
        """A line over mean bits through the logarithms of what the known models drifted: memory and arithmetic drift apart. Its slope is
        from both kinds, each about its own mean, and shrunk (ridge): two or three rows would bend it by their noise. Its level is the
        mixed ones', which are whole as what is measured here is."""
        mixed = self.mixed(row)
        uniform = [anchor for anchor in self.known if anchor.name in KNOWN]
        fitted = [self._over_bits(row, kind) for kind in (mixed, uniform) if kind]
        apart = [(bits - bits.mean(), moves - moves.mean()) for bits, moves in fitted]
        slope = sum(float(bits @ moves) for bits, moves in apart) / (sum(float(bits @ bits) for bits, _ in apart) + SHRINKAGE)
        bits, moves = fitted[0]
        return float(np.exp(np.median(moves - slope * bits) + slope * mean_bits(self.policies[name], self.graph.units)))

    def _over_bits(self, row: Mapping[str, Any], anchors: Sequence[Anchor]) -> tuple[np.ndarray, np.ndarray]:
        """(mean bits, logarithms of the drifts) of known models."""
        bits = [mean_bits(anchor.policy, units_within(self.graph.units, anchor.layers)) for anchor in anchors]
        return np.array(bits), np.log([self.of(row, anchor.name) for anchor in anchors])

    def by_median(self, row: Mapping[str, Any], name: str) -> float:
        return median(self.of(row, known) for known in [anchor.name for anchor in self.mixed(row)] or KNOWN)

    def by_reference(self, row: Mapping[str, Any], name: str) -> float:
        header = self.table.header
        bound = work(self.decoding, working_set_of(self.graph.units, self.policies[name], header.cache_bytes))
        return float(row[bound]) / header.reference_ns[bound]

    def none(self, row: Mapping[str, Any], name: str) -> float:
        return 1.0


def known_latencies(table: CostTable, graph: Graph, known: Anchor, workload: Workload) -> dict[str, float]:
    """What was measured of a known model in the workload's phases when the table was made."""
    found = {}
    for phase in workload.phases:
        for row in table.of(ModelRow):
            point = (row.model, row.policy, row.layers, row.phase, row.batch, row.tokens, row.past)
            if point == (graph.fingerprint, known.name, known.layers, phase.name, phase.batch, phase.tokens, phase.past):
                found[phase.resource] = row.latency_ms
    return found


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation (scipy's, which is there wherever the solver is)."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def spearman_beyond_noise(predicted: list[float], seen: list[float], noise: float) -> tuple[float, int]:
    """Spearman over policies that differ by more than noise: sorted by what was measured, each a factor 1 + noise above the one before."""
    chosen: list[int] = []
    for place in sorted(range(len(seen)), key=seen.__getitem__):
        if not chosen or seen[place] > seen[chosen[-1]] * (1 + noise):
            chosen.append(place)
    if len(chosen) < 3:
        return float("nan"), len(chosen)
    return spearman([predicted[place] for place in chosen], [seen[place] for place in chosen]), len(chosen)


def summary(name: str, ratios: list[float]) -> dict[str, float | str]:
    errors = np.abs(np.array(ratios) - 1)
    return {
        "what": name,
        "n": len(ratios),
        "within 5%": float((errors <= 0.05).mean()),
        "within 10%": float((errors <= 0.10).mean()),
        "worst": float(errors.max()),
        "median ratio": float(np.median(ratios)),
    }


def report(
    graph: Graph, table: CostTable, costs: CostModel, known: Sequence[Anchor], policies: Mapping[str, Policy], measured: Measured
) -> list[dict[str, float | str]]:
    """Print everything; returns the table's lines."""
    names, again, workload = measured.names(), measured.twice(), costs.workload
    predicted = {name: costs.totals(policies[name]) for name in names}
    lines, ranks = [], []
    for resource in ("latency_ms", "first_token_ms"):
        if resource not in costs.per_unit:
            continue
        then_ms = {anchor.name: known_latencies(table, graph, anchor, workload)[resource] for anchor in known}
        drift = Drift(graph, table, known, policies, workload, resource, then_ms)
        for other in then_ms:
            moves = [drift.of(rows[name], other) for rows in measured.once for name in names if other in rows[name]["known"]]
            if not moves:
                continue
            print(
                f"{resource}: known {other} ran {min(moves):.2f} to {max(moves):.2f} times as long as in the table", file=sys.stderr
            )

        def average(rounds: Sequence[Rows], slowness: Callable, of: Sequence[str], what: str = resource) -> dict[str, float]:
            return {name: mean(rows[name][what] / slowness(rows[name], name) for rows in rounds) for name in of}

        now = average(measured.once, drift.by_known, names)
        corrections = {
            "": drift.by_known,
            ", by the known models' median": drift.by_median,
            ", by the references instead": drift.by_reference,
            ", raw": drift.none,
        }
        for how, slowness in corrections.items():
            seen = average(measured.once, slowness, names)
            lines.append(
                summary(f"{resource}: predicted / measured{how}", [predicted[name][resource] / seen[name] for name in names])
            )
        noise = float("nan")
        if len(measured.once) > 1:
            one, other_one = (average([rows], drift.by_known, names) for rows in measured.once[:2])
            lines.append(summary(f"{resource}: one process / another", [one[name] / other_one[name] for name in names]))
            noise = float(np.percentile([abs(one[name] / other_one[name] - 1) for name in names], 90)) / 2**0.5
        if again:
            later = average(measured.again, drift.by_known, again)
            lines.append(summary(f"{resource}: measured again / measured", [later[name] / now[name] for name in again]))
            noise = float(np.percentile([abs(later[name] / now[name] - 1) for name in again], 90))
        pair = [predicted[name][resource] for name in names], [now[name] for name in names]
        ranks.append((resource, spearman(*pair), noise, *spearman_beyond_noise(*pair, noise)))
    weighed = {name: measured.once[0][name] for name in names}
    ratios = [predicted[name]["peak_memory_bytes"] / row["peak_memory_bytes"] for name, row in weighed.items()]
    lines.append(summary("peak_memory_bytes: predicted / measured", ratios))
    exact = sum(package_bytes(graph, policies[name]) == row["package_bytes"] for name, row in weighed.items())
    print(f"{graph.source}, {workload}, {table.header.threads} threads, {table.header.runtime}, {table.header.cpu}")
    print("| what | n | within 5% | within 10% | worst | median ratio |\n|---|---|---|---|---|---|")
    for row in lines:
        shares = f"{row['within 5%']:.1%} | {row['within 10%']:.1%} | {row['worst']:.1%}"
        print(f"| {row['what']} | {row['n']} | {shares} | {row['median ratio']:.3f} |")
    for resource, rank, noise, beyond, count in ranks:
        print(
            f"Spearman {resource}: {rank:.3f} of all; {beyond:.3f} of {count} that differ by more than noise ({noise:.1%}) from the next"
        )
    disturbed = sum(not row["valid"] for rows in (*measured.once, *measured.again) for row in rows.values())
    print(f"package bytes exact: {exact} of {len(names)}; measured while disturbed: {disturbed}")
    print(f"spread that the table promised: { {name: f'{value:.1%}' for name, value in costs.relative_spread.items()} }")
    return lines
