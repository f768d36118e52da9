"""The GitHub Action's and the GitLab example's own scripts, run with bash on a small package. It is really measured in the slow test; the
others are about the scripts, and the numbers are `fast_host.py`'s."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from action_steps import ACTION, ROOT, Job
from conftest import copied, environment

pytest.importorskip("random_models")

from toolchain.hardware import load
from toolchain.package.manifest import open_package

_COMMAND = f"""#!{sys.executable}
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from fast_host import FastHost
from toolchain.cli import main
from toolchain.profiler.ask import Host
made = FastHost()
Host.time = lambda self, *words: made.time(self, *words)
Host.peak = lambda self, subject: made.peak(self, subject)
sys.exit(main())
"""


@pytest.fixture
def job(packages: Callable[[str], Path], tmp_path: Path) -> Job:
    """A workspace with a package in `packages/it's one`, a runner with a bittailor on PATH whose device is made up: 1 ms and 1 MB."""
    tools, workspace, runner = (tmp_path / name for name in ("tools", "workspace", "runner"))
    for folder in (tools, workspace, runner):
        folder.mkdir()
    (tools / "bittailor").write_text(_COMMAND)
    (tools / "bittailor").chmod(0o755)
    copied(packages("bert"), workspace / "packages" / "it's one")
    return Job(workspace, runner, environment(PATH=os.pathsep.join([str(tools), os.environ["PATH"]])))


PACKAGE = "packages/it's one"
INSTALLED = {"package": PACKAGE, "install": "none"}


def test_the_action_lets_through_what_keeps_its_limits(job: Job) -> None:
    arguments = "--latency-ms\n1000\n\n--memory-mb\n1000\n"
    code, outputs, said = job.uses(ACTION, {**INSTALLED, "arguments": arguments, "seal": "true", "out": "out put"})
    assert code == 0, said
    package = job.workspace / PACKAGE
    assert outputs == {"verdict": "within", "digest": open_package(package).digest}
    report = json.loads((job.workspace / "out put" / "report.json").read_text())
    assert report["verdict"] == "within"
    assert report["evidence"]["command"].startswith("bittailor check --device=local ")
    assert ElementTree.parse(job.workspace / "out put" / "junit.xml").getroot().get("tests") == "2"
    assert "within" in (job.runner / "GITHUB_STEP_SUMMARY").read_text()
    assert (package / "seal.json").is_file()


def test_the_action_stops_what_does_not_and_tells_apart_what_it_cannot_tell(job: Job) -> None:
    code, outputs, _ = job.uses(ACTION, {**INSTALLED, "arguments": "--memory-mb\n0.001\n--energy-mj\n1"})
    assert (code, outputs["verdict"]) == (1, "over")
    code, outputs, _ = job.uses(ACTION, {**INSTALLED, "arguments": "--energy-mj\n1", "could-not-tell": "pass"})
    assert (code, outputs["verdict"]) == (0, "could not tell")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"package": "$(touch hacked); `touch hacked`"}, "expected a package folder"),
        ({"package": '"; touch hacked; "'}, "expected a package folder"),
        ({"package": "--help"}, "expected a package folder"),
        ({"device": "$(touch hacked)"}, "expected a device among"),
        ({"device": "--json"}, "expected a device among"),
        ({"arguments": "$(touch hacked)"}, "unrecognized arguments"),
        ({"could-not-tell": "$(touch hacked)"}, "expected could-not-tell"),
    ],
)
def test_what_an_input_says_is_never_run(job: Job, inputs: dict[str, str], expected: str) -> None:
    code, outputs, said = job.uses(ACTION, {**INSTALLED, **inputs})
    assert code == 2
    assert expected in said
    assert outputs["verdict"] == ""
    assert not list(job.workspace.rglob("hacked"))


def test_a_damaged_package_fails_the_action(job: Job) -> None:
    with open(job.workspace / PACKAGE / "model.onnx.data", "ab") as stream:
        stream.write(b"x")
    code, outputs, said = job.uses(ACTION, INSTALLED)
    assert (code, outputs) == (2, {"verdict": "", "digest": ""})
    assert "model.onnx.data" in said


# ---- a job per device


def _hardware(folder: Path) -> list[str]:
    """The shipped device files in a repository of somebody's own, with a folder beside them that holds none."""
    (folder / "hardware" / "templates").mkdir(parents=True)
    (folder / "hardware" / "templates" / "not-one.yaml").write_text("")
    for path in (ROOT / "hardware").glob("*.yaml"):
        shutil.copy(path, folder / "hardware")
    return sorted(path.stem for path in (ROOT / "hardware").glob("*.yaml"))


def _bash(script: str, folder: Path, **more: str) -> str:
    command = ["bash", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_matrix_is_what_hardware_holds(tmp_path: Path) -> None:
    names = _hardware(tmp_path)
    jobs = yaml.safe_load((ROOT / ".github" / "examples" / "devices.yml").read_text())["jobs"]
    listing = next(step for step in jobs["devices"]["steps"] if step.get("id") == "list")
    _bash(listing["run"], tmp_path, GITHUB_OUTPUT=str(tmp_path / "output"))
    assert json.loads((tmp_path / "output").read_text().removeprefix("names=")) == names
    assert jobs["check"]["strategy"]["matrix"] == {"device": "${{ fromJSON(needs.devices.outputs.names) }}"}
    assert jobs["check"]["runs-on"] == ["self-hosted", "${{ matrix.device }}"]
    used = next(step for step in jobs["check"]["steps"] if "bittailor" in step.get("uses", ""))
    assert set(used["with"]) <= set(yaml.safe_load((ACTION / "action.yml").read_text())["inputs"])
    assert all(load(str(tmp_path / "hardware" / f"{name}.yaml")).name == name for name in names)


def test_gitlab_gets_a_job_per_device_whose_script_runs(job: Job) -> None:
    example = yaml.safe_load((ROOT / ".ci" / "gitlab-ci.example.yml").read_text())
    names = _hardware(job.workspace)
    _bash("\n".join(example["devices"]["script"]), job.workspace)
    made = yaml.safe_load((job.workspace / example["check"]["trigger"]["include"][0]["artifact"]).read_text())
    jobs = {name: one for name, one in made.items() if name != "stages"}
    assert [one["tags"] for one in jobs.values()] == [[name] for name in names]
    assert all(one["stage"] in made["stages"] for one in jobs.values())
    local = jobs["check local"]
    shutil.move(job.workspace / PACKAGE, job.workspace / "packages" / "local")
    script = "\n".join(local["script"]).replace("--seal", "--seal --memory-mb 1000")  # its own budget is made up
    _bash(script, job.workspace, PATH=job.environment["PATH"], **local["variables"])
    assert ElementTree.parse(job.workspace / local["artifacts"]["reports"]["junit"]).getroot().get("errors") == "0"
    assert (job.workspace / "packages" / "local" / "seal.json").is_file()


def test_a_repository_without_devices_has_no_job_that_fails(tmp_path: Path) -> None:
    example = yaml.safe_load((ROOT / ".ci" / "gitlab-ci.example.yml").read_text())
    _bash("\n".join(example["devices"]["script"]), tmp_path)
    (name,) = set(yaml.safe_load((tmp_path / "devices.yml").read_text())) - {"stages"}
    assert name == "no devices"


@pytest.mark.slow
def test_the_action_installs_itself_from_a_fresh_clone(packages: Any, tmp_path: Path) -> None:
    """Every step as a runner does it, the pip install included, which needs a registry."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
    workspace, runner = tmp_path / "workspace", tmp_path / "runner"
    copied(packages("bert"), workspace / "package")
    runner.mkdir()
    fresh = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    job = Job(workspace, runner, fresh)
    inputs = {"package": "package", "python": sys.executable, "arguments": "--memory-mb\n1000", "seal": "true"}
    code, outputs, said = job.uses(clone / ".github" / "actions" / "check", inputs)
    assert (code, outputs["verdict"]) == (0, "within"), said
    assert (runner / "bittailor" / "bin" / "bittailor").is_file()


def test_this_projects_own_ci_runs_the_gate() -> None:
    assert ".ci/gate" in (ROOT / ".ci" / "run").read_text().splitlines()
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["steps"]
    assert any(step.get("run") == ".ci/run" for step in steps)
