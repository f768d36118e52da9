"""The nouns that cross every border: frozen, standard library only, round-trip through JSON, hashable.

A cost (predicted) and a measurement (observed) are different types on purpose: nothing that takes one accepts the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from toolchain.errors import InputError, PolicyError

RESOURCES = ("peak_memory_bytes", "compute_flop", "latency_ms", "energy_mj")
"""The four limits of a budget, in the order of the constraint encoding (MetaQuantLLM, section 4.2)."""

LIMITS = (*RESOURCES, "first_token_ms")
"""What a budget may limit: the time to the first token of a decoder has no place in the encoding."""

CHECKED = (*LIMITS, "latency_p95_ms")
"""What `check` may hold besides: the 95th percentile of single runs is measured only, nothing predicts it."""

DERIVED_BUDGETS = ("low", "medium", "high", "promise")
"""Names of budgets that come from a device's cost table, and so speak of the machine as it was when the table was measured."""

_BUDGET_KEYS = {  # what people write in a budget file or on the command line → (resource, factor)
    "memory_mb": ("peak_memory_bytes", 1e6),
    "gflop": ("compute_flop", 1e9),
    **{name: (name, 1.0) for name in CHECKED},
}


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
"""onnxruntime's names for the execution providers that the catalogue has kernels of."""


@dataclass(frozen=True)
class Kernel:
    """One way the runtime executes a unit. The profiler measures it, the supernet trains it, the exporter writes it.

    weight_bits      what the codes need (3 for w3g32)
    container_bits   what the runtime stores per code (4 for w3g32); 32 for fp32, 16 for fp16
    group_size       inputs that share one scale; 0 = one scale per output row, and for fp32 and fp16
    symmetric        zero point fixed in the middle of the range
    activation       "fp32" | "fp16" (so are scales and sums) | "int8_group" (int8 per row and group, inside MatMulNBits)
                     | "int8_tensor" (uint8 per tensor)
    prefill          name of another kernel that runs instead while several tokens are in flight, its weights stored besides; or ""
    provider         the execution provider whose numbers these are
    """

    name: str
    weight_bits: int
    container_bits: int
    group_size: int
    symmetric: bool
    activation: str
    prefill: str = ""
    provider: str = CPU

    @property
    def quantised(self) -> bool:
        """Whether there are codes: False for fp32 and fp16."""
        return self.container_bits < 16

    @property
    def float_type(self) -> str:
        """ "float16" or "float32": numpy's name for its scales and for what flows between its unit and the others."""
        return "float16" if self.activation == "fp16" else "float32"

    @property
    def levels(self) -> int:
        """Number of codes the kernel uses (127 for int8 dynamic, which keeps to ±63: see `kernels.py`)."""
        return 127 if self.activation == "int8_tensor" else 2**self.weight_bits


@dataclass(frozen=True)
class Unit:
    """One thing that gets a kernel: a linear layer, a fused group of them (q,k,v), the embedding, the head.

    op         "MatMul" or "Gather"
    K, N       inner width (the axis that groups run along) and number of rows: a linear maps K → N, an embedding has N rows of K
    role       "linear" | "embedding" | "head"
    modules    the model's own names of the layers inside, in the order their rows are stacked
    node       name of the ONNX node; weight: its fp32 initializer
    tied_to    the unit whose tensor this one is (embedding ↔ head), or ""
    side       "source" runs once, on the source's tokens (an encoder, cross-attention's keys and values), "target" on each generated
               token of an encoder-decoder; "" runs on whatever is in flight
    """

    name: str
    op: str
    K: int
    N: int
    role: str = "linear"
    modules: tuple[str, ...] = ()
    node: str = ""
    weight: str = ""
    tied_to: str = ""
    side: str = ""

    @property
    def parameters(self) -> int:
        return self.K * self.N

    @property
    def shape(self) -> tuple[str, int, int]:
        """What a row of the cost table is keyed by."""
        return (self.op, self.K, self.N)


TOKEN, STREAMED_TOKEN, TOKENS = "token", "streamed token", "tokens"
WORKS = (TOKEN, STREAMED_TOKEN, TOKENS)
"""What bounds a run: one token whose weights lie in the cache, one token whose weights come from memory, several tokens. A machine whose
neighbours are at work does not slow down alike at all three."""

FINER = {TOKEN: "model token", TOKENS: "model tokens"}
"""Kind of work → the reference that a small model follows more closely than that kind's own. Tables and devices of before have none."""


@dataclass(frozen=True)
class Phase:
    """One run of the model within a workload: `tokens` of each of `batch` sequences at once, after `past` earlier ones in the cache.

    prompt: how many of the past are the prompt. An encoder-decoder keeps them apart, as its source; what a position costs to attend to
    hardly depends on it, so phases that differ in nothing else are equal.
    """

    name: str
    batch: int
    tokens: int
    past: int = 0
    prompt: int = field(default=0, compare=False)

    @property
    def in_flight(self) -> int:
        """Rows that a linear layer multiplies (M)."""
        return self.batch * self.tokens

    @property
    def resource(self) -> str:
        """Which latency its time is: of a prefill the first token's."""
        return "first_token_ms" if self.name == "prefill" else "latency_ms"


MOST_TOKENS = 1 << 24
"""Of one inference: more than any model's context, and what a stranger's manifest may have allocated."""


@dataclass(frozen=True)
class Workload:
    """What one inference is: `generate:P+N` (prefill of P tokens, N decode steps) or `encode:BxT`. Every cost is for one."""

    kind: str
    batch: int
    prompt_tokens: int
    new_tokens: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read `generate:64+32` or `encode:1x128`. Raises InputError."""
        if match := re.fullmatch(r"generate:([0-9]{1,9})\+([0-9]{1,9})", text):
            prompt, new = int(match[1]), int(match[2])
            if prompt >= 1 and new >= 1 and prompt + new <= MOST_TOKENS:
                return cls("generate", 1, prompt, new)
        elif match := re.fullmatch(r"encode:([0-9]{1,9})x([0-9]{1,9})", text):
            batch, tokens = int(match[1]), int(match[2])
            if batch >= 1 and tokens >= 1 and batch * tokens <= MOST_TOKENS:
                return cls("encode", batch, tokens, 0)
        raise InputError(
            f"expected a workload as generate:P+N or encode:BxT with positive numbers, {MOST_TOKENS} tokens at most, got {text!r}",
            "type for example: --workload generate:64+32",
        )

    def __str__(self) -> str:
        if self.kind == "generate":
            return f"generate:{self.prompt_tokens}+{self.new_tokens}"
        return f"encode:{self.batch}x{self.prompt_tokens}"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """prefill of P tokens and decode of one, its cache half way through the N steps; or encode of B sequences of T tokens."""
        if self.kind == "generate":
            P = self.prompt_tokens
            return (Phase("prefill", 1, P), Phase("decode", 1, 1, P + self.new_tokens // 2, P))
        return (Phase("encode", self.batch, self.prompt_tokens),)

    @property
    def positions(self) -> int:
        """Positions of the cache that one inference fills, or tokens of one sequence of an encoder."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Policy(Mapping[str, str]):
    """Unit name → kernel name, for a whole model: the only "architecture dict". An immutable mapping."""

    items_: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, mapping: Mapping[str, str]) -> Policy:
        return cls(tuple(sorted(mapping.items())))

    def __getitem__(self, unit: str) -> str:
        try:
            return self._lookup[unit]
        except KeyError:
            raise PolicyError(f"the policy has no kernel for unit {unit!r}") from None

    def __iter__(self) -> Iterator[str]:
        return (unit for unit, _ in self.items_)

    def __len__(self) -> int:
        return len(self.items_)

    @property
    def _lookup(self) -> dict[str, str]:
        cached = self.__dict__.get("_cache")
        if cached is None:
            cached = dict(self.items_)
            object.__setattr__(self, "_cache", cached)
        return cached

    def __hash__(self) -> int:
        return hash(self.items_)

    def to_json(self) -> dict[str, Any]:
        return {"units": dict(self.items_)}


@dataclass(frozen=True)
class Estimate:
    """A predicted number: value and spread (the largest error left when a measured model predicts another), in the unit of its field.

    note: what the number rests on besides measurements of this device, if anything.
    """

    value: float | None
    spread: float | None = None
    reason: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        if self.value is None:
            return {"value": None, "reason": self.reason}
        return {"value": self.value, "spread": self.spread, **({"note": self.note} if self.note else {})}


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one policy for one workload on one device. Never a measurement.

    latency_ms is per generated token (generate) or per inference (encode); first_token_ms is the prefill (generate only).
    compute_flop and energy_mj are for one whole inference of the workload.
    """

    latency_ms: Estimate
    first_token_ms: Estimate
    peak_memory_bytes: Estimate
    package_bytes: Estimate
    compute_flop: Estimate
    energy_mj: Estimate
    workload: Workload
    device: str

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            item.name: getattr(self, item.name).to_json() for item in fields(self) if item.name not in ("workload", "device")
        }
        return {**out, "workload": str(self.workload), "device": self.device}


@dataclass(frozen=True)
class Measurement:
    """Observed: median of `trials`, spread = half the distance between their 10th and 90th percentile, n = number of trials.

    `value` is None where nothing could measure it; `reason` says why. `valid` is False for fewer than two clean trials.
    """

    value: float | None
    spread: float | None = None
    n: int = 0
    valid: bool = False
    trials: tuple[float, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "trials": list(self.trials)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """What `to_json` gave. Raises KeyError, TypeError, ValueError for anything else."""
        return cls(**{**data, "trials": tuple(map(float, data["trials"]))})


@dataclass(frozen=True)
class Budget:
    """Upper limits for one inference of a workload. An absent limit is None: absent, not infinite."""

    peak_memory_bytes: float | None = None
    compute_flop: float | None = None
    latency_ms: float | None = None
    energy_mj: float | None = None
    first_token_ms: float | None = None
    latency_p95_ms: float | None = None
    name: str = "custom"

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, in the order of CHECKED."""
        return {name: value for name in CHECKED if (value := getattr(self, name)) is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], name: str = "custom") -> Budget:
        """Read {latency_ms, memory_mb | peak_memory_bytes, gflop | compute_flop, energy_mj}. Raises InputError."""
        values: dict[str, float] = {}
        for key, raw in data.items():
            if key in ("name", "workload"):
                continue
            if key not in _BUDGET_KEYS:
                raise InputError(f"expected a budget with keys among {', '.join(_BUDGET_KEYS)}, got {key!r}")
            resource, factor = _BUDGET_KEYS[key]
            try:
                value = float("nan") if isinstance(raw, bool) or not isinstance(raw, int | float) else float(raw * factor)
            except OverflowError:  # a whole number that is no float
                value = float("inf")
            if not 0 < value < float("inf"):
                raise InputError(f"expected a positive finite number for the limit {key}, got {raw!r}")
            values[resource] = value
        if not values:
            raise InputError("expected a budget with at least one limit, got none", "type for example: --memory-mb 100")
        return cls(**values, name=str(data.get("name", name)))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **self.limits}


@dataclass(frozen=True)
class Verdict:
    """One limit held against one measurement: "within", "over" or "could not tell"."""

    name: str
    limit: float
    measured: float | None
    low: float | None
    high: float | None
    verdict: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Device:
    """One file in `hardware/`: how to reach a device, what runs there, what measures its energy. Says nothing about models.

    host, user, port, identity, known_hosts   what `ssh` is told; 0 and "" leave it to ssh's own configuration
    serial                                    which of several devices `adb` is to take
    python, folder, agent                     on the device: interpreter, the agent's folder, an agent that is installed there; "" = usual
    """

    name: str
    title: str = ""
    transport: str = "local"
    provider: str = CPU
    threads: int = 0
    meter: str = "none"
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    host: str = ""
    user: str = ""
    port: int = 0
    identity: str = ""
    known_hosts: str = ""
    serial: str = ""
    python: str = ""
    folder: str = ""
    agent: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.transport, self.provider, self.threads, self.meter))

    @property
    def at_hand(self) -> bool:
        """Whether it is this very process's machine and Python: nothing needs to be sent, and the agent is a child process."""
        return self.transport == "local" and not self.folder
