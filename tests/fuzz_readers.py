"""Every reader of what strangers write, each as its command calls it, and the sandbox in which a case runs.

A case is the name of one file of a valid folder and its new content (`NAME\\nCONTENT`), or `@link NAME\\nTARGET`. It ends well if
the reader gives a value, or refuses by a BittailorError of one line. Anything else is a crash: another exception, a file written or read
outside the folder, more than `MOST_BYTES` of memory, more than `MOST_SECONDS`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fuzz_mutation import mutated

from toolchain import hardware
from toolchain.blocks import Block
from toolchain.check import hold_peak_ratio, hold_ratio
from toolchain.commands import workflow
from toolchain.commands.baseline import Baseline
from toolchain.commands.verification import verify
from toolchain.costs.from_table import cost_model
from toolchain.costs.table import open_table
from toolchain.errors import BittailorError
from toolchain.evaluate.spans import read_squad
from toolchain.evaluate.tasks import TASKS
from toolchain.files import sha256
from toolchain.graph import build
from toolchain.graph.assemble import package_bytes, round_to_nearest
from toolchain.graph.external import load_array, read_model
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE, uniform
from toolchain.package import generate
from toolchain.package.integrity import JSON_TAIL, MANIFEST, SEAL, YAML_TAIL
from toolchain.package.manifest import open_package
from toolchain.policy import prices, proposal
from toolchain.profiler import agent, meters, requests
from toolchain.profiler.bundle import agent_bytes, agent_sha256
from toolchain.profiler.measure import latencies, summarise
from toolchain.profiler.transports import doorkeeper, replies
from toolchain.report import records
from toolchain.session import cache_slots, open_session
from toolchain.spec import Device, Workload
from toolchain.supernet.store import SupernetFolder
from toolchain.text import documents, load_tokenizer, separator_id

MOST_SECONDS = 10.0
"""Of this process's CPU time, so that a busy machine makes no crash."""
MOST_BYTES = 400 << 20
"""By which one case may raise this process's peak: the largest valid input here is below 2 MB."""
ROOM_BYTES = 3 << 30
"""Address space beyond what the process has when it begins."""
LONGEST_LINE = 2000
"""Characters of a refusal."""
FORMS = {".json": "json", ".yaml": "yaml", ".jsonl": "table", ".safetensors": "safetensors", ".onnx": "onnx", ".npy": "npy"}
WORKLOAD = Workload.parse("generate:8+4")
"""Of the seeds."""
_DIGESTS = ("manifest.yaml", "supernet.yaml")


class TooSlow(BaseException):
    """Not an Exception: no reader may swallow it."""


@dataclass(frozen=True)
class Reader:
    """One reader: the folder of `fuzz_seeds.make` that it reads, which files in it (patterns) are mutated, and the call.

    links: the files may become links, and not only other bytes.
    closed: what it reads must lie in the folder, links or not; a file that the user names may be a link.
    honest: after the mutation the digests are made to fit again, as a stranger would; of half of the cases.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    call: Callable[[Path], object]
    weight: float = 1.0
    links: bool = True
    honest: bool = False
    closed: bool = True

    def names(self, seeds: Path) -> tuple[str, ...]:
        """The files that are mutated."""
        return _names(seeds / self.folder, self.files)


@cache
def _names(folder: Path, patterns: tuple[str, ...]) -> tuple[str, ...]:
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(found))


DRIVER = "libcuda.so.1"
"""What the agent asks for a GPU's name, whatever the request says."""


class Sandbox:
    """A folder that a case may read, beside others that it may not touch."""

    def __init__(self, root: Path, seeds: Path, reader: Reader, most_seconds: float = MOST_SECONDS) -> None:
        self.root, self.seeds, self.reader, self.most_seconds = root, seeds, reader, most_seconds
        tempfile.gettempdir()  # looks for a folder where it may write
        self.inside = root / "inside"
        root.mkdir(parents=True)
        (root / "secret").write_bytes(b"\0" * 4096)
        self.fresh()
        self.names = reader.names(seeds)
        self._around = self._listing()
        self.risen = 0
        self._offence = ""
        self._watching = False
        sys.modules["pynvml"] = None  # type: ignore[assignment] # a GPU of this machine is none of the folder's
        sys.addaudithook(self._audit)

    def fresh(self) -> None:
        shutil.rmtree(self.inside, ignore_errors=True)
        shutil.copytree(self.seeds / self.reader.folder, self.inside)

    def _listing(self) -> list[tuple[str, int]]:
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(self.root) if entry.name != "inside")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (
                bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
                if isinstance(flags, int)
                else bool(set(mode or "") & set("wax+"))
            )
            if isinstance(path, str | bytes) and self._outside(path, writes):
                self._offence = self._offence or f"{'writes' if writes else 'reads'} {os.fsdecode(path)[-80:]!r}"
        elif event in (
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "os.symlink",
            "os.link",
            "os.truncate",
            "shutil.rmtree",
            "os.chmod",
        ):
            if any(isinstance(path, str | bytes) and self._outside(path, True) for path in arguments[:2]):
                self._offence = self._offence or f"{event} {arguments[:2]!r}"[:120]
        elif event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "ctypes.dlopen") and arguments[:1] != (
            DRIVER,
        ):
            self._offence = self._offence or f"{event} {arguments[:1]!r}"[:120]

    def _outside(self, path: str | bytes, writes: bool) -> bool:
        full = os.path.realpath(os.fsdecode(path))
        if full.startswith((f"{self.inside}/", "/dev/null", os.path.join(os.path.realpath("/tmp"), "bittailor-"))) or full == str(
            self.inside
        ):
            return False
        return writes or (self.reader.closed and full.startswith(f"{self.root}/"))

    def run(self, case: bytes, show: bool = False) -> str:
        """ "accepted", "refused", or how it crashed: one line, the same for the same fault. show: print what was raised."""
        first, _, content = case.partition(b"\n")
        name = os.fsdecode(first)
        link = name.startswith("@link ")
        name = name.removeprefix("@link ")
        if name not in self.names:
            return "accepted"
        target = self.inside / name
        if link:
            target.unlink()
            try:
                os.symlink(content.replace(b"\0", b"") or b".", target)
            except OSError:
                target.write_bytes(b"")
        else:
            target.write_bytes(content)
        if self.reader.honest and not link and hashlib.blake2b(case).digest()[0] % 4:
            _refit(self.inside, name)
        try:
            return self._outcome(show)
        finally:
            self._watching = False
            if self._listing() != self._around:
                raise SystemExit(f"{self.reader.name}: something was written beside its folder")
            self._restore(name)

    def _restore(self, name: str) -> None:
        whole = self.seeds / self.reader.folder
        if self.reader.folder == "incoming":
            self.fresh()
            return
        for other in {name, *_DIGESTS, "table.jsonl"}:
            if (whole / other).is_file():
                (self.inside / other).unlink(missing_ok=True)
                shutil.copyfile(whole / other, self.inside / other)

    def valid(self) -> str:
        """How the seeds themselves end. Called first unwatched: what is imported late, makes folders of its own."""
        self.reader.call(self.inside)
        return self._outcome(show=True)

    def _outcome(self, show: bool = False) -> str:
        before = _peak_bytes(anew=True)
        self._offence, self._watching = "", True
        signal.setitimer(signal.ITIMER_PROF, self.most_seconds)
        try:
            self.reader.call(self.inside)
            outcome = "accepted"
        except BittailorError as error:
            line = str(error)
            if show:
                traceback.print_exception(error)
            bad = "\n" in line or len(line) > LONGEST_LINE or not line.strip()
            outcome = f"refuses in {len(line)} characters: {_where(error)}" if bad else "refused"
        except TooSlow as error:
            outcome = f"too slow: {_where(error)}"
        except doorkeeper.Refused:
            outcome = "refused"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - what a crash is
            if show:
                traceback.print_exception(error)
            outcome = f"{type(error).__name__}: {_where(error)}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._watching = False
        if self._offence:
            return self._offence
        self.risen = _peak_bytes() - before
        return f"{self.risen >> 29 << 9} MB more" if self.risen > MOST_BYTES else outcome


def _peak_bytes(anew: bool = False) -> int:
    """The highest resident set of this process. anew: since now, or a peak of long ago would hide a case's."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _where(error: BaseException) -> str:
    """The innermost line of ours, and what was called from there."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/toolchain/" in frame.filename]
    if not ours:
        return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{ours[-1].filename.rpartition('/toolchain/')[2]}:{ours[-1].lineno} ({str(error)[:60]!r})".replace("\n", " ")


def _refit(folder: Path, name: str) -> None:
    """Make the digests fit, as whoever made the file would have."""
    if name == "table.jsonl":
        head, _, body = (folder / name).read_bytes().partition(b"\n")
        try:
            data = json.loads(head)
            data["sha256"] = hashlib.sha256(body).hexdigest()
            (folder / name).write_bytes(json.dumps(data).encode() + b"\n" + body)
        except (ValueError, TypeError, RecursionError):
            pass
        return
    for description in _DIGESTS:
        path = folder / description
        if path.is_file() and name not in _DIGESTS:
            listed = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
            if name in listed["files"] and (folder / name).is_file():
                path.write_bytes(path.read_bytes().replace(listed["files"][name].encode(), sha256(folder / name).encode()))
    if name == SEAL:
        path = folder / name
        body, _, _ = path.read_bytes().rpartition(JSON_TAIL.before)
        if body:
            path.write_bytes(JSON_TAIL.append(body))
        return
    manifest = folder / MANIFEST
    if manifest.is_file():  # its last line is its own digest
        body, _, _ = manifest.read_bytes().rpartition(YAML_TAIL.before)
        if body:
            manifest.write_bytes(YAML_TAIL.append(body))


# ---- the readers


def _device(folder: Path) -> object:
    device = hardware.load(str(folder / "board.yaml"))
    hash(device)
    return json.dumps([device.title, {name: budget.to_json() for name, budget in device.budgets.items()}]), hardware.meter(
        device, {}
    )


def _devices(folder: Path) -> object:
    found = hardware.list_devices(folder)
    return [hardware.named_budget("sources/low", device, folder) for device in found]


def _budget(folder: Path) -> object:
    return json.dumps(hardware.read_budget(folder / "budget.yaml").to_json())


class _Known:
    """Read once from the seeds, for readers that need a graph beside the file they read."""

    graph: Graph
    source: workflow.Source
    kernels: tuple[str, ...]
    blocks: tuple[Block, ...]


def _policy(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        return workflow.read_policy(str(folder / name), _Known.source, Device("nobody", transport="ssh", host="nobody"), [folder])

    return read


def _table(folder: Path) -> object:
    table = open_table(folder / "table.jsonl")
    model = cost_model(_Known.graph, table, WORKLOAD)
    cost = model.predict(uniform("w4g32", _Known.graph.units, table.header.kernels))
    json.dumps(cost.to_json())
    return model.predict(uniform("fp32", _Known.graph.units, table.header.kernels))


def _stored_budget(folder: Path) -> object:
    path = next(folder.glob("budgets-*.json"))
    return [workflow._stored_budget(path, name).to_json() for name in ("low", "high")]


def _manifest(folder: Path) -> object:
    package = open_package(folder)
    said = (
        package.policy,
        package.workload,
        package.budget,
        package.vocabulary,
        package.predicted,
        package.speeds,
        package.provider,
    )
    json.dumps([str(one) for one in said])
    package.predicted.get("compute_flop", {}).get("value")
    return json.dumps(package.predicted), [CATALOGUE[name].prefill for name in package.policy.values()]


def _session(folder: Path) -> object:
    package = open_package(folder)
    session = open_session(package.directory, threads=1)
    return cache_slots(session)


def _graph(folder: Path) -> object:
    graph = Graph.open(folder)
    policy = uniform("w4g32", graph.units)
    bytes_ = package_bytes(graph, policy)
    return (
        bytes_,
        [graph.first_row(unit) for unit in graph.units],
        graph.cache_bytes_per_layer(16),
        [graph.weight(unit).sum() for unit in graph.units],
    )


def _external(folder: Path) -> object:
    model = read_model(folder)
    return [load_array(tensor, folder).shape for tensor in model.graph.initializer]


def _supernet(folder: Path) -> object:
    supernet = SupernetFolder.open(folder)
    supernet.calibration(), supernet.heldout(), supernet.sensitivity
    json.dumps(dict(supernet.description["training"]))
    workflow.trained_workload(workflow.Source(_Known.graph, supernet.quantized, supernet))
    for unit in _Known.graph.units:
        for name in supernet.kernels:
            if CATALOGUE[name].quantised and name in supernet.description["kernels"].get(unit.name, ()):
                supernet.quantized(unit, CATALOGUE[name])
    return supernet.trained()


def _meta_network(folder: Path) -> object:
    proposal.log_probabilities(folder / "meta_network.safetensors", [0.5] * 4)
    from toolchain.policy.meta_network import MetaNetwork

    return MetaNetwork.load(folder / "meta_network.safetensors")


def _checkpoint(folder: Path) -> object:
    import torch

    from toolchain.train import checkpoint

    values = {"a": torch.nn.Parameter(torch.ones(4, 4)), "b": torch.nn.Parameter(torch.zeros(4))}
    state = checkpoint.load(folder, "id", values, [torch.optim.AdamW(values.values())])
    return state and (state.step + 1, dict(state.extra))


def _tokenizer(folder: Path) -> object:
    tokenizer = load_tokenizer(folder)
    return tokenizer.encode("Once upon a time").ids, separator_id(folder), tokenizer.decode([1, 2, 3])


def _settings(folder: Path) -> object:
    return generate._settings(folder)


def _encoder_decoder(folder: Path) -> object:
    return generate._encoder_decoder_settings(folder)


def _config(folder: Path) -> object:
    build.resolve(str(folder))
    return build.read_config(folder)


def _torch_model(folder: Path) -> object:
    from toolchain.supernet.loading import load_model

    return load_model(folder)


def _index(folder: Path) -> object:
    return build._weight_files(folder)


def _text(folder: Path) -> object:
    return documents([folder / "text.txt"])


_REPLIES: dict[str, tuple[str, dict[str, Any]]] = {
    "hello": ("hello", {"python": "3.11.2", "machine": "aarch64", "cpus": 4, "folder": "/data"}),
    "missing": ("job", {"missing": {"0" * 64: 12}}),
    "answer": ("job", {"answer": '{"peak_bytes": 1, "running_bytes": 2}', "of_another": False, "age_s": 0.5}),
    "died": ("job", {"died": "out of memory"}),
}
_ANSWERS: dict[str, dict[str, Any]] = {
    "identify": {
        "cpu": "x",
        "cache_bytes": 1,
        "runtime": "onnxruntime 1.31",
        "protocol": agent.PROTOCOL,
        "providers": ["CPUExecutionProvider"],
        "meters": {"rapl": ""},
    },
    "time": {
        "trials": {"package": [{"decode_ns": 1e6, "prefill_ns": 2e6}] * 5},
        "reference_ns": {"token": [1.0], "tokens": [2.0]},
        "dropped": 0,
        "valid": True,
    },
    "peak": {"peak_bytes": 10, "running_bytes": 5},
    "outputs": {"outputs": {"w4g32 0": [[1.0, 2.0]], "w8a8 1": None}},
    "energy": {
        "reason": "",
        "meter": "rapl",
        "step_s": 0.001,
        "window_s": 1.0,
        "idle_mw": 5.0,
        "measured": {
            "package": {
                "decode": {
                    **{"valid": True, "reason": "", "error": 0.1, "energy_mj": [1.0], "above_idle_mj": [0.5], "run_ms": [1.0]},
                    "reference_ns": {"token": [1.0]},
                }
            }
        },
    },
}
_PHONE = Device("phone")


def _reply(folder: Path) -> object:
    return [
        replies.reply_of((folder / f"reply-{name}.json").read_bytes(), operation, _PHONE)
        for name, (operation, _) in _REPLIES.items()
    ]


def _answer(folder: Path) -> object:
    made = {name: replies.answer_of((folder / f"answer-{name}.json").read_bytes(), name, _PHONE) for name in _ANSWERS}
    hardware.meter(_PHONE, made["identify"]["meters"])
    latencies(made["time"]["trials"].get("package", []), made["time"]["valid"])
    return json.dumps(made), f"{made['identify']['cpu']} {made['peak']['peak_bytes'] / 1e6:.1f}", float(made["peak"]["peak_bytes"])


def _sealed(folder: Path) -> object:
    said = verify(folder)
    return json.dumps(said.to_json())


def _baseline(folder: Path) -> object:
    read = Baseline.read(folder / "check.json")
    now = _Known.blocks
    return [hold_ratio(name, now, read.blocks, 1) for name in ("latency_ms", "first_token_ms") if name in read.blocks[0].trials], [
        hold_peak_ratio(summarise([1e6] * 3, True), read.peak_bytes)
    ]


def _record(name: str) -> Callable[[Path], object]:
    return lambda folder: json.dumps(records.read(folder / name).said)


def _request(folder: Path) -> object:
    place = os.getcwd()
    os.chdir(folder)
    try:
        for name in ("identify", "outputs"):
            code, answer = agent._answer(requests.read(Path(f"request-{name}.json")))
            if code == 2:
                raise BittailorError(answer["error"])
    finally:
        os.chdir(place)
    return answer


def _doorkeeper(folder: Path) -> object:
    """A header for each operation. A started job is not run here: what would be run is compared with what was sent."""
    root = folder / "device"
    for place in ("files", "incoming", "jobs"):
        (root / place).mkdir(parents=True, exist_ok=True)
    stored = root / "files" / agent_sha256()
    stored.write_bytes((folder / "agent.pyz").read_bytes())
    if doorkeeper._agent(root, {"sha256": agent_sha256()}).read_bytes() != agent_bytes():
        raise AssertionError("a changed agent would be run")
    header = (folder / "header.json").read_bytes()
    with suppress(ValueError, RecursionError):
        if isinstance(data := json.loads(header), dict):  # the desk may name any folder, and this is no desk
            header = json.dumps({**data, "folder": str(root)}).encode()
    _, reply = doorkeeper.answered(BufferedReader(BytesIO(b"%d\n%s%s" % (len(header), header, b"x" * 64))))  # type: ignore[arg-type]
    json.dumps(reply)
    if "error" in reply:
        raise doorkeeper.Refused(reply["error"])
    return reply


def _meters(folder: Path) -> object:
    states = meters.states(folder)
    for name, reason in states.items():
        if not reason and name != "nvml":
            try:
                meter = meters.METERS[name](folder)
                meter.read()
                meter.close()
            except BittailorError:
                pass
    return states


EVERY = (
    Reader("device file", "devices", ("board.yaml",), _device, 1, closed=False),
    Reader("device folder, presets", "devices", ("board.yaml", "local.yaml", "presets/sources.yaml"), _devices, 0.3, closed=False),
    Reader("budget file", "other", ("budget.yaml",), _budget, 2, closed=False),
    Reader("policy file, YAML", "other", ("policy.yaml",), _policy("policy.yaml"), 0.6, closed=False),
    Reader("policy file, JSON", "other", ("policy.json",), _policy("policy.json"), 1.5, closed=False),
    Reader("cost table", "tables/local", ("table.jsonl",), _table, 0.7, closed=False, honest=True),
    Reader("stored budgets", "tables/local", ("budgets-*.json",), _stored_budget, 2, closed=False),
    Reader("manifest", "package", ("manifest.yaml",), _manifest, 1, honest=True),
    Reader("package's graph, onnxruntime", "package", ("model.onnx",), _session, 0.7, honest=True),
    Reader("package's graph, external data", "package", ("model.onnx",), _external, 2),
    Reader("sealed report", "sealed", ("seal.json", "seal.json.minisig"), _sealed, 0.7, honest=True),
    Reader("baseline", "reports", ("check.json",), _baseline, 1, closed=False),
    Reader("measured, check's report", "reports", ("check.json",), _record("check.json"), 1, closed=False),
    Reader("measured, evaluate's report", "reports", ("evaluate.json",), _record("evaluate.json"), 1.5, closed=False),
    Reader("graph folder", "graph", ("graph.json", "model.onnx"), _graph, 1),
    Reader("supernet.yaml", "supernet", ("supernet.yaml",), _supernet, 0.3),
    Reader(
        "supernet's tensors",
        "supernet",
        ("quantised/*.safetensors", "adapters/**/*.safetensors", "*.safetensors"),
        _supernet,
        0.4,
        honest=True,
    ),
    Reader("meta-network", "supernet", ("meta_network.safetensors",), _meta_network, 2),
    Reader("prices", "other", ("prices.safetensors",), lambda folder: prices.read(folder / "prices.safetensors"), 2),
    Reader("checkpoint", "checkpoint", ("checkpoint.safetensors",), _checkpoint, 2),
    Reader("tokenizer", "package", ("tokenizer.json", "tokenizer_config.json"), _tokenizer, 1),
    Reader("genai_config.json", "package", ("genai_config.json",), _settings, 2),
    Reader("encoder-decoder's configs", "other", ("config.json", "generation_config.json"), _encoder_decoder, 2),
    Reader("model's config.json", "model", ("config.json",), _config, 2, closed=False),
    Reader("model, transformers", "model", ("config.json", "model.safetensors"), _torch_model, 0.1, closed=False),
    Reader("index of weights", "other", ("model.safetensors.index.json",), _index, 2, closed=False),
    Reader("text", "other", ("text.txt",), _text, 2, links=False),
    Reader("text, packed", "other", ("text.txt.xz",), lambda folder: documents([folder / "text.txt.xz"]), 2, links=False),
    Reader("questions", "tasks", ("squad.json",), lambda folder: read_squad(folder / "squad.json"), 2, closed=False),
    *(Reader(f"examples of {task.name}", "tasks", task.files[1:], task.examples, 0.7, closed=False) for task in TASKS.values()),
    Reader("device's replies", "talk", ("reply-*.json",), _reply, 3, links=False),
    Reader("agent's answers", "talk", ("answer-*.json",), _answer, 3, links=False),
    Reader("agent's requests", "talk", ("request-identify.json", "request-outputs.json", "unit/x.npy"), _request, 2, links=False),
    Reader("doorkeeper, agent's file", "incoming", ("header.json", "agent.pyz"), _doorkeeper, 0.7, links=False),
    Reader("meters", "sys", ("**/*",), _meters, 0.7),
    Reader("battery's gauge", "gauge", ("**/*",), _meters, 1),
)


def readers(seeds: Path) -> dict[str, Reader]:
    """`EVERY` by name, ready to read. seeds: what `fuzz_seeds.make` made, to which the inputs of some readers are added."""
    _Known.graph = Graph.open(seeds / "graph")
    _Known.source = workflow.Source(_Known.graph, round_to_nearest(_Known.graph), None)
    _Known.blocks = Baseline.read(seeds / "reports" / "check.json").blocks
    talk = seeds / "talk"
    if not talk.is_dir():
        (seeds / "tasks").mkdir()
        for task in TASKS.values():
            places = dict(zip(task.columns, ("1", "a film of parts", "not this one"), strict=True))
            line = "\t".join(places.get(column, "x") for column in range(task.width))
            (seeds / "tasks" / task.files[1]).write_text(f"{line}\n" * (3 if task.header else 2))
        question = {"question": "When?", "answers": [{"text": "1973", "answer_start": 3}]}
        paragraph = {"context": "In 1973 it rose.", "qas": [question]}
        (seeds / "tasks" / "squad.json").write_text(json.dumps({"data": [{"title": "Oil", "paragraphs": [paragraph]}]}))
        talk.mkdir()
        for name, (_, reply) in _REPLIES.items():
            (talk / f"reply-{name}.json").write_text(json.dumps(reply))
        for name, answer in _ANSWERS.items():
            (talk / f"answer-{name}.json").write_text(json.dumps(answer))
        (talk / "unit").mkdir()
        shutil.copyfile(agent.BARE / "model.onnx", talk / "unit" / "model.onnx")
        np.save(talk / "unit" / "x.npy", np.ones((1, 8), np.float32))
        (talk / "request-identify.json").write_text(
            json.dumps({"action": "identify", "sysfs": "sys", "provider": "CPUExecutionProvider"})
        )
        subject = {"name": "x", "folder": "unit", "inputs": ["x.npy"]}
        (talk / "request-outputs.json").write_text(json.dumps({"action": "outputs", "subjects": [subject]}))
        (seeds / "incoming").mkdir()
        (seeds / "incoming" / "agent.pyz").write_bytes(agent_bytes())
        files = [{"sha256": hashlib.sha256(b"x" * 32).hexdigest(), "size": 32, "offset": 0}]
        (seeds / "incoming" / "header.json").write_text(
            json.dumps({"op": "put", "folder": "@device", "caller": "abc", "files": files})
        )
    return {reader.name: reader for reader in EVERY}


# ---- cases


def cases(reader: Reader, seeds: Path, seed: int, start: int, count: int) -> Iterator[bytes]:
    """Cases number `start` to `start + count` of a seed, each by itself: the same whichever went before."""
    for number in range(start, start + count):
        yield case(reader, seeds, random.Random(f"{reader.name} {seed} {number}"))


def case(reader: Reader, seeds: Path, rng: random.Random, earlier: bytes = b"") -> bytes:
    """One case. earlier: a case to go on from instead of a valid file."""
    names = reader.names(seeds)
    name = rng.choice(names)
    if reader.links and rng.random() < 0.01:
        return (
            b"@link "
            + os.fsencode(name)
            + b"\n"
            + rng.choice((b"../secret", b"/dev/zero", b".", b"nowhere", os.fsencode(name), b"/proc/self/mem"))
        )
    first, _, content = earlier.partition(b"\n")
    if first and os.fsdecode(first) in names:
        name = os.fsdecode(first)
    else:
        content = (seeds / reader.folder / name).read_bytes()
    return os.fsencode(name) + b"\n" + mutated(rng, content, FORMS.get(Path(name).suffix, "bytes"))


@contextmanager
def limited() -> Iterator[None]:
    """Address space and time are bounded for cases in this process."""

    def late(*_: object) -> None:
        raise TooSlow

    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, old)
