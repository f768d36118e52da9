"""What runs in a phase of a workload, how often, and on how many tokens: counted from shapes, nothing measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from toolchain.kernels import CATALOGUE
from toolchain.quantize.packing import packed_bytes
from toolchain.spec import Phase, Unit, Workload


def working_set(units: Iterable[Unit], kernel: str, cache_bytes: int) -> str:
    """Whether a model whose units all took `kernel` streams its weights from memory between two uses of one unit."""
    units = tuple(units)
    return working_set_of(units, dict.fromkeys((unit.name for unit in units), kernel), cache_bytes)


def working_set_of(units: Iterable[Unit], policy: Mapping[str, str], cache_bytes: int) -> str:
    """The same of a model under a policy."""
    total = sum(packed_bytes(unit, CATALOGUE[policy[unit.name]]) for unit in units if unit.op != "Gather")
    return "streamed" if total > cache_bytes else "cached"


def runs(phase: Phase, workload: Workload) -> int:
    """How often a phase runs in one inference: decoding once for every new token, the others once."""
    return workload.new_tokens if phase.name == "decode" else 1


def tokens_in_flight(unit: Unit, phase: Phase) -> int:
    """Rows that a unit multiplies in a phase; 0: it does not run. A decoder's head sees the last position only (`graph/decoder.py`).

    An encoder-decoder's prefill is its encoder and the first target token.
    """
    if unit.side == "source":
        return 0 if phase.name == "decode" else phase.in_flight
    one = unit.side == "target" or unit.role == "head"
    return phase.batch if one and phase.name == "prefill" else phase.in_flight


def flops(units: Iterable[Unit], workload: Workload, layers: int, width: int, encoder_layers: int = 0) -> float:
    """Floating-point operations of one inference: 2·K·N per token of every linear, plus 4·width per attended pair and layer.

    The head works on the last position of a prefill and on every generated one. A multiply-add counts two, whatever its number format;
    `width` is heads × head width. Norms and activations (below 1%) are left out. encoder_layers: of an encoder-decoder, whose source
    attends to itself, and each of whose target tokens attends to the source and to the target so far.
    """
    units = tuple(units)
    head = sum(2.0 * unit.parameters for unit in units if unit.role == "head")
    linear = sum(2.0 * unit.parameters for unit in units if unit.op != "Gather") - head
    attended = 4.0 * width * layers
    if workload.kind == "encode":
        tokens = workload.prompt_tokens
        return workload.batch * (tokens * (linear + head) + attended * tokens * tokens)
    if encoder_layers:
        P, steps = workload.prompt_tokens, workload.new_tokens + 1
        source = sum(2.0 * unit.parameters for unit in units if unit.side == "source")
        attended = encoder_layers * P * P + layers * (steps * P + steps * (steps + 1) / 2)
        return P * source + steps * (linear - source + head) + 4.0 * width * attended
    total = workload.positions
    return total * linear + (workload.new_tokens + 1) * head + attended * total * (total + 1) / 2
