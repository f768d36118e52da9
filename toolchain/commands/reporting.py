"""`bittailor report`: packages, what was measured of them and what was predicted, as one JSON object that the page draws and nothing else.

Owns the object's layout and the reasons for what is missing. Packages are compared only with those of the same model, device and workload
(a group); qualities only if measured on the same text. Refuses to measure, and to know how anything is drawn.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toolchain
from toolchain.errors import InputError, require
from toolchain.files import write_atomic
from toolchain.package.manifest import FILE_NAME, Package, open_package
from toolchain.package.seal import read_seal
from toolchain.progress import note
from toolchain.report import comparison, manifests, records
from toolchain.report.comparison import COSTS, no_breakdown
from toolchain.report.contents import layers
from toolchain.report.records import METRICS, Record

if TYPE_CHECKING:
    from toolchain.commands.foresight import Foresight

FORMAT = "bittailor report 1"
NOT_CHECKED = "not checked"
SEAL = "seal.json"
"""What `check --seal` calls a report that it puts into the package."""
BESIDE = "supernet"
"""What quickstart calls it: looked for beside a package where no --supernet is given."""


def report(
    folders: Sequence[Path], reports: Sequence[Path], supernet: Path | None, profiles: str | None, out: Path
) -> tuple[dict[str, Any], str]:
    """(what the page shows, the same in words for a terminal). Writes the page to `out`. Raises as `gather`; MissingPackageError."""
    for module in ("matplotlib", "jinja2"):
        require(module, "report")
    from toolchain.report.page import page

    data = gather(folders, reports, supernet, profiles)
    write_atomic(out, page(data))
    return data, _in_words(data, out)


def gather(folders: Sequence[Path], reports: Sequence[Path], supernet: Path | None, profiles: str | None) -> dict[str, Any]:
    """Everything the page shows. Raises InputError, DamagedFileError for what was given; what is merely absent has a reason instead."""
    packages = [manifests.readable(open_package(folder)) for folder in folders]
    if twice := [name for name, count in Counter(str(folder.resolve()) for folder in folders).items() if count > 1]:
        raise InputError(f"expected each package once, got {twice[0]} twice")
    found, references = records.match([records.read(path) for path in reports], packages)
    found = [[*of_it, *_sealed(package, of_it)] for package, of_it in zip(packages, found, strict=True)]
    if supernet is not None:
        require("scipy")  # what reads a supernet and solves comes with bittailor[train]
        from toolchain.commands.foresight import refuse_a_stranger

        refuse_a_stranger(supernet, packages)
    names = _names(folders)
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, package in enumerate(packages):
        key = (manifests.text_of(package, "model", "fingerprint"), manifests.text_of(package, "device"), str(package.workload))
        groups.setdefault(key, []).append(index)
    return {
        "format": FORMAT,
        "bittailor": toolchain.__version__,
        "groups": [
            _group(
                [packages[index] for index in members],
                [names[index] for index in members],
                [found[index] for index in members],
                references,
                supernet,
                profiles,
            )
            for members in groups.values()
        ],
    }


def _sealed(package: Package, found: Sequence[Record]) -> list[Record]:
    """The check that is sealed in a package, where no other was given: shown as it stands, `bittailor verify` is what verifies it."""
    path = package.directory / SEAL
    if not path.is_file() or any(record.kind == "check" for record in found):
        return []
    read_seal(package)
    record = records.read(path)
    try:
        records.refuse_another(record, package)
    except InputError as error:  # nobody named it: the other packages are shown all the same
        note(f"bittailor: {path} is not shown: {error.problem}")
        return []
    return [record]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; where two are called alike, as they were typed."""
    short = [folder.resolve().name for folder in folders]
    return [str(folder) if short.count(name) > 1 else name for folder, name in zip(folders, short, strict=True)]


def _group(
    packages: Sequence[Package],
    names: Sequence[str],
    found: Sequence[Sequence[Record]],
    references: Sequence[Record],
    supernet: Path | None,
    profiles: str | None,
) -> dict[str, Any]:
    first = packages[0]
    known, why = _foresight(packages, supernet, profiles)
    quality = _quality_of(found)
    entries = [
        _entry(package, name, records_, quality, known, why) for package, name, records_ in zip(packages, names, found, strict=True)
    ]
    reference, of_what = _reference(packages, entries, references, quality, known)
    for entry in entries:
        entry["radar"] = comparison.radar(entry, reference)
    _mark_fronts(entries, quality["better"])
    return {
        "model": {name: manifests.text_of(first, "model", name) for name in manifests.MODEL},
        "device": manifests.text_of(first, "device"),
        "workload": str(first.workload),
        "latency_is": "per generated token" if first.workload.kind == "generate" else "per inference",
        "quality": quality,
        "reference": {"what": of_what, **reference},
        "front": {
            "supernet": str(known.folder.directory) if known else None,
            "table": str(known.costs.path) if known else None,
            "loss": known.losses_are if known else None,
            "reason": why,
            "resources": known.fronts(packages) if known else {name: {"points": [], "reason": why} for name in COSTS},
        },
        "packages": entries,
    }


def _foresight(packages: Sequence[Package], supernet: Path | None, profiles: str | None) -> tuple[Foresight | None, str]:
    """(what is known beforehand, why nothing is)."""
    if supernet is None:
        beside = [Path(os.path.normpath(package.directory / ".." / BESIDE)) for package in packages]
        supernet = next((folder for folder in beside if (folder / "supernet.yaml").is_file()), None)
    if supernet is None:
        return None, "no supernet was given and none lies beside the packages; add --supernet DIR"
    try:
        from toolchain.commands.foresight import foresee
    except ModuleNotFoundError as error:
        return None, f"reading {supernet} needs the Python package {error.name}; type: pip install 'bittailor[train]'"
    known = foresee(supernet, packages, profiles)
    return (None, known) if isinstance(known, str) else (known, "")


def _quality_of(found: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """On which text the group's packages are compared: the one that most of them were evaluated on, of several the first."""
    said = [record.said for records_ in found for record in records_ if record.kind == "evaluate"]
    if not said:
        reason = "no evaluate report was given; type: bittailor evaluate PACKAGE --text FILE --json > FILE, and add --measured FILE"
        return {"metric": None, "better": None, "text": None, "text_sha256": None, "window": None, "reason": reason}
    keys = Counter((one["metric"], one["text_sha256"], one["window"]) for one in said)
    metric, digest, window = keys.most_common(1)[0][0]
    text = next(one["text"] for one in said if one["text_sha256"] == digest)
    return {"metric": metric, "better": METRICS[metric], "text": text, "text_sha256": digest, "window": window, "reason": ""}


def _on_the_text(said: Mapping[str, Any], quality: Mapping[str, Any]) -> bool:
    return all(said[name] == quality[name] for name in ("metric", "text_sha256", "window"))


def _entry(
    package: Package, name: str, found: Sequence[Record], quality: Mapping[str, Any], known: Foresight | None, why: str
) -> dict[str, Any]:
    predicted = manifests.predicted(package)
    checked = next((record.said for record in found if record.kind == "check"), None)
    evaluated = next((record.said for record in found if record.kind == "evaluate"), None)
    limits = checked["limits"] if checked else _unchecked(package)
    order = [unit.name for unit in known.graph.units] if known else []
    laid_out = layers(package.policy, order)
    return {
        "name": name,
        "full_precision": comparison.is_full_precision(package.policy),
        "budget": package.budget.to_json() if package.budget else None,
        "chosen_by": str(package.data.get("chosen_by", "not said")),
        "mean_bits": manifests.finite(package, "mean_bits", package.data.get("mean_bits")),
        "bytes": sum((package.directory / file).stat().st_size for file in (*package.data["files"], FILE_NAME)),
        "predicted": predicted,
        "predicted_loss": known.loss(package) if known else {"value": None, "reason": why},
        "measured": _measured(checked, limits),
        "verdict": checked["verdict"] if checked else NOT_CHECKED,
        "limits": limits,
        "quality": _quality(evaluated, quality),
        "layers": laid_out,
        "breakdown": {
            resource: known.breakdown(package.policy, resource, predicted[resource]["value"]) if known else no_breakdown(why)
            for resource in COSTS
        },
    }


def _unchecked(package: Package) -> list[dict[str, Any]]:
    reason = f"no check report was given; type: bittailor check {package.directory} --json > FILE, and add --measured FILE"
    nothing = {"measured": None, "low": None, "high": None, "verdict": NOT_CHECKED, "reason": reason}
    limits = package.budget.limits if package.budget else {}
    return [{"name": name, "limit": limit, **nothing} for name, limit in limits.items()]


def _measured(checked: Mapping[str, Any] | None, limits: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """resource → the measurement, with the interval that its limit was held by, where it was this value that was held."""
    held = {limit["name"]: limit for limit in limits}
    measured = {}
    for name in (*COSTS, "first_token_ms", "compute_flop"):
        seen = (checked or {}).get("measured", {}).get(name)
        if seen is None:
            reason = "no check report was given" if checked is None else "the check did not measure it"
            seen = {"value": None, "spread": None, "n": 0, "valid": False, "reason": reason}
        limit = held.get(name, {})
        same = limit.get("measured") == seen["value"]  # memory is held by its largest process, a slow machine's latency corrected
        interval = {end: limit.get(end) if same else None for end in ("low", "high")}
        measured[name] = {**seen, **interval}
    return measured


def _quality(said: Mapping[str, Any] | None, quality: Mapping[str, Any]) -> dict[str, Any]:
    if said is None:
        reason = quality["reason"] or "no evaluate report of this package was given"
        return {"metric": quality["metric"], "value": None, "tokens": None, "reason": reason}
    if not _on_the_text(said, quality):
        reason = f"evaluated otherwise than the others: {said['metric']} on {said['text']}, windows of {said['window']} tokens"
        return {"metric": quality["metric"], "value": None, "tokens": None, "reason": reason}
    return {"metric": said["metric"], "value": said["value"], "tokens": said["tokens"], "reason": ""}


def _reference(
    packages: Sequence[Package],
    entries: Sequence[Mapping[str, Any]],
    references: Sequence[Record],
    quality: Mapping[str, Any],
    known: Foresight | None,
) -> tuple[dict[str, Any], str]:
    """(what full precision is known to be like, what that rests on): a full-precision package of the group, else reports and the table."""
    whole = next((entry for entry in entries if entry["full_precision"]), None)
    source = str(packages[0].data["model"]["source"])
    score = whole["quality"]["value"] if whole else None
    if score is None and quality["metric"] == "perplexity":
        said = [record.said for record in references if record.subject == source and _on_the_text(record.said, quality)]
        score = said[0]["value"] if said else None
    latency, size = known.full_precision(packages[0].provider) if known else (None, None)
    rests = f"the package {whole['name']}" if whole else f"{source}, and the cost table" if known else source
    return {
        "quality": score,
        "latency_measured_ms": comparison.seen(whole, "latency_ms") if whole else None,
        "latency_predicted_ms": latency,
        "bytes": whole["bytes"] if whole else None,
        "predicted_bytes": size,
    }, rests


def _mark_fronts(entries: Sequence[dict[str, Any]], better: str | None) -> None:
    """Say of each package for which resources no other one is both cheaper and better, by what was measured."""
    sign = -1.0 if better == "higher" else 1.0
    for resource in COSTS:
        points = [
            (cost, sign * entry["quality"]["value"])
            if (cost := comparison.seen(entry, resource)) is not None and entry["quality"]["value"] is not None
            else None
            for entry in entries
        ]
        for entry, best in zip(entries, comparison.undominated(points), strict=True):
            entry["measured"][resource]["on_the_front"] = best


def _in_words(data: Mapping[str, Any], out: Path) -> str:
    """For a terminal: where the page is, each package's verdict, and how many front points stand beside them."""
    count = sum(len(group["packages"]) for group in data["groups"])
    lines = [f"{out}: {count} package{'s' if count != 1 else ''}"]
    for group in data["groups"]:
        points = sum(len(front["points"]) for front in group["front"]["resources"].values())
        front = f"{points} points of the exact front" if points else f"no exact front: {group['front']['reason']}"
        lines.append(f"{group['model']['source']} on {group['device']}, {group['workload']}: {front}")
        lines += [f"  {entry['name']}: {entry['verdict']}" for entry in group["packages"]]
    return "\n".join(lines)
