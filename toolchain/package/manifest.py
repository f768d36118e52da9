"""`manifest.yaml`: what a package is, for which device and budget it was cut, what it was predicted to cost, sha256 of every file.

Owns reading, writing and verifying it. Refuses to know how packages are made and measured. Its last line, `digest`, is the sha256 of all
lines before; since they name every file's, it is the package's own: `Package.digest`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolchain.blocks import PRIOR, Share, Speed
from toolchain.errors import DamagedFileError, InputError
from toolchain.files import inside, sha256, write_atomic
from toolchain.kernels import CATALOGUE
from toolchain.package.graphs import check_graphs
from toolchain.package.integrity import MANIFEST as FILE_NAME
from toolchain.package.integrity import REMEDY, YAML_TAIL, check_files, check_names, read_bounded
from toolchain.reading import MOST_YAML_BYTES, plain_yaml_of
from toolchain.session import MODEL_FILES
from toolchain.spec import CPU, FINER, WORKS, Budget, Policy, Unit, Workload

FORMAT = "bittailor package 2"


@dataclass(frozen=True)
class Package:
    """An opened package: its folder and what its manifest says."""

    directory: Path
    data: Mapping[str, Any]

    @property
    def policy(self) -> Policy:
        found: Mapping[str, str] = self.data["policy"]
        if unknown := [name for name in found.values() if name not in CATALOGUE]:
            raise ValueError(f"kernel {unknown[0]!r}, which this version does not know")
        return Policy.of(found)

    @property
    def digest(self) -> str:
        """sha256 of the manifest, and so of the package: 64 hex digits."""
        return str(self.data["digest"])

    @property
    def units(self) -> dict[str, Unit]:
        """What the policy's kernels are for, by name."""
        found = {
            str(name): Unit(str(name), str(one["op"]), int(one["K"]), int(one["N"]), node=str(one["node"]))
            for name, one in self.data["units"].items()
        }
        if wrong := [unit.name for unit in found.values() if unit.op not in ("MatMul", "Gather") or min(unit.K, unit.N) < 1]:
            raise ValueError(f"unit {wrong[0]!r} {self.data['units'][wrong[0]]}")
        if other := sorted(found.keys() ^ self.policy.keys()):
            raise ValueError(f"{other[0]!r} either among its units or in its policy, not in both")
        return found

    @property
    def workload(self) -> Workload:
        return Workload.parse(self.data["workload"])

    @property
    def budget(self) -> Budget | None:
        """The budget it was cut for, or None."""
        found = self.data["budget"]
        return Budget.from_json(found) if found else None

    @property
    def predicted(self) -> Mapping[str, Any]:
        """The cost it was predicted to have (`Cost.to_json`), empty where there was no cost table."""
        found = self.data["predicted"] or {}
        if not all(isinstance(part, Mapping) for name, part in found.items() if name not in ("workload", "device")):
            raise ValueError("predicted values without a spread")
        return dict(found)

    @property
    def speeds(self) -> dict[str, Speed]:
        """Latency → the machine's speed when the cost table was measured, by the kind of work that bounds it, and how the package follows
        it, as far as the table tells; empty without a table."""
        found, follows = self.data.get("reference_ns") or {}, self.data.get("follows") or {}
        try:
            times = {name: (work, float(time)) for name, times in found.items() for work, time in times.items()}
            right = all(work in (*WORKS, *FINER.values()) and 0 < time < math.inf for work, time in times.values())
        except (AttributeError, TypeError, ValueError):
            right = False
        if not right:
            raise ValueError(f"reference_ns {found!r} instead of a positive time for a kind of work ({', '.join(WORKS)})")
        try:
            shares = {name: Share(*(_number(share[part]) for part in ("share", "unknown"))) for name, share in follows.items()}
            right = set(shares) <= set(times)
        except (AttributeError, TypeError, ValueError, KeyError):
            right = False
        if not right:
            raise ValueError(f"follows {follows!r} instead of a share and what is unknown of it, for latencies in reference_ns")
        return {name: Speed(*speed, shares.get(name, PRIOR)) for name, speed in times.items()}

    @property
    def kind(self) -> str:
        """ "decoder", "encoder" or "encoder-decoder"."""
        found = str(self.data["model"]["kind"])
        if found not in MODEL_FILES:
            raise ValueError(f"kind {found!r} instead of one of {', '.join(MODEL_FILES)}")
        return found

    @property
    def provider(self) -> str:
        """The execution provider whose kernels it holds. Packages from before there were two do not say, and mean the CPU's."""
        return str(self.data.get("provider", CPU))

    @property
    def vocabulary(self) -> int:
        return self._size("vocabulary")

    @property
    def context(self) -> int:
        """The longest sequence; of an encoder-decoder the longest source and the longest target."""
        return self._size("context")

    def _size(self, name: str) -> int:
        found = self.data["model"][name]
        if type(found) is not int or not 0 < found < 1 << 31:
            raise ValueError(f"{name} {found!r} instead of a whole number from 1")
        return found


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} instead of a number")
    return float(value)


def write_manifest(directory: Path, data: Mapping[str, Any], units: Sequence[Unit]) -> None:
    """Write the manifest of a folder whose other files are complete; adds the format, the units, every file's sha256 and the digest."""
    files = {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name != FILE_NAME}
    shapes = {unit.name: {"op": unit.op, "K": unit.K, "N": unit.N, "node": unit.node} for unit in units}
    write_atomic(directory / FILE_NAME, manifest_text({"format": FORMAT, **data, "units": shapes, "files": files}))


def manifest_text(data: Mapping[str, Any]) -> bytes:
    """The manifest's bytes, its digest added; a unit is one line."""
    pieces = [
        yaml.safe_dump(
            {key: value}, sort_keys=False, allow_unicode=True, width=160, default_flow_style=None if key == "units" else False
        )
        for key, value in data.items()
        if key != "digest"
    ]
    return YAML_TAIL.append("".join(pieces).encode())


def is_package(directory: Path) -> bool:
    return (directory / FILE_NAME).is_file()


def open_package(directory: Path, verify: bool = True) -> Package:
    """Read a package and hold the folder and its graphs against the manifest (`integrity.py`, `graphs.py`).

    verify False: the manifest alone is read. Raises InputError for another kind of folder, DamagedFileError for a damaged one.
    """
    if not is_package(directory):
        raise InputError(
            f"expected a package folder with {FILE_NAME}, got {directory}", "make one: bittailor export MODEL --out PACKAGE"
        )
    path = inside(directory, FILE_NAME)
    try:
        text = read_bounded(path, MOST_YAML_BYTES)
        if (first := text.partition(b"\n")[0]) != f"format: {FORMAT}".encode():
            raise ValueError(f"a first line {first[:40]!r} instead of 'format: {FORMAT}'")
        digest = YAML_TAIL.digest(text)
        package = Package(directory, {**plain_yaml_of(text.decode()), "digest": digest})
        _ = (
            package.workload,
            package.budget,
            package.vocabulary,
            package.context,
            package.predicted,
            package.speeds,
            package.units,
        )
        files = {str(name): str(digest) for name, digest in package.data["files"].items()}
        check_names(files)
        if missing := [name for name in MODEL_FILES[package.kind] if name not in files]:
            raise ValueError(f"no sha256 of {missing[0]}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"expected a package manifest in {path}, got {type(error).__name__}: {error}", REMEDY) from error
    if verify:
        check_files(directory, files)
        check_graphs(directory, MODEL_FILES[package.kind], files, package.units, package.policy)
    return package
