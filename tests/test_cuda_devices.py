"""Devices with a GPU: commands without one, what the agent does for one, refusals; what needs a GPU is at the end and skipped without."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, copied

from toolchain.decoding import check_cache
from toolchain.errors import InputError, PolicyError
from toolchain.graph.model import Graph
from toolchain.graph.oneunit import random_weights, write_one_unit
from toolchain.hardware import has_provider, load
from toolchain.kernels import CATALOGUE, candidates, full_precision, legal, offered
from toolchain.package.manifest import open_package
from toolchain.profiler import agent, measure, model_rows, probe
from toolchain.profiler.phases import UNTIMED
from toolchain.profiler.subjects import SUBJECTS
from toolchain.session import CacheSlot, open_session
from toolchain.spec import CPU, CUDA, Unit, Workload

KERNELS = offered(CUDA)
QUANTISED = [name for name in KERNELS if CATALOGUE[name].quantised]
UNITS = {op: Unit("u", op, 256, 48) for op in ("MatMul", "Gather")}

gpu = pytest.mark.skipif(not has_provider(CUDA).usable, reason=f"needs a GPU: {has_provider(CUDA).reason}")


# ---- commands, without a GPU


def test_a_package_for_a_gpu_is_made_without_one(cli: Callable[..., Result], models: Any, graphs: Any, tmp_path: Path) -> None:
    """And runs on the CPU, which says so; a check that would measure another device is refused."""
    if has_provider(CUDA).usable:
        pytest.skip("there is a GPU here")
    made = cli(
        "export",
        models("llama"),
        "--device",
        "local-cuda",
        "--policy",
        "w4g32-fp16",
        "--out",
        tmp_path / "p",
        "--profiles",
        tmp_path,
    )
    assert made.code == 0, made.err
    manifest = (tmp_path / "p" / "manifest.yaml").read_text()
    assert "provider: CUDAExecutionProvider" in manifest
    assert "arena_extend_strategy: kSameAsRequested" in manifest
    assert "expected a package for CPUExecutionProvider" in cli("check", tmp_path / "p", "--latency-ms", 5).error
    refused = cli("check", tmp_path / "p", "--device", "local-cuda", "--latency-ms", 5)
    assert refused.code == 2
    assert "no CUDAExecutionProvider" in refused.err.splitlines()[-1]
    assert (
        "no CUDAExecutionProvider"
        in cli("profile", graphs("llama").directory, "--device", "local-cuda", "--profiles", tmp_path).error
    )
    assert (
        "expected a kernel among fp16"
        in cli(
            "export",
            graphs("llama").directory,
            "--device",
            "local-cuda",
            "--policy",
            _file(tmp_path),
            "--out",
            tmp_path / "q",
        ).error
    )


def test_a_gpu_with_a_table_is_predicted_and_exported_for_without_it(
    cli: Callable[..., Result], graphs: Any, tmp_path: Path
) -> None:
    """Its table cannot be stale for a machine that is not asked."""
    from small_tables import complete_table, header_here

    from toolchain.profiler.profile import default_workload

    if has_provider(CUDA).usable:
        pytest.skip("there is a GPU here")
    graph = graphs("llama")
    header = replace(header_here(), device="local-cuda", kernels=KERNELS, provider=CUDA)
    complete_table(graph, default_workload(graph), header).save(tmp_path / "local-cuda" / "table.jsonl")
    words = ("--device", "local-cuda", "--policy", "w4g32-fp16", "--profiles", tmp_path)
    assert cli("predict", graphs("llama").directory, *words).code == 0
    made = cli("export", graphs("llama").directory, *words, "--out", tmp_path / "p")
    assert made.code == 0, made.err
    assert "nothing predicted" not in made.out


def test_a_gpus_package_is_scored_on_the_cpu_where_there_is_none_and_says_so(
    cli: Callable[..., Result], graphs: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from toolchain.commands.scoring import serving_provider

    if has_provider(CUDA).usable:
        pytest.skip("there is a GPU here")
    words = ("--device", "local-cuda", "--policy", "w4g32-fp16", "--profiles", tmp_path, "--out", tmp_path / "p")
    assert cli("export", graphs("llama").directory, *words).code == 0
    assert serving_provider(tmp_path / "p") == CPU
    assert "made for CUDAExecutionProvider, runs on the CPU instead" in capfd.readouterr().err


def test_a_gpus_package_tells_onnxruntime_genai_to_take_the_gpu(cli: Callable[..., Result], graphs: Any, tmp_path: Path) -> None:
    """Its file named no provider, which is the CPU: an fp16 package ran there, and nothing said so. Then it named the arena's growth as
    onnxruntime does, and onnxruntime-genai's build for GPUs, which reads a number there, did not open it (`RuntimeError: stoll`)."""
    if has_provider(CUDA).usable:
        pytest.skip("there is a GPU here")
    words = ("--policy", "w4g32-fp16", "--profiles", tmp_path, "--out", tmp_path / "p")
    assert cli("export", graphs("llama").directory, "--device", "local-cuda", *words).code == 0
    config = json.loads((tmp_path / "p" / "genai_config.json").read_text())
    (options,) = config["model"]["decoder"]["session_options"]["provider_options"]
    assert open_package(tmp_path / "p").data["provider_options"] == {"arena_extend_strategy": "kSameAsRequested"}
    assert options == {"cuda": {"arena_extend_strategy": "1"}}
    if importlib.util.find_spec("onnxruntime_genai"):  # a build that has no part for a GPU looks for it
        opened = [sys.executable, "-c", "import sys, onnxruntime_genai as og; og.Model(sys.argv[1])", str(tmp_path / "p")]
        done = subprocess.run(opened, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "cuda" in done.stderr.lower()


def test_a_graph_whose_genai_config_is_none_makes_no_gpus_package(cli: Callable[..., Result], graphs: Any, tmp_path: Path) -> None:
    if has_provider(CUDA).usable:
        pytest.skip("there is a GPU here")
    graph = copied(graphs("llama").directory, tmp_path / "graph")
    (graph / "genai_config.json").write_text('{"model": []}')
    made = cli("export", graph, "--device", "local-cuda", "--policy", "w4g32-fp16", "--profiles", tmp_path, "--out", tmp_path / "p")
    assert made.code == 2
    assert "session options in genai_config.json" in made.error
    assert not (tmp_path / "p").exists()


def test_units_shows_the_kernels_of_the_device_that_is_named(cli: Callable[..., Result], graphs: Any) -> None:
    if has_provider(CUDA).usable:
        pytest.skip("there is a GPU here")
    units = json.loads(cli("units", graphs("llama").directory, "--device", "local-cuda", "--json").out)["units"]
    assert {CATALOGUE[name].provider for unit in units for name in unit["kernels"]} == {CUDA}


def test_a_provider_without_kernels_is_refused_by_its_name() -> None:
    with pytest.raises(PolicyError, match="got NnapiExecutionProvider"):
        full_precision("NnapiExecutionProvider")


def _file(folder: Path) -> Path:
    path = folder / "policy.json"
    manifest = (folder / "p" / "manifest.yaml").read_text()
    import yaml

    units = yaml.safe_load(manifest)["policy"]
    path.write_text(json.dumps({"units": dict.fromkeys(units, "fp32")}))
    return path


def test_devices_says_why_the_gpu_is_not_reachable(cli: Callable[..., Result]) -> None:
    (row,) = cli("devices", "--device", "local-cuda", "--json").json["devices"]  # all would be other people's boards too
    assert row["provider"] == CUDA
    if not has_provider(CUDA).usable:
        assert "has no CUDAExecutionProvider" in row["reachable"]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_no_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime goes on with the CPU and a warning: its times would stand in the table as the GPU's."""
    if has_provider(CUDA).usable:
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match="expected CUDAExecutionProvider to start"):
        open_session(agent.BARE, 1, CUDA)
    unit = {"name": "x", "kind": "unit", "folder": str(agent.BARE), "tokens": 1, "rows": 1}
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"action": "peak", "threads": 1, "provider": CUDA, "subject": unit}))
    assert agent.main([str(request)]) == 2
    assert "expected CUDAExecutionProvider to start" in json.loads(capsys.readouterr().out)["error"]


def test_cuda_takes_no_cache_of_fp32() -> None:
    """Its attention would run on the CPU, on a copy of the cache: wrong logits, and no error."""
    slots = [CacheSlot("past_key_values.0.key", "present.0.key", 2, 8, np.dtype(kind)) for kind in (np.float16, np.float32)]
    check_cache(slots, CPU)
    check_cache(slots[:1], CUDA)
    with pytest.raises(InputError, match="expected a decoder in fp16 for CUDAExecutionProvider, got a cache of float32"):
        check_cache(slots, CUDA)


def test_a_gpu_is_warmed_up_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(agent.time, "monotonic", lambda: next(now))
    runs: list[str] = []

    class Subject:
        def trial(self) -> dict[str, float]:
            runs.append("run")
            return {}

    agent._warm_up([Subject()], agent.WARM_UP_SECONDS.get(CPU, 0.0))
    assert len(runs) == 2
    agent._warm_up([Subject()], agent.WARM_UP_SECONDS[CUDA])
    assert len(runs) == 2 + 6  # the clock's second reading is one second after its first; the first two rounds do not ask


def test_a_busy_cpu_is_no_busy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "cpu_count", lambda: 16)
    assert agent.tolerated(CPU) == agent.BUSY
    assert agent.tolerated(CUDA) == pytest.approx(14 / 16)
    monkeypatch.setattr(agent, "cpu_count", lambda: 2)
    assert agent.tolerated(CUDA) == agent.BUSY


@pytest.mark.parametrize(
    ("kind", "name", "counted"),
    [
        ("generate", "llama", "toolchain.decoding.Decoder.prefill"),
        ("decoder phases", "llama", "toolchain.decoding.Decoder.prefill"),
        ("encode", "bert", "onnxruntime.InferenceSession.run"),
        ("encoder phases", "bert", "onnxruntime.InferenceSession.run"),
        ("encoder-decoder phases", "t5", "toolchain.decoding.EncoderDecoder.prefill"),
        ("unit", "", "onnxruntime.InferenceSession.run_with_iobinding"),
    ],
)
def test_no_first_run_is_timed_on_a_gpu(
    kind: str, name: str, counted: str, graphs: Callable[[str], Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each timed run as many as the provider asks for; here the CPU asks, in the place of a GPU that need not be there."""
    if kind == "unit":
        kernel = CATALOGUE["w4g32"]
        write_one_unit(UNITS["MatMul"], kernel, random_weights(UNITS["MatMul"], kernel), 2, tmp_path)
        what: dict[str, Any] = {"folder": str(tmp_path), "tokens": 8, "rows": 48}
    else:
        graph, workload = graphs(name), Workload.parse("encode:2x8" if name == "bert" else "generate:8+2")
        prefills = [phase for phase in workload.phases if phase.name != "decode"]
        what = (
            model_rows.subject(graph, "m", graph.directory, prefills)
            if kind.endswith("phases")
            else measure.subject("m", graph.directory, workload, graph.vocabulary)
        )
    whose, _, method = counted.rpartition(".")
    owner = pkgutil.resolve_name(whose)
    real, runs = getattr(owner, method), []
    monkeypatch.setattr(owner, method, lambda *words, **more: runs.append(1) or real(*words, **more))
    for untimed in (0, 3):
        monkeypatch.setitem(UNTIMED, CPU, untimed)
        subject = SUBJECTS[kind](what, 1, False)
        runs.clear()
        subject.trial()
        assert len(runs) == untimed + 1


@pytest.fixture
def asked_for_energy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], dict[str, Any]]:
    """`asked_for_energy(provider, meter)` → what the agent wants of `energy.measure`. NVML is made up, the other meters constructed."""
    from constructed_sysfs import package, write
    from test_meters import _driver

    class Nothing:
        def runs(self) -> dict[str, Callable[[], int]]:
            return {}

        def trial(self) -> dict[str, float]:
            return {}

    seen: dict[str, Any] = {}
    sensor = {"name": "ina238", "power1_input": 2_500_000}
    tree = write(tmp_path, {**package(0, 0), **{f"class/hwmon/hwmon0/{name}": content for name, content in sensor.items()}})
    monkeypatch.setitem(sys.modules, "pynvml", _driver(lambda handle: 0))
    monkeypatch.setattr("onnxruntime.set_global_thread_pool_sizes", lambda *sizes: None)
    monkeypatch.setattr(agent, "_settle", lambda *_: None)
    monkeypatch.setattr(agent, "References", lambda *words: Nothing())
    monkeypatch.setattr(agent, "cpu_count", lambda: 16)
    monkeypatch.setitem(agent.SUBJECTS, "nothing", lambda *words: Nothing())
    monkeypatch.setattr(agent.energy, "measure", lambda meter, *words, **more: seen.update(meter=meter.name, **more) or {})

    def ask(provider: str, meter: str) -> dict[str, Any]:
        seen.clear()
        subjects = [{"name": "m", "kind": "nothing"}]
        request = {"threads": 1, "provider": provider, "subjects": subjects, "meter": meter, "sysfs": str(tree)}
        assert agent.energy_of_subjects({**request, "windows": 2, "window_s": 0})["reason"] == ""
        assert seen["meter"] == meter
        return seen

    return ask


def test_a_gpus_energy_is_measured_warm(asked_for_energy: Callable[[str, str], dict[str, Any]]) -> None:
    assert asked_for_energy(CUDA, "nvml")["warm_up_s"] == agent.WARM_UP_SECONDS[CUDA]
    assert asked_for_energy(CPU, "rapl")["warm_up_s"] == 0


def test_a_meter_that_sees_the_cpus_is_disturbed_by_them(asked_for_energy: Callable[[str, str], dict[str, Any]]) -> None:
    """A board's sensors beside a GPU count what 14 of 16 busy CPUs draw; NVML does not."""
    assert asked_for_energy(CUDA, "nvml")["busy"] == agent.tolerated(CUDA) > agent.BUSY
    assert asked_for_energy(CUDA, "hwmon")["busy"] == agent.BUSY
    assert asked_for_energy(CPU, "rapl")["busy"] == agent.BUSY


class _Libcuda:
    """A driver that notes what it is asked and answers zeros: it holds no GPU."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def __getattr__(self, name: str) -> Callable[..., int]:
        def answer(*arguments: object) -> int:
            self._asked.append(name)
            return 0

        return answer


def test_who_asks_for_a_gpus_name_takes_none_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary context is hundreds of MB, which another process that measures memory would see come and go."""
    from toolchain.profiler import gpu as libcuda

    asked: list[str] = []
    monkeypatch.setattr(libcuda.ctypes, "CDLL", lambda name: _Libcuda(asked))
    kept = [function for function in vars(libcuda).values() if hasattr(function, "cache_clear")]
    for function in kept:
        function.cache_clear()
    try:
        libcuda.name()
        libcuda.cache_bytes()
        libcuda.pci_bus_id()
        assert not any("Ctx" in name for name in asked), asked
        libcuda.used_bytes()
        libcuda.used_bytes()
        assert asked.index("cuDevicePrimaryCtxRetain") < asked.index("cuMemGetInfo_v2")
        assert (asked.count("cuInit"), asked.count("cuDevicePrimaryCtxRetain")) == (1, 1)
    finally:
        for function in kept:
            function.cache_clear()


# ---- with a GPU


@gpu
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [("MatMul", 256, 48), ("MatMul", 200, 24), ("MatMul", 4096, 1024), ("Gather", 256, 48)])
def test_the_gpu_computes_each_kernel_right(shape: tuple[str, int, int], name: str) -> None:
    unit = Unit("u", *shape)
    if not legal(unit, CATALOGUE[name]):
        pytest.skip("not legal")
    assert probe.relative_error(unit, CATALOGUE[name], CUDA) < probe.TOLERANCE_FP16


@gpu
def test_the_gpus_memory_grows_by_what_a_unit_weighs(tmp_path: Path) -> None:
    from toolchain.profiler.ask import Host

    unit, kernel = Unit("u", "MatMul", 4096, 4096), CATALOGUE["fp16"]
    write_one_unit(unit, kernel, random_weights(unit, kernel), 8, tmp_path)
    seen = Host(load("local-cuda"), 1).peak({"name": "x", "kind": "unit", "folder": str(tmp_path), "tokens": 1, "rows": 1})
    assert seen["peak_bytes"] == pytest.approx(8 * 2 * 4096**2, rel=0.1)
    assert candidates(unit, KERNELS)


@gpu
def test_onnxruntime_genai_writes_on_the_gpu_what_we_write(cli: Callable[..., Result], tmp_path: Path) -> None:
    from toolchain.package.generate import generate
    from toolchain.text import load_tokenizer

    genai = pytest.importorskip("onnxruntime_genai")
    if not genai.is_cuda_available():
        pytest.skip("needs onnxruntime-genai-cuda")
    words = ("--device", "local-cuda", "--policy", "w4g32-fp16", "--profiles", tmp_path / "none", "--out", tmp_path / "p")
    assert cli("export", "pocket-llama-6m", *words).code == 0
    model, prompt, written = genai.Model(str(tmp_path / "p")), "The sea was", []  # which the model continues for longer than that
    assert model.device_type.lower() == "cuda"
    ids = load_tokenizer(tmp_path / "p").encode(prompt).ids
    wanted = genai.GeneratorParams(model)
    wanted.set_search_options(do_sample=False, max_length=len(ids) + 48)
    generator = genai.Generator(model, wanted)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
        written.append(int(generator.get_next_tokens()[0]))
    # Both run the same graph on the same provider, so not even the sums' order differs.
    assert tuple(written) == generate(tmp_path / "p", prompt, 48, provider=CUDA).tokens
