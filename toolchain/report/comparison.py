"""What is computed from several packages' figures: who dominates whom, and the radar of the third source. Numbers in, numbers out.

The radar (arXiv:2411.06084, figure 2) has three axes, full precision the reference of each, and the outer edge is better:

    accuracy retention   perplexity of full precision / the package's; an encoder's cosine to full precision
    size reduction       1 − bytes / bytes of full precision
    latency reduction    1 − time / time of full precision

A ratio is of two measurements or of two predictions, never of one and the other, and says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.kernels import CATALOGUE

COSTS = ("latency_ms", "peak_memory_bytes", "energy_mj")
"""What quality is held against, and what is broken down by unit."""
AXES = ("accuracy_retention", "size_reduction", "latency_reduction")


def is_full_precision(policy: Mapping[str, str]) -> bool:
    return not any(CATALOGUE[kernel].quantised for kernel in policy.values())


def no_breakdown(reason: str) -> dict[str, Any]:
    """What stands for a cost by unit that is not known."""
    return {"parts": [], "units": [], "remainder": None, "shared": None, "total": None, "reason": reason}


def undominated(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Which (cost, badness) no other point is at least as good as in both and better in one; False for a point that is None."""
    present = [point for point in points if point is not None]

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in present)

    return [point is not None and not beaten(point) for point in points]


def seen(package: Mapping[str, Any], resource: str) -> float | None:
    """The measured value of a resource, None where it was not measured or the measurement is not valid."""
    found = package["measured"][resource]
    return found["value"] if found["valid"] else None


def radar(package: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """axis → {"value", "basis", "reason"}.

    reference: {"quality", "latency_measured_ms", "latency_predicted_ms", "bytes", "predicted_bytes"} of full precision, each may be None.
    """
    return {
        "accuracy_retention": _accuracy(package, reference),
        "size_reduction": _size(package, reference),
        "latency_reduction": _latency(package, reference),
    }


def _axis(value: float | None, basis: str, reason: str = "") -> dict[str, Any]:
    return {"value": value, "basis": basis, "reason": reason}


def _accuracy(package: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    quality = package["quality"]
    if quality["value"] is None:
        return _axis(None, "", quality["reason"])
    if quality["metric"] == "cosine":
        return _axis(quality["value"], "measured")
    if reference["quality"] is None:
        return _axis(None, "", "the full-precision model was not evaluated on the same text; give its evaluate report as well")
    return _axis(reference["quality"] / quality["value"], "measured")


def _size(package: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    if reference["bytes"]:
        return _axis(1 - package["bytes"] / reference["bytes"], "counted")
    predicted = package["predicted"]["package_bytes"]["value"]
    if reference["predicted_bytes"] and predicted:
        return _axis(1 - predicted / reference["predicted_bytes"], "counted")
    return _axis(None, "", "the full-precision package's bytes are not known; give that package as well, or --supernet")


def _latency(package: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    measured, predicted = seen(package, "latency_ms"), package["predicted"]["latency_ms"]["value"]
    if measured is not None and reference["latency_measured_ms"]:
        return _axis(1 - measured / reference["latency_measured_ms"], "measured")
    if predicted is not None and reference["latency_predicted_ms"]:
        return _axis(1 - predicted / reference["latency_predicted_ms"], "predicted")
    return _axis(
        None, "", "the full-precision latency is neither measured nor predicted; give a full-precision package, or --supernet"
    )
