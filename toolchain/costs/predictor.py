"""Costs of unit shapes that nobody measured, from those of the same kernel on the same device that somebody did.

    one token in flight    log(t / K·N) = a + b·log K + c·log N       ridge: shrunk towards a constant time per weight
    more tokens (M)        t = a + b·M + c·bytes + d·K·N·M            no coefficient below 0, so that it grows with every size
    embedding              t = a + b·M + c·K·M                        likewise
    memory                 peak = a + b·bytes + c·N                   likewise; of an embedding in proportion to its bytes

Each is a fit per kernel. One token is a fit of its own because the runtime has another kernel for it. What a fit gets wrong is found by
leaving out one shape at a time. Whether the weights are streamed or cached is left out: in the tables this was tried on it goes with the
size, and where it does not, using it made the errors larger. Refuses to know models (`borrowed.py`) and who asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toolchain.costs.borrowed import totals
from toolchain.costs.rows import MemoryRow, Row, UnitRow, at_speed
from toolchain.costs.table import CostTable, missing
from toolchain.errors import MissingCostError, require
from toolchain.kernels import CATALOGUE
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import WORKS, Unit

FEWEST = 4
"""Shapes of a linear that a fit needs: three sizes and one to tell them by. Of embeddings a table has one per model: one must do."""

Points = np.ndarray
"""[n, 4]: K, N, tokens and packed bytes of one row each."""
Law = Callable[[Points, np.ndarray], Callable[[Points], np.ndarray]]
"""(points, costs [n]) → points → costs."""


@dataclass(frozen=True)
class Errors:
    """|predicted / measured − 1| of every row, its shape left out of the fit; empty where only one shape was measured."""

    relative: tuple[float, ...]

    @property
    def spread(self) -> float:
        """The 90th percentile; 1 where it is not known."""
        return float(np.quantile(self.relative, 0.9)) if self.relative else 1.0

    def __str__(self) -> str:
        if not self.relative:
            return "not known, only one shape was measured"
        return f"median {np.median(self.relative):.0%}, 90th percentile {self.spread:.0%}"


@dataclass(frozen=True)
class Guess:
    """A unit's cost (ms or bytes) that no row holds; beyond: the shape is larger or smaller than all that were measured."""

    value: float
    errors: Errors
    op: str
    beyond: bool

    @property
    def spread(self) -> float:
        """Relative. Between measured shapes the fits' error; beyond them nobody knows it, and all of the value may be wrong."""
        return max(1.0, self.errors.spread) if self.beyond else self.errors.spread


@dataclass(frozen=True)
class _Fit:
    """One kernel of one op in one regime."""

    law: Callable[[Points], np.ndarray]
    sizes: tuple[float, float]
    relative_errors: tuple[float, ...]


def guesses_note(guesses: Mapping[tuple[str, str], Guess], units: int) -> str:
    """How many of a model's units were predicted, and how well: (unit, kernel) → guess as a note; empty for none."""
    if not guesses:
        return ""
    parts = []
    for op in sorted({guess.op for guess in guesses.values()}, reverse=True):
        errors = dict.fromkeys(guess.errors for guess in guesses.values() if guess.op == op)
        pooled = Errors(tuple(error for each in errors for error in each.relative))
        parts.append(f"{'' if op == 'MatMul' else 'of the embedding '}{pooled}")
    beyond = len({unit for (unit, _), guess in guesses.items() if guess.beyond})
    more = (
        f"; not known of {beyond} that are larger or smaller than all that were measured, the spread holds 100%" if beyond else ""
    )
    said = f"leave-one-shape-out error: {', '.join(parts)}{more}"
    return f"{len({unit for unit, _ in guesses})} of {units} units predicted from other shapes ({said})"


def guesses_spread(guesses: Mapping[tuple[str, str], Guess], costs: Mapping[str, Mapping[str, float]], fixed: float) -> float:
    """What the guesses add to the relative spread of a model of these costs: as if all were wrong the same way, at worst over kernels."""
    unsure = {
        unit: {name: cost * (guesses[unit, name].spread if (unit, name) in guesses else 0.0) for name, cost in per.items()}
        for unit, per in costs.items()
    }
    whole = totals(costs, fixed)
    return max(part / whole[kernel] for kernel, part in totals(unsure, 0.0).items())


@dataclass(frozen=True)
class ShapePredictor:
    """Fits over `table`, made when first asked for. `table` holds all rows of a device, whatever file they came from (`of`)."""

    table: CostTable
    _fits: dict[tuple[str, str, str], _Fit] = field(default_factory=dict, compare=False, repr=False)
    _guesses: dict[tuple[str, int, int, str, int, str], Guess] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, tables: Sequence[CostTable]) -> ShapePredictor:
        """Over the first table and those of the others that agree with its identity, brought to the first one's speed."""
        first = tables[0]
        rows: dict[tuple[Any, ...], Row] = {}
        for table in reversed(tables):
            if table.header.identity == first.header.identity:
                then, now = table.header.reference_ns, first.header.reference_ns
                speed = {work: now[work] / then[work] if now and then else 1.0 for work in WORKS}
                rows |= {key: at_speed(row, speed, first.header.provider) for key, row in table.rows.items()}
        return cls(CostTable(first.header, rows))

    def latency(self, unit: Unit, kernel: str, tokens: int) -> Guess:
        """Milliseconds of a unit at `tokens` in flight. Raises MissingCostError where too few shapes were measured."""
        regime = "one token" if tokens == 1 and unit.op == "MatMul" else "time"
        return self._guess(unit, kernel, tokens, regime)

    def peak_bytes(self, unit: Unit, kernel: str) -> Guess:
        """Peak resident bytes of a unit. Raises MissingCostError where too few shapes were measured."""
        return self._guess(unit, kernel, 1, "memory")

    def _guess(self, unit: Unit, kernel: str, tokens: int, regime: str) -> Guess:
        key = (*unit.shape, kernel, tokens, regime)
        if key not in self._guesses:
            fit = self._fit(unit.op, kernel, regime)
            value = fit.law(_points([(unit, kernel, tokens)]))[0]
            beyond = not fit.sizes[0] <= unit.parameters <= fit.sizes[1]
            self._guesses[key] = Guess(float(value), self._errors(unit.op, regime), unit.op, beyond)
        return self._guesses[key]

    def _errors(self, op: str, regime: str) -> Errors:
        """Of all kernels together: ten shapes of one kernel are too few to tell a 90th percentile by."""
        found: list[float] = []
        for kernel in dict.fromkeys(row.kernel for row in self.table.of(MemoryRow) + self.table.of(UnitRow) if row.op == op):
            try:
                found += self._fit(op, kernel, regime).relative_errors
            except MissingCostError:
                continue  # a kernel with too few shapes has no fit to be wrong
        return Errors(tuple(found))

    def _fit(self, op: str, kernel: str, regime: str) -> _Fit:
        key = (op, kernel, regime)
        if key not in self._fits:
            self._fits[key] = self._fitted(op, kernel, regime)
        return self._fits[key]

    def _fitted(self, op: str, kernel: str, regime: str) -> _Fit:
        if regime == "memory":
            rows = [(row, 1, row.peak_bytes) for row in self.table.of(MemoryRow) if (row.op, row.kernel) == (op, kernel)]
        else:
            rows = [
                (row, row.tokens, row.latency_ms)
                for row in self.table.of(UnitRow)
                if (row.op, row.kernel) == (op, kernel)
                and row.valid
                and (op == "Gather" or (row.tokens == 1) == (regime == "one token"))
            ]
        shapes = np.array([f"{row.K}x{row.N}" for row, _, _ in rows])
        distinct, fewest = len(set(shapes)), FEWEST if op == "MatMul" else 1
        if distinct < fewest:
            found = f"{fewest} or more measured shapes of {op} {kernel} to predict others from ({regime}), found {distinct},"
            raise missing(found, self.table.header.device)
        points = _points([(Unit("", op, row.K, row.N), kernel, tokens) for row, tokens, _ in rows])
        costs = np.array([cost for *_, cost in rows])
        law, errors = _LAWS[op, regime], []
        if distinct > 1:
            split = require("sklearn.model_selection").LeaveOneGroupOut().split(points, costs, shapes)
            for rest, left in split:
                errors += list(np.abs(law(points[rest], costs[rest])(points[left]) / costs[left] - 1))
        sizes = [row.K * row.N for row, _, _ in rows]
        return _Fit(law(points, costs), (min(sizes), max(sizes)), tuple(map(float, errors)))


def _points(cases: Iterable[tuple[Unit, str, int]]) -> Points:
    made = [(unit.K, unit.N, tokens, packed_bytes(unit, CATALOGUE[kernel])) for unit, kernel, tokens in cases]
    return np.array(made, dtype=float)


def _per_weight(points: Points, costs: np.ndarray) -> Callable[[Points], np.ndarray]:
    """A power of K and of N, both close to 1: few shapes lie on a straight line in logarithms, and beyond them it stays one."""
    linear, pipeline = require("sklearn.linear_model"), require("sklearn.pipeline")
    scaler = require("sklearn.preprocessing").StandardScaler()

    def weights(at: Points) -> np.ndarray:
        return at[:, 0] * at[:, 1]

    model = pipeline.make_pipeline(scaler, linear.Ridge(1.0))
    model.fit(np.log(points[:, :2]), np.log(costs / weights(points)))
    return lambda at: weights(at) * np.exp(model.predict(np.log(at[:, :2])))


def _sum_of(terms: Callable[..., Sequence[np.ndarray]]) -> Law:
    """A sum of these terms of (K, N, M, bytes), each with a coefficient of 0 or more, fitted to relative errors."""

    def law(points: Points, costs: np.ndarray) -> Callable[[Points], np.ndarray]:
        linear, pipeline = require("sklearn.linear_model"), require("sklearn.pipeline")
        scaler = require("sklearn.preprocessing").MaxAbsScaler()
        model = pipeline.make_pipeline(scaler, linear.LinearRegression(positive=True, fit_intercept=False))
        model.fit(_columns(points), costs, linearregression__sample_weight=costs**-2)
        return lambda at: model.predict(_columns(at))

    def _columns(points: Points) -> np.ndarray:
        return np.column_stack(np.broadcast_arrays(*terms(*points.T)))

    return law


def _per_byte(points: Points, costs: np.ndarray) -> Callable[[Points], np.ndarray]:
    ratio = np.exp(np.mean(np.log(costs / points[:, 3])))
    return lambda at: ratio * at[:, 3]


_ONE = np.ones(1)
_LAWS: dict[tuple[str, str], Law] = {
    ("MatMul", "one token"): _per_weight,
    ("MatMul", "time"): _sum_of(lambda K, N, M, B: (_ONE, M, B, K * N * M)),
    ("MatMul", "memory"): _sum_of(lambda K, N, M, B: (_ONE, B, N)),
    ("Gather", "time"): _sum_of(lambda K, N, M, B: (_ONE, M, K * M)),
    ("Gather", "memory"): _per_byte,
}
