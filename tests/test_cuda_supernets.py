"""Supernets that serve the CUDA provider, alone or beside the CPU's: the same codes, scales as either reads them. Computed on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.errors import InputError
from toolchain.kernels import CATALOGUE, candidates, counterpart, offered
from toolchain.session import open_session
from toolchain.spec import CPU, CUDA, Policy

KERNELS = offered(CUDA)
QUANTISED = [name for name in KERNELS if CATALOGUE[name].quantised]


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
