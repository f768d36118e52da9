"""The readers at both ends of a device's link, of replies and answers there, of requests and headers here; and of its meters' files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_sandbox import Reader

from toolchain import hardware
from toolchain.errors import BittailorError
from toolchain.profiler import agent, meters, requests
from toolchain.profiler.bundle import agent_bytes, agent_sha256
from toolchain.profiler.measure import latencies
from toolchain.profiler.transports import doorkeeper, replies
from toolchain.spec import Device

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


OF_DEVICES = (
    Reader("device's replies", "talk", ("reply-*.json",), _reply, 3, links=False),
    Reader("agent's answers", "talk", ("answer-*.json",), _answer, 3, links=False),
    Reader("agent's requests", "talk", ("request-identify.json", "request-outputs.json", "unit/x.npy"), _request, 2, links=False),
    Reader("doorkeeper, agent's file", "incoming", ("header.json", "agent.pyz"), _doorkeeper, 0.7, links=False),
    Reader("meters", "sys", ("**/*",), _meters, 0.7),
    Reader("battery's gauge", "gauge", ("**/*",), _meters, 1),
)


def add_valid(seeds: Path) -> None:
    """What devices say when all is well: talk/ and incoming/ beside the other seeds."""
    talk = seeds / "talk"
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
    (seeds / "incoming" / "header.json").write_text(json.dumps({"op": "put", "folder": "@device", "caller": "abc", "files": files}))
