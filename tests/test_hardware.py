import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from toolchain import hardware
from toolchain.errors import InputError
from toolchain.hardware import Availability
from toolchain.spec import Budget, Device

ROOT = Path(__file__).parent.parent


def _write(folder, content, name="board"):
    (folder / f"{name}.yaml").write_text(content)
    return folder


def test_this_machine_is_described_reachable_and_has_threads():
    local = hardware.load("local")
    assert local in hardware.list_devices()
    assert hardware.reachable(local) == Availability(True)
    assert 1 <= hardware.thread_count(local) <= os.cpu_count()
    assert hardware.thread_count(Device("board", threads=3)) == 3


def test_a_device_of_ones_own_is_one_file(tmp_path):
    content = "name: board\ntitle: a board\nthreads: 4\nmeter: none\nbudgets:\n  tight:\n    memory_mb: 20\n    latency_ms: 5\n"
    expected = Device("board", "a board", threads=4, budgets={"tight": Budget(2e7, None, 5.0, name="tight")})
    assert hardware.load("board", _write(tmp_path, content)) == expected
    assert hardware.load(str(tmp_path / "board.yaml")) == expected
    assert hardware.list_devices(tmp_path) == (expected,)


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("name: other\n", 1, "file's own name, 'board'"),
        ("title: x\n", 1, "got no name"),
        ("name: board\ncolour: red\n", 2, "got 'colour'"),
        ("name: board\n\nthreads: two\n", 3, "got 'two'"),
        ("name: board\nthreads: true\n", 2, "got True"),
        ("name: board\ntransport: telepathy\n", 2, "one of local, ssh, adb"),
        ("name: board\ntransport: ssh\n", 2, "expected host: beside transport: ssh"),
        ("name: board\ntransport: ssh\n\nhost: -oProxyCommand=touch /tmp/x\n", 4, "expected host to be a host name"),
        ("name: board\ntransport: ssh\nhost: me@pi\n", 3, "expected host to be"),
        ("name: board\ntransport: ssh\nhost: pi;id\n", 3, "expected host to be"),
        ("name: board\ntransport: ssh\nhost: fe80::1%$(id)\n", 3, "expected host to be"),
        ("name: board\ntransport: ssh\nhost: 7\n", 3, "expected host to be"),
        ("name: board\ntransport: ssh\nhost: pi\nuser: -F/tmp/x\n", 4, "expected user to be"),
        ("name: board\ntransport: ssh\nhost: pi\nport: 22x\n", 4, "port from 1 to 65535"),
        ("name: board\ntransport: ssh\nhost: pi\nport: 0\n", 4, "port from 1 to 65535"),
        ("name: board\ntransport: ssh\nhost: pi\nidentity: key\n", 4, "absolute path"),
        ("name: board\ntransport: ssh\nhost: pi\nidentity: /a/%d ${HOME}\n", 4, "absolute path"),
        ("name: board\ntransport: ssh\nhost: pi\nknown_hosts: /a /b\n", 4, "absolute path"),
        ("name: board\ntransport: ssh\nhost: pi\npython: -c\n", 4, "interpreter on the device"),
        ("name: board\ntransport: ssh\nhost: pi\npython: python3 -c x\n", 4, "interpreter on the device"),
        ("name: board\ntransport: ssh\nhost: pi\npython: $(id)\n", 4, "interpreter on the device"),
        ("name: board\ntransport: ssh\nhost: pi\nfolder: ../up\n", 4, "path on the device"),
        ("name: board\ntransport: ssh\nhost: pi\nserial: x\n", 4, "expected serial: only beside transport: adb"),
        ("name: board\nhost: pi\n", 2, "expected host: only beside transport: ssh, got transport: local"),
        ("name: board\npython: python3\n", 2, "expected folder: beside python:"),
        ("name: board\ntransport: adb\n", 2, "expected python: beside transport: adb"),
        ("name: board\ntransport: adb\npython: /p\nserial: -e\n", 4, "serial number"),
        ("name: board\ntransport: adb\npython: /p\nfolder: here\n", 4, "absolute beside transport: adb"),
        ("name: board\nmeter: [rapl]\n", 2, "got \\['rapl'\\]"),
        ("name: board\nprovider: CPU\n", 2, "CPUExecutionProvider"),
        ("name: board\nthreads: 1\nthreads: 2\n", 3, "twice"),
        ("name: board\nbudgets:\n  low: 5\n", 3, "mapping of limits"),
        ("name: board\nbudgets:\n  low: {}\n", 3, "at least one limit"),
        ("name: board\nbudgets:\n  low:\n    memory_mb: 9\n    speed: 5\n", 5, "'speed'"),
        ("name: board\nbudgets:\n  low:\n    latency_ms: -1\n", 4, "positive"),
        ("name: board\nbudgets:\n  1:\n    latency_ms: .nan\n", 4, "positive"),
        ("name: board\n  title: [\n", 2, "expected YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", 1, "expected YAML"),
        ("- name\n", 1, "a mapping"),
        ("", 1, "a mapping"),
        ("name: board\nbudgets: &a\n  x: *a\n", 3, "levels inside each other"),
    ],
)
def test_a_wrong_device_file_is_named_with_its_line(tmp_path, content, line, words):
    with pytest.raises(InputError, match=words) as caught:
        hardware.load("board", _write(tmp_path, content))
    assert f"board.yaml, line {line}:" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["toaster", "../hardware/local", "", "absent.yaml"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(InputError, match="expected a") as caught:
        hardware.load(name)
    assert "local" in str(caught.value) or "absent.yaml" in str(caught.value)


def test_budgets_have_names_presets_and_files(tmp_path):
    own = Budget(latency_ms=3.0, name="low")
    device = Device("board", budgets={"low": own})
    assert hardware.named_budget("low", device) == own
    assert hardware.named_budget("high", device) is None
    assert hardware.named_budget("absent/low", device) is None
    assert hardware.named_budget("sources/low", device) == Budget(100e6, 1e9, 10.0, 1.0, name="sources/low")
    assert hardware.named_budget("sources/high", device) == Budget(2e9, 20e9, 200.0, 100.0, name="sources/high")
    with pytest.raises(InputError, match="sources/medium"):
        hardware.named_budget("sources/huge", device)
    (tmp_path / "mine.json").write_text('{"memory_mb": 12,\n "gflop": 0.5}')
    assert hardware.read_budget(tmp_path / "mine.json") == Budget(12e6, 0.5e9, name="mine")
    (tmp_path / "mine.json").write_text('{"memory_mb": 12,\n "gflop": "0.5"}')
    with pytest.raises(InputError, match=r"mine\.json, line 2: expected a positive"):
        hardware.read_budget(tmp_path / "mine.json")
    with pytest.raises(InputError, match="No such file"):
        hardware.read_budget(tmp_path / "absent.yaml")


def test_a_provider_that_the_runtime_lacks_is_not_reachable():
    found = hardware.reachable(Device("gpu", provider="ImaginaryExecutionProvider"))
    assert not found.usable
    assert "ImaginaryExecutionProvider" in found.reason
    assert "CPUExecutionProvider" in found.reason


@pytest.mark.parametrize(
    ("meter", "provider", "works", "expected", "words"),
    [
        ("none", "CPUExecutionProvider", ["rapl"], "none", "says meter: none"),
        ("auto", "CPUExecutionProvider", ["rapl", "hwmon"], "rapl", ""),
        ("auto", "CPUExecutionProvider", ["nvml", "hwmon", "battery"], "hwmon", ""),
        ("auto", "CPUExecutionProvider", ["nvml", "battery"], "none", "no rapl here; no hwmon here; meter: battery in the file of"),
        ("battery", "CPUExecutionProvider", ["rapl", "battery"], "battery", ""),  # it takes hours: never without being asked for
        ("rapl", "CPUExecutionProvider", ["rapl"], "rapl", ""),
        ("rapl", "CPUExecutionProvider", ["hwmon"], "none", "no energy meter: no rapl here"),
        ("auto", "CUDAExecutionProvider", ["rapl"], "none", "no energy meter: no nvml here; no hwmon here"),
        ("auto", "CUDAExecutionProvider", ["nvml", "hwmon"], "nvml", ""),
        ("hwmon", "CUDAExecutionProvider", ["nvml", "hwmon"], "hwmon", ""),  # a board's sensors see its GPU too
        ("rapl", "CUDAExecutionProvider", ["rapl"], "none", "cannot see"),
        ("nvml", "CPUExecutionProvider", ["nvml"], "none", "cannot see"),
    ],
)
def test_a_meter_is_taken_only_for_what_it_sees(meter, provider, works, expected, words):
    states = {name: "" if name in works else f"no {name} here" for name in ("rapl", "nvml", "hwmon", "battery")}
    name, reason = hardware.meter(Device("board", provider=provider, meter=meter), states)
    assert name == expected
    assert words in reason
    assert bool(reason) == (expected == "none")


def test_every_meter_that_a_device_file_may_name_exists():
    from toolchain.profiler.meters import METERS

    assert set(hardware.METERS) == {"none", "auto", *METERS}


def test_an_installed_package_finds_what_the_checkout_has_beside_it(tmp_path):
    """Lays the files out as the wheel does (pyproject's force-include) and imports from there."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    ignore = shutil.ignore_patterns("models", "__pycache__")
    for package in build["packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    for source, target in build["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / target)
    code = "from toolchain import hardware as h; print(h.shipped('profiles')); "
    code += "print(h.named_budget('sources/low', h.load('local')).latency_ms)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "toolchain" / "_profiles"), "10.0"]
    assert (tmp_path / "toolchain" / "_profiles" / "README.md").is_file()


def test_a_device_behind_ssh_has_all_that_its_file_says(tmp_path):
    fields = {
        "name": "board",
        "transport": "ssh",
        "host": "pi.lan",
        "user": "me",
        "port": 2222,
        "identity": "~/.ssh/id_ed25519",
        "known_hosts": "/etc/known",
        "python": "venv/bin/python",
        "folder": "/data/bittailor",
        "agent": "bittailor-agent.pyz",
    }
    device = hardware.load("board", _write(tmp_path, "".join(f"{key}: {value}\n" for key, value in fields.items())))
    assert {key: getattr(device, key) for key in fields} == fields
    for host in ("192.168.1.7", "fe80::1", "pi", "my_alias", "a-b.c-d"):
        assert hardware.load("board", _write(tmp_path, f"name: board\ntransport: ssh\nhost: {host}\n")).host == host


TEMPLATES = sorted((ROOT / "hardware" / "templates").glob("*.yaml"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_lacks_only_what_its_owner_knows(template, tmp_path):
    """As it stands it says what is missing; with that it is a device. It is not listed."""
    with pytest.raises(InputError, match=r"expected (host|python): beside transport") as caught:
        hardware.load(str(template))
    missing = "host: board.lan" if "expected host:" in str(caught.value) else "python: /data/local/tmp/python"
    content = template.read_text().replace(f"name: {template.stem}", "name: board")
    assert hardware.load("board", _write(tmp_path, f"{content}{missing}\n")).title
    assert template.stem not in [device.name for device in hardware.list_devices()]
    with pytest.raises(InputError, match="is a template: copy it"):
        hardware.load(template.stem)


def test_every_field_and_file_of_hardware_is_documented(tmp_path):
    said = (ROOT / "hardware" / "README.md").read_text()
    with pytest.raises(InputError, match="expected a key among") as caught:
        hardware.load("board", _write(tmp_path, "name: board\nno: 1\n"))
    keys = str(caught.value).partition("among ")[2].partition(", got")[0].split(", ")
    assert len(keys) > 10
    assert [key for key in keys if f"`{key}`" not in said] == []
    paths = [path.relative_to(ROOT / "hardware").as_posix() for path in (ROOT / "hardware").rglob("*.yaml")]
    assert [path for path in paths if f"`{path}`" not in said] == []
