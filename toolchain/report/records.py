"""What `check --json` and `evaluate --json` wrote, read back as a stranger's input, and which package each file speaks of.

Owns the reading and the matching. Refuses to know how anything was measured and how it is drawn.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.check import COULD_NOT_TELL, OVER, WITHIN
from toolchain.errors import InputError
from toolchain.package.manifest import Package
from toolchain.reading import read_json
from toolchain.spec import LIMITS, RESOURCES

METRICS = {"perplexity": "lower", "cosine": "higher"}
"""What `evaluate` measures → which is better. A decoder has a perplexity, an encoder the cosine to its full-precision model."""
_SEEN = tuple(dict.fromkeys((*RESOURCES, *LIMITS)))


@dataclass(frozen=True)
class Record:
    """One file. kind "check" or "evaluate"; `subject` is the package or model as it was typed there; `said` what we keep of it."""

    path: Path
    kind: str
    subject: str
    said: Mapping[str, Any]


def read(path: Path) -> Record:
    """Read one file. Raises InputError naming it, for what is neither report, and what `reading.read_json` refuses."""
    try:
        data = read_json(path)
        if isinstance(data, dict) and isinstance(data.get("report"), dict):  # as `check --seal` puts it into a package
            data = data["report"]
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__} instead of an object")
        if "limits" in data and "measured" in data:
            return Record(path, "check", _text(data, "package"), _checked(data))
        if metric := next((name for name in METRICS if name in data), None):
            return Record(path, "evaluate", _text(data, "what"), _evaluated(data, metric))
        raise ValueError(f"the keys {', '.join(sorted(map(str, data)))[:80] or 'none'}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"expected a report that check or evaluate wrote in {path}, got {what}",
            "type: bittailor check PACKAGE --json > FILE, or bittailor evaluate PACKAGE --text FILE --json > FILE",
        ) from error


def match(records: Sequence[Record], packages: Sequence[Package]) -> tuple[list[list[Record]], list[Record]]:
    """(the records of each package, those of the packages' full-precision model).

    A record is a package's if it names its folder, or, from elsewhere, a folder of that name. Raises InputError for a record of none or
    of several, for two of one kind on one package, and as `refuse_another`: a check repeats the prediction of the manifest it read.
    """
    found: list[list[Record]] = [[] for _ in packages]
    references: list[Record] = []
    sources = {str(package.data["model"]["source"]) for package in packages}
    for record in records:
        here = [index for index, package in enumerate(packages) if _same_folder(record.subject, package.directory)]
        named = [index for index, package in enumerate(packages) if _name(record.subject) == _name(package.directory)]
        candidates = here or named
        if len(candidates) > 1 and record.kind == "check":
            candidates = [index for index in candidates if packages[index].predicted == record.said["predicted"]]
        if not candidates and record.kind == "evaluate" and record.subject in sources:
            references.append(record)
            continue
        if len(candidates) != 1:
            raise InputError(
                f"expected in {record.path} a report of one of the packages given, got one of {record.subject!r},"
                f" which {'is none' if not candidates else 'may be several'} of them",
                "name that package too, or leave this file out",
            )
        index = candidates[0]
        if record.kind == "check":
            refuse_another(record, packages[index])
        if twice := [other for other in found[index] if other.kind == record.kind]:
            raise InputError(f"expected one {record.kind} report of each package, got {twice[0].path} and {record.path}")
        found[index].append(record)
    return found, references


def refuse_another(record: Record, package: Package) -> None:
    """Raise InputError for a check of another package of that name, or on another device than the package was cut for."""
    if record.said["predicted"] != package.predicted:
        raise InputError(
            f"expected in {record.path} a check of {package.directory} as it is, got one of another package",
            f"type: bittailor check {package.directory} --json > {record.path}",
        )
    if (device := record.said["device"]) != package.data["device"]:
        raise InputError(
            f"expected in {record.path} a check on {package.data['device']!r}, the device that {package.directory} was cut for,"
            f" got one on {device!r}"
        )


def _checked(data: Mapping[str, Any]) -> dict[str, Any]:
    measured = {}
    for name in _SEEN:
        if (seen := data["measured"].get(name)) is not None:
            value = _number(seen, "value")
            reason = str(seen.get("reason") or ("not measured" if value is None else ""))
            measured[name] = {
                "value": value,
                "spread": _number(seen, "spread"),
                "n": int(seen.get("n", 0)),
                "valid": seen.get("valid") is True,
                "reason": reason,
            }
    return {
        "device": _device(_text(data, "device")),
        "verdict": _verdict(data),
        "limits": [_limit(limit) for limit in data["limits"]],
        "measured": measured,
        "predicted": dict(data.get("predicted") or {}),
    }


def _device(typed: str) -> str:
    """Its name, of a name or a file in hardware/."""
    return Path(typed).stem if typed.endswith((".yaml", ".yml")) else typed


def _limit(limit: Mapping[str, Any]) -> dict[str, Any]:
    value = _number(limit, "limit")
    if value is None or value <= 0:
        raise ValueError(f"the limit {value!r} on {limit['name']}")
    numbers = {name: _number(limit, name) for name in ("measured", "low", "high")}
    return {
        "name": _text(limit, "name"),
        "limit": value,
        **numbers,
        "verdict": _verdict(limit),
        "reason": str(limit.get("reason") or ""),
    }


def _evaluated(data: Mapping[str, Any], metric: str) -> dict[str, Any]:
    value = _number(data, metric)
    if value is None or (metric == "perplexity" and value <= 0):
        raise ValueError(f"the {metric} {value!r}")
    texts = {name: _text(data, name) for name in ("text", "text_sha256")}
    return {"metric": metric, "value": value, "tokens": int(data["tokens"]), "window": int(data["window"]), **texts}


def _verdict(data: Mapping[str, Any]) -> str:
    if data["verdict"] not in (WITHIN, OVER, COULD_NOT_TELL):
        raise ValueError(f"the verdict {data['verdict']!r}")
    return str(data["verdict"])


def _number(data: Mapping[str, Any], name: str) -> float | None:
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} {value!r} instead of a number")
    return float(value)


def _text(data: Mapping[str, Any], name: str) -> str:
    if not isinstance(data[name], str):
        raise ValueError(f"{name} {data[name]!r} instead of text")
    return str(data[name])


def _same_folder(subject: str, directory: Path) -> bool:
    return os.path.abspath(subject) == os.path.abspath(directory)


def _name(folder: str | Path) -> str:
    return os.path.basename(os.path.abspath(folder))
