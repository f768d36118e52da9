"""What the benchmarks of training share: jobs in processes of their own, whose results are kept; start, windows and quality of a supernet.

DIR/graph, *.npy, start-*    made once          DIR/<job>.json    a job's result: a run that was killed goes on
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save

from toolchain import text as texts
from toolchain.files import scratch, sha256, write_atomic
from toolchain.graph.build import build, resolve
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE
from toolchain.spec import Policy
from toolchain.supernet.adapters import COMMON, KINDS, OWN, RANK, RANKS
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import input_moments
from toolchain.train.loop import Run, adapt
from toolchain.train.settings import TUNED, Settings, polishing
from toolchain.train.team import Team

WINDOW, CALIBRATION = 256, 64
TABLE = "table.jsonl"
POLISHED = ("supernet", "polished", "ours")
"""First words of the jobs that depend on how long subnets are polished."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="pocket-llama-6m")
    made.add_argument("--text", nargs="+", type=Path, required=True)
    made.add_argument("--heldout", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--steps", type=int, default=600, help="S, policy-steps of a dedicated run")
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--micro-batch", type=int, default=0, help="windows that go through the model at once (0: the batch)")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--workers", type=int, default=1, help="jobs at a time")
    made.add_argument("--windows", type=int, default=0, help="held-out windows to measure on (0: all)")
    made.add_argument("--on", default="auto")
    made.add_argument("--precision", default="fp32")
    made.add_argument("--lr", type=float, default=TUNED.lr, help="long runs want smaller steps; bounds keep their ratio to it")
    made.add_argument("--adapters", choices=KINDS, default=OWN, help="of all that is trained, but where a variant has its own")
    made.add_argument("--compile", action="store_true", help="compile the model's passes: for runs of minutes on a GPU")
    made.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # what the workers are called with
    return made


def with_polish(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with how long a supernet's subnets are polished: ten of them together half of 3·S unless said otherwise."""
    parser.add_argument("--polish", type=int, help="policy-steps that a mixed subnet is polished with (3·S / 20)")
    arguments = parser.parse_args()
    if arguments.polish is None:
        arguments.polish = 3 * arguments.steps // 20
    return arguments


def prepare(arguments: argparse.Namespace) -> Graph:
    """Graph and token windows, in --out."""
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "graph" / "graph.json").is_file():
        (out / "graph").mkdir(exist_ok=True)
        build(arguments.model, out / "graph")
    folder = resolve(arguments.model)
    texts_of = {"train": arguments.text, "heldout": [arguments.heldout]}
    texts_of |= {also_name(path): [path] for path in also_of(arguments)}
    for name, paths in texts_of.items():
        if not (out / f"{name}.npy").is_file():
            tokenizer, separator = texts.load_tokenizer(folder), texts.separator_id(folder)
            tokens = texts.windows(tokenizer, texts.documents(paths), WINDOW, separator, framed=False)
            buffer = io.BytesIO()
            np.save(buffer, tokens.astype(np.int32))
            write_atomic(out / f"{name}.npy", buffer.getvalue())
    return Graph.open(out / "graph")


def started(
    arguments: argparse.Namespace, kernels: Sequence[str], seed: int, gptq: bool = True, adapters: str | None = None
) -> Supernet:
    """A supernet at its start, on the device that was asked for. What GPTQ takes its time for is kept for the jobs that start alike;
    delete it (DIR/start-*) where the way to start changed."""
    adapters = adapters or arguments.adapters
    graph = Graph.open(arguments.out / "graph")
    facts = json.dumps([graph.fingerprint, *kernels, gptq, adapters, RANK, COMMON, RANKS])
    kept = arguments.out / f"start-{hashlib.sha256(facts.encode()).hexdigest()[:12]}-{seed}.safetensors"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process makes it, the others wait
        if not kept.is_file():
            supernet = start(arguments, kernels, seed, gptq, adapters)
            write_atomic(kept, save(supernet.arrays()))
            return supernet
    model = load_model(resolve(arguments.model)).to(Team(arguments.on).device)
    supernet = Supernet(model, graph.units, kernels, seed=seed, start=False, adapters=adapters)
    supernet.load(load_file(kept))
    return supernet


def start(
    arguments: argparse.Namespace, kernels: Sequence[str], seed: int, gptq: bool = True, adapters: str | None = None
) -> Supernet:
    """A supernet at its start, made anew."""
    model = load_model(resolve(arguments.model)).to(Team(arguments.on).device)
    units = Graph.open(arguments.out / "graph").units
    windows = torch.from_numpy(training_windows(arguments)[:CALIBRATION]).to(Team(arguments.on).device)
    moments = input_moments(model, units, windows) if gptq else None
    return Supernet(model, units, kernels, seed=seed, moments=moments, adapters=adapters or arguments.adapters)


def settings_of(arguments: argparse.Namespace, **changes: Any) -> Settings:
    """What the arguments and a variant's changes make of the tuned settings."""
    share = arguments.lr / TUNED.lr
    asked = {"precision": arguments.precision, "lr": arguments.lr, "bound_lr": share * TUNED.bound_lr}
    return replace(TUNED, **(asked | {"micro_batch": arguments.micro_batch, "compiled": arguments.compile} | changes))


def described(arguments: argparse.Namespace) -> str:
    """What a policy-step is, for a report's first line."""
    how = f"{arguments.precision}, learning rate {arguments.lr:g}, {arguments.adapters} adapters"
    return f"policy-steps of {arguments.batch} x {WINDOW} tokens, {how}"


def training_windows(arguments: argparse.Namespace) -> np.ndarray:
    return np.load(arguments.out / "train.npy").astype(np.int64)


def heldout_windows(arguments: argparse.Namespace) -> np.ndarray:
    return np.load(arguments.out / "heldout.npy").astype(np.int64)[: arguments.windows or None]


def also_windows(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Of each of the further held-out texts, by its name."""
    return {
        text_name(path): np.load(arguments.out / f"{also_name(path)}.npy").astype(np.int64)[: arguments.windows or None]
        for path in also_of(arguments)
    }


def also_of(arguments: argparse.Namespace) -> list[Path]:
    """The further held-out texts, which their names must tell apart."""
    paths = vars(arguments).get("also") or []
    if len({text_name(path) for path in paths}) < len(paths):
        raise SystemExit(f"expected --also files of different folders or names, got {' '.join(map(str, paths))}")
    return list(paths)


def text_name(path: Path) -> str:
    """A text as reports name it: FOLDER/FILE, since many a data set's file is a "valid.txt"."""
    return "/".join(path.resolve().parts[-2:])


def also_name(path: Path) -> str:
    return f"also-{sha256(path)[:12]}"


@torch.no_grad()
def quality(
    supernet: Supernet,
    policies: Mapping[str, Policy],
    windows: np.ndarray,
    weights: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> dict[str, tuple[float, float]]:
    """(perplexity, KL to fp32 in nats per token) of each. Windows share a batch unless a kernel quantises activations per tensor.
    weights: what stands in place of those that the supernet would make for each, as `Supernet.weights` returns them."""
    if any(CATALOGUE[name].activation == "int8_tensor" for policy in policies.values() for name in policy.values()):
        batch = 1
    else:  # a CPU takes longer for large tensors, which it has to ask memory for each time
        batch = 32 if supernet.device.type == "cuda" else 4
    made = weights or {name: supernet.weights(policy) for name, policy in policies.items()}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in policies}
    for ids in torch.from_numpy(windows).to(supernet.device).split(batch):
        teacher = torch.log_softmax(supernet.teacher(ids)[:, :-1].float(), -1)
        for name, policy in policies.items():
            student = torch.log_softmax(supernet(policy, ids, None, True, made[name])[:, :-1].float(), -1)
            sums[name][0] -= student.gather(-1, ids[:, 1:, None]).double().sum().cpu()
            sums[name][1] += (teacher.exp() * (teacher - student)).sum(-1).double().sum().cpu()
    tokens = windows[:, 1:].size
    return {name: (math.exp(float(nll) / tokens), float(distance) / tokens) for name, (nll, distance) in sums.items()}


def polish(supernet: Supernet, policy: Policy, run: Run, steps: int) -> float:
    """`steps` more for one policy, as `export --polish` takes them; returns the seconds."""
    begin = time.monotonic()
    with scratch() as folder:
        adapt(supernet, replace(run, steps=steps, settings=polishing(run.settings, steps), out=folder), [policy])
    return time.monotonic() - begin


def polished(
    supernet: Supernet, policies: Mapping[str, Policy], run: Run, steps: int, windows: np.ndarray
) -> dict[str, tuple[float, float]]:
    """`quality` of each policy after `steps` of its own. The supernet stays as it was."""
    trained = {name: parameter.detach().clone() for name, parameter in supernet.parameters.items()}
    seen = {}
    for name, policy in policies.items() if steps else ():
        polish(supernet, policy, run, steps)
        seen |= quality(supernet, {name: policy}, windows)
        for key, parameter in supernet.parameters.items():
            parameter.data.copy_(trained[key])
    return seen


def place(out: Path, job: str) -> Path:
    """Where a job's result is kept."""
    return out / f"{job.replace(' ', '-')}.json"


def beside(arguments: argparse.Namespace, job: str, suffix: str) -> Path:
    """Where what a job leaves for others is kept: its name says of which set-up it is."""
    digest = hashlib.sha256(json.dumps(setup(arguments, job), sort_keys=True).encode()).hexdigest()[:12]
    return place(arguments.out, job).with_suffix(f".{digest}{suffix}")


def setup(arguments: argparse.Namespace, job: str) -> dict[str, Any]:
    """What a job's result depends on; a dedicated run is not polished."""
    named = ["model", "text", "heldout", "steps", "batch", "windows", "precision", "lr", "adapters", "workload", "compile"]
    named += ["polish"] if job.partition(" ")[0] in POLISHED else []
    facts = {name: str(vars(arguments).get(name)) for name in named}
    table, more = vars(arguments).get("table"), {}
    if further := also_of(arguments):
        more["also"] = {text_name(path): sha256(path) for path in further}
    if "profiles" in vars(arguments):  # a task's: what it is trained on and held against
        more |= {name: str(vars(arguments)[name]) for name in ("models", "data", "examples", "device")}
        more |= {f"{path.parent.name}/{TABLE}": sha256(path) for path in sorted(arguments.profiles.glob(f"*/{TABLE}"))}
        more["graph"] = Graph.open(arguments.graph).fingerprint
    return {**facts, **more, "table": sha256(table) if table else None}


def keep(arguments: argparse.Namespace, job: str, result: dict[str, Any]) -> None:
    """Keep a job's result; its checkpoint has served."""
    write_atomic(place(arguments.out, job), json.dumps({"setup": setup(arguments, job), **result}, indent=1) + "\n")
    shutil.rmtree(place(arguments.out, job).with_suffix(".training"), ignore_errors=True)


def read(arguments: argparse.Namespace, job: str) -> Any | None:
    """A job's result, or None where there is none of this set-up."""
    path = place(arguments.out, job)
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("setup") == setup(arguments, job) else None


def run_all(arguments: argparse.Namespace, jobs: Sequence[str]) -> None:
    """Every job without a result, by --workers processes of this script that are told one job after another (`serve`): what is compiled, or
    loaded, is so once a process. Several GPUs take turns."""
    gpus = [str(number) for number in range(torch.cuda.device_count() if arguments.on != "cpu" else 0)]
    if gpus and (given := os.environ.get("CUDA_VISIBLE_DEVICES")):
        gpus = given.split(",")
    wanted = [job for job in jobs if read(arguments, job) is None]
    failed: list[str] = []
    left = iter(wanted)  # one for all threads
    workers = min(arguments.workers, len(wanted))

    def attend(number: int) -> None:
        environment = dict(os.environ)
        if workers > 1:
            environment["OMP_NUM_THREADS"] = "1"
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        log = arguments.out / f"worker-{number}.log"
        with log.open("a") as errors:
            for first in left:
                ours = {"stdin": PIPE, "stdout": PIPE, "stderr": errors, "env": environment, "text": True}
                with subprocess.Popen([sys.executable, *sys.argv, "--serve"], **ours) as worker:
                    job: str | None = first
                    while job:
                        try:
                            print(job, file=worker.stdin, flush=True)
                            done = worker.stdout.readline().rstrip() == job
                        except BrokenPipeError:  # it died after the job before
                            done = False
                        print(f"{job}: {'done' if done else f'failed, see {log}'}", file=sys.stderr)
                        failed.extend([job] * (not done))
                        job = next(left, None) if done else None  # after a failure the next one gets a new process

    if wanted:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(attend, range(workers)))
    if failed:
        raise SystemExit(f"expected every job to end well, {len(failed)} of {len(wanted)} failed: see {arguments.out}/worker-*.log")


def serve(arguments: argparse.Namespace, work: Callable[[argparse.Namespace, str], None]) -> None:
    """Do the jobs that standard input names, one a line; each is answered with its name once it is done, and with nothing else: what a
    compiler prints goes where errors go."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            work(arguments, line.rstrip())
            print(line.rstrip(), file=answers, flush=True)
