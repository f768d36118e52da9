"""A package of the embedded model's shapes with fewer layers and random weights: one whose time a single unit's kernel can move by 8%.

    python benchmarks/shallow.py OUT [--layers 4] [--policy w4g128]

OUT/model, OUT/graph and OUT/package, for `gate.py baseline OUT/package --graph OUT/graph`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from toolchain.graph.build import build, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--policy", default="w4g128")
    arguments = parser.parse_args()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(resolve("pocket-llama-6m"), num_hidden_layers=arguments.layers, trust_remote_code=False)
    model, graph, package = (arguments.out / name for name in ("model", "graph", "package"))
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    graph.mkdir(exist_ok=True)
    build(str(model), graph)
    command = [sys.executable, "-m", "toolchain.cli", "export", str(model), "--policy", arguments.policy, "--out", str(package)]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
