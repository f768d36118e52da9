"""The one reader of `hardware/`: devices, named budgets, what is reachable and which energy meter works. Cannot measure anything.

hardware/<device>.yaml         name, title, transport, provider, threads, meter, budgets
hardware/presets/<name>.yaml   budgets that belong to no device: `--budget sources/low`
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import InputError
from toolchain.spec import Budget, Device

TRANSPORTS = ("local",)
METERS = ("none", "auto", "rapl", "nvml")
_DEPTH = 3  # of nested mappings in our files: budgets, name, limit
_POWERCAP = Path("/sys/class/powercap")


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
        raise InputError(f"expected a device among {known}, got {name!r}", f"type: bittailor devices; or describe it in {path}")
    return _read_device(path)


def thread_count(device: Device) -> int:
    """Threads a session on this device uses: what its file says, or every CPU that this process may use."""
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
    """Whether a session could be opened on this device now: its transport is there and its runtime has the provider."""
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


def meter_states(powercap: Path = _POWERCAP) -> dict[str, Availability]:
    """Every energy meter we know, and whether it can be read here: {"rapl": ..., "nvml": ...}."""
    return {"rapl": _rapl(powercap), "nvml": _nvml()}


def meter(device: Device, states: Callable[[], Mapping[str, Availability]] = meter_states) -> tuple[str, str]:
    """(name of the meter that measures this device's energy or "none", why none does).

    "auto" takes the meter of what the provider runs on. A meter that does not belong to the provider is refused: RAPL does not
    see a GPU's energy, and NVML sees nothing else.
    """
    if device.meter == "none":
        return "none", f"hardware/{device.name}.yaml says meter: none"
    fitting = "nvml" if device.provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "rapl"
    if device.meter not in ("auto", fitting):
        return "none", f"{device.meter} cannot see the energy of {device.provider}"
    state = states()[fitting]
    return (fitting, "") if state.usable else ("none", f"no energy meter: {state.reason}")


def _rapl(powercap: Path) -> Availability:
    counters = sorted(powercap.glob("intel-rapl:*/energy_uj"))  # AMD's counters have Intel's name too
    if not counters:
        return Availability(False, f"no RAPL counter in {powercap} (virtual machines and most ARM boards have none)")
    try:
        int(counters[0].read_text())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        return Availability(False, f"{counters[0]} is not readable ({why}); type: sudo chmod a+r {powercap}/intel-rapl:*/energy_uj")
    return Availability(True)


def _nvml() -> Availability:
    try:
        import pynvml
    except ImportError:
        return Availability(False, "no NVML: the Python package nvidia-ml-py is not installed; type: pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
        try:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return Availability(False, f"NVML does not answer ({error})")
    return Availability(True)


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
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"expected a YAML file, got {path} ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text in {path}, got the byte 0x{error.object[error.start]:02x}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: expected YAML, got: {getattr(error, 'problem', None) or error}") from error
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
    }
    for key, value in data.items():
        if key not in checks:
            raise source.error((str(key),), f"expected a key among {', '.join(checks)}, got {key!r}")
        wanted, accepts = checks[key]
        if not accepts(value):
            raise source.error((key,), f"expected {key} to be {wanted}, got {value!r}")
    if "name" not in data:
        raise source.error((), f"expected name: {path.stem}, got no name")
    budgets = _budgets(source, data.get("budgets", {}), inside=("budgets",))
    return Device(**{**data, "budgets": budgets})


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
