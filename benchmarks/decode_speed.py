"""Decode speed of a ~300M-parameter Llama at 4 bits: our package against onnxruntime-genai's own int4 build, on plain onnxruntime.

    python benchmarks/decode_speed.py [--work DIR] [--rounds 15]

Random weights (they do not change the time), the same shapes, block size 32, accuracy level 4 and thread count for both; both run in
one process, on one thread pool, in turn, through the same decoding loop. Prints medians, spreads and the ratio of their rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime

from toolchain.decoding import Decoder
from toolchain.graph.quiet import quiet

PROMPT, NEW = 64, 32


def random_llama(folder: Path, layers: int = 24) -> None:
    """Hidden 1024, vocabulary 32000; with 24 layers 336M parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=32000, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False, **shape)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)


def genai_int4(source: Path, folder: Path, cache: Path) -> None:
    """onnxruntime-genai's own 4-bit build. It saves the tokenizer last, and fails there for want of one."""
    from onnxruntime_genai.models.builder import create_model

    with quiet(), contextlib.suppress(TypeError, AttributeError):
        create_model(
            "", str(source), str(folder), "int4", "cpu", str(cache), hf_remote=False, int4_block_size=32, int4_accuracy_level=4
        )


def measure(folders: dict[str, Path], rounds: int, threads: int) -> dict[str, dict[str, list[float]]]:
    """{name: {"prefill tok/s", "decode tok/s"}} per round, the order turned every round."""
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    decoders = {name: Decoder(folder, threads, PROMPT + NEW, shared_pool=True) for name, folder in folders.items()}
    ids = np.random.default_rng(0).integers(0, 32000, PROMPT)
    import time

    seen: dict[str, dict[str, list[float]]] = {name: {"prefill tok/s": [], "decode tok/s": []} for name in folders}
    for number in range(rounds + 1):
        names = list(folders) if number % 2 else list(folders)[::-1]
        for name in names:
            decoder = decoders[name]
            start = time.perf_counter()
            token = int(decoder.prefill(ids).argmax())
            middle = time.perf_counter()
            for _ in range(NEW):
                token = int(decoder.step(token).argmax())
            end = time.perf_counter()
            if number:  # the first round warms up
                seen[name]["prefill tok/s"].append(PROMPT / (middle - start))
                seen[name]["decode tok/s"].append(NEW / (end - middle))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="keep the models here (about 1.5 GB) instead of in a temporary folder")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        source, ours, theirs = work / "llama", work / "ours", work / "genai"
        if not source.exists():
            with contextlib.redirect_stderr(io.StringIO()):
                random_llama(source)
        if not ours.exists():
            command = [sys.executable, "-m", "toolchain.cli", "export", str(source), "--policy", "w4g32", "--out", str(ours)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        if not (theirs / "model.onnx").exists():
            genai_int4(source, theirs, work / "cache")
        seen = measure({"bittailor w4g32": ours, "onnxruntime-genai int4": theirs}, arguments.rounds, threads)
        sizes = {"bittailor w4g32": ours, "onnxruntime-genai int4": theirs}
        print(
            f"onnxruntime {onnxruntime.__version__}, {threads} threads, {PROMPT} + {NEW} tokens, {arguments.rounds} interleaved rounds"
        )
        print("| package | prefill tok/s | decode tok/s | 10th to 90th percentile | model MB |\n|---|---|---|---|---|")
        for name, series in seen.items():
            low, high = np.percentile(series["decode tok/s"], [10, 90])
            size = sum(path.stat().st_size for path in sizes[name].glob("model.onnx*")) / 1e6
            prefill, decode = median(series["prefill tok/s"]), median(series["decode tok/s"])
            print(f"| {name} | {prefill:.1f} | {decode:.1f} | {low:.1f} to {high:.1f} | {size:.0f} |")
        for phase in ("prefill tok/s", "decode tok/s"):
            ratios = [a / b for a, b in zip(*(series[phase] for series in seen.values()), strict=True)]
            low, high = np.percentile(ratios, [10, 90])
            print(f"ratio {phase}: {median(ratios):.3f} (10th to 90th percentile {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
