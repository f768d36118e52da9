"""Tables of results/ that are made from other results or a cost table are just that: nobody typed a figure."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

pytest.importorskip("matplotlib")
pytest.importorskip("torch")


MADE = {
    "ablation": [],
    "energy": ["--table", str(ROOT / "profiles" / "h200" / "table.jsonl"), "--model", "4842ffe6"],
}


@pytest.mark.parametrize("name", MADE)
def test_a_table_is_made_from_what_was_measured(name: str, tmp_path: Path) -> None:
    for path in (ROOT / "results").glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    command = [sys.executable, str(ROOT / "benchmarks" / "from_results.py"), name, *MADE[name], "--results", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{name}.md").read_text() == (ROOT / "results" / f"{name}.md").read_text()
