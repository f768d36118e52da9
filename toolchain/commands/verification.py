"""`bittailor verify`: a package and its sealed report, without a device: nothing is measured, everything is checked again.

    files     every sha256, no link, no other file; the graphs' units, kernels and data as the manifest says; they load in onnxruntime
    report    sealed for this very package; its medians are those of its trials, its verdicts what these trials give today
    signature by the public key that is given

Who changed trials *and* digests is not found out by that: the signature is for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isclose
from pathlib import Path
from typing import Any

from toolchain import check, ci
from toolchain.commands import acceptance
from toolchain.errors import DamagedFileError, InputError
from toolchain.hardware import has_provider
from toolchain.package.integrity import SEAL
from toolchain.package.manifest import Package, open_package
from toolchain.package.seal import Seal, read_seal
from toolchain.profiler.transports.replies import plain
from toolchain.session import MODEL_FILES, open_session
from toolchain.spec import Verdict

_REMEDY = "type: bittailor check PACKAGE --seal"


@dataclass(frozen=True)
class Verified:
    """A package that is what its manifest says, and what its sealed report (None: it has none) comes to."""

    package: Package
    verdict: str
    report: Mapping[str, Any] | None
    loads: str
    """ "yes", or why it was not tried."""
    signature: str
    """ "of KEY: comment", or why nobody knows."""
    as_sealed: tuple[str, ...] = ()
    """Limits that are taken as the report states them: what they were held against (a baseline, a text) is not in the package."""
    not_held: tuple[str, ...] = ()
    """Limits of the package's own budget that the report does not hold, or holds at a looser value: whatever it says, that is open."""

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "digest": self.package.digest,
            "files": sorted(self.package.data["files"]),
            "loads": self.loads,
            "sealed": self.report is not None,
            "signature": self.signature,
            "as_sealed": list(self.as_sealed),
            "not_held": list(self.not_held),
            "report": self.report,
        }


def verify(directory: Path, public_key: str | None = None) -> Verified:
    """Check a package and its sealed report again. Without a report the verdict is "could not tell".

    Raises DamagedFileError for files, graphs or a report that are not what they should be, InputError for a signature that is not.
    """
    package = open_package(directory)
    loads = _loads(package)
    seal = read_seal(package)
    if seal is None:
        if public_key:
            raise InputError(f"expected a signed {SEAL} in {directory}, found none", f"{_REMEDY} --sign-with minisign:KEY")
        return Verified(package, check.COULD_NOT_TELL, None, loads, "none: there is no sealed report")
    verdict, taken, report = _recomputed(package, seal)
    open_ = _not_held(package, report)
    if open_ and verdict == check.WITHIN:
        verdict = check.COULD_NOT_TELL
    return Verified(package, verdict, report, loads, _signature(seal, public_key), taken, open_)


def _not_held(package: Package, report: Mapping[str, Any]) -> tuple[str, ...]:
    """Limits of the manifest that no row of the report is as tight as: somebody typed others."""
    held = {row["name"]: row["limit"] for row in report["limits"]}
    limits = package.budget.limits if package.budget else {}
    return tuple(name for name, limit in limits.items() if not held.get(name, inf) <= limit)


def _loads(package: Package) -> str:
    here = has_provider(package.provider)
    if not here.usable:
        return f"not tried: {here.reason}"
    for name in MODEL_FILES[package.kind]:
        open_session(package.directory, 1, package.provider, name=name)
    return "yes"


def _signature(seal: Seal, public_key: str | None) -> str:
    if public_key:
        return f"of {public_key}: {seal.signed_by(public_key)}"
    return "none" if seal.signature is None else "there is one, not checked: type --public-key KEY"


def _recomputed(package: Package, seal: Seal) -> tuple[str, tuple[str, ...], Mapping[str, Any]]:
    """(the verdict that the report's own trials give, if it is the one it states; limits taken as stated; the report). Raises
    DamagedFileError."""
    path = package.directory / SEAL
    try:
        report = plain(seal.report)
        _check_subject(package, report)
        stated = [_stated(row) for row in report["limits"]]
        held = acceptance.judged_again(package, report)
        for verdict in held:
            if not any(_same(verdict, row) for row in stated):
                said = next((row.verdict for row in stated if row.name == verdict.name), "nothing")
                gives = f"{verdict.name}: its trials give {verdict.verdict!r}"
                raise ValueError(f"{gives}, it says {said!r}" if said != verdict.verdict else f"{gives}, with other bounds")
        names = {verdict.name for verdict in held}
        taken = tuple(row for row in stated if row.name not in names)
        found = check.overall([*held, *taken])
        if report["verdict"] != found:
            raise ValueError(f"verdict {report['verdict']!r}, its limits give {found!r}")
        _ = (ci.junit(report), ci.markdown(report))  # what cannot be shown is no report
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, InputError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedFileError(f"expected a report in {path} that its own trials bear out, got {said}", _REMEDY) from error
    return found, tuple(row.name for row in taken), report


def _same(found: Verdict, stated: Verdict) -> bool:
    """Whether both say the same. The last digits of logarithms are the C library's, and the words of a reason the version's."""
    numbers = [(found.limit, stated.limit), (found.measured, stated.measured), (found.low, stated.low), (found.high, stated.high)]
    alike = all(a == b or (a is not None and b is not None and isclose(a, b, rel_tol=1e-9)) for a, b in numbers)
    return alike and (found.name, found.verdict) == (stated.name, stated.verdict)


def _stated(row: Mapping[str, Any]) -> Verdict:
    """Raises TypeError, ValueError for what is no verdict."""
    found = Verdict(**row)
    numbers = (found.limit, *(part for part in (found.measured, found.low, found.high) if part is not None))
    texts = (found.name, found.verdict, found.reason)
    if not (all(type(part) in (int, float) for part in numbers) and all(isinstance(part, str) for part in texts)):
        raise ValueError(f"{found.name!r} among its limits, which is none")
    return found


def _check_subject(package: Package, report: Mapping[str, Any]) -> None:
    """Raise ValueError where the report speaks of another package, workload, provider or budget than the manifest."""
    evidence = report["evidence"]
    expected = {
        "package_digest": package.digest,
        "workload": str(package.workload),
        **({"budget": package.data["budget"]} if evidence["budget_from"] == "manifest" else {}),
    }
    for name, value in expected.items():
        if evidence[name] != value:
            raise ValueError(f"{name} {evidence[name]!r}, the manifest says {value!r}")
    if evidence["device"]["provider"] != package.provider:
        raise ValueError(f"provider {evidence['device']['provider']!r}, the manifest says {package.provider!r}")
    if report["predicted"] != package.data["predicted"]:
        raise ValueError("another prediction than the manifest's")
