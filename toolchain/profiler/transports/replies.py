"""What a device says comes from outside: bounded, of the types that we expect, without characters that steer a terminal. What is
anything else is one line that names the device, whatever made it so."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from toolchain.errors import BittailorError
from toolchain.reading import json_of
from toolchain.spec import Device

LONGEST_BYTES = 64 << 20
"""Of a reply. The longest that we know of, the outputs of the probe's graphs, is about 7 MB."""
Check = Callable[[Any], bool]


def _named(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _many(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _some(check: Check) -> Check:
    return lambda value: _many(check)(value) and value != []


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _digest(value: Any) -> bool:
    return _text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _entry(value: Any) -> bool:
    return isinstance(value, dict) and "value" in value


_STATE = ("cpus", "clock_mhz", "governor", "load", "temperature_c", "gpu")
_REPLIES: Mapping[str, Mapping[str, Check]] = {
    "hello": {
        "python": lambda value: _text(value) and re.match(r"\d{1,4}\.\d{1,4}(\D|$)", value) is not None,
        "machine": _text,
        "cpus": lambda value: _whole(value) and 1 <= value <= 1 << 16,
        "folder": _text,
    },
    "put": {"stored": _whole},
    "adopt": {"stored": _whole},
    "settle": {},
}
_OF_A_JOB: Mapping[str, Mapping[str, Check]] = {
    "answer": {"answer": _text, "of_another": _flag, "age_s": _number},
    "done": {"done": _text, "sha256": _digest, "of_another": _flag, "age_s": _number},
    "died": {"died": _text},
    "missing": {"missing": lambda value: _named(_whole)(value) and value != {} and all(map(_digest, value))},
    "running": {"running": _flag},
}
_OF_A_PHASE: Mapping[str, Check] = {
    **dict.fromkeys(("energy_mj", "above_idle_mj", "run_ms"), _many(_number)),
    "reference_ns": _named(_many(_number)),
    "error": _number,
    "valid": _flag,
    "reason": _text,
}
_ANSWERS: Mapping[str, Mapping[str, Check]] = {
    "identify": {
        "cpu": _text,
        "cache_bytes": _number,
        "runtime": _text,
        "protocol": _text,
        "providers": _many(_text),
        "meters": _named(_text),
    },
    "time": {"trials": _named(_some(_named(_number))), "reference_ns": _named(_some(_number)), "dropped": _whole, "valid": _flag},
    "peak": {"peak_bytes": _number, "running_bytes": _number},
    "outputs": {"outputs": _named(lambda value: value is None or isinstance(value, list))},
    "energy": {"reason": _text},  # and of one without a reason `_ENERGY`
    "state": {"versions": _named(_text), **dict.fromkeys(_STATE, _entry)},
}


_ENERGY: Mapping[str, Check] = {
    "meter": _text,
    "step_s": _number,
    "window_s": _number,
    "idle_mw": _number,
    "measured": _named(
        _named(lambda value: isinstance(value, dict) and all(key in value and ok(value[key]) for key, ok in _OF_A_PHASE.items()))
    ),
}


def reply_of(data: bytes, operation: str, device: Device) -> dict[str, Any]:
    """The doorkeeper's reply to an operation. Raises BittailorError for what it refuses, and for what is no such reply."""
    reply = _parsed(data, device)
    if "error" in reply:
        raise BittailorError(f"{device.name}: {reply['error']}")
    wanted = _REPLIES.get(operation)
    if wanted is None:
        wanted = next((checks for kind, checks in _OF_A_JOB.items() if kind in reply), {"answer": _text})
    return _checked(reply, wanted, device)


def answer_of(text: str | bytes, action: str, device: Device) -> dict[str, Any]:
    """The agent's answer to a request. Raises BittailorError for what it refuses, and for what is no such answer."""
    answer = _parsed(text, device)
    if "error" in answer:
        raise BittailorError(str(answer["error"]))
    if action == "energy" and answer.get("reason") == "":
        _checked(answer, _ENERGY, device)
    if action == "time" and "quantiles" in answer:
        _checked(answer, {"quantiles": _named(_named(_number))}, device)
    return _checked(answer, _ANSWERS.get(action, {}), device)


def malformed(device: Device, wanted: str, got: str) -> BittailorError:
    return BittailorError(f"expected {wanted} from {device.name!r}, got {got}", "what runs there is not ours, or is damaged")


def plain(value: Any) -> Any:
    """The value with every character that is none to be read replaced, however deep."""
    if isinstance(value, str):
        return value if value.isprintable() else "".join(one if one.isprintable() else "\ufffd" for one in value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def _parsed(data: str | bytes, device: Device) -> dict[str, Any]:
    try:
        value = plain(json_of(data))
    except (ValueError, RecursionError) as error:
        raise malformed(
            device, "JSON", "what is nested too deep" if isinstance(error, RecursionError) else repr(data[:80])
        ) from None
    if not isinstance(value, dict):
        raise malformed(device, "a JSON object", f"a {type(value).__name__}")
    return value


def _checked(value: dict[str, Any], wanted: Mapping[str, Check], device: Device) -> dict[str, Any]:
    for key, accepts in wanted.items():
        if key not in value or not accepts(value[key]):
            raise malformed(device, f"an answer with {key!r}", repr(value[key])[:80] if key in value else "one without it")
    return value
