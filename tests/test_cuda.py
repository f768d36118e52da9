"""The CUDA provider's kernels: what they mean in numbers, the fp16 graph around them. All on the CPU provider, which computes the same
nodes in fp16; supernets are in `test_cuda_supernets.py`, commands, and what needs a GPU, in `test_cuda_devices.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fast_host import FastHost

from toolchain.costs.bounds import LARGE_BYTES, LARGE_PRODUCTS, bound_of_phase, bound_of_unit
from toolchain.costs.rows import UnitRow, at_speed, work
from toolchain.errors import InputError, PolicyError
from toolchain.graph.oneunit import write_one_unit
from toolchain.hardware import has_provider, load
from toolchain.kernels import (
    CATALOGUE,
    float_type,
    full_precision,
    legal,
    offered,
    runs_as,
    translated,
    uniform,
    validate,
)
from toolchain.profiler import probe
from toolchain.profiler.subjects import GRAPHS
from toolchain.quantize.affine import Quantized, dequantize, quantize, quantize_activation, unquantised
from toolchain.session import open_session
from toolchain.spec import CPU, CUDA, STREAMED_TOKEN, TOKEN, TOKENS, Policy, Unit, Workload

KERNELS = offered(CUDA)
QUANTISED = [name for name in KERNELS if CATALOGUE[name].quantised]
UNITS = {op: Unit("u", op, 256, 48) for op in ("MatMul", "Gather")}

gpu = pytest.mark.skipif(not has_provider(CUDA).usable, reason=f"needs a GPU: {has_provider(CUDA).reason}")


# ---- the catalogue


HEAD, LAYER = Unit("head", "MatMul", 4096, 32000, role="head"), Unit("layer", "MatMul", 4096, 4096)
RATES = {TOKEN: 280e3, STREAMED_TOKEN: 50e3, TOKENS: 130e3}  # nanoseconds, as an H200 shows them


@pytest.mark.parametrize(
    ("unit", "kernel", "tokens", "kind", "run_ms", "bound"),
    [
        (HEAD, "fp16", 1, "streamed", 0.12, STREAMED_TOKEN),  # 262 MB at 2.7 TB/s are 0.098 ms
        (HEAD, "fp16", 1, "streamed", 0.30, TOKEN),  # less than half of it is the GPU's
        (HEAD, "fp16", 1, "cached", 0.12, TOKEN),
        (HEAD, "w4g32-fp16", 1, "streamed", 0.12, TOKEN),  # a quarter of the bytes
        (LAYER, "fp16", 1024, "streamed", 0.30, TOKENS),  # 17.2 G multiplications at 66 T/s are 0.26 ms
        (LAYER, "fp16", 1024, "cached", 0.30, TOKENS),
        (LAYER, "fp16", 16, "streamed", 0.03, TOKEN),
        (Unit("words", "Gather", 4096, 32000), "fp16", 1024, "streamed", 0.01, TOKEN),
    ],
)
def test_a_gpus_roofline_tells_what_bounds_a_unit(
    unit: Unit, kernel: str, tokens: int, kind: str, run_ms: float, bound: str
) -> None:
    """Rows are brought to another speed by the reference that was seen to slow down with them."""
    assert bound_of_unit(unit, kernel, tokens, kind, run_ms, RATES, CUDA) == bound
    assert bound_of_unit(unit, kernel, tokens, kind, run_ms, RATES, CPU) == work(tokens == 1, kind)
    row = UnitRow(*unit.shape, kernel, tokens, kind, run_ms, 0.1, 5, True, bound=bound)
    assert at_speed(row, {**dict.fromkeys(RATES, 7.0), bound: 2.0}).latency_ms == 2 * run_ms


def test_what_bounds_a_model_is_the_sum_of_its_units() -> None:
    units, policy = (HEAD, *(replace(LAYER, name=f"l{number}") for number in range(8))), {"head": "fp16"}
    policy |= {unit.name: "fp16" for unit in units}
    prefill, decode = Workload.parse("generate:256+32").phases
    assert bound_of_phase(units, policy, decode, "streamed", 0.3, RATES, CUDA) == STREAMED_TOKEN  # 531 MB: 0.2 ms
    assert bound_of_phase(units, policy, decode, "streamed", 0.5, RATES, CUDA) == TOKEN
    assert bound_of_phase(units, policy, prefill, "streamed", 0.9, RATES, CUDA) == TOKENS  # the head sees one position: 0.52 ms
    assert bound_of_phase(units, policy, prefill, "streamed", 1.1, RATES, CUDA) == TOKEN
    assert bound_of_phase(units, policy, prefill, "streamed", 0.9, RATES, CPU) == TOKENS


def test_the_roofline_counts_what_the_reference_does() -> None:
    model = onnx.load(GRAPHS / "large" / "model.onnx")
    shapes = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name.endswith(".shape")]
    elements = sum(int(np.prod(shape)) for shape in shapes)
    assert (4 * elements, 256 * elements) == (LARGE_BYTES, LARGE_PRODUCTS)


def test_the_launching_reference_is_a_chain_that_no_optimisation_shortens(tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(GRAPHS / "launches" / "model.onnx"), options, providers=[CPU])
    import onnx

    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert [node.op_type for node in nodes] == ["Add", "Mul"] * 32


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
