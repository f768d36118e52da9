"""The on-device agent: `python -m toolchain.profiler.agent REQUEST.json` → one JSON object on stdout. onnxruntime and numpy only.
With a second file name it is a job: the answer appears there, whole, after one job at a time has been carried out (`transports/`).

    settle          warm-up         windows of ≥ 200 ms: rounds R A B C   R B C A   R C A B     valid or not
    |--------------|---------------|-----------|-----------|--- ... ---|-----------------------|------------|
    wait until      every subject   a round is one run of every subject, the order turned by    ≥ 5 clean
    others use      runs twice,     one, after R, the reference; a window's medians are         windows; fewer:
    < 15% of the    untimed         one trial. A window in which others used > 15% of the CPUs  not valid, what-
    CPUs (≤ 10 s)                   is dropped and repeated, at most twice as often as wanted   ever the numbers

A window, not a run, is a trial, because neighbouring runs share the machine's mood: their number says nothing about its drift.
All sessions share one thread pool (pools spin after work: with one each, subjects would steal each other's cores). R tells how fast
the machine is now: rows are scaled by (R when the table began) / (R in these windows). A neighbour slows different work differently, so
R is three small graphs, and a row is scaled by those that were seen to slow down as it does (`References`, `benchmarks/references.py`).
Energy has a protocol of its own (`energy.py`): a meter needs seconds where a clock needs milliseconds.
On a GPU, R is the GPU's work and memory is the GPU's. An idle GPU comes to speed slowly, so its warm-up lasts five seconds. The CPUs only
hand it work: windows are dropped where others left them fewer than two. Another program on the same GPU is not seen by itself, only in R.
Refuses to know budgets and policies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import toolchain
from toolchain.errors import BittailorError, DamagedFileError, InputError, MeterError, reason_of
from toolchain.files import inside, write_atomic
from toolchain.profiler import energy, gpu, meters, requests, state
from toolchain.profiler.contention import Watch, cpu_count
from toolchain.profiler.machine import cpu_name, last_level_cache_bytes
from toolchain.profiler.subjects import GRAPHS, SUBJECTS, References, Subject, Unit, singles_of
from toolchain.session import open_session
from toolchain.spec import CPU, CUDA

PROTOCOL = "interleaved windows, drift-corrected, 4"
WINDOW_SECONDS = 0.2
BUSY = 0.15
ROUNDS, LONGEST_SECONDS = 5, 1.0
VALID_WINDOWS = 5
SETTLE_SECONDS = 10.0
WARM_UP_SECONDS = {CUDA: 5.0}
"""Where twice is not enough: steps of small decoders, timed one after the other on an H200, went from 1.1 to 0.5 ms within four seconds."""
_PIECE = 1 << 16
_FIRST = -20
_AUTOGROUP = Path("/proc/self/autogroup")
BARE = GRAPHS / "bare"


def main(arguments: list[str]) -> int:
    """Carry out one request file. Exit code 0, or 2 with {"error": line} for a request or model that is no good."""
    if arguments == ["--version"]:
        sys.stdout.write(f"bittailor agent {toolchain.__version__}\n")
        return 0
    request = requests.read(Path(arguments[0]))
    if isinstance(host := request.get("host"), int):
        threading.Thread(target=_leave_with, args=(host,), daemon=True).start()
    if len(arguments) < 2:
        code, answer = _answer(request)
        sys.stdout.write(json.dumps(answer))
        return code
    with open("../../busy", "a") as busy:
        if request.get("action") not in ("identify", "state"):  # which disturb nobody for long
            fcntl.flock(busy, fcntl.LOCK_EX)
        if isinstance(limit_s := request.get("limit_s"), int | float):
            threading.Thread(target=_leave_after, args=(limit_s,), daemon=True).start()
        code, answer = _answer(request)
        write_atomic(Path(arguments[1]), json.dumps(answer))
    return code


def _answer(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(exit code, answer). A desk of another version or protocol is refused: its requests may mean something else."""
    actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "identify": identify,
        "state": lambda request: state.read(request.get("provider", CPU), Path(request.get("sysfs", "/sys"))),
        "time": time_subjects,
        "peak": peak,
        "outputs": outputs,
        "energy": energy_of_subjects,
    }
    mine = {"version": toolchain.__version__, "protocol": PROTOCOL}
    desk = request.get("desk", mine)
    try:
        if desk != mine and isinstance(desk, dict):
            expected, got = (f"{one.get('version')} ({one.get('protocol')})" for one in (desk, mine))
            raise InputError(
                f"expected an agent of version {expected}, the desk's, got {got} on the device",
                "install that version there, or leave agent: out of the device's file and it is sent",
            )
        requests.check(request)
        for item in (*request.get("subjects", ()), *filter(None, [request.get("subject")])):
            item.setdefault("provider", request.get("provider", CPU))
        return 0, actions[request["action"]](request)
    except BittailorError as error:
        return 2, {"error": str(error)}


def _leave_after(seconds: float) -> None:
    """End this process when it took longer than a desk waits."""
    time.sleep(seconds)
    sys.stderr.write(f"it took longer than {seconds:.0f} s; try a shorter --workload\n")
    sys.stderr.flush()
    os._exit(1)


def _leave_with(host: int) -> None:
    """End this process when the one that started it (its id) is gone: nobody reads the answer, and the next run would find the CPU busy."""
    while os.getppid() == host:
        time.sleep(1)
    os._exit(1)


def identify(request: dict[str, Any]) -> dict[str, Any]:
    """What a table's header says of the machine: CPU (and before it the GPU, where that computes), cache, runtime; and what only this
    machine knows: providers, and meters with why one cannot be read or ""."""
    import onnxruntime

    on_gpu = request.get("provider", CPU) == CUDA
    return {
        "cpu": f"{gpu.name()} with {cpu_name()}" if on_gpu else cpu_name(),
        "cache_bytes": gpu.cache_bytes() if on_gpu else last_level_cache_bytes(),
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "protocol": f"{PROTOCOL}, launches, warm" if on_gpu else PROTOCOL,
        "providers": onnxruntime.get_available_providers(),
        "meters": meters.states(Path(request.get("sysfs", "/sys"))),
    }


def outputs(request: dict[str, Any]) -> dict[str, Any]:
    """{"outputs": {name: [first output of each run] or null}} of subjects [{name, folder, inputs}]; null where the runtime refuses the
    graph or gives no finite numbers. An input is the name of a .npy file beside the graph. For asking whether this runtime computes
    right, not for timing."""
    made: dict[str, list[Any] | None] = {}
    for subject in request["subjects"]:
        try:
            session = open_session(Path(subject["folder"]), threads=1, provider=subject["provider"], only=True)
        except DamagedFileError:
            made[subject["name"]] = None
            continue
        folder = Path(subject["folder"])
        dtype = {"tensor(int64)": np.int64, "tensor(float16)": np.float16}.get(session.get_inputs()[0].type, np.float32)
        try:  # mapped: a header may say that 10 GB follow
            inputs = [np.load(inside(folder, name), mmap_mode="r", allow_pickle=False) for name in subject["inputs"]]
            outputs = [session.run(None, {"x": x.astype(dtype)})[0] for x in inputs]
            made[subject["name"]] = [y.tolist() for y in outputs] if all(np.isfinite(y).all() for y in outputs) else None
        except BittailorError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no other base class
            raise InputError(f"expected inputs that {subject['name']!r} runs on, got: {reason_of(error)}") from error
    return {"outputs": made}


def time_subjects(request: dict[str, Any]) -> dict[str, Any]:
    """Time the subjects in rotation with the reference; {"trials": {name: [{phase_ns}]}, "reference_ns": {work: []}, "dropped", "valid",
    "niceness"}, and where asked for "quantiles": {name: {phase_ns: the 95th percentile of its single runs in those windows}}.

    request: threads, provider, subjects [{name, kind, folder, tokens, ...}], windows (clean ones wanted); precedence: go before others
    if the system allows it, so that a neighbour disturbs no window; quantile: also that share of the single runs, 0.95.
    """
    import onnxruntime

    first = bool(request.get("precedence")) and _go_first()
    provider = request.get("provider", CPU)
    busy = tolerated(provider)
    threads, wanted = int(request["threads"]), max(VALID_WINDOWS, int(request["windows"]))
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    references = References(threads, provider)
    subjects = {item["name"]: SUBJECTS[item["kind"]](item, threads, True) for item in request["subjects"]}
    _settle(1.0 if first else SETTLE_SECONDS)
    _warm_up((references, *subjects.values()), WARM_UP_SECONDS.get(provider, 0.0))
    clean: list[_Window] = []
    disturbed: list[_Window] = []
    while len(clean) < wanted and len(disturbed) < 2 * wanted:
        watch = Watch()
        window = _window(references, subjects, len(clean) + len(disturbed), watch)
        others = watch.usage().others
        (disturbed if others is not None and others > busy else clean).append(window)
    valid = len(clean) >= VALID_WINDOWS
    shown = clean if valid else clean + disturbed  # not valid: all of them, so that somebody can see how disturbed
    share = float(request.get("quantile", 0))
    return {
        "trials": {name: [window.trials[name] for window in shown] for name in subjects},
        "reference_ns": {work: [window.reference_ns[work] for window in shown] for work in shown[0].reference_ns},
        "dropped": len(disturbed),
        "valid": valid,
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        **(
            {"quantiles": {name: _quantiles([window.singles[name] for window in shown], share) for name in subjects}}
            if share
            else {}
        ),
    }


def _go_first() -> bool:
    """Ask for the highest priority and say whether this process has it now: a superuser's has, others' have not. To be called before any
    thread is made, which would keep its own. Linux shares the CPUs between sessions first, so this process gets a session of its own, and
    that the priority too. On an idle machine it changes nothing; beside a program that took a core it brought the time per token back to
    that of the idle machine (`benchmarks/gate.py`)."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
    with contextlib.suppress(OSError):  # a job has a session of its own already
        os.setsid()
    with contextlib.suppress(OSError):
        if os.getsid(0) == os.getpid():  # never the session of whoever started this
            _AUTOGROUP.write_text(str(_FIRST))
    return os.getpriority(os.PRIO_PROCESS, 0) < 0


def _quantiles(windows: Sequence[Mapping[str, Sequence[float]]], share: float) -> dict[str, float]:
    """By phase, that share's quantile of the single runs of all windows, as numpy interpolates it; phases of fewer runs than it takes to
    have one beyond it are left out."""
    runs = {phase: [run for window in windows for run in window[phase]] for phase in windows[0]}
    return {phase: float(np.quantile(times, share)) for phase, times in runs.items() if len(times) * (1 - share) >= 1}


def _warm_up(subjects: Sequence[Subject], seconds: float) -> None:
    """Run every subject twice, and again until so many seconds are over."""
    start, rounds = time.monotonic(), 0
    while rounds < 2 or time.monotonic() - start < seconds:
        for subject in subjects:
            subject.trial()
        rounds += 1


def tolerated(provider: str) -> float:
    """Share of the CPUs that others may use in a window: BUSY where CPUs compute, all but two where they only hand work to a GPU."""
    return BUSY if provider != CUDA else max(BUSY, 1 - 2 / cpu_count())


@dataclass(frozen=True)
class _Window:
    """Medians over the window's rounds, per subject and phase, and of the reference by kind of work."""

    trials: dict[str, dict[str, float]]
    reference_ns: dict[str, float]
    singles: dict[str, dict[str, list[float]]]
    """By subject and phase, the nanoseconds of every single run."""


def _window(reference: Subject, subjects: Mapping[str, Subject], turn: int, watch: Watch) -> _Window:
    names = list(subjects)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    singles: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    references: list[dict[str, float]] = []
    while not references or _goes_on(len(references), watch.usage().seconds):
        references.append(reference.trial())
        start = (turn + len(references)) % len(names)
        for name in names[start:] + names[:start]:
            runs[name].append(subjects[name].trial())
            for phase, times in singles_of(subjects[name], runs[name][-1]).items():
                singles[name].setdefault(phase, []).extend(times)
    trials = {name: _medians(done) for name, done in runs.items()}
    return _Window(trials, _medians(references), singles)


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {phase: median(run[phase] for run in runs) for phase in runs[0]}


def _goes_on(rounds: int, seconds: float) -> bool:
    """A window is at least 200 ms and five rounds long; of slow subjects it holds what fits into one second."""
    return seconds < WINDOW_SECONDS or (rounds < ROUNDS and seconds < LONGEST_SECONDS)


def _settle(most_s: float = SETTLE_SECONDS) -> None:
    """Wait until others use less than 15% of the CPUs for half a second, at most most_s."""
    deadline = time.monotonic() + most_s
    while time.monotonic() < deadline:
        watch = Watch()
        time.sleep(0.5)
        others = watch.usage().others
        if others is None or others < BUSY:
            return


def energy_of_subjects(request: dict[str, Any]) -> dict[str, Any]:
    """What `energy.measure` answers for the subjects, each phase by itself; {"reason"} where the meter cannot tell.

    request: threads, provider, subjects as for `time_subjects`, meter (a name of `meters.METERS`), sysfs, windows, window_s (0: the
    meter's least).
    """
    import onnxruntime

    threads = int(request["threads"])
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    subjects = {item["name"]: SUBJECTS[item["kind"]](item, threads, True).runs() for item in request["subjects"]}
    provider = request.get("provider", CPU)
    reference = References(threads, provider).trial
    try:
        meter = meters.open_meter(request["meter"], Path(request["sysfs"]))
    except MeterError as error:
        return {"reason": str(error)}
    try:
        _settle()
        windows, window_s = int(request["windows"]), float(request["window_s"])
        warm_up_s = WARM_UP_SECONDS.get(provider, 0.0)
        busy = tolerated(provider) if meter.name == "nvml" else BUSY  # every other meter sees what the CPUs do
        measured = energy.measure(meter, subjects, windows, window_s, busy=busy, warm_up_s=warm_up_s, reference=reference)
        return {"reason": "", **measured}
    except MeterError as error:
        return {"reason": str(error)}
    finally:
        meter.close()


def peak(request: dict[str, Any]) -> dict[str, Any]:
    """Rise of this process's resident set over a bare runtime process: highest, loading and two trials included, and afterwards.
    On a GPU, of the GPU's memory in use: the runtime gives none back while a session lives, so both are what it has when it has run.

    Needs a fresh process.
    """
    threads = int(request["threads"])
    subject = request["subject"]
    if request.get("provider", CPU) == CUDA:
        return _gpu_peak(subject, threads)
    Unit({"folder": BARE, "tokens": 1, "rows": 1}, threads, shared_pool=False).trial()
    before = _peak_bytes()  # before the reading, whose buffer is not the model's doing
    _read_anew(Path(subject["folder"]))
    try:
        running = SUBJECTS[subject["kind"]](subject, threads, False)
        running.trial()
        running.trial()
    except MemoryError as error:
        raise InputError(f"expected the model to fit in this device's memory, it did not: {error}") from error
    resident = _resident_bytes()
    highest = max(_peak_bytes(), resident)  # the system counts pages per CPU and sums them loosely: its peak may lag by some
    return {"peak_bytes": highest - before, "running_bytes": resident - before}


def _gpu_peak(subject: dict[str, Any], threads: int) -> dict[str, Any]:
    """The subject takes the place of a bare session: what every session has (the libraries' handles and workspace) counts for neither."""
    bare = Unit({"folder": BARE, "tokens": 1, "rows": 1, "provider": CUDA}, threads, shared_pool=False)
    bare.trial()
    before = gpu.used_bytes()
    del bare
    running = SUBJECTS[subject["kind"]](subject, threads, False)
    running.trial()
    running.trial()
    rise = max(0, gpu.used_bytes() - before)
    return {"peak_bytes": rise, "running_bytes": rise}


def _read_anew(folder: Path) -> None:
    """Drop the folder's files from the page cache and read them again: a fault in a mapped file maps what lies cached around it, so that
    the peak of one and the same package was seen to move by a quarter with what the cache held, and in what pieces."""
    for path in sorted(folder.iterdir()):
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(_PIECE):
                pass


def _peak_bytes() -> int:
    """VmHWM: unlike getrusage's figure, it does not inherit the peak of the process that started this one."""
    return _status_bytes("VmHWM")


def _resident_bytes() -> int:
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise InputError(f"expected {field} in /proc/self/status, found none: this system cannot tell memory")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
