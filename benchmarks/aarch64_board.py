"""A Debian arm64 root on this machine, with the bare install in it, as `benchmarks/aarch64.py` wants it. Made once; what is there is kept.

Nothing needs binfmt_misc, which a container seldom has, nor chroot and so root's rights: `qemu-aarch64 -L ROOT` opens what ROOT holds in
place of the same path here, and Python is told that it is the shell script which starts the emulator, so that its children start so too.

    debian/             Debian's packages unpacked (python3, libstdc++6); their install scripts are not run
    bare-<sha256>/      `pip install` of this checkout's wheel without extras, for aarch64, with the desk's onnxruntime and numpy
    <CPU>/python3       the shell script
    <CPU>/cpuinfo       what the CPU says of itself; laid over /proc/cpuinfo, where qemu before 8.1 shows this machine's: an x86 CPU's
                        lines there crash the import of onnxruntime, and another ARM CPU's let it choose instructions that this one lacks
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from toolchain.errors import InputError
from toolchain.files import replace_folder, scratch, sha256, write_atomic
from toolchain.progress import note

CHECKOUT = Path(__file__).resolve().parent.parent
SUITE = "bookworm"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
TYPE = "type: apt-get install qemu-user-static mmdebstrap"
_WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")

_CPUINFO = r"""
import ctypes, mmap, os
value = ctypes.CDLL(None).getauxval
value.restype, value.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
first = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 asimddp "
first += "sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
second = "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh rng bti mte "
second += "ecv afp rpres mte3 sme smei16i64 smef64f64 smei8i32 smef16f32 smeb16f32 smef32f32 smefa64"
features = [name for kind, names in ((16, first), (26, second)) for bit, name in enumerate(names.split()) if value(kind) >> bit & 1]
code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(0xD5380000.to_bytes(4, "little") + 0xD65F03C0.to_bytes(4, "little"))  # mrs x0, midr_el1; ret
midr = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
for number in range(os.cpu_count()):
    print(f"processor\t: {number}\nBogoMIPS\t: 100.00\nFeatures\t: {' '.join(features)}\nCPU implementer\t: {midr >> 24 & 255:#04x}")
    print(f"CPU architecture: 8\nCPU variant\t: {midr >> 20 & 15:#x}\nCPU part\t: {midr >> 4 & 0xFFF:#05x}\nCPU revision\t: {midr & 15}\n")
"""
"""Prints /proc/cpuinfo as Linux writes it on arm64: from AT_HWCAP, AT_HWCAP2 and the CPU's identification register."""


@dataclass(frozen=True)
class Board:
    """The root under one emulated CPU: `run` starts its Python."""

    cpu: str
    folder: Path
    bare: Path

    def run(self, words: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """`python3 *words` there. Raises InputError when it does not end in time."""
        cpuinfo = self.folder / "debian" / "proc" / "cpuinfo"
        write_atomic(cpuinfo, (self.folder / self.cpu / "cpuinfo").read_bytes())
        try:
            return _python(self.folder, self.cpu, words, self.bare, timeout_s)
        except subprocess.TimeoutExpired:
            problem = f"expected an end within {timeout_s:.0f} s under {self.cpu}, got none"
            raise InputError(problem, "give --timeout more") from None


@contextmanager
def boards(folder: Path, cpus: Sequence[str]) -> Iterator[list[Board]]:
    """The root in `folder` under each of these CPUs of qemu; nobody else uses it meanwhile. Raises InputError for what is missing."""
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if emulator is None:
        raise InputError(f"expected {EMULATORS[0]} on the PATH, found none", TYPE)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"expected {folder} to be free, another run uses it", "wait for it, or give another --root") from None
        _unpack(folder / "debian")
        bare = _install(folder)
        for cpu in cpus:
            _identify(folder, cpu, emulator)
        yield [Board(cpu, folder, bare) for cpu in cpus]


def _unpack(debian: Path) -> None:
    if (debian / "usr/bin/python3").exists():
        return
    if shutil.which("mmdebstrap") is None:
        raise InputError("expected mmdebstrap on the PATH, found none", TYPE)
    note(f"unpacking Debian {SUITE} for arm64 into {debian}")
    with replace_folder(debian, "usr/bin/python3") as out:
        kind = ["--mode=chrootless", "--variant=extract", "--architectures=arm64", "--include=python3,libstdc++6"]
        _done(["mmdebstrap", *kind, SUITE, str(out)], "mmdebstrap to unpack Debian")


def _install(folder: Path) -> Path:
    """The bare install of this checkout: made anew when its wheel, or the desk's onnxruntime or numpy, is another."""
    python = (folder / "debian/usr/bin/python3").readlink().name.removeprefix("python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    with scratch() as made:
        _done([*pip, "wheel", "--no-deps", "--wheel-dir", str(made), str(CHECKOUT)], "pip to build this checkout's wheel")
        (wheel,) = made.glob("*.whl")
        runtime = [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")]
        bare = folder / f"bare-{sha256(wheel)[:12]}-{'-'.join(runtime).replace('==', '-')}"
        if bare.is_dir():
            return bare
        for old in folder.glob("bare-*"):
            shutil.rmtree(old)
        note(f"installing {wheel.name} and {', '.join(runtime)} for aarch64, Python {python}")
        with replace_folder(bare, "toolchain/__init__.py") as out:
            kind = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
            kind += [f"--platform={name}" for name in _WHEELS]
            _done([*pip, "install", *kind, "--target", str(out), str(wheel), *runtime], "pip to install for aarch64")
    return bare


def _identify(folder: Path, cpu: str, emulator: str) -> None:
    """Write CPU/python3 and CPU/cpuinfo. Raises InputError for a CPU that this qemu does not have."""
    script, root = folder / cpu / "python3", folder / "debian"
    emulated = f"{emulator} -cpu {shlex.quote(cpu)} -L {shlex.quote(str(root))} -0 {shlex.quote(str(script))}"
    python = f"-E {shlex.quote(f'PYTHONHOME={root}/usr')} {shlex.quote(f'{root}/usr/bin/python3')}"
    write_atomic(script, f'#!/bin/sh\nexec {emulated} {python} "$@"\n')
    script.chmod(0o755)
    done = _python(folder, cpu, ["-c", _CPUINFO], None, 60)
    if done.returncode or not re.search(r"^Features\s*: .*asimd", done.stdout, re.MULTILINE):
        why = (done.stderr.strip().splitlines() or ["it says nothing of itself"])[-1]
        raise InputError(f"expected a CPU that {emulator} knows, got {cpu!r}: {why}", f"type: {Path(emulator).name} -cpu help")
    write_atomic(folder / cpu / "cpuinfo", done.stdout)


def _python(folder: Path, cpu: str, words: Sequence[str], bare: Path | None, timeout_s: float) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if bare:
        environment["PYTHONPATH"] = str(bare)
    command = [str(folder / cpu / "python3"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def _done(words: Sequence[str], what: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.startswith(("E:", "ERROR", "error"))]
        last = (lines or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"expected {what}, got: {last[:300]}")
