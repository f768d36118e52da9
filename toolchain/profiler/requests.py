"""What the agent is asked: a JSON object with an action, and what to run. Refused in one line where it is none that a desk makes: what it
lacks would otherwise end in a traceback on the device, or have memory allocated for a size that nobody meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.errors import InputError
from toolchain.profiler.subjects import SUBJECTS
from toolchain.reading import read_json
from toolchain.spec import MOST_TOKENS

_NEEDS: dict[str, tuple[str, ...]] = {
    "identify": (),
    "state": (),
    "time": ("threads", "subjects", "windows"),
    "peak": ("threads", "subject"),
    "outputs": ("subjects",),
    "energy": ("threads", "subjects", "meter", "sysfs", "windows", "window_s"),
}
_MEASURED = ("name", "kind", "folder", "rows")
_NEEDS_OF_A_SUBJECT: dict[str, tuple[str, ...]] = {
    "identify": (),
    "state": (),
    "time": _MEASURED,
    "peak": ("kind", "folder", "rows"),
    "outputs": ("name", "folder", "inputs"),
    "energy": _MEASURED,
}
_TEXTS = ("name", "folder", "meter", "sysfs", "provider", "kind")
_NUMBERS: dict[str, tuple[Any, float, float]] = {
    **dict.fromkeys(("tokens", "new_tokens", "batch", "past", "capacity", "source"), (int, 0, MOST_TOKENS)),
    "rows": (int, 1, 1 << 31),
    "threads": (int, 0, 4096),
    "windows": (int, 1, 1 << 20),
    "host": (int, 0, 1 << 31),
    "quantile": (int | float, 0, 1),
    "window_s": (int | float, 0, 3600),
    "limit_s": (int | float, 0, 1 << 20),
}
"""Types and bounds of what a request may hold: what is measured has sizes, and they are allocated."""


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {"unreadable": why} where there is none, which `check` then says."""
    try:
        request = read_json(path)
        return request if isinstance(request, dict) else {"unreadable": f"a {type(request).__name__}"}
    except (OSError, ValueError) as error:
        return {"unreadable": str(error)}


def check(request: dict[str, Any]) -> None:
    """Raise InputError unless it is a request of this version: what it lacks would otherwise end some other way, minutes later."""
    try:
        if "unreadable" in request:
            raise ValueError(request["unreadable"])
        action = request.get("action")
        if not isinstance(action, str) or action not in _NEEDS:
            raise ValueError(f"the action {action!r} instead of one of {', '.join(_NEEDS)}")
        _check(request, _NEEDS[action])
        subjects = request.get("subjects", [])
        if not isinstance(subjects, list):
            raise ValueError("subjects that are no list")
        for subject in (*subjects, *([request["subject"]] if "subject" in request else [])):
            if not isinstance(subject, dict):
                raise ValueError("a subject that is no object")
            _check(subject, _NEEDS_OF_A_SUBJECT[action])
    except ValueError as error:
        raise InputError(f"expected a request of this version's desk, got {error}") from error


def _check(found: dict[str, Any], needed: tuple[str, ...]) -> None:
    """ValueError unless what is needed is there, and every name, number and file of its type."""
    if lacking := [name for name in needed if name not in found]:
        raise ValueError(f"no {lacking[0]}")
    for name, value in found.items():
        wanted, least, most = _NUMBERS.get(name, (object, 0, 0))
        if wanted is not object and (isinstance(value, bool) or not isinstance(value, wanted) or not least <= value <= most):
            raise ValueError(f"{name} {value!r} instead of a number from {least} to {most}")
        if name in _TEXTS and (not isinstance(value, str) or "\0" in value or max(map(len, value.split("/"))) > 255):
            raise ValueError(f"{name} {value!r} instead of text")
    inputs = found.get("inputs", [])
    if not isinstance(inputs, list) or not all(isinstance(name, str) for name in inputs):
        raise ValueError("inputs that are no names of files")
    if "kind" in needed and found["kind"] not in SUBJECTS:
        raise ValueError(f"kind {found['kind']!r} instead of one of {', '.join(SUBJECTS)}")
