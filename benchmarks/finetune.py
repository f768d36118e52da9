"""A model per task, from an encoder's weights: what the tables of tasks quantise. Scores are of the task's evaluation file.

    python benchmarks/finetune.py MODEL --data DATA --out OUT [--tasks sst2 cola mrpc stsb squad] [--seeds 3] [--epochs 4] [--batch 32]
                                  [--lr 1e-4] [--on cuda]

OUT/<task>-<seed>/ is a model folder (safetensors, tokenizer) that every command takes, and says its scores in scores.json; what is there
is not made again. With --epochs 0 its head is as it was drawn: a model to profile a device with before any is trained. Rows are fed as a
package feeds them (`task_kinds.py`). AdamW, a tenth of the steps up, then down to 0. A seed's model is meant to be the same each
time, on a GPU too: it was (two of each task, ten of STS-B on two hosts) but for an eleventh of STS-B, 0.000002 off in its scores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import task_kinds
import torch
from torch import nn

from toolchain.files import write_atomic


def finetuned(arguments: argparse.Namespace, name: str, seed: int, out: Path) -> dict[str, float]:
    """Train one model, save it, return its scores."""
    import transformers

    torch.manual_seed(seed)
    rng = random.Random(seed)
    task = task_kinds.kind_of(name, arguments.data, arguments.model)
    config = transformers.AutoConfig.from_pretrained(arguments.model, trust_remote_code=False, **task.head)
    model = (
        getattr(transformers, task.auto)
        .from_pretrained(arguments.model, config=config, use_safetensors=True, local_files_only=True, dtype=torch.float32)
        .to(arguments.on)
    )
    rows, labels = task.rows, task.labels.to(arguments.on)
    steps = max(1, arguments.epochs * math.ceil(len(rows) / arguments.batch))
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps))
    model.train()
    for epoch in range(arguments.epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), arguments.batch):
            places = order[start : start + arguments.batch]
            said = model(**task_kinds.padded([rows[place] for place in places], arguments.on))
            task.loss(said, labels[places]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        print(f"{name}, seed {seed}: epoch {epoch + 1} of {arguments.epochs}", file=sys.stderr, flush=True)
    model.eval()
    scores = task.of_model(model, arguments.on)
    model.cpu().save_pretrained(out, safe_serialization=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (arguments.model / name).is_file():
            shutil.copyfile(arguments.model / name, out / name)
    return scores


def alike() -> None:
    """Let sums be added up in one order, as fused attention and cuBLAS need not. That all of it is needed was not tried."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a folder for each task")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=task_kinds.NAMES, default=list(task_kinds.TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--on", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    alike()
    for name in arguments.tasks:
        for seed in range(arguments.seeds):
            place = arguments.out / f"{name}-{seed}"
            kept = place / "scores.json"
            about: dict[str, Any] = {"model": arguments.model.resolve().name, "seed": seed, "epochs": arguments.epochs}
            about |= {"lr": arguments.lr, "batch": arguments.batch}
            if not kept.is_file():
                begin = time.monotonic()
                place.mkdir(parents=True, exist_ok=True)
                scores = finetuned(arguments, name, seed, place)
                how = {"seconds": time.monotonic() - begin, "on": arguments.on, "torch": torch.__version__}
                write_atomic(kept, json.dumps({**about, **how, "scores": scores}, indent=1) + "\n")
            found = json.loads(kept.read_text())
            if other := [word for word in about if found[word] != about[word]]:
                raise SystemExit(f"expected {other[0]} {about[other[0]]} in {kept}, got {found[other[0]]}: take another --out")
            print(name, seed, found["scores"])


if __name__ == "__main__":
    main()
