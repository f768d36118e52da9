"""A model per task, from an encoder's weights: what the tables of tasks quantise. Scores are of the task's evaluation file.

    python benchmarks/finetune.py MODEL --data DATA --out OUT [--tasks sst2 cola mrpc stsb] [--seeds 3] [--epochs 4] [--batch 32]
                                  [--lr 1e-4] [--on cuda]

OUT/<task>-<seed>/ is a model folder (safetensors, tokenizer) that every command takes, and says its scores in scores.json; what is there
is not made again. Pairs are fed as a package feeds them: both parts in one row, all token types 0. AdamW, a tenth of the steps up, then
down to 0.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from toolchain.evaluate.outputs import token_ids
from toolchain.evaluate.tasks import TASKS, Task
from toolchain.files import write_atomic

LONGEST = 128
TOGETHER = 128  # sentences of one pass of scoring


def padded(rows: list[list[int]], device: str) -> dict[str, torch.Tensor]:
    """ids and mask [B, T] of rows of token ids."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def said(model: nn.Module, rows: list[list[int]], device: str) -> np.ndarray:
    """Logits float64 [n, L]."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    made: dict[int, np.ndarray] = {}
    for start in range(0, len(order), TOGETHER):
        places = order[start : start + TOGETHER]
        logits = model(**padded([rows[place] for place in places], device)).logits.double().cpu().numpy()
        made |= dict(zip(places, logits, strict=True))
    return np.stack([made[place] for place in range(len(rows))])


def finetuned(arguments: argparse.Namespace, task: Task, seed: int, out: Path) -> dict[str, float]:
    """Train one model, save it, return its scores."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    rng = random.Random(seed)
    kind = "regression" if task.labels == 1 else "single_label_classification"
    config = AutoConfig.from_pretrained(arguments.model, num_labels=task.labels, problem_type=kind, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, config=config, use_safetensors=True, local_files_only=True, dtype=torch.float32
    ).to(arguments.on)
    train, dev = (task.examples(arguments.data / task.name, training) for training in (True, False))
    rows, held = (token_ids(arguments.model, [(one.text, one.pair) for one in part], LONGEST) for part in (train, dev))
    labels = torch.tensor([one.label for one in train], device=arguments.on)
    labels = labels.float() if task.labels == 1 else labels.long()
    steps = arguments.epochs * math.ceil(len(rows) / arguments.batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps))
    model.train()
    for epoch in range(arguments.epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), arguments.batch):
            places = order[start : start + arguments.batch]
            batch: dict[str, Any] = padded([rows[place] for place in places], arguments.on)
            model(**batch, labels=labels[places]).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        print(f"{task.name}, seed {seed}: epoch {epoch + 1} of {arguments.epochs}", file=sys.stderr, flush=True)
    model.eval()
    scores = task.score([one.label for one in dev], said(model, held, arguments.on))
    model.cpu().save_pretrained(out, safe_serialization=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (arguments.model / name).is_file():
            shutil.copyfile(arguments.model / name, out / name)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a folder for each task")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--on", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for name in arguments.tasks:
        for seed in range(arguments.seeds):
            place = arguments.out / f"{name}-{seed}"
            kept = place / "scores.json"
            about: dict[str, Any] = {"model": arguments.model.resolve().name, "seed": seed, "epochs": arguments.epochs}
            about |= {"lr": arguments.lr, "batch": arguments.batch}
            if not kept.is_file():
                begin = time.monotonic()
                place.mkdir(parents=True, exist_ok=True)
                scores = finetuned(arguments, TASKS[name], seed, place)
                how = {"seconds": time.monotonic() - begin, "on": arguments.on, "torch": torch.__version__}
                write_atomic(kept, json.dumps({**about, **how, "scores": scores}, indent=1) + "\n")
            found = json.loads(kept.read_text())
            if other := [word for word in about if found[word] != about[word]]:
                raise SystemExit(f"expected {other[0]} {about[other[0]]} in {kept}, got {found[other[0]]}: take another --out")
            print(name, seed, found["scores"])


if __name__ == "__main__":
    main()
