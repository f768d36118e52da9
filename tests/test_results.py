"""The ablation table of results/ is made from the JSON beside it: nobody typed a figure."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

pytest.importorskip("matplotlib")
pytest.importorskip("torch")


def test_the_ablation_table_is_made_from_the_results(tmp_path: Path) -> None:
    for path in (ROOT / "results").glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    command = [sys.executable, str(ROOT / "benchmarks" / "from_results.py"), "ablation", "--results", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ablation.md").read_text() == (ROOT / "results" / "ablation.md").read_text()
