"""The CUDA provider's kernels: what they mean in numbers, the fp16 graph around them, packages and refusals. All on the CPU provider, which
computes the same nodes in fp16; what needs a GPU is at the end and skipped without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from fast_host import FastHost

from toolchain.decoding import check_cache
from toolchain.errors import InputError, PolicyError
from toolchain.graph.oneunit import random_weights, write_one_unit
from toolchain.hardware import has_provider, load
from toolchain.kernels import (
    CATALOGUE,
    candidates,
    counterpart,
    float_type,
    full_precision,
    legal,
    offered,
    runs_as,
    translated,
    uniform,
    validate,
)
from toolchain.profiler import agent, probe
from toolchain.quantize.affine import Quantized, dequantize, quantize, quantize_activation, unquantised
from toolchain.session import CacheSlot, open_session
from toolchain.spec import CPU, CUDA, Policy, Unit

KERNELS = offered(CUDA)
QUANTISED = [name for name in KERNELS if CATALOGUE[name].quantised]
UNITS = {op: Unit("u", op, 256, 48) for op in ("MatMul", "Gather")}

gpu = pytest.mark.skipif(not has_provider(CUDA).usable, reason=f"needs a GPU: {has_provider(CUDA).reason}")


# ---- the catalogue


def test_a_kernel_is_one_providers() -> None:
    assert not set(offered(CPU)) & set(KERNELS)
    assert {*offered(CPU), *KERNELS} == set(CATALOGUE)
    assert offered("TensorrtExecutionProvider") == ()
    assert full_precision(CPU) == "fp32"
    assert full_precision(CUDA) == "fp16"
    assert runs_as("w3g32-fp16") == "w4g32-fp16"
    assert float_type(KERNELS) == "float16"
    assert float_type(offered(CPU)) == "float32"


def test_a_policy_keeps_to_one_provider() -> None:
    units = (Unit("a", "MatMul", 64, 64), Unit("b", "MatMul", 64, 64))
    mixed = {"a": "w4g32", "b": "w4g32-fp16"}
    for available in (offered(CPU), KERNELS):
        with pytest.raises(PolicyError, match="expected a kernel among"):
            validate(mixed, units, available)
    assert set(uniform("w4g128-fp16", units).values()) == {"w4g32-fp16"}


def test_an_embeddings_zero_points_end_on_a_byte() -> None:
    """CUDA reads row r's zero points at bit r·G·bits: packed rows that end within a byte would be read askew from the second row on."""
    assert legal(Unit("u", "Gather", 64, 8), CATALOGUE["w4g32-fp16"])
    assert not legal(Unit("u", "Gather", 96, 8), CATALOGUE["w4g32-fp16"])
    assert legal(Unit("u", "Gather", 96, 8), CATALOGUE["w4g32"])
    assert legal(Unit("u", "Gather", 96, 8), CATALOGUE["w8g32-fp16"])
    assert not legal(Unit("u", "Gather", 256, 8), CATALOGUE["w2g128-fp16"])
    assert legal(Unit("u", "Gather", 96, 8), CATALOGUE["fp16"])


def test_a_bare_name_takes_more_bits_for_an_embedding_alone() -> None:
    """A linear without the kernel that was asked for is an error: a package of other bits would pass for it."""
    units = (Unit("e", "Gather", 64, 8, "embedding"), Unit("l", "MatMul", 64, 8))
    assert dict(uniform("w2g32-fp16", units)) == {"e": "w3g32-fp16", "l": "w2g32-fp16"}
    without = [name for name in KERNELS if not name.startswith("w2")]
    with pytest.raises(PolicyError, match=r"'l' \(MatMul 64x8\) has no w2g32-fp16 kernel"):
        uniform("w2g32-fp16", units, without)


def test_a_policy_is_carried_to_another_provider_by_its_bits() -> None:
    units = tuple(Unit(name, "MatMul", 256, 64) for name in "abcdef")
    there = {"a": "fp32", "b": "w8a8", "c": "w4g128", "d": "w3g32", "e": "w4g32+w8a8", "f": "w2g32"}
    here = translated(there, units, CUDA)
    assert dict(here) == {
        "a": "fp16",
        "b": "w8g32-fp16",
        "c": "w4g128-fp16",
        "d": "w3g32-fp16",
        "e": "w4g32-fp16",
        "f": "w2g32-fp16",
    }
    assert translated(here, units, CPU) == Policy.of({**there, "b": "w8g32", "e": "w4g32"})


# ---- numbers


@pytest.mark.parametrize("name", QUANTISED)
def test_scales_are_what_the_runtime_reads(name: str) -> None:
    """Codes belong to the rounded scale: dividing by the other one moves about one code in a hundred."""
    kernel = CATALOGUE[name]
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32) * np.float32(0.03)
    quantized = quantize(weight, kernel)
    assert np.array_equal(quantized.scales, quantized.scales.astype(np.float16).astype(np.float32))
    nearest = np.abs(dequantize(quantized) - weight) / np.repeat(quantized.scales, kernel.group_size, 1)
    inside = (quantized.codes > 0) & (quantized.codes < kernel.levels - 1)
    assert nearest[inside.reshape(64, -1)].max() <= 0.5 + 1e-3


def test_scales_beyond_fp16_are_refused() -> None:
    with pytest.raises(ValueError, match="range of float16"):
        quantize(np.full((1, 32), 1e7, np.float32), CATALOGUE["w2g32-fp16"])


def test_fp16_rounds_weights_and_inputs() -> None:
    x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    expected = x.astype(np.float16).astype(np.float32)
    assert np.array_equal(quantize_activation(x, CATALOGUE["w4g32-fp16"]), expected)
    assert np.array_equal(unquantised(x, CATALOGUE["fp16"]), expected)
    assert np.array_equal(unquantised(x, CATALOGUE["fp32"]), x)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in UNITS for name in KERNELS if legal(UNITS[op], CATALOGUE[name])])
def test_one_unit_computes_what_its_numbers_mean(op: str, name: str) -> None:
    """The CPU provider rounds products or sums to fp16: 2 to 4e-4. Other activations than fp16 would be off by 5e-3 (int8)."""
    assert probe.relative_error(UNITS[op], CATALOGUE[name]) < 1e-3


@pytest.mark.parametrize("name", QUANTISED)
def test_the_probes_tolerance_sees_codes_that_are_one_off(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def wrong(unit: Unit, kernel: Any, weights: tuple[Quantized, ...], copies: int, out: Path) -> None:
        write_one_unit(unit, kernel, tuple(replace(part, codes=part.codes ^ 1) for part in weights), copies, out)

    monkeypatch.setattr(probe, "write_one_unit", wrong)
    assert probe.relative_error(UNITS["MatMul"], CATALOGUE[name]) > 2 * probe.TOLERANCE_FP16


@pytest.mark.parametrize("name", KERNELS)
def test_the_trained_numbers_are_the_exported_ones(name: str) -> None:
    torch = pytest.importorskip("torch")
    from toolchain.quantize.fake import codes, fake_quantise, fake_quantise_activation

    kernel = CATALOGUE[name]
    weight = torch.randn(48, 200, generator=torch.Generator().manual_seed(0), requires_grad=True)
    made = fake_quantise(weight, kernel)
    plain = weight.detach().numpy()
    assert np.array_equal(
        made.detach().numpy(), dequantize(codes(weight, kernel)) if kernel.quantised else unquantised(plain, kernel)
    )
    if kernel.quantised:
        assert np.array_equal(codes(weight, kernel).codes, quantize(plain, kernel).codes)
    x = torch.full((2, 200), 1e-3 / 3, requires_grad=True)  # its own gradient, 1e-9, would vanish in fp16
    (fake_quantise_activation(x, kernel) * 1e-9).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 1e-9))
    (made * 1e-9).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 1e-9))


# ---- graphs


def _errors(folder: Path, model: Any) -> list[float]:
    from numerics import first_output, relative_error, run_torch, tokens

    session = open_session(folder, threads=1)
    return sorted(relative_error(first_output(session, ids), run_torch(model, ids)) for ids in np.split(tokens(24, 4), 24))


@pytest.mark.parametrize("model", ["qwen2", "llama", "bert"])
@pytest.mark.parametrize("name", ["fp16", "w8g32-fp16", "w4g32-fp16", "w2g32-fp16"])
def test_a_graph_in_fp16_computes_what_its_kernels_mean(graphs: Any, tmp_path: Path, model: str, name: str) -> None:
    """Within 5e-3: everything between the units is rounded to 11 bits too. A kernel without its numbers is off by 5e-2 at 4 bits."""
    pytest.importorskip("random_models")
    from numerics import with_kernels
    from random_models import random_model

    from toolchain.graph.assemble import assemble, round_to_nearest

    graph = graphs(model)
    policy = uniform(name, graph.units)
    assemble(graph, policy, round_to_nearest(graph), tmp_path)
    assert _errors(tmp_path, with_kernels(random_model(model), graph, policy))[-1] < 5e-3


def test_a_graph_in_fp16_has_no_other_float_inside(graphs: Any, tmp_path: Path) -> None:
    """Logits come out as fp32, the cache is fp16, and the only Cast is the one of the logits: none between units."""
    import onnx

    from toolchain.graph.assemble import assemble, package_bytes, round_to_nearest

    graph = graphs("llama", tie_word_embeddings=True)
    policy = Policy.of({**uniform("w4g32-fp16", graph.units), "embed_tokens": "fp16", graph.units[1].name: "fp16"})
    assemble(graph, policy, round_to_nearest(graph), tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    floats = [tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert floats == []
    session = open_session(tmp_path, 1)
    types = {output.name: output.type for output in session.get_outputs()}
    assert types.pop("logits") == "tensor(float)"
    assert set(types.values()) == {"tensor(float16)"}
    casts = [node.name for node in model.graph.node if node.op_type == "Cast" and node.attribute[0].i in (1, 10)]
    assert casts == ["logits/Cast"]
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert package_bytes(graph, policy) == written + sum(path.stat().st_size for path in graph.companions())


def test_masks_keep_within_fp16() -> None:
    """The least float32 is what exporters add to masked positions: as fp16's infinity it would make 0 × inf of the others."""
    from toolchain.graph.half import in_half

    lowest = np.array([np.finfo(np.float32).min, 1.5], np.float32)
    assert in_half(lowest).tolist() == [np.finfo(np.float16).min, 1.5]
    assert in_half(np.array([3], np.int64)).dtype == np.int64


def test_a_t5_in_fp16_is_refused(graphs: Any, tmp_path: Path) -> None:
    from toolchain.graph.assemble import assemble, round_to_nearest

    graph = graphs("t5")
    with pytest.raises(InputError, match="expected a decoder or an encoder"):
        assemble(graph, uniform("w8g32-fp16", graph.units), round_to_nearest(graph), tmp_path)


def test_a_t5_is_refused_for_a_gpu_before_anything_is_measured(graphs: Any, tmp_path: Path, fast: FastHost) -> None:
    """Its units would all be measured, and then no whole model of them could be made."""
    from small_tables import header_here

    from toolchain.profiler.profile import default_workload, profile

    header = replace(header_here(), kernels=KERNELS, provider=CUDA)
    graph = graphs("t5")
    with pytest.raises(InputError, match="expected a decoder or an encoder"):
        profile(graph, header, load("local-cuda"), default_workload(graph), tmp_path / "table.jsonl")
    assert fast.timed == []
    assert fast.weighed == 0


def test_a_table_of_a_gpu_gives_policies_of_its_kernels(graphs: Any) -> None:
    """And a cache of half the bytes."""
    from small_tables import complete_table, header_here

    from toolchain.costs.from_table import cost_model
    from toolchain.policy.budgets import derive
    from toolchain.policy.solver import solve
    from toolchain.profiler.profile import default_workload

    graph = graphs("llama")
    workload = default_workload(graph)
    header = replace(header_here(), kernels=KERNELS, provider=CUDA)
    model = cost_model(graph, complete_table(graph, workload, header), workload)
    budget = derive(model)["medium"]
    chosen = solve(
        model, {unit: {name: -CATALOGUE[name].weight_bits for name in row} for unit, row in model.kernels.items()}, budget
    )
    assert {CATALOGUE[name].provider for name in chosen.policy.values()} == {CUDA}
    assert graph.cache_bytes_per_layer(10, "float16") * 2 == graph.cache_bytes_per_layer(10)


# ---- supernets


@pytest.mark.usefixtures("one_thread")
def test_a_supernet_of_fp16_kernels_says_what_its_package_says(graphs: Any, models: Any, tmp_path: Path) -> None:
    """Trained weights and the inputs' rounding are the package's; written to a folder and read back, the codes are the same."""
    torch = pytest.importorskip("torch")
    from numerics import first_output, relative_error, tokens

    from toolchain.graph.assemble import assemble
    from toolchain.policy.meta_network import MetaNetwork
    from toolchain.supernet import saving
    from toolchain.supernet.loading import load_model
    from toolchain.supernet.model import Supernet
    from toolchain.supernet.store import SupernetFolder

    graph = graphs("llama")
    names = ("fp16", "w8g32-fp16", "w4g32-fp16", "w2g32-fp16")
    supernet = Supernet(load_model(models("llama")), graph.units, names, rank=4)
    for name, parameter in supernet.parameters.items():
        if name.endswith("/B"):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.02
    policy = Policy.of(
        {unit.name: candidates(unit, names)[turn % len(candidates(unit, names))] for turn, unit in enumerate(graph.units)}
    )
    assert len(set(policy.values())) == 4
    (tmp_path / "s").mkdir()
    MetaNetwork(supernet.kernels).save(tmp_path / "s" / "meta_network.safetensors")
    losses = {unit: dict.fromkeys(row, 0.25) for unit, row in supernet.kernels.items()}
    saving.save(supernet, tmp_path / "s", "tiny", losses, {"text": "none"}, np.arange(12).reshape(2, 6))
    (tmp_path / "p").mkdir()
    assemble(graph, policy, SupernetFolder.open(tmp_path / "s").quantized, tmp_path / "p")
    ids = tokens(8, 6)
    with torch.no_grad():
        expected = supernet(policy, torch.from_numpy(ids)).numpy()
        plain = supernet.teacher(torch.from_numpy(ids)).numpy()
    got = first_output(open_session(tmp_path / "p", 1), ids)
    assert relative_error(got, expected) < 5e-3
    assert relative_error(plain, expected) > 5e-2


def test_codes_trained_for_one_provider_serve_the_other(tmp_path: Path) -> None:
    """One supernet for CPUs and GPUs: the same codes, the scales as the other reads them; what was not trained is refused."""
    pytest.importorskip("torch")
    from test_supernet import written

    supernet, folder = written(tmp_path)
    unit = supernet.units[1]
    mine, theirs = (folder.quantized(unit, CATALOGUE[name]) for name in ("w4g32", "w4g32-fp16"))
    assert np.array_equal(mine.codes, theirs.codes)
    assert np.array_equal(theirs.scales, mine.scales.astype(np.float16).astype(np.float32))
    assert not np.array_equal(theirs.scales, mine.scales)
    with pytest.raises(InputError, match="expected a quantised kernel among"):
        folder.quantized(unit, CATALOGUE["w3g32-fp16"])


def test_a_counterpart_has_the_same_codes() -> None:
    assert [counterpart(name, offered(CPU)) for name in KERNELS] == ["fp32", *(name.removesuffix("-fp16") for name in QUANTISED)]
    assert counterpart("w4g32-fp16", CATALOGUE) == "w4g32-fp16"
    assert counterpart("w8a8", KERNELS) == ""
    assert counterpart("w4g32+w8a8", KERNELS) == ""


@pytest.mark.parametrize("method", ["solver", "meta-network", "prices"])
def test_a_supernet_trained_for_a_cpu_is_cut_for_a_gpu(method: str, tmp_path: Path) -> None:
    """Chosen by what was measured there and by the losses of the same codes; the policy names the GPU's kernels."""
    pytest.importorskip("torch")
    from small_costs import bytes_and_time
    from small_tables import header_here
    from test_supernet import written

    from toolchain.commands.choosing import choose
    from toolchain.commands.workflow import Costs, Source
    from toolchain.costs.table import CostTable
    from toolchain.spec import Budget

    supernet, folder = written(tmp_path)
    model = bytes_and_time(supernet.units, KERNELS)
    low, high = model.bounds("peak_memory_bytes")
    budget = Budget(peak_memory_bytes=low + (high - low) / 2)
    costs = Costs(model, CostTable(replace(header_here(), provider=CUDA, kernels=KERNELS), {}), tmp_path)
    choice = choose(Source(None, folder.quantized, folder), costs, budget, method)  # type: ignore[arg-type]
    assert {CATALOGUE[name].provider for name in choice.policy.values()} == {CUDA}
    assert {counterpart(name, folder.kernels) for name in choice.policy.values()} <= {*folder.kernels}
    assert model.totals(choice.policy)["peak_memory_bytes"] <= budget.peak_memory_bytes


# ---- commands, without a GPU


def test_a_package_for_a_gpu_is_made_without_one(cli: Callable[..., Result], models: Any, tmp_path: Path) -> None:
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
    assert "no CUDAExecutionProvider" in cli("profile", models("llama"), "--device", "local-cuda", "--profiles", tmp_path).error
    assert (
        "expected a kernel among fp16"
        in cli(
            "export", models("llama"), "--device", "local-cuda", "--policy", _file(tmp_path, models), "--out", tmp_path / "q"
        ).error
    )


def test_a_gpu_with_a_table_is_predicted_and_exported_for_without_it(
    cli: Callable[..., Result], graphs: Any, models: Any, tmp_path: Path
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
    assert cli("predict", models("llama"), *words).code == 0
    made = cli("export", models("llama"), *words, "--out", tmp_path / "p")
    assert made.code == 0, made.err
    assert "nothing predicted" not in made.out


def test_a_gpus_package_is_scored_on_the_cpu_where_there_is_none_and_says_so(
    cli: Callable[..., Result], models: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from toolchain.commands.scoring import serving_provider

    if has_provider(CUDA).usable:
        pytest.skip("there is a GPU here")
    words = ("--device", "local-cuda", "--policy", "w4g32-fp16", "--profiles", tmp_path, "--out", tmp_path / "p")
    assert cli("export", models("llama"), *words).code == 0
    assert serving_provider(tmp_path / "p") == CPU
    assert "made for CUDAExecutionProvider, runs on the CPU instead" in capfd.readouterr().err


def test_units_shows_the_kernels_of_the_device_that_is_named(cli: Callable[..., Result], models: Any) -> None:
    if has_provider(CUDA).usable:
        pytest.skip("there is a GPU here")
    units = json.loads(cli("units", models("llama"), "--device", "local-cuda", "--json").out)["units"]
    assert {CATALOGUE[name].provider for unit in units for name in unit["kernels"]} == {CUDA}


def test_a_provider_without_kernels_is_refused_by_its_name() -> None:
    with pytest.raises(PolicyError, match="got NnapiExecutionProvider"):
        full_precision("NnapiExecutionProvider")


def _file(folder: Path, models: Any) -> Path:
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
    monkeypatch.setattr(agent.os, "cpu_count", lambda: 16)
    assert agent.tolerated(CPU) == agent.BUSY
    assert agent.tolerated(CUDA) == pytest.approx(14 / 16)
    monkeypatch.setattr(agent.os, "cpu_count", lambda: 2)
    assert agent.tolerated(CUDA) == agent.BUSY


@pytest.fixture
def asked_for_energy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], dict[str, Any]]:
    """`asked_for_energy(provider, meter)` → what the agent wants of `energy.measure`. NVML is made up, the other meters constructed."""
    from constructed_sysfs import package, write
    from test_meters import _driver

    class Nothing:
        def runs(self) -> dict[str, Callable[[], int]]:
            return {}

    seen: dict[str, Any] = {}
    sensor = {"name": "ina238", "power1_input": 2_500_000}
    tree = write(tmp_path, {**package(0, 0), **{f"class/hwmon/hwmon0/{name}": content for name, content in sensor.items()}})
    monkeypatch.setitem(sys.modules, "pynvml", _driver(lambda handle: 0))
    monkeypatch.setattr("onnxruntime.set_global_thread_pool_sizes", lambda *sizes: None)
    monkeypatch.setattr(agent, "_settle", lambda *_: None)
    monkeypatch.setattr(agent.os, "cpu_count", lambda: 16)
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
