"""How long does a full cost table take, and does that grow with the layers?

    python benchmarks/profile_time.py [--layers 24 48] [--work DIR]

Random Llamas of one width (24 layers: 336M parameters) and different depths, each profiled into an empty folder by the command itself;
building the fp32 graph from the checkpoint is part of that. Goal: at most 5 minutes for 24 layers, at most 1.2 times as long for 48.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from decode_speed import random_llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 48])
    parser.add_argument("--work", type=Path, help="keep checkpoints and the tables here (1.4 GB for 24 layers)")
    arguments = parser.parse_args()
    print("| layers | rows | wall time s | × the first |\n|---|---|---|---|")
    first = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        for layers in arguments.layers:
            source = (arguments.work or Path(temporary)) / f"llama-{layers}"
            if not source.exists():
                with contextlib.redirect_stderr(io.StringIO()):
                    random_llama(source, layers)
            profiles = source.with_name(f"profiles-{layers}")
            shutil.rmtree(profiles, ignore_errors=True)
            start = time.monotonic()
            command = [sys.executable, "-m", "toolchain.cli", "profile", str(source), "--profiles", str(profiles), "--json"]
            done = subprocess.run(command, stdout=subprocess.PIPE)
            seconds = time.monotonic() - start
            if done.returncode not in (0, 3):  # 3: rows that others' work made invalid
                raise SystemExit(done.returncode)
            rows = len(Path(json.loads(done.stdout)["table"]).read_text().splitlines()) - 1
            first = first or seconds
            print(f"| {layers} | {rows} | {seconds:.0f} | {seconds / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
