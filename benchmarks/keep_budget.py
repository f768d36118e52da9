"""Does a package keep its budget? Measured without a line of bittailor: only onnxruntime, numpy and the standard library.

    python benchmarks/keep_budget.py PACKAGE [PACKAGE ...]

Reads the limits, the workload and the session options from manifest.yaml's text. Per package, in a fresh process each: the rise of the
peak resident set over a process that ran an 8 × 8 product; and the median over 0.2 s windows of the time per generated token. Exit code 1
if a limit breaks.
"""

import base64
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

BARE = Path(__file__).resolve().parent / "bare.onnx.b64"
WINDOWS = 25
PROMPT = np.random.default_rng(0).integers(0, 256, (1, 512))  # here: numpy.random alone weighs 6 MB, which is not the model's


def session(path):
    options = ort.SessionOptions()
    manifest = Path(path).parent / "manifest.yaml"  # how to open it, if it is a package
    for name, value in re.findall(r"\n  (enable_\w+): (true|false)", manifest.read_text()) if manifest.exists() else ():
        setattr(options, name, value == "true")
    options.intra_op_num_threads = len(__import__("os").sched_getaffinity(0))
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def decode(model, prompt, new):
    """One prefill and `new` greedy steps; (first token ms, ms per further token)."""
    buffers = {}
    for value in model.get_inputs():
        if value.name.startswith("past_key_values."):
            zeros = np.zeros((1, value.shape[1], prompt + new, value.shape[3]), np.float32)
            buffers[value.name] = ort.OrtValue.ortvalue_from_numpy(zeros)
    ids, length, times = np.ascontiguousarray(PROMPT[:, :prompt]), 0, [time.perf_counter()]
    for _ in range(new + 1):
        length += ids.shape[1]
        binding = model.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        model.run_with_iobinding(binding)
        ids = binding.get_outputs()[-1].numpy()[:, -1].argmax(-1)[None].astype(np.int64)
        times.append(time.perf_counter())
    return (times[1] - times[0]) * 1e3, (times[-1] - times[1]) * 1e3 / new


def memory(package, prompt, new):
    """Bytes, in this process: call it in a fresh one."""
    bare = Path(package).resolve().parent / ".bare.onnx"
    bare.write_bytes(base64.b64decode(BARE.read_text()))
    session(bare).run(None, {"x": np.zeros((1, 8), np.float32)})
    bare.unlink()
    before = peak()
    model = session(Path(package) / "model.onnx")
    decode(model, prompt, new)
    decode(model, prompt, new)
    return peak() - before


def main(packages):
    broken = False
    for package in packages:
        text = (Path(package) / "manifest.yaml").read_text()
        prompt, new = map(int, re.search(r"workload: generate:(\d+)\+(\d+)", text).groups())
        budget = text[text.index("\nbudget:") :]
        limits = {name: float(re.search(rf"  {name}: ([\d.e+]+)", budget)[1]) for name in ("peak_memory_bytes", "latency_ms")}
        fresh = subprocess.run(
            [sys.executable, __file__, "--memory", package, str(prompt), str(new)], capture_output=True, text=True
        )
        model = session(Path(package) / "model.onnx")
        decode(model, prompt, new)
        windows = []
        for _ in range(WINDOWS):
            start, steps = time.perf_counter(), []
            while time.perf_counter() - start < 0.2:
                steps.append(decode(model, prompt, new)[1])
            windows.append(np.median(steps))
        seen = {"peak_memory_bytes": float(fresh.stdout), "latency_ms": float(np.median(windows))}
        low, high = np.percentile(windows, [10, 90])
        for name, limit in limits.items():
            kept = seen[name] <= limit
            broken |= not kept
            spread = f" (windows {low:.4g} to {high:.4g})" if name == "latency_ms" else ""
            print(f"{Path(package).name:10} {name:18} {seen[name]:.5g}{spread}, limit {limit:.5g}: {'kept' if kept else 'BROKEN'}")
    return int(broken)


if __name__ == "__main__":
    if sys.argv[1] == "--memory":
        print(memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    else:
        sys.exit(main(sys.argv[1:]))
