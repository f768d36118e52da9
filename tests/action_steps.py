"""A composite GitHub Action's steps, run here one by one with bash: what a runner does with them, as far as ours need it.

`python tests/action_steps.py PACKAGE [input=value ...]` runs .github/actions/check on a package, step by step, in a working copy of yours.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
ACTION = ROOT / ".github" / "actions" / "check"
_EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")
_CONDITION = re.compile(r"inputs\.([\w-]+) != '([^']*)'")


@dataclass
class Job:
    """A runner's job: where it works, what its steps left. `say`: told of each step and its output."""

    workspace: Path
    runner: Path
    environment: dict[str, str]
    say: Callable[[str], object] = lambda line: None
    path: list[str] = field(default_factory=list)

    def uses(self, action: Path, inputs: Mapping[str, str]) -> tuple[int, dict[str, str], str]:
        """(exit code of the first step that failed or 0, the action's outputs, what the steps printed)."""
        described = yaml.safe_load((action / "action.yml").read_text())
        unknown = set(inputs) - set(described["inputs"])
        assert not unknown, f"no inputs {unknown}"
        values = {name: str(inputs.get(name, one.get("default", ""))) for name, one in described["inputs"].items()}
        assert all(values[name] for name, one in described["inputs"].items() if one.get("required"))
        context = {f"inputs.{name}": value for name, value in values.items()}
        printed, code = [], 0
        for step in described["runs"]["steps"]:
            if not self._wanted(step, values):
                continue
            self.say(f"== {step['name']}")
            code, outputs, text = self._run(step, context, action)
            context |= {f"steps.{step.get('id')}.outputs.{name}": value for name, value in outputs.items()}
            printed.append(text)
            self.say(text)
            if code:
                break
        outputs = {name: _resolved(one["value"], context) for name, one in described.get("outputs", {}).items()}
        return code, outputs, "".join(printed)

    def _wanted(self, step: Mapping[str, Any], values: Mapping[str, str]) -> bool:
        if "if" not in step:
            return True
        match = _CONDITION.fullmatch(step["if"])
        assert match, f"a condition that this reader does not know: {step['if']}"
        return values[match[1]] != match[2]

    def _run(self, step: Mapping[str, Any], context: Mapping[str, str], action: Path) -> tuple[int, dict[str, str], str]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "what comes from outside must not be part of a script"
        script = self.runner / "step.sh"
        script.write_text(step["run"])
        told = {name: self.runner / name for name in ("GITHUB_OUTPUT", "GITHUB_PATH", "GITHUB_STEP_SUMMARY")}
        told["GITHUB_OUTPUT"].write_text("")
        given = {name: _resolved(str(value), context) for name, value in step.get("env", {}).items()}
        environment = {
            **self.environment,
            **{name: str(path) for name, path in told.items()},
            "RUNNER_TEMP": str(self.runner),
            "GITHUB_ACTION_PATH": str(action),
            "GITHUB_WORKSPACE": str(self.workspace),
            "PATH": os.pathsep.join([*reversed(self.path), self.environment["PATH"]]),
            **given,
        }
        # The command line that a runner takes for `shell: bash`.
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        done = subprocess.run(
            command, cwd=self.workspace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if told["GITHUB_PATH"].is_file():
            self.path = told["GITHUB_PATH"].read_text().splitlines()
        outputs = dict(line.split("=", 1) for line in told["GITHUB_OUTPUT"].read_text().splitlines())
        return done.returncode, outputs, done.stdout


def _resolved(text: str, context: Mapping[str, str]) -> str:
    return _EXPRESSION.sub(lambda match: context.get(match[1], ""), text)


def main(words: list[str]) -> int:
    inputs = {"package": words[0], **dict(word.split("=", 1) for word in words[1:])}
    with tempfile.TemporaryDirectory(prefix="runner-") as runner:
        job = Job(Path.cwd(), Path(runner), dict(os.environ), print)
        code, outputs, _ = job.uses(ACTION, inputs)
        print(f"== exit code {code}, outputs {outputs}, summary:")
        summary = Path(runner) / "GITHUB_STEP_SUMMARY"
        print(summary.read_text() if summary.is_file() else "none")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
