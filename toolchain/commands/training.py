"""`bittailor train`: MODEL → supernet folder. Text, cost model, sensitivities and the joint loop brought together.

While it runs, everything a killed run needs to go on is in `SUPERNET.training/`; the supernet itself appears whole at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from toolchain import text as texts
from toolchain.commands import workflow
from toolchain.errors import BittailorError, InputError, require
from toolchain.files import replace_folder
from toolchain.graph.build import build, fingerprint, resolve
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, uniform
from toolchain.policy import sensitivity
from toolchain.spec import Device, Workload
from toolchain.supernet import store

WINDOW = 256
BATCH = 4
MOST_RATE = 10
CALIBRATION = 4
"""Windows on which the kernels' losses are measured, before training (for the meta-network's start) and after."""
GPTQ_WINDOWS = 64
SELF_WRITTEN_TOKENS = 128 * WINDOW
HELDOUT = 0.1
_HELDOUT_MOST = 40


@dataclass(frozen=True)
class Machine:
    """Where and in what portions to train. on: "cpu", "cuda" or "auto"; precision: "fp32", "bf16" or "auto" (bf16 on a GPU);
    batch: windows a step; micro_batch: windows that go through the model at once, 0: all; compiled: the model's passes are.
    rate: times the tuned learning rates."""

    on: str = "auto"
    precision: str = "auto"
    batch: int = BATCH
    micro_batch: int = 0
    compiled: bool = False
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= MOST_RATE:
            raise InputError(f"expected --rate above 0, at most {MOST_RATE}, got {self.rate:g}", "type for example: --rate 0.25")
        if self.batch < 1 or self.micro_batch < 0:
            raise InputError(f"expected one window a step or more, got {self.batch} and {self.micro_batch}")
        if self.compiled and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise InputError("expected a C++ compiler for --compile, found none", "install g++, or leave --compile out")


LOCAL = Machine()


@dataclass(frozen=True)
class Text:
    """Token windows [n, WINDOW] to train on and to measure on, and what outputs say of them."""

    train: np.ndarray
    heldout: np.ndarray
    description: str
    heldout_description: str


def train_supernet(
    source: str,
    device: Device,
    folders: Sequence[Path],
    workload: Workload | None,
    text: list[Path] | None,
    out: Path,
    steps: int,
    seed: int,
    machine: Machine = LOCAL,
) -> dict[str, Any]:
    """Train and write the supernet; returns {"supernet", "steps", "text", "distance", ...}. Raises InputError and its kin before any long
    work. "distance": kernel → (at its start, trained), of its uniform policy to the model on held-out text, as training measures it.

    Under `accelerate launch` every process calls this with the same arguments; the first one writes.
    """
    torch = require("torch")
    from toolchain.supernet.loading import load_model
    from toolchain.supernet.model import Supernet
    from toolchain.supernet.saving import save
    from toolchain.supernet.starts import input_moments
    from toolchain.train.loop import Run, train
    from toolchain.train.quality import scorer
    from toolchain.train.sampler import worth_training
    from toolchain.train.settings import Settings
    from toolchain.train.team import Team

    if steps < 1:
        raise InputError(f"expected one training step or more, got {steps}")
    if out.exists() and not (out / store.DESCRIPTION).is_file() and any(out.iterdir()):
        raise InputError(f"expected {out} to be absent, empty or an earlier supernet, got something else", "choose another --out")
    folder = resolve(source)
    if text:
        texts.documents(text)  # unreadable text is found before the long work
    team = Team(machine.on)
    precision = machine.precision if machine.precision != "auto" else "bf16" if team.device.type == "cuda" else "fp32"
    settings = Settings(micro_batch=machine.micro_batch, precision=precision, compiled=machine.compiled)
    settings = replace(settings, lr=machine.rate * settings.lr, bound_lr=machine.rate * settings.bound_lr)
    work = out.with_name(out.name + ".training")
    resumed = work.exists()
    try:
        with team.main_first():  # the others find what it has made
            graph = _graph(source, folder, work)
            costs = workflow.find_costs(graph, device, folders, workload)
            model = load_model(folder).to(team.device)
            text_used = _text(graph, model, text, work, seed)
    except BittailorError:
        if not resumed:
            shutil.rmtree(work, ignore_errors=True)
        raise
    calibration = text_used.train[:CALIBRATION]
    moments = input_moments(model, graph.units, torch.from_numpy(text_used.train[:GPTQ_WINDOWS]).to(team.device))
    supernet = Supernet(model, graph.units, costs.table.header.kernels, seed=seed, moments=moments)
    reference = uniform("fp32", graph.units)

    def losses() -> dict[str, dict[str, float]]:
        return team.agree(lambda: sensitivity.measure(scorer(supernet, calibration), graph.units, supernet.kernels, reference))

    def distances() -> dict[str, float]:
        """Of text that nothing is trained on: too large a step for a model or its batches shows here, and nowhere else."""
        score = scorer(supernet, text_used.heldout[:CALIBRATION])
        worth = dict.fromkeys(chain(*worth_training(costs.model).values()))  # no step sees the others
        names = [name for name in CATALOGUE if name in worth and CATALOGUE[name].quantised and not CATALOGUE[name].prefill]
        return team.agree(lambda: {name: score(supernet.policy(name)) for name in names})

    batch = min(machine.batch, len(text_used.train))
    if batch < team.size:
        raise InputError(
            f"expected a window for each of {team.size} processes, got a batch of {batch}", f"type: --batch {team.size}"
        )
    run = Run(text_used.train, steps, batch, work, seed, settings=settings, team=team)
    untrained = distances()
    trained = train(supernet, run, costs.model, losses)
    assert trained.meta_network is not None
    after, now = losses(), distances()
    description = {
        "text": text_used.description,
        "heldout": text_used.heldout_description,
        "steps": steps,
        "batch": batch,
        "trained_on": f"{team.size} × {team.device.type}, {precision}",
        "window": WINDOW,
        "seed": seed,
        **({"rate": machine.rate} if machine.rate != 1 else {}),
        "device": device.name,
        "workload": str(costs.model.workload),
    }
    if team.main:
        with replace_folder(out, store.DESCRIPTION) as target:
            shutil.copytree(graph.directory, target / "graph")
            shutil.copytree(folder, target / "model", ignore=shutil.ignore_patterns(".*", "*.bin", "*.md"))
            trained.meta_network.save(target / "meta_network.safetensors")
            store.write_arrays(target / "heldout.safetensors", {"tokens": text_used.heldout})
            save(supernet, target, Path(source).name, after, description, calibration)
        shutil.rmtree(work, ignore_errors=True)
    team.wait()
    distance = {name: (untrained[name], now[name]) for name in now}
    return {"supernet": str(out), **description, "resumed_from_step": trained.resumed_from, "distance": distance}


def _graph(source: str, folder: Path, work: Path) -> Graph:
    """The model's graph in `work`, built unless a killed run left it whole."""
    place = work / "graph"
    if (place / "graph.json").is_file():
        graph = Graph.open(place)
        if graph.fingerprint == fingerprint(folder):
            return graph
    with replace_folder(place, "graph.json") as fresh:
        build(source, fresh)
    return Graph.open(place)


def _text(graph: Graph, model: Any, given: list[Path] | None, work: Path, seed: int) -> Text:
    """The user's text, or the prose that every CPython carries, for a decoder together with what the model writes itself."""
    tokenizer = texts.load_tokenizer(graph.directory)
    separator = texts.separator_id(graph.directory)
    found = texts.documents(given) if given else texts.pydoc_documents()
    windows = texts.windows(tokenizer, found, min(WINDOW, graph.context), separator, framed=graph.kind == "encoder")
    if len(windows) < 2:
        raise InputError(f"expected two windows of {WINDOW} tokens or more, got {len(windows)}", "give more text: --text FILE")
    train, heldout = texts.split(windows, HELDOUT, seed)
    heldout = heldout[:_HELDOUT_MOST]
    name = ", ".join(path.name for path in given) if given else texts.pydoc_description()
    description = f"{name} ({train.size} tokens)"
    if not given and graph.kind == "decoder":
        own = _self_written(model, graph.fingerprint, separator or 0, work, seed, train.shape[1])
        train = np.concatenate([own, train])
        description = f"{own.size} tokens the model wrote itself, and {description}"
    return Text(train, heldout, description, f"held-out part of {name}")


def _self_written(model: Any, fingerprint_: str, end: int, work: Path, seed: int, length: int) -> np.ndarray:
    from safetensors.numpy import load_file

    from toolchain.train.text_source import self_written

    path = work / f"self-written-{fingerprint_[:12]}-{seed}-{length}.safetensors"
    if not path.is_file():
        store.write_arrays(path, {"tokens": self_written(model, SELF_WRITTEN_TOKENS, seed, end, length)})
    return load_file(path)["tokens"]
