"""What roofline.py times in one process and on one thread pool: readers of memory, copies of one unit, whole models while decoding.

Graphs are written to a temporary folder that is gone once they are loaded: the runtime has the files open.
"""

from __future__ import annotations

import ctypes
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import onnx.parser
import onnxruntime

from toolchain.decoding import Decoder
from toolchain.files import scratch
from toolchain.graph.assemble import assemble
from toolchain.graph.external import read_model
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import drawn, random_weights, write_one_unit
from toolchain.kernels import CATALOGUE, uniform
from toolchain.profiler.machine import last_level_cache_bytes
from toolchain.quantize.packing import packed_bytes
from toolchain.session import MODEL, SESSION_OPTIONS, open_session
from toolchain.spec import Unit

UNIT = Unit("unit", "MatMul", K=1024, N=2816)
KERNELS = ("fp32", "w8a8", "w8g32", "w8g128", "w4g32", "w4g128", "w2g32", "w2g128")
SYMMETRIC_TOO = ("w8g32", "w8g128", "w4g32", "w4g128")
WITHOUT, WHOLE, PROFILED = "{} without zero points", "{} model", "{} model, profiled"
MODELS, POSITION = ("w4g32", "w8g32"), 64
IDLE_NODES = 256


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


class TimedSession:
    """A session that notes how long its runs take: what a step takes beyond that is our own loop."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: onnxruntime.IOBinding) -> None:
        start = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.seconds.append(time.perf_counter() - start)


def decoders(graph: Graph, traces: Path) -> tuple[dict[str, Subject], dict[str, tuple[TimedSession, onnxruntime.InferenceSession]]]:
    """Each of MODELS without and with the profiler, and their sessions."""
    subjects, sessions = {}, {}

    def step(decoder: Decoder) -> None:
        decoder.seek(POSITION)
        decoder.step(1).argmax()

    for model in MODELS:
        policy = uniform(model, graph.units)
        packed = sum(packed_bytes(unit, CATALOGUE[policy[unit.name]]) for unit in graph.units if unit.op != "Gather")
        with scratch() as folder:
            assemble(graph, policy, drawn, folder, sync=False)
            options = _options()
            options.enable_profiling, options.profile_file_prefix = True, str(traces / model)
            watched = onnxruntime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
            sessions[model] = TimedSession(open_session(folder, shared_pool=True)), watched
            for label, session in zip((WHOLE, PROFILED), sessions[model], strict=True):
                with mock.patch("toolchain.decoding.open_session", return_value=session):
                    subjects[label.format(model)] = Subject(partial(step, Decoder(folder, capacity=POSITION + 1)), packed)
    return subjects, sessions


def _options() -> onnxruntime.SessionOptions:
    """As `open_session` has them with a shared pool."""
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads, options.log_severity_level = False, 3
    for name, value in SESSION_OPTIONS.items():
        setattr(options, name, value)
    return options


def idle_nodes() -> Subject:
    """A chain of nodes that have next to nothing to do: what is left is the runtime's way from one node to the next."""
    chain = " ".join(f"y{number + 1} = Abs(y{number})" for number in range(IDLE_NODES))
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]> idle (float[1] y0) => (float[1] y{IDLE_NODES}) {{ {chain} }}""")
    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Subject(partial(session.run, None, {"y0": np.ones(1, np.float32)}), 0, IDLE_NODES)


def timed_runs(values: Sequence, kept: Sequence[int], runs: int) -> list[Sequence]:
    """One value per run of a session → those of each kept round that count: a round's first is untimed, `runs` follow it."""
    return [values[number * (runs + 1) + 1 : (number + 1) * (runs + 1)] for number in kept]


def operators(trace: Path, kept: Sequence[int], runs: int) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """({operator: seconds per run in each kept round}, {operator: nodes}) of a session with the profiler on."""
    seen: list[Counter[str]] = [Counter()]
    nodes: Counter[str] = Counter()
    for event in json.loads(trace.read_text()):
        if event["name"] == "model_run":  # noted when it ends, after its nodes
            seen.append(Counter())
        elif event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            seen[-1][event["args"]["op_name"]] += event["dur"]
            nodes[event["args"]["op_name"]] += 1
    rounds = timed_runs(seen, kept, runs)
    seconds = {what: np.array([median(run[what] for run in timed) / 1e6 for timed in rounds]) for what in nodes}
    return seconds, Counter({what: count // (len(seen) - 1) for what, count in nodes.items()})
