"""Where a kernel's training starts: the search for bounds, GPTQ, and how its weights are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_supernet import KERNELS, moved, tiny_llama

from toolchain.kernels import CATALOGUE
from toolchain.policy.meta_network import MetaNetwork
from toolchain.quantize.fake import fake_quantise
from toolchain.quantize.gptq import compensated
from toolchain.spec import Unit
from toolchain.supernet import saving
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import Frozen, input_moments, search
from toolchain.supernet.store import SupernetFolder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_search_for_bounds_beats_min_max_and_importance_weighs_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    importance = torch.ones(64)
    importance[:8] = 1000.0
    kernel = CATALOGUE["w2g32"]

    def loss(low: torch.Tensor | None, high: torch.Tensor | None, share: torch.Tensor) -> float:
        return float(((fake_quantise(weight, kernel, low, high) - weight).square() * share).sum())

    plain, weighted = search(weight, kernel), search(weight, kernel, importance)
    assert loss(*plain, torch.ones(64)) < 0.8 * loss(None, None, torch.ones(64))
    assert loss(*weighted, importance) < 0.95 * loss(*plain, importance)
    assert all((low < 0).all() and (high > 0).all() for low, high in (plain, weighted))


@pytest.mark.parametrize("name", ["w2g32", "w3g32", "w4g32", "w2g128"])
def test_gptq_loses_less_of_a_layers_output_than_rounding_to_nearest_and_its_frozen_weights_round_alike(name: str) -> None:
    """Inputs that resemble each other, as in a real model: what one column loses, the others can make up for."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 160, generator=generator)
    inputs = torch.randn(512, 24, generator=generator) @ torch.randn(24, 160, generator=generator)
    inputs += 0.3 * torch.randn(512, 160, generator=generator)
    inputs[:, 5] = 0  # a dead input must not break the factorisation
    moments, kernel = inputs.T @ inputs / 512, CATALOGUE[name]
    low, high = search(weight, kernel, moments.diagonal())
    moved = compensated(weight, moments, kernel, low, high)

    def lost(start: torch.Tensor) -> float:
        return float((inputs @ (fake_quantise(start, kernel, low, high) - weight).T).square().mean())

    assert lost(moved) < 0.5 * lost(weight)
    frozen = Frozen.of(moved, kernel, low, high)
    assert frozen.places.dtype == torch.uint8
    assert torch.equal(fake_quantise(frozen.weight(kernel), kernel, low, high), fake_quantise(moved, kernel, low, high))
    inside = (moved > low.min()) & (moved < high.max())
    step = ((high - low) / (kernel.levels - 1)).max()
    assert float((frozen.weight(kernel) - moved)[inside].abs().median()) < float(step) * kernel.levels / 256


def test_uncorrelated_inputs_leave_gptq_at_rounding_to_nearest() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    kernel = CATALOGUE["w2g32"]
    low, high = search(weight, kernel)
    assert torch.allclose(compensated(weight, torch.eye(64), kernel, low, high), weight, atol=1e-6)


def test_a_supernet_starts_where_gptq_ends_and_its_folder_keeps_that(tmp_path: Path) -> None:
    model, units = tiny_llama()
    windows = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (16, 24)))
    plain = Supernet(model, units, KERNELS, rank=4)
    started = Supernet(model, units, KERNELS, rank=4, moments=input_moments(model, units, windows))
    assert set(started.frozen) == {f"{name}/{plain.owner(m)}" for name in ("w4g32", "w2g32") for u in units for m in u.modules}
    policy = started.policy("w2g32")
    with torch.no_grad():
        teacher = started.teacher(windows)
        errors = [(net(policy, windows) - teacher).square().mean() for net in (started, plain)]
    assert errors[0] < errors[1]
    again = Supernet(model, units, KERNELS, rank=4, start=False)
    MetaNetwork(started.kernels).save(tmp_path / "meta_network.safetensors")
    losses = {unit: dict.fromkeys(names, 0.25) for unit, names in started.kernels.items()}
    saving.save(moved(started), tmp_path, "tiny", losses, {"text": "none"}, windows.numpy())
    again.load(SupernetFolder.open(tmp_path).trained())
    with torch.no_grad():
        assert torch.equal(again(policy, windows), started(policy, windows))


def test_input_moments_are_those_of_what_the_layer_sees() -> None:
    model, units = tiny_llama()
    windows = torch.arange(24).reshape(4, 6)
    found = input_moments(model, units, windows, batch=3)  # pieces of 3 and 1: each token counts alike
    seen = {}
    hook = model.get_submodule("lm_head").register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    with torch.no_grad():
        model(input_ids=windows)
    hook.remove()
    x = seen["x"].reshape(-1, 64)
    torch.testing.assert_close(found["lm_head"], x.T @ x / len(x))
    assert torch.equal(found["model.embed_tokens"], found["lm_head"])
    assert found["model.layers.0.self_attn.q_proj"] is found["model.layers.0.self_attn.v_proj"]


def test_padding_does_not_count_among_a_layers_inputs() -> None:
    from random_models import random_model

    model = random_model("bert", "BertForSequenceClassification", num_labels=2)
    linear = "bert.encoder.layer.1.output.dense"
    units = (
        Unit("down", "MatMul", 128, 64, "linear", (linear,), "", ""),
        Unit("head", "MatMul", 64, 2, "head", ("classifier",), "", ""),
    )
    rows = torch.arange(2, 12).reshape(2, 5)
    padded, masks = torch.nn.functional.pad(rows, (0, 3)), torch.tensor([[1] * 5 + [0] * 3] * 2)
    seen, expected = input_moments(model, units, padded, masks=masks), input_moments(model, units, rows)
    for module in (linear, "classifier"):  # the head sees one token of each
        torch.testing.assert_close(seen[module], expected[module], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(input_moments(model, units, padded)[linear], expected[linear], rtol=1e-2)
