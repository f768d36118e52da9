"""`manifest.yaml`: what a package is, for which device and budget it was cut, what it was predicted to cost, sha256 of every file.

Owns reading, writing and verifying it. Refuses to know how packages are made and measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolchain.errors import DamagedFileError, InputError
from toolchain.files import inside, sha256, write_atomic
from toolchain.kernels import CATALOGUE
from toolchain.reading import read_yaml
from toolchain.session import MODEL_FILES
from toolchain.spec import CPU, WORKS, Budget, Policy, Workload

FORMAT = "bittailor package 1"
FILE_NAME = "manifest.yaml"


@dataclass(frozen=True)
class Package:
    """An opened package: its folder and what its manifest says."""

    directory: Path
    data: Mapping[str, Any]

    @property
    def policy(self) -> Policy:
        found: Mapping[str, str] = self.data["policy"]
        if not found or (unknown := [name for name in found.values() if name not in CATALOGUE]):
            raise ValueError(f"kernel {unknown[0]!r}, which this version does not know" if found else "no policy")
        return Policy.of(found)

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
    def reference_ns(self) -> dict[str, tuple[str, float]]:
        """Latency → (the kind of work that bounds it, its reference's time when the cost table was measured); empty without a table."""
        found = self.data.get("reference_ns") or {}
        try:
            times = {name: (work, float(time)) for name, times in found.items() for work, time in times.items()}
            right = all(work in WORKS and 0 < time < math.inf for work, time in times.values())
        except (AttributeError, TypeError, ValueError):
            right = False
        if not right:
            raise ValueError(f"reference_ns {found!r} instead of a positive time for a kind of work ({', '.join(WORKS)})")
        return times

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


def write_manifest(directory: Path, data: Mapping[str, Any]) -> None:
    """Write the manifest of a folder whose other files are complete; adds the format and every file's sha256."""
    files = {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name != FILE_NAME}
    text = yaml.safe_dump({"format": FORMAT, **data, "files": files}, sort_keys=False, allow_unicode=True, width=120)
    write_atomic(directory / FILE_NAME, text)


def is_package(directory: Path) -> bool:
    return (directory / FILE_NAME).is_file()


def open_package(directory: Path, verify: bool = True) -> Package:
    """Read a package and verify its files' sha256. Raises InputError for another kind of folder, DamagedFileError for a damaged one."""
    if not is_package(directory):
        raise InputError(
            f"expected a package folder with {FILE_NAME}, got {directory}", "make one: bittailor export MODEL --out PACKAGE"
        )
    path = inside(directory, FILE_NAME)
    remedy = "export the package again"
    try:
        data = read_yaml(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"no format {FORMAT!r}")
        package = Package(directory, data)
        _ = (
            package.policy,
            package.workload,
            package.budget,
            package.vocabulary,
            package.context,
            package.predicted,
            package.reference_ns,
        )
        files = {str(name): str(digest) for name, digest in data["files"].items()}
        if missing := [name for name in MODEL_FILES[package.kind] if name not in files]:
            raise ValueError(f"no sha256 of {missing[0]}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"expected a package manifest in {path}, got {type(error).__name__}: {error}", remedy) from error
    for name, digest in files.items() if verify else ():
        file = inside(directory, name)
        if not file.is_file():
            raise DamagedFileError(f"expected {name} in {directory}, which the manifest lists, found none", remedy)
        if sha256(file) != digest:
            raise DamagedFileError(f"expected {name} in {directory} to have the sha256 of the manifest, got another", remedy)
    return package
