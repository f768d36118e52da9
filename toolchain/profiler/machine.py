"""What a device's CPU is called, and how large its cache is. Runs on the device: the standard library only."""

from __future__ import annotations

import platform
from pathlib import Path

_INSTRUCTION_SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sme")
_ARM = ("aarch", "arm")
_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Model, family and the instruction sets that decide which kernels run, as the system names them; of ARM, which has no such names,
    maker and part of every kind of core. Lines of another architecture's CPU are an emulator's host: said, and its sets are not ours."""
    machine = platform.machine()
    try:
        blocks = _CPUINFO.read_text().split("\n\n")
    except OSError:
        return platform.processor() or machine
    cores = [
        {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())} for block in blocks
    ]
    fields = cores[0]
    name = fields.get("model name", machine)
    if ("Features" in fields) != machine.startswith(_ARM):
        return f"{machine} emulated on {name}"
    flags = fields.get("flags", fields.get("Features", "")).split()
    sets = " ".join(known for known in _INSTRUCTION_SETS if known in flags)
    if "Features" in fields:
        kinds = dict.fromkeys((core["CPU implementer"], core["CPU part"]) for core in cores if "CPU part" in core)
        return f"{machine} {', '.join(f'implementer {maker} part {part}' for maker, part in kinds)} ({sets})"
    return f"{name} family {fields.get('cpu family', '?')} model {fields.get('model', '?')} ({sets})"


def last_level_cache_bytes() -> int:
    """Size of the largest cache that CPU 0 sees; 32 MiB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1024, "M": 1024**2}.get(text[-1], 1))
    return max(sizes, default=32 * 1024**2)
