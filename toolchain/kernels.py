"""The kernel catalogue for ONNX Runtime's CPU and CUDA providers, and which unit may have which kernel.

A new bit-width or runtime op is one new line in CATALOGUE. What a line means in numbers is `quantize/affine.py`; what it means
in nodes is `graph/nodes.py`; whether this runtime computes it right is asked of the runtime itself (`profiler/probe.py`).

One op computes different numbers on different providers, so a line belongs to one provider, and a policy keeps to one provider's lines.

On the CPU:
- MatMulNBits takes 2, 4 and 8 bits only: 3-bit codes ride in a 4-bit container (quality of 3, cost of 4).
- accuracy_level 4 (int8 activations per group) everywhere: level 0 was measured up to 230 times slower.
- A kernel named `w4g32+w8a8` decodes with the first and prefills with the second: int8 dynamic is the fastest with many tokens in flight,
  4 bits with one. Both weights are in memory; an `If` on the token count chooses, and the profile measures its price.
- w8a8 keeps its weights within ±63: ±127 was measured less exact on an AVX2 machine (16-bit sums of u8 × s8 products are suspected).

On CUDA, names end in -fp16:
- MatMulNBits takes the same codes but knows no int8 activations (accuracy_level is ignored there): scales, activations and sums are fp16.
- Their activation says that the whole graph is fp16 (`float_type`), cache included: no Cast between units, and half the bytes of the cache.
- There is no fp32 kernel: GroupQueryAttention has none on CUDA and would run on the CPU, and fp16 loses less than any quantising.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from toolchain.errors import PolicyError
from toolchain.spec import CPU, CUDA, Kernel, Policy, Unit


def _nbits(bits: int, group_size: int, container: int | None = None) -> Kernel:
    return Kernel(f"w{bits}g{group_size}", bits, container or bits, group_size, symmetric=False, activation="int8_group")


def _in_half(kernel: Kernel) -> Kernel:
    """The same codes on CUDA."""
    return replace(kernel, name=f"{kernel.name}-fp16", activation="fp16", provider=CUDA)


CATALOGUE: Mapping[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("fp32", 32, 32, 0, symmetric=True, activation="fp32"),
        Kernel("w8a8", 8, 8, 0, symmetric=True, activation="int8_tensor"),
        _nbits(8, 32),
        _nbits(8, 128),
        _nbits(4, 32),
        _nbits(4, 128),
        _nbits(3, 32, container=4),
        _nbits(2, 32),
        _nbits(2, 128),
        replace(_nbits(4, 32), name="w4g32+w8a8", prefill="w8a8"),
        replace(_nbits(4, 128), name="w4g128+w8a8", prefill="w8a8"),
        Kernel("fp16", 16, 16, 0, symmetric=True, activation="fp16", provider=CUDA),
        _in_half(_nbits(8, 32)),
        _in_half(_nbits(8, 128)),
        _in_half(_nbits(4, 32)),
        _in_half(_nbits(4, 128)),
        _in_half(_nbits(3, 32, container=4)),
        _in_half(_nbits(2, 32)),
        _in_half(_nbits(2, 128)),
    )
}


def offered(provider: str = CPU) -> tuple[str, ...]:
    """Names of a provider's kernels, in catalogue order; () for a provider that the catalogue knows nothing of."""
    return tuple(name for name, kernel in CATALOGUE.items() if kernel.provider == provider)


def full_precision(provider: str = CPU) -> str:
    """Name of the kernel that quantises nothing: fp32 on the CPU, fp16 on CUDA. Raises PolicyError for a provider without kernels."""
    found = next((name for name in offered(provider) if not CATALOGUE[name].quantised), None)
    if found is None:
        raise PolicyError(f"expected provider {CPU} or {CUDA}, whose kernels the catalogue has, got {provider}")
    return found


def float_type(names: Iterable[str]) -> str:
    """ "float16" or "float32": what flows in a graph of these kernels, its cache included."""
    return "float16" if any(CATALOGUE[name].float_type == "float16" for name in names) else "float32"


def parts(kernel: Kernel) -> tuple[Kernel, ...]:
    """The kernel itself; or the one it decodes with and the one it prefills with."""
    return (CATALOGUE[kernel.name.partition("+")[0]], CATALOGUE[kernel.prefill]) if kernel.prefill else (kernel,)


def runs_as(name: str) -> str:
    """The kernel whose node and bytes a kernel shares, so that one measurement serves both: w3g32 runs as w4g32."""
    kernel = CATALOGUE[name]
    wanted = (kernel.container_bits, kernel.group_size, kernel.activation, kernel.prefill)
    return next(
        other.name
        for other in CATALOGUE.values()
        if (other.weight_bits, other.group_size, other.activation, other.prefill) == wanted
    )


def counterpart(name: str, available: Iterable[str]) -> str:
    """The kernel among `available` that has the same codes, or like it none: w4g32 of w4g32-fp16, fp32 of fp16. "" where there is none."""

    def codes(kernel: Kernel) -> tuple[object, ...]:
        kind = (kernel.weight_bits, kernel.container_bits, kernel.group_size, kernel.symmetric) if kernel.quantised else ()
        return (*kind, kernel.prefill)

    available = tuple(available)
    wanted = codes(CATALOGUE[name])
    return name if name in available else next((other for other in available if codes(CATALOGUE[other]) == wanted), "")


def node_op(unit_op: str, kernel: Kernel) -> str:
    """The ONNX op that executes a unit of this op with this kernel."""
    if not kernel.quantised:
        return unit_op
    if unit_op == "Gather":
        return "GatherBlockQuantized"
    return "DynamicQuantizeMatMul" if kernel.activation == "int8_tensor" else "MatMulNBits"


def legal(unit: Unit, kernel: Kernel) -> bool:
    """Whether the catalogue has this kernel for this unit (not yet whether this runtime runs it)."""
    if kernel.prefill:  # worth its memory only where one token and many are in flight in turn
        return unit.role == "linear" and not unit.side and all(legal(unit, part) for part in parts(kernel))
    if unit.op == "Gather" and kernel.quantised:
        if kernel.activation == "int8_tensor" or unit.K % kernel.group_size:
            return False
        # CUDA's GatherBlockQuantized reads the zero points of all rows as one string of bits: each row must end with a byte (else
        # rows from the second on are wrong, by 0.8 of their norm).
        return kernel.provider != CUDA or unit.K // kernel.group_size * kernel.container_bits % 8 == 0
    # A group wider than the layer is all padding: it would cost more than per-row scales and gain nothing.
    return kernel.group_size <= unit.K


def candidates(unit: Unit, available: Iterable[str] = offered()) -> tuple[str, ...]:
    """Names of the kernels a unit may have, in catalogue order, among `available` (default: the CPU's)."""
    allowed = set(available)
    return tuple(name for name, kernel in CATALOGUE.items() if name in allowed and legal(unit, kernel))


def uniform(name: str, units: Sequence[Unit], available: Iterable[str] | None = None) -> Policy:
    """The policy a bare kernel name means: that kernel on every linear, the legal one of the same bits on embedding and head; on an
    embedding that has none, of the next more.

    available: default all of the kernel's provider.

    Raises PolicyError for an unknown name, or a unit with no kernel of these bits.
    """
    if name not in CATALOGUE:
        raise PolicyError(f"expected a kernel among {', '.join(CATALOGUE)}, got {name!r}", "or name a policy file that exists")
    available = offered(CATALOGUE[name].provider) if available is None else tuple(available)
    choice = {}
    for unit in units:
        names = candidates(unit, available)
        wanted = CATALOGUE[name].weight_bits
        enough = [other for other in names if CATALOGUE[other].weight_bits == wanted]
        if unit.op == "Gather":
            enough += [other for other in names if CATALOGUE[other].weight_bits > wanted]
        if name in names:
            choice[unit.name] = name
        elif enough:
            choice[unit.name] = min(enough, key=lambda other: CATALOGUE[other].weight_bits)
        else:
            raise PolicyError(f"unit {unit.name!r} ({unit.op} {unit.K}x{unit.N}) has no {name} kernel on this runtime")
    return Policy.of(choice)


def validate(policy: Mapping[str, str], units: Sequence[Unit], available: Iterable[str] = offered()) -> Policy:
    """Check that a policy names exactly these units and kernels they may have. Raises PolicyError naming the first offence."""
    names = {unit.name for unit in units}
    available = tuple(available)
    if unknown := sorted(set(policy) - names):
        raise PolicyError(f"expected units of this model, got unknown unit {unknown[0]!r}", "type: bittailor units MODEL")
    if missing := sorted(names - set(policy)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PolicyError(f"expected a kernel for every unit, got none for {missing[0]!r}{more}", "type: bittailor units MODEL")
    for unit in units:
        allowed = candidates(unit, available)
        if policy[unit.name] not in allowed:
            raise PolicyError(f"expected a kernel among {', '.join(allowed)} for unit {unit.name!r}, got {policy[unit.name]!r}")
    return Policy.of(policy)


def translated(policy: Mapping[str, str], units: Sequence[Unit], provider: str) -> Policy:
    """What comes nearest to a policy with another provider's kernels: of the same bits, and of those in groups of the same width if any
    has it. Raises PolicyError where a unit has none of its bits.
    """
    choice = {}
    for unit in units:
        kernel = parts(CATALOGUE[policy[unit.name]])[0]
        near = [CATALOGUE[name] for name in candidates(unit, offered(provider)) if not CATALOGUE[name].prefill]
        near = [other for other in near if other.weight_bits == kernel.weight_bits or not (other.quantised or kernel.quantised)]
        if not near:
            raise PolicyError(
                f"unit {unit.name!r} ({unit.op} {unit.K}x{unit.N}) has no kernel of {kernel.weight_bits} bits on {provider}"
            )
        choice[unit.name] = min(near, key=lambda other: other.group_size != kernel.group_size).name
    return Policy.of(choice)


def mean_bits(policy: Mapping[str, str], units: Sequence[Unit]) -> float:
    """Weight bits per parameter, averaged over all units' parameters (scales and zero points not counted)."""
    total = sum(unit.parameters for unit in units)
    return sum(CATALOGUE[policy[unit.name]].weight_bits * unit.parameters for unit in units) / total
