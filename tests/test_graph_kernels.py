"""A policy's kernels placed in a graph: their numbers, tied units, the bytes on disk, and the Gemm that becomes a MatMul first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import environment
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("random_models")

from numerics import first_output, mixed_policy, relative_error, run_torch, tokens, with_kernels
from random_models import random_model

from toolchain.decoding import Decoder
from toolchain.graph.assemble import assemble, round_to_nearest
from toolchain.graph.external import DATA_NAME, DataWriter, load_array, read_model
from toolchain.graph.model import Graph
from toolchain.graph.normalise import save_normalised
from toolchain.kernels import CATALOGUE, offered, parts, uniform
from toolchain.quantize.affine import dequantize, quantize, quantize_activation
from toolchain.quantize.packing import packed_bytes
from toolchain.session import open_session
from toolchain.spec import Policy, Unit

Graphs = Callable[..., Graph]


# ---- kernels


@pytest.mark.parametrize("name", ["qwen2", "bert"])
@pytest.mark.parametrize("kernel", offered())
def test_each_kernel_in_the_graph_computes_what_its_numbers_mean(graphs: Graphs, tmp_path: Path, name: str, kernel: str) -> None:
    """Median over sequences 1e-5: the numbers agree to float32, but where an activation lies within 1e-7 of the middle between two of
    its int8 codes the two round apart, and that sequence is off by up to 1e-2 from there on. Without the activation quantiser in the
    reference, every sequence is off by 5e-3 or more."""
    graph = graphs(name)
    policy = uniform(kernel, graph.units)
    assemble(graph, policy, round_to_nearest(graph), tmp_path)
    # Several tokens are in flight: of a kernel of two phases, its second part computes.
    several = Policy.of({unit: parts(CATALOGUE[chosen])[-1].name for unit, chosen in policy.items()})
    errors = _errors(tmp_path, with_kernels(random_model(name), graph, several))
    assert errors[len(errors) // 2] < 1e-5
    assert errors[-1] < 5e-2


def test_a_kernel_of_two_phases_is_the_one_while_decoding_and_the_other_in_the_prompt(graphs: Graphs, tmp_path: Path) -> None:
    """Bit for bit: the same nodes on the same weights. Only the linears have two phases, so the others keep 4 bits throughout."""
    graph = graphs("llama")
    both = uniform("w4g32+w8a8", graph.units)
    linears = {unit.name for unit in graph.units if unit.role == "linear"}
    assert {both[name] for name in linears} == {"w4g32+w8a8"}
    decoders = {}
    for name, part in (("both", None), ("w4g32", 0), ("w8a8", 1)):
        policy = {
            unit: both[unit] if part is None or unit not in linears else parts(CATALOGUE[both[unit]])[part].name for unit in both
        }
        (tmp_path / name).mkdir()
        assemble(graph, policy, round_to_nearest(graph), tmp_path / name)
        decoders[name] = Decoder(tmp_path / name, 1, 32)
    prompt = np.arange(1, 9)
    np.testing.assert_array_equal(decoders["both"].prefill(prompt), decoders["w8a8"].prefill(prompt))
    for decoder in decoders.values():
        decoder.prefill(prompt[:1])
    for token in (3, 5, 7):
        seen = {name: decoder.step(token) for name, decoder in decoders.items()}
        np.testing.assert_array_equal(seen["both"], seen["w4g32"])
        assert np.abs(seen["both"] - seen["w8a8"]).max() > 1e-3


def _errors(folder: Path, model: Any) -> list[float]:
    """Sorted errors of 24 short sequences, each alone: int8_tensor rounds by the range of everything that is in flight."""
    session = open_session(folder, threads=1)
    return sorted(relative_error(first_output(session, ids), run_torch(model, ids)) for ids in np.split(tokens(24, 4), 24))


def test_a_policy_may_mix_every_kernel(graphs: Graphs, tmp_path: Path) -> None:
    graph = graphs("qwen2")
    policy = mixed_policy(graph)
    assert len(set(policy.values())) >= 7
    assemble(graph, policy, round_to_nearest(graph), tmp_path)
    several = Policy.of({unit: parts(CATALOGUE[kernel])[-1].name for unit, kernel in policy.items()})
    assert _errors(tmp_path, with_kernels(random_model("qwen2"), graph, several))[12] < 1e-5


_TIES = [("fp32", "fp32"), ("fp32", "w4g32"), ("w4g32", "fp32"), ("w4g32", "w4g32"), ("w8g32", "w8a8"), ("w2g32", "w8g32")]


@pytest.mark.parametrize(("embedding", "head"), _TIES)
def test_tied_units_may_take_different_kernels(graphs: Graphs, tmp_path: Path, embedding: str, head: str) -> None:
    graph = graphs("llama", tie_word_embeddings=True)
    policy = Policy.of({**uniform("fp32", graph.units), "embed_tokens": embedding, "lm_head": head})
    assemble(graph, policy, round_to_nearest(graph), tmp_path)
    assert _errors(tmp_path, with_kernels(random_model("llama", tie_word_embeddings=True), graph, policy))[12] < 1e-5
    external = [tensor for tensor in read_model(tmp_path).graph.initializer if tensor.external_data]
    places = {tuple(entry.value for entry in tensor.external_data) for tensor in external}
    referred = sum(int(length) for _, _, length in places)
    assert 0 <= (tmp_path / DATA_NAME).stat().st_size - referred < 64 * len(places)  # nothing in the file that no tensor reads


@pytest.mark.parametrize("kernel", ["fp32", "w8g32", "w4g32", "w3g32", "w2g32"])
def test_a_tied_embedding_and_head_of_one_kernel_are_stored_once(graphs: Graphs, tmp_path: Path, kernel: str) -> None:
    tied, free = graphs("llama", tie_word_embeddings=True), graphs("llama")
    sizes = []
    for graph, folder in ((tied, tmp_path / "tied"), (free, tmp_path / "free")):
        folder.mkdir()
        assemble(graph, uniform(kernel, graph.units), round_to_nearest(graph), folder)
        sizes.append((folder / DATA_NAME).stat().st_size)
    shared = packed_bytes(tied.unit("embed_tokens"), CATALOGUE[kernel])
    assert abs(sizes[1] - sizes[0] - shared) < 1024 + 3 * 64  # tensors below 1 KiB are inline, the others aligned to 64 bytes


def test_one_unit_alone_computes_what_its_numbers_mean(tmp_path: Path) -> None:
    """K that no group divides, and copies that are each other's rows turned."""
    from toolchain.graph.oneunit import write_one_unit

    unit, kernel = Unit("u", "MatMul", 200, 24), CATALOGUE["w4g128"]
    weight = np.random.default_rng(0).standard_normal((24, 200)).astype(np.float32)
    write_one_unit(unit, kernel, (quantize(weight, kernel),), 3, tmp_path)
    x = np.random.default_rng(1).standard_normal((6, 200)).astype(np.float32)
    expected = quantize_activation(x, kernel) @ dequantize(quantize(weight, kernel)).T
    for copy, got in enumerate(open_session(tmp_path, 1).run(None, {"x": x})):
        np.testing.assert_allclose(got, np.roll(expected, copy, 1), rtol=1e-4, atol=1e-4)


# ---- bytes


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_the_same_inputs_give_the_same_bytes_in_another_process(graphs: Graphs, models: Any, tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from toolchain.graph.assemble import assemble, round_to_nearest
        from toolchain.graph.build import build
        from toolchain.kernels import uniform

        for source, place in zip(sys.argv[1::2], map(Path, sys.argv[2::2])):
            (place / "graph").mkdir(parents=True)
            (place / "made").mkdir()
            graph = build(source, place / "graph")
            assemble(graph, uniform("w4g32", graph.units), round_to_nearest(graph), place / "made")
    """
    names = ("llama", "bert")
    words = [word for name in names for word in (str(models(name)), str(tmp_path / "there" / name))]
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment(PYTHONHASHSEED="7"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in names:
        graph, here, there = graphs(name), tmp_path / "here" / name, tmp_path / "there" / name
        here.mkdir(parents=True)
        assemble(graph, uniform("w4g32", graph.units), round_to_nearest(graph), here)
        assert _bytes(there / "graph") == _bytes(graph.directory)
        assert _bytes(there / "made") == _bytes(here)


def test_large_tensors_are_external_and_aligned(graphs: Graphs, tmp_path: Path) -> None:
    graph = graphs("llama")
    assemble(graph, uniform("w4g32", graph.units), round_to_nearest(graph), tmp_path)
    model = read_model(tmp_path)
    for tensor in model.graph.initializer:
        array = load_array(tensor, tmp_path)
        external = {entry.key: entry.value for entry in tensor.external_data}
        assert bool(external) == (array.nbytes >= 1024), tensor.name
        if external:
            assert external["location"] == DATA_NAME
            assert int(external["offset"]) % 64 == 0


def test_the_data_writer_stores_equal_bytes_once(tmp_path: Path) -> None:
    ones = np.ones((32, 32), np.float32)
    with DataWriter(tmp_path / DATA_NAME) as writer:
        first, second = writer.tensor("a", ones), writer.tensor("b", ones.reshape(-1))
        third = writer.tensor("c", 2 * ones)
        small = writer.tensor("d", np.ones(3, np.float32))
    assert (tmp_path / DATA_NAME).stat().st_size == 2 * ones.nbytes
    for proto, value in ((first, ones), (second, ones.reshape(-1)), (third, 2 * ones), (small, np.ones(3, np.float32))):
        np.testing.assert_array_equal(load_array(proto, tmp_path), value)


# ---- normalisation


def _gemm(folder: Path, bias: bool, **attributes: Any) -> tuple[onnx.ModelProto, np.ndarray]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 40) if attributes.get("transB") else (40, 24)).astype(np.float32)
    tensors = {"w": weight, **({"b": rng.standard_normal(24).astype(np.float32)} if bias else {})}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", 40])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", 24])
    node = helper.make_node("Gemm", ["x", *tensors], ["y"], name="/dense/Gemm", **attributes)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(value, name) for name, value in tensors.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "before.onnx")
    return model, rng.standard_normal((5, 40)).astype(np.float32)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_gemm_becomes_matmul_and_add(tmp_path: Path, transposed: int, bias: bool) -> None:
    model, x = _gemm(tmp_path, bias, transB=transposed)
    before = model.SerializeToString()
    import onnxruntime

    expected = onnxruntime.InferenceSession(before).run(None, {"x": x})[0]
    save_normalised(model, tmp_path, tmp_path)
    made = read_model(tmp_path)
    assert [node.op_type for node in made.graph.node] == (["MatMul", "Add"] if bias else ["MatMul"])
    shapes = {tensor.name: tuple(tensor.dims) for tensor in made.graph.initializer}
    assert shapes[made.graph.node[0].input[1]] == (40, 24)
    np.testing.assert_allclose(open_session(tmp_path, 1).run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)


def test_a_scaled_gemm_is_left_alone(tmp_path: Path) -> None:
    model, _ = _gemm(tmp_path, True, alpha=0.5)
    save_normalised(model, tmp_path, tmp_path)
    assert [node.op_type for node in read_model(tmp_path).graph.node] == ["Gemm"]
