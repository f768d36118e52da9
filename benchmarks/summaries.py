"""Summaries of CNN/DailyMail by a small T5 that is trained on the spot: ROUGE of every method's packages.

    python benchmarks/summaries.py run --articles FILE --out DIR [--seeds 0 1 2] [--epochs 60] [--steps 150] [--heldout 100] [--on cuda]
    python benchmarks/summaries.py report --out DIR [--results results]

FILE: json lines with "article" and "highlights"; the last of them are for scoring. No pretrained T5 can be had here, and a few hundred
articles teach none to summarise: the report holds full precision against two baselines that read nothing, and says whether the rows are
more than form. Rows are PTQ (min-max, MSE, with γ), GPTQ, and QAT of S policy-steps at 8, 4 and 2 bits on all units; each package is run by
`generate`, greedily, on stock onnxruntime. ROUGE-1, -2, -L: F-measures of rouge-score, stemmed. Seeds that are done are not done again.

T5: 4 + 4 blocks of width 256, the embedded model's tokenizer; SOURCE tokens of an article in, its highlights out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from post_training import made_by, spread
from tasks_bench import ptq
from torch import nn

from toolchain import text
from toolchain.files import scratch, write_atomic
from toolchain.graph.assemble import Weights, assemble
from toolchain.graph.build import build, resolve
from toolchain.graph.model import Graph
from toolchain.kernels import uniform
from toolchain.package.generate import generate
from toolchain.profiler.contention import cpu_count
from toolchain.report import table
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import input_moments
from toolchain.train.loop import Run, adapt
from toolchain.train.settings import TUNED
from toolchain.train.team import Team

SOURCE, WRITTEN = 256, 96
"""Tokens of an article, and at most of a summary."""
TOKENIZER = "pocket-llama-6m"
END, PAD = 0, 1
SHAPE = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4}
KERNELS = {8: "w8g32", 4: "w4g32", 2: "w2g32"}
WAYS = ("PTQ, min-max", "PTQ, min-max, and γ", "PTQ, MSE", "PTQ, MSE, and γ")
ROUGE = ("rouge1", "rouge2", "rougeL")
LEAD, OTHER = "first three sentences", "another article's highlights"
CALIBRATION = 64


def read(path: Path, heldout: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(articles to train on, articles to score)."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    if len(found) <= 2 * heldout or not all({"article", "highlights"} <= one.keys() for one in found):
        want = f'more than {2 * heldout} lines with "article" and "highlights"'
        raise SystemExit(f"expected {want} in {path}, got {len(found)} lines")
    return found[:-heldout], found[-heldout:]


def windows(articles: Sequence[Mapping[str, str]]) -> np.ndarray:
    """int64 [n, 2·SOURCE]: an article's first tokens, then its highlights and END to the end. Shorter articles are left out."""
    tokenizer = text.load_tokenizer(resolve(TOKENIZER))
    rows = []
    for one in articles:
        source = tokenizer.encode(one["article"]).ids[:SOURCE]
        target = tokenizer.encode(one["highlights"]).ids[:WRITTEN]
        if len(source) == SOURCE:
            rows.append([*source, *target, *[END] * (SOURCE - len(target))])
    return np.array(rows, np.int64)


def taught(rows: np.ndarray, seed: int, epochs: int, device: torch.device, out: Path) -> None:
    """A T5 trained on these from nothing, as a model folder."""
    import transformers

    torch.manual_seed(seed)
    special = {"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": END, "n_positions": SOURCE}
    config = transformers.T5Config(vocab_size=4096, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **special, **SHAPE)
    model = transformers.T5ForConditionalGeneration(config).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for places in np.array_split(rng.permutation(len(rows)), max(1, len(rows) // 16)):
            ids = torch.from_numpy(rows[places]).to(device)
            source, target = ids[:, :SOURCE], ids[:, SOURCE : SOURCE + WRITTEN]
            ended = (target == END).long().cumsum(1) > 1  # the first END is to be learned, those behind it are padding
            model(input_ids=source, labels=target.masked_fill(ended, -100)).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    out.mkdir(parents=True)
    model.eval().cpu().save_pretrained(out, safe_serialization=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(resolve(TOKENIZER) / name, out / name)


def rouge(said: Iterable[str], wanted: Iterable[str]) -> dict[str, float]:
    """Mean F-measures, in hundredths."""
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise SystemExit("expected the package rouge-score, found none; type: pip install rouge-score") from None
    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
    found = [scorer.score(right, made) for made, right in zip(said, wanted, strict=True)]
    return {name: 100 * fmean(one[name].fmeasure for one in found) for name in ROUGE}


class Bench:
    """One seed's T5, its graph, and what its packages write."""

    def __init__(self, arguments: argparse.Namespace, seed: int, folder: Path) -> None:
        train, self.heldout = read(arguments.articles, arguments.heldout)
        self.windows = windows(train)
        self.device, self.seed, self.arguments, self.model = Team(arguments.on).device, seed, arguments, folder / "model"
        begin = time.monotonic()
        taught(self.windows, seed, arguments.epochs, self.device, self.model)
        self.taught_s = time.monotonic() - begin
        (folder / "graph").mkdir()
        build(str(self.model), folder / "graph")
        self.graph = Graph.open(folder / "graph")
        tokenizer = text.load_tokenizer(self.model)
        self.asked = [tokenizer.decode(tokenizer.encode(one["article"]).ids[: SOURCE - 8]) for one in self.heldout]
        self.wanted = [one["highlights"] for one in self.heldout]

    def score(self, kernel: str, weights: Weights | None) -> dict[str, float]:
        with scratch() as folder:
            assemble(
                self.graph, uniform(kernel, self.graph.units), weights or (lambda unit, _: self._none(unit)), folder, sync=False
            )
            for path in self.graph.companions():
                shutil.copyfile(path, folder / path.name)
            with ThreadPoolExecutor(self.arguments.threads or cpu_count()) as pool:
                return rouge(pool.map(lambda prompt: generate(folder, prompt, WRITTEN, threads=1).text, self.asked), self.wanted)

    @staticmethod
    def _none(unit: Any) -> Any:
        raise AssertionError(f"{unit} is not quantised")

    def start(self) -> Supernet:
        model = load_model(self.model).to(self.device)
        ids = torch.from_numpy(self.windows[:CALIBRATION]).to(self.device)
        moments = input_moments(model, self.graph.units, ids)
        return Supernet(model, self.graph.units, ["fp32", *KERNELS.values()], seed=self.seed, moments=moments)

    def run(self, folder: Path) -> Run:
        return Run(self.windows, self.arguments.steps, 16, folder, self.seed, None, TUNED, Team(self.arguments.on))


def one_seed(arguments: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, Any]]:
    bench = Bench(arguments, seed, folder)
    about = {"seed": seed, **made_by(bench.device)}
    leads = [". ".join(one["article"].split(". ")[:3]) for one in bench.heldout]
    others = [*bench.wanted[1:], bench.wanted[0]]
    rows = [
        {"method": LEAD, "bits": 32, "seconds": 0.0, **rouge(leads, bench.wanted), **about},
        {"method": OTHER, "bits": 32, "seconds": 0.0, **rouge(others, bench.wanted), **about},
        {"method": "fp32", "bits": 32, "seconds": bench.taught_s, **bench.score("fp32", None), **about},
    ]
    model = load_model(bench.model).to(bench.device)
    moments = input_moments(model, bench.graph.units, torch.from_numpy(bench.windows[:CALIBRATION]).to(bench.device))
    for bits, kernel in KERNELS.items():
        for way in WAYS:
            begin = time.monotonic()
            weights = ptq(bench.graph, way, moments)
            rows.append({"method": way, "bits": bits, "seconds": time.monotonic() - begin, **bench.score(kernel, weights), **about})
        begin = time.monotonic()
        supernet = bench.start()
        started = time.monotonic() - begin
        rows.append({"method": "GPTQ", "bits": bits, "seconds": started, **bench.score(kernel, supernet.quantized), **about})
        begin = time.monotonic()
        adapt(supernet, bench.run(folder / f"training-{bits}"), [uniform(kernel, bench.graph.units)])
        spent = started + time.monotonic() - begin
        rows.append({"method": "QAT", "bits": bits, "seconds": spent, **bench.score(kernel, supernet.quantized), **about})
        print(f"seed {seed}, {bits} bits: done", file=sys.stderr)
    return rows


def run(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        path = arguments.out / f"seed-{seed}.json"
        if not path.is_file():
            with scratch() as folder:
                rows = one_seed(arguments, seed, folder)
            how = {name: getattr(arguments, name) for name in ("epochs", "steps", "heldout")}
            how["articles"] = len(read(arguments.articles, arguments.heldout)[0])
            write_atomic(path, json.dumps({"how": how, "rows": rows}, indent=1) + "\n")


def report(arguments: argparse.Namespace) -> None:
    found = [json.loads(path.read_text()) for path in sorted(arguments.out.glob("seed-*.json"))]
    if not found:
        raise SystemExit(
            f"expected seeds in {arguments.out}, found none; type: python benchmarks/summaries.py run --out {arguments.out} ..."
        )
    data = {"how": found[0]["how"], "rows": [row for one in found for row in one["rows"]]}
    arguments.results.mkdir(exist_ok=True)
    write_atomic(arguments.results / "summaries.md", page(data))
    write_atomic(arguments.results / "summaries.json", json.dumps(data, indent=1) + "\n")


def page(data: dict[str, Any]) -> str:
    """All seeds as Markdown: a row for each method."""
    how, rows = data["how"], data["rows"]

    def of(method: str, bits: int) -> list[dict[str, Any]]:
        return [row for row in rows if (row["method"], row["bits"]) == (method, bits)]

    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        widths = [bits for bits in (32, *KERNELS) if of(method, bits)]
        line = {"method": method}
        for bits in KERNELS if widths != [32] else (32,):
            shown = " / ".join(spread([row[name] for row in of(method, bits)], 1) for name in ROUGE)
            line |= dict.fromkeys((f"{each} bits" for each in KERNELS), shown) if bits == 32 else {f"{bits} bits": shown}
        lines.append(line | {"seconds": f"{fmean(row['seconds'] for row in rows if row['method'] == method):.0f}"})
    learned = min(row["rouge1"] for row in of("fp32", 32)) > max(row["rouge1"] for row in of(OTHER, 32))
    verdict = (
        "It says more of an article than another article's highlights do, so the rows tell methods apart as far as their spreads allow."
        if learned
        else "It says no more of an article than another article's highlights do: the rows are form only, and tell nothing of methods."
    )
    seeds = len(of("fp32", 32))
    made = "; ".join(sorted({f"{row['device']}, commit {row['commit']}" for row in rows}))
    said = (
        f"T5 of {SHAPE['num_layers']} + {SHAPE['num_decoder_layers']} blocks, width {SHAPE['d_model']}, trained from nothing on "
        f"{how['articles']} articles ({how['epochs']} epochs); QAT {how['steps']} policy-steps; {seeds} seeds ± half their range. "
        f"{verdict}\n\nROUGE-1 / -2 / -L on {how['heldout']} other articles; {made}"
    )
    return f"{said}\n\n{table(lines, list(lines[0]), markdown=True)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for act in (run, report):
        sub = commands.add_parser(act.__name__)
        sub.set_defaults(act=act)
        sub.add_argument("--out", type=Path, required=True)
        if act is report:
            sub.add_argument("--results", type=Path, default=Path("results"))
            continue
        sub.add_argument("--articles", type=Path, required=True)
        sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="numbers of the seeds")
        sub.add_argument("--epochs", type=int, default=60)
        sub.add_argument("--steps", type=int, default=150, help="S, policy-steps of QAT")
        sub.add_argument("--heldout", type=int, default=100, help="articles that nothing is trained on")
        sub.add_argument("--threads", type=int, default=0, help="articles summarised at a time (0: as many as there are CPUs)")
        sub.add_argument("--on", default="auto")
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
