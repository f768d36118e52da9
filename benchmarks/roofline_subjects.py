"""What roofline.py times in one process and on one thread pool: readers of memory, copies of one unit, whole models while decoding.

Graphs are written to a temporary folder that is gone once they are loaded: the runtime has the files open.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import onnx
import onnxruntime
from decode_speed import random_llama

from toolchain.commands.workflow import opened
from toolchain.decoding import Decoder
from toolchain.files import scratch
from toolchain.graph.assemble import assemble
from toolchain.graph.external import read_model
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import drawn, random_weights, write_one_unit
from toolchain.kernels import CATALOGUE, uniform
from toolchain.profiler.agent import last_level_cache_bytes
from toolchain.quantize.packing import packed_bytes
from toolchain.session import MODEL, open_session
from toolchain.spec import Unit

UNIT = Unit("unit", "MatMul", K=1024, N=2816)
KERNELS = ("fp32", "w8a8", "w8g32", "w8g128", "w4g32", "w4g128", "w2g32", "w2g128")
SYMMETRIC_TOO = ("w8g32", "w8g128", "w4g32", "w4g128")
WITHOUT, WHOLE, PROFILED = "{} without zero points", "{} model", "{} model, profiled"
MODELS, POSITION = ("w4g32", "w8g32"), 64
RUN = "model_run"
"""The profiler's name for a run of the whole graph."""


@dataclass(frozen=True)
class Subject:
    """Something that reads so many bytes of weights in a run; held: what the runtime keeps in memory of its own for them."""

    run: Callable[[], object]
    bytes: int
    copies: int = 1
    held: int = 0


def far_beyond_cache() -> int:
    """Bytes of which a cache can keep no part that matters."""
    return max(160_000_000, 5 * last_level_cache_bytes())


def readers(size: int, threads: int) -> dict[str, Subject]:
    arrays = [np.random.default_rng(number).random(size // 4 // threads, np.float32) for number in range(threads)]
    pool = ThreadPoolExecutor(threads)
    ways: dict[str, Callable[[np.ndarray], object]] = {
        "numpy max, float32": lambda array: array.max(),
        "numpy max, int32": lambda array: array.view(np.int32).max(),
        "numpy dot, float32": lambda array: np.dot(array, array),
    }
    return {name: Subject(lambda way=way: list(pool.map(way, arrays)), sum(a.nbytes for a in arrays)) for name, way in ways.items()}


def units(size: int) -> dict[str, Subject]:
    """Copies of UNIT under every kernel, and under some without their zero points."""
    subjects = {}
    for name in KERNELS:
        with scratch() as folder:
            packed = packed_bytes(UNIT, CATALOGUE[name])
            copies = ceil(size / packed)
            write_one_unit(UNIT, CATALOGUE[name], random_weights(UNIT, CATALOGUE[name]), copies, folder)
            subjects[name] = _unit(folder, copies * packed, copies)
            if name in SYMMETRIC_TOO:
                subjects[WITHOUT.format(name)] = _unit(folder, copies * packed - _drop_zero_points(folder), copies)
    return subjects


def _unit(folder: Path, size: int, copies: int) -> Subject:
    before = _own_bytes()
    session = open_session(folder, shared_pool=True)
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.random.default_rng(0).standard_normal((1, UNIT.K), dtype=np.float32))
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    return Subject(partial(session.run_with_iobinding, binding), size, copies, _own_bytes() - before)


def _own_bytes() -> int:
    """Memory of this process that is in no file; what was freed is handed back first (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _drop_zero_points(folder: Path) -> int:
    """Let the graph's MatMulNBits go without: the runtime then takes the middle of the range. Returns the bytes dropped."""
    model = read_model(folder)
    dropped = {node.input.pop() for node in model.graph.node}
    size = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.name in dropped)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in dropped]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, folder / MODEL)
    return size


@contextlib.contextmanager
def opened_graph(folder: Path) -> Iterator[Graph]:
    """The graph of a checkpoint, or of a folder that is one already."""
    with contextlib.nullcontext() if (folder / "graph.json").is_file() else opened(str(folder)) as source:
        yield source.graph if source else Graph.open(folder)


def llama(work: Path) -> Path:
    """The random checkpoint: the folder `llama` in the work folder is taken as it is, if there is one."""
    if not (work / "llama").exists():
        work.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()):
            random_llama(work / "llama")
    return work / "llama"


def decoders(graph: Graph, traces: Path) -> tuple[dict[str, Subject], dict[str, onnxruntime.InferenceSession]]:
    """Each of MODELS without and with the profiler, and the sessions of the latter."""
    subjects, sessions = {}, {}

    def profiled(directory: Path, *_: object, **__: object) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads, options.log_severity_level = False, 3
        options.enable_profiling, options.profile_file_prefix = True, str(traces / name)
        sessions[name] = onnxruntime.InferenceSession(str(directory / MODEL), options, providers=["CPUExecutionProvider"])
        return sessions[name]

    def step(decoder: Decoder) -> None:
        decoder.seek(POSITION)
        decoder.step(1).argmax()

    for name in MODELS:
        policy = uniform(name, graph.units)
        packed = sum(packed_bytes(unit, CATALOGUE[policy[unit.name]]) for unit in graph.units if unit.op != "Gather")
        with scratch() as folder:
            assemble(graph, policy, drawn, folder, sync=False)
            subjects[WHOLE.format(name)] = Subject(partial(step, Decoder(folder, 0, POSITION + 1, shared_pool=True)), packed)
            with mock.patch("toolchain.decoding.open_session", profiled):
                subjects[PROFILED.format(name)] = Subject(partial(step, Decoder(folder, 0, POSITION + 1, shared_pool=True)), packed)
    return subjects, sessions


def operators(trace: Path, kept: list[int], turn: int) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """({operator, and RUN for all of it: seconds per run in each kept round}, {operator: nodes}) of a session with the profiler on.

    turn: runs per round, of which the first does not count.
    """
    runs: list[Counter[str]] = []
    nodes: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in json.loads(trace.read_text()):
        if event["name"] == RUN:  # noted when it ends, after its nodes
            runs.append(spent + Counter({RUN: event["dur"]}))
            spent = Counter()
        elif event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
            nodes[event["args"]["op_name"]] += 1
    rounds = [runs[number * turn + 1 : (number + 1) * turn] for number in kept]
    seconds = {what: np.array([median(run[what] for run in timed) / 1e6 for timed in rounds]) for what in (*nodes, RUN)}
    return seconds, Counter({what: count // len(runs) for what, count in nodes.items()})
