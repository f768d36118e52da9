"""The one reader of `hardware/`: devices, named budgets, what is reachable and which energy meter fits. Cannot measure anything.

hardware/<device>.yaml             name, title, transport and how it finds the device, provider, threads, meter, budgets
hardware/templates/<board>.yaml    a device's file but for what only its owner knows; copied, not listed
hardware/presets/<name>.yaml       budgets that belong to no device: `--budget sources/low`
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import InputError
from toolchain.reading import MOST_YAML_BYTES, read_text, yaml_of
from toolchain.spec import Budget, Device

TRANSPORTS = ("local", "ssh", "adb")
METERS = ("none", "auto", "rapl", "nvml", "hwmon", "battery")
_DEPTH = 3  # of nested mappings in our files: budgets, name, limit
_REACHED_BY = {
    "host": ("ssh",),
    "user": ("ssh",),
    "port": ("ssh",),
    "identity": ("ssh",),
    "known_hosts": ("ssh",),
    "serial": ("adb",),
    "python": TRANSPORTS,
    "folder": TRANSPORTS,
    "agent": TRANSPORTS,
}
"""Keys that say how a device is reached, and the transports that read them."""


@dataclass(frozen=True)
class Availability:
    """Whether something can be used now, and if not, why and what to do about it."""

    usable: bool
    reason: str = ""


def shipped(folder: str) -> Path:
    """Where `hardware` or `profiles` of this installation is: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / folder
    if (package.parent / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    return package / f"_{folder}"


def list_devices(directory: Path | None = None) -> tuple[Device, ...]:
    """Every device that `directory` (default: the shipped hardware/) describes, by name. Raises InputError for the first bad file."""
    folder = directory or shipped("hardware")
    if not folder.is_dir():
        raise InputError(f"expected a folder of device files, got {folder}")
    return tuple(_read_device(path) for path in sorted(folder.glob("*.yaml")))


def load(name: str, directory: Path | None = None) -> Device:
    """The device called `name`, or the one a path ending in .yaml describes.

    Raises InputError naming the devices there are, or the line of the file that is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        return _read_device(Path(name))
    folder = directory or shipped("hardware")
    path = folder / f"{name}.yaml"
    if Path(name).name != name or not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.yaml"))) or "none"
        remedy = f"type: bittailor devices; or describe it in {path}"
        template = folder / "templates" / f"{name}.yaml"
        if Path(name).name == name and template.is_file():
            remedy = f"{template} is a template: copy it to {path}, and fill in what it says is missing"
        raise InputError(f"expected a device among {known}, got {name!r}", remedy)
    return _read_device(path)


def thread_count(device: Device) -> int:
    """Threads a session on this device uses: what its file says, or every CPU that this process may use.

    Of a device that is not at hand only its file's word counts: how many CPUs it has, `profiler.ask.Host.of` asks it.
    """
    if device.threads:
        return device.threads
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def named_budget(name: str, device: Device, directory: Path | None = None) -> Budget | None:
    """The budget `name` of the device's own file, or `preset/name` of a preset; None if neither has it."""
    if name in device.budgets:
        return device.budgets[name]
    preset, _, entry = name.partition("/")
    path = (directory or shipped("hardware")) / "presets" / f"{preset}.yaml"
    if not entry or Path(preset).name != preset or not path.is_file():
        return None
    source = _read_yaml(path)
    budgets = _budgets(source, source.data, f"{preset}/")
    if name not in budgets:
        raise InputError(f"expected a budget among {', '.join(budgets)}, got {name!r}")
    return budgets[name]


def read_budget(path: Path) -> Budget:
    """A budget file: one YAML (or JSON) mapping of limits. Raises InputError with the line that is wrong."""
    source = _read_yaml(path)
    return _budget(source, source.data, path.stem)


def reachable(device: Device) -> Availability:
    """Whether a session could be opened here now: whether this machine's runtime has the device's provider.

    Devices that are not at hand are asked by `profiler.reach`.
    """
    return has_provider(device.provider)


def has_provider(provider: str) -> Availability:
    """Whether the onnxruntime that is installed here was built with this execution provider (not yet whether its libraries load)."""
    try:
        import onnxruntime
    except ImportError as error:
        return Availability(False, f"onnxruntime does not import here ({error})")
    available = onnxruntime.get_available_providers()
    if provider not in available:
        return Availability(False, f"onnxruntime {onnxruntime.__version__} here has no {provider}, only {', '.join(available)}")
    return Availability(True)


def meter(device: Device, states: Mapping[str, str]) -> tuple[str, str]:
    """(name of the meter that measures this device's energy or "none", why none does).

    states: by meter, why it cannot be read on the device, or "" (`profiler.meters.states`, the agent's `identify`). "auto" takes the first
    that works of those that see what the provider runs on, but no battery: a profile by its gauge takes hours, so a device's file must
    name it. One that does not see that is refused: RAPL does not see a GPU's energy, and NVML sees nothing else; a board's sensors and
    its battery see both.
    """
    if device.meter == "none":
        return "none", f"hardware/{device.name}.yaml says meter: none"
    own = "nvml" if device.provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "rapl"
    fitting = (own, "hwmon", "battery")
    if device.meter not in ("auto", *fitting):
        return "none", f"{device.meter} cannot see the energy of {device.provider}"
    asked = (own, "hwmon") if device.meter == "auto" else (device.meter,)
    reasons = {name: states.get(name, "not known to the agent there") for name in asked}
    if works := next((name for name, reason in reasons.items() if not reason), ""):
        return works, ""
    if device.meter == "auto" and states.get("battery") == "":
        reasons["battery"] = f"meter: battery in the file of {device.name!r} asks its battery, which takes hours"
    return "none", f"no energy meter: {'; '.join(reasons.values())}"


@dataclass(frozen=True)
class _Source:
    """A parsed YAML mapping and the line on which each key stands."""

    path: Path
    data: dict[str, Any]
    lines: Mapping[tuple[str, ...], int]

    def error(self, key: tuple[str, ...], problem: str, remedy: str = "") -> InputError:
        return InputError(f"{self.path}, line {self.lines.get(key, 1)}: {problem}", remedy)


def _read_yaml(path: Path) -> _Source:
    import yaml

    try:
        data, node = yaml_of(read_text(path, MOST_YAML_BYTES))
    except OSError as error:
        raise InputError(f"expected a YAML file, got {path} ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text in {path}, got the byte 0x{error.object[error.start]:02x}") from error
    except ValueError as error:
        raise InputError(f"{path}, {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}, line 1: expected a mapping of keys to values, got {type(data).__name__}")
    lines: dict[tuple[str, ...], int] = {}

    def walk(mapping: yaml.MappingNode, prefix: tuple[str, ...]) -> None:
        for key, value in mapping.value:
            where = (*prefix, str(key.value))
            if where in lines:
                raise InputError(f"{path}, line {key.start_mark.line + 1}: the key {key.value!r} stands here twice")
            lines[where] = key.start_mark.line + 1
            if isinstance(value, yaml.MappingNode) and len(where) < _DEPTH:  # an alias may make a mapping its own child
                walk(value, where)

    assert isinstance(node, yaml.MappingNode)  # or safe_load would not have made a dict
    walk(node, ())
    return _Source(path, data, lines)


def _read_device(path: Path) -> Device:
    source = _read_yaml(path)
    data = source.data
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "name": (f"the file's own name, {path.stem!r}", lambda value: value == path.stem),
        "title": ("a line of text", lambda value: isinstance(value, str)),
        "transport": (f"one of {', '.join(TRANSPORTS)}", lambda value: value in TRANSPORTS),
        "provider": ("an onnxruntime provider, such as CPUExecutionProvider", _is_provider),
        "threads": ("a number of threads from 0 (all) to 1024", lambda value: type(value) is int and 0 <= value <= 1024),
        "meter": (f"one of {', '.join(METERS)}", lambda value: value in METERS),
        "budgets": ("a mapping of names to limits", lambda value: isinstance(value, dict)),
        "host": ("a host name, an address or an alias of ssh's configuration", _is_host),
        "user": ("a user's name", _matches(r"[A-Za-z_][A-Za-z0-9._-]{0,31}")),
        "port": ("a port from 1 to 65535", lambda value: type(value) is int and 1 <= value <= 65535),
        "identity": ("an absolute path here, or one from ~/, of a private key", _is_path_here),
        "known_hosts": ("an absolute path here, or one from ~/", _is_path_here),
        "serial": ("a serial number as `adb devices` shows it", _matches(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")),
        "python": ("the name or path of an interpreter on the device", _is_path_there),
        "folder": ("a path on the device, absolute or from the home folder", _is_path_there),
        "agent": ("the path of an installed agent on the device", _is_path_there),
    }
    for key, value in data.items():
        if key not in checks:
            raise source.error((str(key),), f"expected a key among {', '.join(checks)}, got {key!r}")
        wanted, accepts = checks[key]
        if not accepts(value):
            raise source.error((key,), f"expected {key} to be {wanted}, got {value!r}")
    if "name" not in data:
        raise source.error((), f"expected name: {path.stem}, got no name")
    _check_transport(source)
    budgets = _budgets(source, data.get("budgets", {}), inside=("budgets",))
    return Device(**{**data, "budgets": budgets})


def _check_transport(source: _Source) -> None:
    """Raise InputError for a key that this transport does not read, or one that it needs and does not find."""
    transport = source.data.get("transport", "local")
    for key, transports in _REACHED_BY.items():
        if key in source.data and transport not in transports:
            raise source.error(
                (key,), f"expected {key}: only beside transport: {' or '.join(transports)}, got transport: {transport}"
            )
    if transport == "ssh" and "host" not in source.data:
        problem = "expected host: beside transport: ssh, the name or address that ssh reaches the device by, got none"
        raise source.error(("transport",), problem, "add for example: host: board.lan")
    if transport == "adb" and "python" not in source.data:
        problem = "expected python: beside transport: adb, an interpreter on the phone with onnxruntime and numpy, got none"
        raise source.error(("transport",), problem, "Android has none of its own; see hardware/README.md")
    if transport == "adb" and not source.data.get("folder", "/").startswith("/"):
        raise source.error(("folder",), f"expected folder: to be absolute beside transport: adb, got {source.data['folder']!r}")
    if transport == "local" and "folder" not in source.data:
        for key in ("python", "agent"):
            if key in source.data:
                problem = f"expected folder: beside {key}: and transport: local, got none"
                raise source.error((key,), problem, "without a folder the agent is a child of this very Python")


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


_is_path_here = _matches(r"(~|~?(/[A-Za-z0-9_.+@,][A-Za-z0-9_.+@,-]*)+)")
"""ssh expands % and ${} in its options, and splits them at spaces."""
_is_plain_path = _matches(r"(~?/)?[A-Za-z0-9_.+@,][A-Za-z0-9_.+@,-]*(/[A-Za-z0-9_.+@,][A-Za-z0-9_.+@,-]*)*")


def _is_path_there(value: Any) -> bool:
    return _is_plain_path(value) and ".." not in Path(value).parts


def _is_host(value: Any) -> bool:
    """Neither an option of ssh's (-oProxyCommand=...) nor user@host nor anything that ssh expands."""
    if not isinstance(value, str) or "%" in value:
        return False
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return len(value) <= 253 and re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?", value) is not None
    return True


def _is_provider(value: Any) -> bool:
    return isinstance(value, str) and value.endswith("ExecutionProvider")


def _budgets(source: _Source, mapping: Mapping[Any, Any], prefix: str = "", inside: tuple[str, ...] = ()) -> dict[str, Budget]:
    found = {}
    for name, limits in mapping.items():
        where = (*inside, str(name))
        if not isinstance(limits, dict):
            raise source.error(where, f"expected a mapping of limits for {name!r}, got {limits!r}")
        found[f"{prefix}{name}"] = _budget(source, limits, f"{prefix}{name}", where)
    return found


def _budget(source: _Source, limits: Mapping[Any, Any], name: str, inside: tuple[str, ...] = ()) -> Budget:
    for key, value in limits.items():  # one by one, so that the error has the line of the key that is wrong
        if key in ("name", "workload"):
            continue
        try:
            Budget.from_json({key: value})
        except InputError as error:
            raise source.error((*inside, str(key)), error.problem, error.remedy) from error
    try:
        return Budget.from_json(limits, name)
    except InputError as error:
        raise source.error(inside, error.problem, error.remedy) from error
