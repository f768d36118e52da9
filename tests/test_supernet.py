"""The supernet: exported codes equal the forward pass, ties, PEFT's reading of the adapters, and its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from toolchain.errors import DamagedFileError, InputError, UnsafeModelError
from toolchain.kernels import CATALOGUE
from toolchain.policy.meta_network import MetaNetwork
from toolchain.quantize import affine
from toolchain.spec import Policy, Unit
from toolchain.supernet import saving
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import input_moments
from toolchain.supernet.store import SupernetFolder

pytestmark = pytest.mark.usefixtures("one_thread")


KERNELS = ("fp32", "w8a8", "w8g32", "w4g32", "w2g32")


def tiny_llama() -> tuple[nn.Module, tuple[Unit, ...]]:
    """One layer, tied embedding and head, a width (48) that no group of 32 divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    layer = "model.layers.0."
    units = (
        Unit("embed_tokens", "Gather", 64, 64, "embedding", ("model.embed_tokens",), tied_to="lm_head"),
        Unit("qkv", "MatMul", 64, 128, modules=tuple(f"{layer}self_attn.{x}_proj" for x in "qkv")),
        Unit("o", "MatMul", 64, 64, modules=(f"{layer}self_attn.o_proj",)),
        Unit("down", "MatMul", 48, 64, modules=(f"{layer}mlp.down_proj",)),
        Unit("lm_head", "MatMul", 64, 64, "head", ("lm_head",), tied_to="embed_tokens"),
    )
    return LlamaForCausalLM(config).eval(), units


def tiny_bert() -> tuple[nn.Module, tuple[Unit, ...]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    layer = "encoder.layer.0."
    units = (
        Unit("words", "Gather", 32, 50, "embedding", ("embeddings.word_embeddings",)),
        Unit("query", "MatMul", 32, 32, modules=(f"{layer}attention.self.query",)),
        Unit("up", "MatMul", 32, 64, modules=(f"{layer}intermediate.dense",)),
        Unit("down", "MatMul", 64, 32, modules=(f"{layer}output.dense",)),
    )
    return BertModel(config).eval(), units


def moved(supernet: Supernet) -> Supernet:
    """As after some training: adapters that do something."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in supernet.parameters.items():
        if name.endswith("/B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return supernet


def mixed(units: tuple[Unit, ...], kernels: tuple[str, ...]) -> Policy:
    return Policy.of({unit.name: kernels[index % len(kernels)] for index, unit in enumerate(units)})


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("name", ["w8g32", "w4g32", "w2g32", "w8a8"])
def test_exported_codes_dequantise_to_exactly_the_forward_pass_weights(make, name: str) -> None:  # type: ignore[no-untyped-def]
    model, units = make()
    supernet = moved(Supernet(model, units, KERNELS, rank=4))
    policy = Policy.of({unit.name: name if name in supernet.kernels[unit.name] else "fp32" for unit in units})
    weights = supernet.weights(policy)
    for unit in units:
        if policy[unit.name] == "fp32":
            continue
        forward = torch.cat([weights[f"{module}.weight"] for module in unit.modules]).detach().numpy()
        assert np.array_equal(affine.dequantize(supernet.quantized(unit, CATALOGUE[name])), forward)
        assert not np.array_equal(forward, torch.cat([model.get_submodule(module).weight for module in unit.modules]).numpy())


def test_tied_units_share_codes_and_a_gradient_step_keeps_them_equal() -> None:
    model, units = tiny_llama()
    supernet = moved(Supernet(model, units, KERNELS, rank=4))
    policy = supernet.policy("w4g32")
    supernet(policy, torch.arange(12).reshape(2, 6)).square().mean().backward()
    for parameter in supernet.parameters_of(policy).values():
        assert parameter.grad is not None
        parameter.data -= 0.1 * parameter.grad
    codes = [supernet.quantized(unit, CATALOGUE["w4g32"]) for unit in (units[0], units[-1])]
    assert np.array_equal(codes[0].codes, codes[1].codes)
    assert np.array_equal(codes[0].scales, codes[1].scales)


def test_a_policy_is_an_argument_and_leaves_no_trace() -> None:
    model, units = tiny_llama()
    supernet = moved(Supernet(model, units, KERNELS, rank=4))
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        teacher = supernet.teacher(ids)
        low = supernet(supernet.policy("w2g32"), ids)
        assert torch.equal(supernet(supernet.policy("fp32"), ids), teacher)
        assert torch.equal(supernet(supernet.policy("w2g32"), ids), low)
        assert not torch.allclose(low, teacher, atol=1e-3)
        different = supernet(supernet.policy("w2g32"), ids, activations=False)
        assert not torch.equal(different, low)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_only_the_policys_own_adapters_get_gradients() -> None:
    model, units = tiny_llama()
    supernet = Supernet(model, units, KERNELS, rank=4)
    policy = mixed(units, ("w2g32", "w4g32", "fp32"))
    supernet(policy, torch.arange(12).reshape(2, 6)).square().mean().backward()
    used = {name for name, parameter in supernet.parameters.items() if parameter.grad is not None}
    assert used == set(supernet.parameters_of(policy))
    assert used
    assert all(not name.startswith(("w8", "fp32")) for name in used)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activation_quantisers_match_the_numpy_reference_in_a_layer() -> None:
    """One linear: its output is the reference's activations times the codes."""
    model, units = tiny_llama()
    supernet = moved(Supernet(model, units, KERNELS, rank=4))
    seen = {}
    layer = model.get_submodule(units[3].modules[0])
    capture = layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        supernet(supernet.policy("fp32"), ids)
        raw = {"x": seen["x"].numpy().copy()}
        supernet(Policy.of({unit.name: "w8a8" if unit.name == "down" else "fp32" for unit in units}), ids)
    capture.remove()
    expected = affine.quantize_activation(raw["x"], CATALOGUE["w8a8"])
    assert np.array_equal(seen["x"].numpy(), expected)
    weight = affine.dequantize(supernet.quantized(units[3], CATALOGUE["w8a8"]))
    np.testing.assert_allclose(seen["y"].numpy(), expected @ weight.T, rtol=1e-4, atol=1e-6)


def test_a_tied_heads_start_is_kept_where_the_embedding_cannot_have_the_kernel(tmp_path: Path) -> None:
    """A group of 32 divides no width of 48: the embedding has no such kernel, the head (padded) has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    embedding = Unit("embed_tokens", "Gather", 48, 64, "embedding", ("model.embed_tokens",), tied_to="lm_head")
    head = Unit("lm_head", "MatMul", 48, 64, "head", ("lm_head",), tied_to="embed_tokens")
    windows = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (8, 16)))
    supernet = moved(Supernet(model, (embedding, head), KERNELS, rank=4, moments=input_moments(model, (head,), windows)))
    assert "w2g32" not in supernet.kernels["embed_tokens"]
    MetaNetwork(supernet.kernels).save(tmp_path / "meta_network.safetensors")
    losses = {unit: dict.fromkeys(names, 0.25) for unit, names in supernet.kernels.items()}
    saving.save(supernet, tmp_path, "tiny", losses, {"text": "none"}, windows.numpy())
    again = Supernet(model, (embedding, head), KERNELS, rank=4, start=False)
    again.load(SupernetFolder.open(tmp_path).trained())
    assert np.array_equal(again.quantized(head, CATALOGUE["w2g32"]).codes, supernet.quantized(head, CATALOGUE["w2g32"]).codes)


def test_shared_adapters_are_as_large_as_a_kernels_own_and_serve_every_kernel(tmp_path: Path) -> None:
    model, units = tiny_llama()
    own, shared = (Supernet(model, units, KERNELS, rank=4, adapters=kind) for kind in ("own", "shared"))
    sizes = [sum(p.numel() for name, p in net.parameters.items() if name[-2:] in ("/A", "/B")) for net in (own, shared)]
    assert sizes[0] == sizes[1]
    ids = torch.arange(12).reshape(2, 6)
    before = [shared(shared.policy(name), ids) for name in ("w2g32", "w8g32")]
    moved(shared)
    after = [shared(shared.policy(name), ids) for name in ("w2g32", "w8g32")]
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))
    assert {name for name in shared.parameters_of(shared.policy("w8g32")) if name.endswith("/A")} == {
        name for name in shared.parameters if name.endswith("/A")
    }
    with pytest.raises(InputError, match="shared"):
        saving.save(shared, tmp_path, "tiny", {}, {}, ids.numpy())
    with pytest.raises(InputError, match="theirs"):
        Supernet(model, units, KERNELS, adapters="theirs")


def test_pooled_adapters_move_the_zero_points_of_frozen_codes_and_nothing_else(tmp_path: Path) -> None:
    model, units = tiny_llama()
    moments = input_moments(model, units, torch.arange(32)[None])
    supernet, plain = (Supernet(model, units, KERNELS, rank=4, moments=moments, adapters=kind) for kind in ("pooled", "own"))
    policy = supernet.policy("w2g32")
    for name, weight in plain.weights(policy).items():  # it starts as GPTQ's codes
        assert torch.equal(supernet.weights(policy)[name], weight)
    start = {name: weight.detach() for name, weight in supernet.weights(policy).items()}
    moved(supernet)
    for name in [name for name in supernet.parameters if name.endswith(("/low", "/high"))]:
        supernet.parameters[name].data.copy_(plain.parameters[name])
    for name, weight in supernet.weights(policy).items():
        shift = (weight - start[name]).detach()
        assert shift.abs().max() > 1e-4
        for group in shift.split(32, dim=1):  # also the last one, of 16 of down's 48
            assert torch.allclose(group, group[:, :1].expand_as(group), atol=1e-6)
    sum(weight.square().sum() for weight in supernet.weights(policy).values()).backward()  # type: ignore[union-attr]
    assert all(supernet.parameters[name].grad is not None for name in supernet.parameters_of(policy) if name.endswith("/B"))
    with pytest.raises(InputError, match="pooled"):
        supernet.quantized(units[1], CATALOGUE["w2g32"])
    with pytest.raises(InputError, match="own or both"):
        saving.save(supernet, tmp_path, "tiny", {}, {}, np.zeros((1, 4), np.int64))


def test_an_adapter_shared_beside_a_kernels_own_moves_kernels_of_few_bits_and_leaves_the_others() -> None:
    model, units = tiny_llama()
    supernet = Supernet(model, units, KERNELS, rank=4, adapters="both")
    ids = torch.arange(12).reshape(2, 6)

    def answers() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {name: supernet(supernet.policy(name), ids) for name in KERNELS}

    before = answers()
    for name, parameter in supernet.parameters.items():
        if name.startswith("shared/") and name.endswith("/B"):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    after = answers()
    assert {name for name in KERNELS if not torch.equal(before[name], after[name])} == {"w4g32", "w2g32"}
    assert not [name for name in supernet.parameters_of(supernet.policy("w8g32")) if name.startswith("shared/")]
    assert [name for name in supernet.parameters_of(supernet.policy("w2g32")) if name.startswith("shared/")]


def test_few_bits_have_a_higher_rank() -> None:
    model, units = tiny_llama()
    supernet = Supernet(model, units, KERNELS, rank=4, adapters="both")
    ranks = {name: supernet.parameters[f"{name}/model.layers.0.mlp.down_proj/A"].shape[0] for name in (*KERNELS[1:], "shared")}
    assert ranks == {"w8a8": 4, "w8g32": 4, "w4g32": 4, "w2g32": 16, "shared": 24}


def written(folder: Path, make=tiny_llama, adapters: str = "own") -> tuple[Supernet, SupernetFolder]:  # type: ignore[no-untyped-def]
    model, units = make()
    supernet = moved(Supernet(model, units, KERNELS, rank=4, alpha=8.0, adapters=adapters))
    MetaNetwork(supernet.kernels).save(folder / "meta_network.safetensors")
    losses = {unit: dict.fromkeys(names, 0.25) for unit, names in supernet.kernels.items()}
    saving.save(supernet, folder, "tiny", losses, {"text": "none"}, np.arange(12).reshape(2, 6))
    return supernet, SupernetFolder.open(folder)


@pytest.mark.parametrize(("make", "adapters"), [(tiny_llama, "own"), (tiny_llama, "both"), (tiny_bert, "own")])
def test_folder_gives_back_codes_sensitivities_and_trained_tensors(make, adapters: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    supernet, folder = written(tmp_path, make, adapters)
    for unit in supernet.units:
        for name in supernet.kernels[unit.name]:
            if name == "fp32":
                continue
            ours, theirs = folder.quantized(unit, CATALOGUE[name]), supernet.quantized(unit, CATALOGUE[name])
            assert np.array_equal(affine.dequantize(ours), affine.dequantize(theirs))
            assert np.array_equal(ours.codes, theirs.codes)
            assert np.array_equal(ours.zero_points, theirs.zero_points)
    assert folder.kernels == KERNELS
    assert folder.sensitivity == {unit: dict.fromkeys(names, 0.25) for unit, names in supernet.kernels.items()}
    assert folder.calibration().tolist() == np.arange(12).reshape(2, 6).tolist()
    assert folder.description["adapters"] == adapters
    again = Supernet(make()[0], supernet.units, KERNELS, rank=4, alpha=8.0, seed=9, adapters=adapters)
    again.load(folder.trained())
    policy = mixed(supernet.units, ("w2g32", "w4g32", "w8g32"))
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again(policy, ids), supernet(policy, ids))


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    written(tmp_path)
    assert not [name for name in load_file(tmp_path / "quantised" / "w4g32.safetensors") if name.startswith("lm_head")]
    assert [name for name in load_file(tmp_path / "quantised" / "w8a8.safetensors") if name.startswith("lm_head")]


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_peft_loads_the_adapters_and_computes_the_merged_weights(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """PEFT on the plain model = our merge without the fake-quantiser (reached here at fp32 by adding the adapters to the weights)."""
    from peft import PeftModel

    supernet, _ = written(tmp_path, make, "both")
    base, _ = make()
    ids = torch.arange(12).reshape(2, 6)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapters" / "w2g32", adapter_name="w2g32")
    adapted.load_adapter(tmp_path / "adapters" / "shared", "shared")
    adapted.base_model.set_adapter(["w2g32", "shared"])
    adapted.eval()
    reference, units = make()
    for unit in units:
        for module in unit.modules:
            for stem in (f"{name}/{supernet.owner(module)}" for name in ("w2g32", "shared")):
                if supernet.owner(module) == module:
                    delta = supernet.parameters[f"{stem}/B"] @ supernet.parameters[f"{stem}/A"] * (8.0 / 4)
                    reference.get_submodule(module).weight.data += delta.detach()
    with torch.no_grad():
        ours, theirs, plain = (m(input_ids=ids)[0] for m in (reference, adapted, make()[0]))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, ours, atol=1e-3)
    assert json.loads((tmp_path / "adapters/w4g32/adapter_config.json").read_text())["r"] == 4


def test_folder_refuses_what_is_missing_damaged_or_outside(tmp_path: Path) -> None:
    supernet, folder = written(tmp_path)
    with pytest.raises(InputError, match=r"no_such|expected a supernet"):
        SupernetFolder.open(tmp_path / "no_such")
    with pytest.raises(InputError, match="w3g32"):
        folder.quantized(supernet.units[1], CATALOGUE["w3g32"])
    stored = tmp_path / "quantised" / "w4g32.safetensors"
    good = stored.read_bytes()
    stored.write_bytes(good[:-3] + b"abc")
    with pytest.raises(DamagedFileError, match="w4g32"):
        SupernetFolder.open(tmp_path)
    stored.unlink()
    with pytest.raises(DamagedFileError, match="no such file"):
        SupernetFolder.open(tmp_path)
    stored.write_bytes(good)
    text = (tmp_path / "supernet.yaml").read_text()
    (tmp_path / "supernet.yaml").write_text(text.replace("files:\n", "files:\n  ../../outside: abc\n"))
    with pytest.raises(InputError, match="inside"):
        SupernetFolder.open(tmp_path)
    for broken in ("format: 2\n", "- a list\n", "key: [\n", text.replace("format: 2", "format: 99")):
        (tmp_path / "supernet.yaml").write_text(broken)
        with pytest.raises(DamagedFileError) as caught:
            SupernetFolder.open(tmp_path)
        assert "\n" not in str(caught.value)


def test_construction_and_loading_name_what_is_wrong(tmp_path: Path) -> None:
    model, units = tiny_llama()
    with pytest.raises(InputError, match="nowhere"):
        Supernet(model, (Unit("x", "MatMul", 64, 64, modules=("model.nowhere",)),), KERNELS)
    with pytest.raises(InputError, match="expected 100 rows"):
        Supernet(model, (Unit("x", "MatMul", 64, 100, modules=units[2].modules),), KERNELS)
    with pytest.raises(InputError, match="linear or embedding"):
        Supernet(model, (Unit("x", "MatMul", 64, 64, modules=("model.norm",)),), KERNELS)
    with pytest.raises(UnsafeModelError, match="safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError):
        load_model(tmp_path)


def test_load_model_reads_a_decoder_with_its_head_and_an_encoder_without(tmp_path: Path) -> None:
    for make, kind in ((tiny_llama, "decoder"), (tiny_bert, "encoder")):
        model, units = make()
        model.save_pretrained(tmp_path / kind)
        supernet = Supernet(load_model(tmp_path / kind), units, ("fp32", "w4g32"), rank=2)
        assert supernet.kind == kind
        ids = torch.arange(8).reshape(1, 8)
        assert supernet.teacher(ids).shape == (1, 8, 64 if kind == "decoder" else 32)
        torch.testing.assert_close(supernet.teacher(ids), model(input_ids=ids)[0].detach())


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_inputs_quantised_for_a_compiled_pass_are_the_same(make) -> None:  # type: ignore[no-untyped-def]
    """Every layer is told by number there; what the numbers mean must be what each kernel does, for mixed policies too."""
    model, units = make()
    supernet = moved(Supernet(model, units, KERNELS, rank=4))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 48, (2, 12)))
    mixed = {unit.name: supernet.kernels[unit.name][place % len(supernet.kernels[unit.name])] for place, unit in enumerate(units)}
    outputs = []
    for policy in (Policy.of(mixed), *(supernet.policy(name) for name in KERNELS)):
        weights = supernet.weights(policy)
        with supernet.quantised_inputs(policy, compiled=True):
            outputs.append(supernet.passed(weights, ids).output)
        assert torch.equal(outputs[-1], supernet(policy, ids))
    assert not torch.equal(outputs[-1], supernet(supernet.policy(KERNELS[-1]), ids, activations=False))
