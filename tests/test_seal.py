"""A report that is sealed into its package, signed by the real minisign, and judged again without a device."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import copied
from constructed_sysfs import write
from fast_host import FastHost

pytest.importorskip("random_models")

from toolchain.package.integrity import JSON_TAIL
from toolchain.package.manifest import manifest_text, open_package
from toolchain.profiler import ask, state
from toolchain.profiler.ask import Host
from toolchain.spec import CPU

Cli = Callable[..., Any]


@pytest.fixture
def package(packages: Callable[[str], Path], tmp_path: Path) -> Path:
    return copied(packages("qwen2"), tmp_path / "package")


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`no_device()`: from now on nobody may ask a device anything."""

    def forbid() -> None:
        for name in ("_ask", "state", "time", "peak", "energy", "identify"):
            monkeypatch.setattr(Host, name, lambda *_: pytest.fail("a device was asked"))

    return forbid


def _resealed(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Somebody who changes the report and writes its digest anew."""
    seal = json.loads((package / "seal.json").read_text())
    del seal["digest"]
    change(seal)
    (package / "seal.json").write_bytes(JSON_TAIL.append(json.dumps(seal, indent=1).removesuffix("\n}").encode()))


def _without_budget(package: Path) -> None:
    """Whose limits are those that are typed."""
    data = yaml.safe_load((package / "manifest.yaml").read_text())
    (package / "manifest.yaml").write_bytes(manifest_text({**data, "budget": None}))


# ---- what a report holds


def test_the_report_holds_what_the_verdict_rests_on(package: Path, tmp_path: Path, cli: Cli, fast: FastHost) -> None:
    words = ("check", package, "--latency-ms", "5", "--memory-mb", "50", "--report", tmp_path / "r" / "report.json", "--json")
    report = cli(*words).json
    assert json.loads((tmp_path / "r" / "report.json").read_text()) == report
    assert set(report["measured"]["latency_ms"]["trials"]) == {1.0}
    assert len(report["blocks"]) == report["decision"]["processes"]
    assert report["measured"]["peak_memory_bytes"]["trials"] == [1e6] * 3
    evidence = report["evidence"]
    assert evidence["package_digest"] == open_package(package).digest
    assert evidence["budget"] == {"name": "custom", "peak_memory_bytes": 5e7, "latency_ms": 5.0}
    assert evidence["budget_from"] == "command line"
    assert evidence["command"].startswith(f"bittailor check {package} --latency-ms 5 ")
    assert evidence["protocol"].startswith("interleaved windows")
    assert evidence["runtime"].startswith("onnxruntime ")
    assert set(evidence["versions"]) == {"bittailor", "python", "numpy", "system"}
    assert evidence["device"]["cpu"]
    assert evidence["meter"]["value"] is None
    assert "no RAPL" in evidence["meter"]["reason"]
    assert len(evidence["date"]) == len("2026-01-01T00:00:00Z")
    assert sum(evidence["seconds"].values()) >= 0
    for moment in ("before", "after"):
        for name, entry in evidence["state"][moment].items():
            assert name == "versions" or (entry["value"] is None) == bool(entry.get("reason")), (name, entry)
    own = cli("check", package, "--json").json["evidence"]
    assert (own["budget_from"], own["budget"]) == ("manifest", open_package(package).data["budget"])


def test_a_devices_state_is_read_where_the_system_tells_it(tmp_path: Path) -> None:
    cpu = "devices/system/cpu"
    sysfs = write(
        tmp_path / "sys",
        {f"{cpu}/cpu{n}/cpufreq/scaling_cur_freq": khz for n, khz in enumerate((800000, 2400000, 2500000))}
        | {f"{cpu}/cpu{n}/cpufreq/scaling_governor": name for n, name in enumerate(("powersave", "performance", "performance"))}
        | {"class/thermal/thermal_zone0/type": "cpu-thermal", "class/thermal/thermal_zone0/temp": 48250}
        | {"class/thermal/thermal_zone1/type": "off", "class/thermal/thermal_zone1/temp": "N/A"}
        | {"class/hwmon/hwmon0/name": "k10temp", "class/hwmon/hwmon0/temp1_input": 51000, "class/hwmon/hwmon0/temp1_label": "Tctl"},
    )
    seen = state.read(CPU, sysfs, write(tmp_path / "proc", {"loadavg": "1.25 0.5 0.4 2/300 1234"}))
    assert seen["clock_mhz"] == {"value": 2400.0}
    assert seen["governor"] == {"value": "performance on 2, powersave on 1"}
    assert seen["load"] == {"value": 1.25}
    assert seen["temperature_c"] == {"value": {"thermal_zone0 cpu-thermal": 48.25, "k10temp Tctl": 51.0}}
    assert seen["gpu"] == {"value": None, "reason": "the package runs on the CPU"}
    blind = state.read(CPU, tmp_path / "none", tmp_path / "none")
    for name in ("clock_mhz", "governor", "load", "temperature_c"):
        assert blind[name]["value"] is None
        assert str(tmp_path / "none") in blind[name]["reason"]


def test_the_agent_tells_the_state_of_its_machine(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"action": "state", "sysfs": str(tmp_path)}))
    done = subprocess.run(
        [sys.executable, "-m", "toolchain.profiler.agent", request], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert set(json.loads(done.stdout)) == set(state.read(CPU, Path(ask.SYSFS)))


# ---- sealing and verifying


def test_a_sealed_report_is_judged_again_without_a_device(package: Path, cli: Cli, fast: FastHost, no_device: Any) -> None:
    _without_budget(package)
    digest = cli("verify", package, "--digest").out
    for limit, code, verdict in (("5", 0, "within"), ("0.5", 1, "over")):
        said = cli("check", package, "--latency-ms", limit, "--seal", "--json")
        assert (said.code, said.json["verdict"]) == (code, verdict)
        assert cli("verify", package, "--digest").out == digest, "sealing changed the package"
        seen = cli("verify", package, "--json")
        assert (seen.code, seen.json["verdict"]) == (code, verdict)
        assert seen.json["report"] == said.json
    no_device()
    assert cli("verify", package).code == 1
    assert cli("verify", package).out.splitlines()[-1] == "over"


def test_could_not_tell_and_no_report_are_three(package: Path, cli: Cli, fast: FastHost) -> None:
    result = cli("verify", package)
    assert result.code == 3
    assert "no sealed report; type: bittailor check" in result.out
    assert cli("check", package, "--energy-mj", "5", "--seal").code == 3
    assert cli("verify", package).code == 3


def test_the_machines_slowness_is_part_of_what_is_judged_again(package: Path, cli: Cli, fast: FastHost) -> None:
    """The package's own budget comes from a made-up table, in which the reference took another time."""
    said = cli("check", package, "--seal", "--json")
    assert said.json["slowness"]
    assert cli("verify", package).code == said.code
    _resealed(package, lambda seal: seal["report"]["slowness"].update(latency_ms=9.0))
    assert "its references" in cli("verify", package).error


def _report(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda seal: change(seal["report"])


def _nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a verdict": (_report(lambda report: report.update(verdict="within")), "its limits give 'over'"),
    "a limit's verdict": (_report(lambda report: report["limits"][0].update(verdict="within")), "its trials give 'over'"),
    "a limit": (_report(lambda report: report["limits"][0].update(limit=50.0)), "latency_ms"),
    "a limit gone": (_report(lambda report: report["limits"].clear()), "latency_ms"),
    "a median": (_report(lambda report: report["measured"]["latency_ms"].update(value=0.1)), "latency_ms 0.1"),
    "trials": (_report(lambda report: report["measured"]["latency_ms"].update(trials=[0.1] * 7)), "latency_ms 1.0"),
    "fewer trials": (_report(lambda report: report["measured"]["latency_ms"].update(trials=[1.0] * 6)), "latency_ms 1.0"),
    "no processes": (_report(lambda report: report["blocks"].clear()), "seal.json"),
    "another look": (_report(lambda report: report["decision"].update(looks=0)), "seal.json"),
    "processes": (_report(lambda report: report["blocks"][0]["trials"].update(latency_ms=[0.1] * 7)), "its processes give"),
    "bounds": (_report(lambda report: report["limits"][0].update(low=0.9)), "other bounds"),
    "another package": (lambda seal: seal.update(package="0" * 64), "about 000000000000"),
    "another digest": (_report(lambda report: report["evidence"].update(package_digest="0" * 64)), "package_digest"),
    "another workload": (_report(lambda report: report["evidence"].update(workload="encode:1x1")), "workload"),
    "another prediction": (_report(lambda report: report.update(predicted=None)), "prediction"),
    "the manifest's budget": (_report(lambda report: report["evidence"].update(budget_from="manifest")), "budget"),
    "no evidence": (_report(lambda report: report.pop("evidence")), "evidence"),
    "no report": (lambda seal: seal.update(report=[1]), "seal.json"),
    "another format": (lambda seal: seal.update(format="bittailor seal 9"), "bittailor seal 3"),
    "a trial of words": (_report(lambda report: report["measured"]["latency_ms"].update(trials=["fast"])), "seal.json"),
    "a limit of words": (_report(lambda report: report["limits"][0].update(limit="low")), "latency_ms"),
    "a limit more that is none": (_report(lambda report: report["limits"].append({"name": "x"})), "seal.json"),
    "a state of words": (_report(lambda report: report["evidence"].update(state="idle")), "seal.json"),
    "seconds of words": (_report(lambda report: report["evidence"].update(seconds={"latency_ms": "one"})), "seal.json"),
    "a number that is no float": (_report(lambda report: report["limits"][0].update(measured=10**400)), "numbers below 1e300"),
    "what is nested deep": (_report(lambda report: report.update(predicted=_nested(800))), "seal.json"),
    "a budget of words": (_report(lambda report: report["evidence"].update(budget={"latency_ms": "low"})), "latency_ms"),
}  # fmt: skip


@pytest.mark.parametrize(("typed", "code"), [("4", 0), ("100000", 3)])
def test_limits_that_somebody_typed_are_not_the_packages(package: Path, cli: Cli, fast: FastHost, typed: str, code: int) -> None:
    """A check of looser limits was within, and is sealed as that; the package's own budget is open."""
    data = yaml.safe_load((package / "manifest.yaml").read_text())
    (package / "manifest.yaml").write_bytes(manifest_text({**data, "budget": {"latency_ms": 5.0, "name": "mine"}}))
    assert cli("check", package, "--latency-ms", typed, "--seal").code == 0
    verified = cli("verify", package, "--json")
    assert verified.code == code
    assert verified.json["not_held"] == ([] if code == 0 else ["latency_ms"])
    if code:
        assert "that were not held: latency_ms" in cli("verify", package).out


@pytest.fixture(scope="module")
def over(packages: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package sealed as over its limit, once for all forgeries."""
    from toolchain.cli import main

    made = copied(packages("qwen2"), tmp_path_factory.mktemp("over") / "package")
    fast = FastHost()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Host, "time", lambda self, *words: fast.time(self, *words))
        patch.setattr(Host, "peak", lambda self, subject: fast.peak(self, subject))
        assert main(["check", str(made), "--latency-ms", "0.5", "--seal"]) == 1
    return made


@pytest.mark.parametrize("name", FORGERIES)
def test_a_report_that_its_trials_do_not_bear_out_is_refused(over: Path, tmp_path: Path, cli: Cli, name: str) -> None:
    change, words = FORGERIES[name]
    package = copied(over, tmp_path / "package")
    _resealed(package, lambda seal: None)
    assert cli("verify", package).code == 1, "the report as it was"
    _resealed(package, change)
    line = cli("verify", package).error
    assert words in line
    assert "seal.json" in line


def test_what_a_strangers_report_says_steers_no_terminal(over: Path, tmp_path: Path, cli: Cli) -> None:
    package = copied(over, tmp_path / "package")
    _resealed(package, _report(lambda report: report["evidence"]["device"].update(cpu="\x1b]0;title\x07\u202ecpu")))
    result = cli("verify", package)
    assert result.code == 1
    assert "title" in result.out
    assert all(character.isprintable() or character == "\n" for character in result.out)


def test_what_changed_while_it_was_measured_is_not_sealed(
    package: Path, cli: Cli, fast: FastHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddle(self: Host, subject: dict[str, Any]) -> dict[str, int]:
        (package / "genai_config.json").write_text("{}")
        return fast.peak(self, subject)

    monkeypatch.setattr(Host, "peak", meddle)
    assert "genai_config.json" in cli("check", package, "--latency-ms", "5", "--seal").err
    assert not (package / "seal.json").exists()


def test_a_sealed_report_is_shown_in_ci_as_the_check_was(package: Path, tmp_path: Path, cli: Cli, fast: FastHost) -> None:
    cli("check", package, "--latency-ms", "0.5", "--seal", "--junit", tmp_path / "1.xml", "--summary", tmp_path / "1.md")
    cli("verify", package, "--junit", tmp_path / "2.xml", "--summary", tmp_path / "2.md")
    assert (tmp_path / "1.xml").read_bytes() == (tmp_path / "2.xml").read_bytes()
    assert (tmp_path / "1.md").read_bytes() == (tmp_path / "2.md").read_bytes()
    assert ElementTree.parse(tmp_path / "2.xml").getroot().get("failures") == "1"


# ---- signatures


def test_without_minisign_there_is_one_line(
    package: Path, tmp_path: Path, cli: Cli, fast: FastHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("a key")
    monkeypatch.setenv("PATH", str(tmp_path))
    line = cli("check", package, "--latency-ms", "5", "--seal", "--sign-with", f"minisign:{tmp_path / 'key'}").error
    assert "the program minisign" in line
    assert "apt install minisign" in line
    assert fast.timed == [], "it was measured before anybody looked for minisign"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sign-with", "minisign:key"), "expected --seal"),
        (("--seal", "--sign-with", "gpg:key"), "expected --sign-with minisign:KEY"),
        (("--seal", "--sign-with", "minisign:nowhere"), "nowhere"),
    ],
)
def test_signing_is_asked_for_in_full(package: Path, cli: Cli, fast: FastHost, words: tuple[str, ...], said: str) -> None:
    assert said in cli("check", package, "--latency-ms", "5", *words).error
    assert fast.timed == []


needs_minisign = pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed (apt install minisign)")


@pytest.fixture
def keys(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """`keys("mine")` → (secret, public) key files of the real minisign, without a password."""

    def make(name: str) -> tuple[Path, Path]:
        secret, public = tmp_path / f"{name}.key", tmp_path / f"{name}.pub"
        subprocess.run(["minisign", "-G", "-W", "-s", secret, "-p", public], check=True, capture_output=True)
        return secret, public

    return make


@needs_minisign
def test_a_signed_report_is_verified_by_its_public_key_alone(package: Path, cli: Cli, fast: FastHost, keys: Any) -> None:
    (secret, public), (_, stranger) = keys("mine"), keys("other")
    _without_budget(package)
    assert cli("check", package, "--latency-ms", "5", "--seal", "--sign-with", f"minisign:{secret}").code == 0
    assert "not checked" in cli("verify", package, "--json").json["signature"]
    for key in (public, public.read_text().splitlines()[-1]):
        seen = cli("verify", package, "--public-key", key, "--json")
        assert (seen.code, seen.json["signature"]) == (0, f"of {key}: bittailor package {open_package(package).digest}")
    assert "minisign says" in cli("verify", package, "--public-key", stranger).error
    assert "public key" in cli("verify", package, "--public-key", "RWnonsense").error
    own = subprocess.run(["minisign", "-V", "-m", package / "seal.json", "-p", public], capture_output=True, text=True)
    assert own.returncode == 0, own.stderr


@needs_minisign
def test_a_signature_does_not_fit_another_report(package: Path, cli: Cli, fast: FastHost, keys: Any) -> None:
    secret, public = keys("mine")
    assert cli("check", package, "--latency-ms", "0.5", "--seal", "--sign-with", f"minisign:{secret}").code == 1
    signature = package / "seal.json.minisig"
    whole = signature.read_bytes()
    for place in range(0, len(whole), 7):
        signature.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "seal.json.minisig" in cli("verify", package, "--public-key", public).error, place
    signature.write_bytes(whole)
    _resealed(package, _report(lambda report: report.update(running_bytes=1)))  # which no verdict rests on
    assert cli("verify", package).code == 1
    assert "minisign says" in cli("verify", package, "--public-key", public).error
    assert cli("check", package, "--latency-ms", "5", "--seal").code == 0
    assert not signature.exists(), "the signature of the report before"
    assert "found none" in cli("verify", package, "--public-key", public).error
