"""What a package's manifest says, as far as it is shown, of the types that can be. A manifest may be a stranger's.

`package.manifest` has read it before; what only the report shows is looked at here. Raises DamagedFileError for anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from toolchain.errors import DamagedFileError
from toolchain.package.manifest import FILE_NAME, Package

RESOURCES = ("latency_ms", "first_token_ms", "peak_memory_bytes", "package_bytes", "compute_flop", "energy_mj")
"""As a package's manifest predicts them."""
MODEL = ("source", "architecture", "kind", "fingerprint")


def readable(package: Package) -> Package:
    """The package, if its manifest has what is shown, of the types that can be. Raises DamagedFileError."""
    for path in (*(("model", name) for name in MODEL), ("device",)):
        text_of(package, *path)
    if wrong := [item for item in package.policy.items() if not all(isinstance(name, str) for name in item)]:
        raise DamagedFileError(
            f"expected names in the policy of {package.directory / FILE_NAME}, got {wrong[0]!r}", "export the package again"
        )
    return package


def text_of(package: Package, *path: str) -> str:
    """A text of the manifest. Raises DamagedFileError."""
    found: Any = package.data
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, str):
        raise DamagedFileError(
            f"expected text as {'.'.join(path)} in {package.directory / FILE_NAME}, got {found!r}", "export the package again"
        )
    return found


def finite(package: Package, name: str, value: Any, null: bool = False) -> float | None:
    if value is None and null:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DamagedFileError(
            f"expected a finite number as {name} in {package.directory / FILE_NAME}, got {value!r}", "export the package again"
        )
    return float(value)


def predicted(package: Package) -> dict[str, dict[str, Any]]:
    """resource → {"value", "spread", "reason"} of the manifest."""
    found = {}
    for name in RESOURCES:
        said = package.predicted.get(name, {"value": None, "reason": "the package was exported without a cost table"})
        if not isinstance(said, Mapping):
            raise DamagedFileError(
                f"expected a predicted {name} in {package.directory / FILE_NAME}, got {said!r}", "export it again"
            )
        value = finite(package, f"predicted {name}", said.get("value"), null=True)
        spread = finite(package, f"the spread of {name}", said.get("spread"), null=True)
        reason = str(said.get("reason") or ("not predicted" if value is None else ""))
        found[name] = {"value": value, "spread": spread, "reason": reason}
    return found
