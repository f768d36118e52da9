"""The rows of a cost table and its header: what was measured, on what, how well. Measurements only, one frozen noun per kind.

A row's key is what it is about; its values are what was seen. Refuses to know files (`table.py`) and predictions (`from_table.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolchain.spec import CPU, CUDA, STREAMED_TOKEN, TOKEN, TOKENS


@dataclass(frozen=True)
class Header:
    """What was measured on, by which protocol. A table speaks only for a runtime that agrees in `identity`.

    reference_ns: by kind of work (`spec.WORKS`, and `FINER` where the agent has those), the reference's time when the table began; empty
    until something is timed.
    """

    device: str
    cpu: str
    provider: str
    threads: int
    runtime: str
    protocol: str
    meter: str
    reference_ns: Mapping[str, float] = field(default_factory=dict)
    date: str = ""
    command: str = ""
    kernels: tuple[str, ...] = ()
    cache_bytes: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("cpu", "provider", "threads", "runtime", "protocol")}


@dataclass(frozen=True)
class UnitRow:
    """Time of one execution of a unit of this shape under a kernel, `tokens` in flight.

    working_set "cached": the weights between two uses of the same unit fit the last-level cache; "streamed": they do not.
    latency_ms: median over n interleaved trials, corrected for the machine's drift by the reference; spread_ms: half the
    distance between the 10th and the 90th percentile. interpolation_error: |line between the neighbours on the grid − measured| /
    measured; None at the ends of the grid and where one token is in flight, which is never interpolated. bound: the kind of work by
    whose reference the time is brought to another speed (`bounds.py`); rows of before have none (`at_speed`).
    """

    op: str
    K: int
    N: int
    kernel: str
    tokens: int
    working_set: str
    latency_ms: float
    spread_ms: float
    n: int
    valid: bool
    interpolation_error: float | None = None
    bound: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return ("unit", self.op, self.K, self.N, self.working_set, self.tokens, self.kernel)

    @property
    def one_token(self) -> bool:
        return self.tokens == 1


@dataclass(frozen=True)
class MemoryRow:
    """Rise of a fresh process's peak resident set per unit of this shape and kernel: its tensors and what prepacking adds."""

    op: str
    K: int
    N: int
    kernel: str
    peak_bytes: float
    packed_bytes: int
    copies: int

    @property
    def key(self) -> tuple[Any, ...]:
        return ("memory", self.op, self.K, self.N, self.kernel)


@dataclass(frozen=True)
class ModelRow:
    """One phase of a model's first `layers` layers, embedding and head, measured under one policy (`units`: unit → kernel).

    What the sum of its units leaves over is the remainder: attention, norms, cache, per-run overhead. latency_ms (the mean over processes
    of each one's median trial; n and spread_ms are of all their trials) is for one run:
    a step of decoding with `past` positions in the cache, a prefill or an encoding of batch × tokens. working_set, bound: as a unit's
    row has them.
    """

    model: str
    phase: str
    batch: int
    tokens: int
    past: int
    layers: int
    policy: str
    units: Mapping[str, str]
    working_set: str
    latency_ms: float
    spread_ms: float
    n: int
    valid: bool
    bound: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return ("model", self.model, self.phase, self.batch, self.tokens, self.past, self.layers, self.policy)

    @property
    def one_token(self) -> bool:
        return self.phase == "decode"


@dataclass(frozen=True)
class ModelMemoryRow:
    """Memory of a fresh process that loaded these layers and ran batch × tokens, with room for `capacity` positions in the cache.

    peak_bytes: highest resident set, running_bytes: the resident set afterwards, both over a bare runtime process.
    """

    model: str
    batch: int
    tokens: int
    capacity: int
    layers: int
    policy: str
    units: Mapping[str, str]
    peak_bytes: float
    running_bytes: float

    @property
    def key(self) -> tuple[Any, ...]:
        return ("model memory", self.model, self.batch, self.tokens, self.capacity, self.layers, self.policy)


MOST_SESSIONS = 1000


@dataclass(frozen=True)
class SessionRow:
    """What one process saw of a model's phase under one policy, and of the references beside it: as it was, at the speed it had.

    latency_ms, reference_ns (by kind of work): medians of the process's windows. session: which of the processes that followed this phase;
    its rows, one a policy, are of one process. bound: the kind of work, as a model's row has it. valid: others left it the CPUs.
    """

    model: str
    phase: str
    batch: int
    tokens: int
    past: int
    layers: int
    policy: str
    session: int
    latency_ms: float
    reference_ns: Mapping[str, float]
    bound: str
    valid: bool

    def __post_init__(self) -> None:
        if not self.latency_ms > 0 or not self.reference_ns:
            raise ValueError(f"latency_ms {self.latency_ms!r} beside references {self.reference_ns!r}")
        if not self.session < MOST_SESSIONS:
            raise ValueError(f"session {self.session!r} instead of one below {MOST_SESSIONS}")

    @property
    def key(self) -> tuple[Any, ...]:
        return ("session", self.model, self.phase, self.batch, self.tokens, self.past, self.layers, self.policy, self.session)


@dataclass(frozen=True)
class ModelShapeRow:
    """What a measured model is made of: without it, its rows say nothing about models of other sizes (`borrowed.py`).

    kind "decoder" | "encoder"; units: name → [op, K, N, role].
    """

    model: str
    kind: str
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    units: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        for name, unit in self.units.items():
            if [type(part) for part in unit] != [str, int, int, str]:
                raise ValueError(f"unit {name!r} {unit!r} instead of [op, K, N, role]")

    @property
    def key(self) -> tuple[Any, ...]:
        return ("model shape", self.model)


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What a meter saw of one execution: the median over n windows, and half the distance between the 10th and the 90th percentile.

    energy_mj is all that was used meanwhile, above_idle_mj what is left of it without idle power: energy_mj = above_idle_mj +
    idle_mw · run_ms / 1000. meter: its name and what it sees, "rapl: package-0 + package-1". meter_error: relative, how far sampling or
    the counter's steps (every step_s seconds) may be off in a window of window_s seconds. Corrected for the machine's drift: work takes
    its energy at any speed, but on a slower machine idle power flows for longer.
    """

    energy_mj: float
    spread_mj: float
    above_idle_mj: float
    above_idle_spread_mj: float
    idle_mw: float
    run_ms: float
    n: int
    valid: bool
    meter: str
    step_s: float
    window_s: float
    meter_error: float
    bound: str = ""

    def __post_init__(self) -> None:
        for name in ("energy_mj", "idle_mw", "run_ms", "n", "step_s", "window_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)!r} instead of a positive number")


@dataclass(frozen=True, kw_only=True)
class UnitEnergyRow(Energy):
    """Energy of one execution of a unit of this shape under a kernel, `tokens` in flight. working_set: as a unit's time row has it."""

    op: str
    K: int
    N: int
    kernel: str
    tokens: int
    working_set: str

    @property
    def one_token(self) -> bool:
        return self.tokens == 1

    @property
    def key(self) -> tuple[Any, ...]:
        return ("unit energy", self.op, self.K, self.N, self.working_set, self.tokens, self.kernel)


@dataclass(frozen=True, kw_only=True)
class ModelEnergyRow(Energy):
    """Energy of one run of a phase of a whole model under one policy: as `ModelRow` is of its time."""

    model: str
    phase: str
    batch: int
    tokens: int
    past: int
    layers: int
    policy: str
    units: Mapping[str, str]
    working_set: str

    @property
    def one_token(self) -> bool:
        return self.phase == "decode"

    @property
    def key(self) -> tuple[Any, ...]:
        return ("model energy", self.model, self.phase, self.batch, self.tokens, self.past, self.layers, self.policy)


Row = UnitRow | MemoryRow | ModelRow | ModelMemoryRow | SessionRow | ModelShapeRow | UnitEnergyRow | ModelEnergyRow
KINDS: dict[str, type[Row]] = {
    "unit": UnitRow,
    "memory": MemoryRow,
    "model": ModelRow,
    "model memory": ModelMemoryRow,
    "session": SessionRow,
    "model shape": ModelShapeRow,
    "unit energy": UnitEnergyRow,
    "model energy": ModelEnergyRow,
}


def at_speed(row: Row, speed: Mapping[str, float], provider: str = CPU) -> Row:
    """The row as a machine would have shown it that takes `speed` times as long for this kind of work. Of energy, idle power's part grows
    with the time, and what is above it stays; memory stays whole. A row of before that says no `bound` is a GPU's, which launching kernels
    bounds nearly always, or a CPU's, of which `work` tells."""
    if not isinstance(row, UnitRow | ModelRow | UnitEnergyRow | ModelEnergyRow):
        return row
    before = TOKEN if provider == CUDA else work(row.one_token, row.working_set)
    factor = speed[row.bound or before]
    if isinstance(row, UnitRow | ModelRow):
        return replace(row, latency_ms=row.latency_ms * factor, spread_ms=row.spread_ms * factor)
    run_ms = row.run_ms * factor
    return replace(row, run_ms=run_ms, energy_mj=row.above_idle_mj + row.idle_mw * run_ms / 1e3)


def work(one_token: bool, working_set: str) -> str:
    """What bounds such a run of CPUs (`spec.WORKS`)."""
    if not one_token:
        return TOKENS
    return STREAMED_TOKEN if working_set == "streamed" else TOKEN


def between(x: float, low: float, at_low: float, high: float, at_high: float) -> float:
    """The value at x on the line through (low, at_low) and (high, at_high)."""
    return at_low + (at_high - at_low) * (x - low) / (high - low)


def with_interpolation_errors(rows: Sequence[UnitRow]) -> list[UnitRow]:
    """Rows of one unit, kernel and working set, each inner one of the grid with what its neighbours would have said of it."""
    grid = sorted((row for row in rows if row.tokens > 1), key=lambda row: row.tokens)
    made = [replace(row, interpolation_error=None) for row in rows if row.tokens == 1]
    for place, row in enumerate(grid):
        error = None
        if 0 < place < len(grid) - 1:
            low, high = grid[place - 1], grid[place + 1]
            drawn = between(row.tokens, low.tokens, low.latency_ms, high.tokens, high.latency_ms)
            error = abs(drawn - row.latency_ms) / row.latency_ms
        made.append(replace(row, interpolation_error=error))
    return made
