"""From a trained `Supernet` to the files of its folder, and back. The layout is `store.py`'s; torch is needed only here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from toolchain.errors import InputError
from toolchain.graph.model import Graph
from toolchain.kernels import CATALOGUE
from toolchain.supernet import store
from toolchain.supernet.adapters import OWN, SAVED
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.store import SHARED

# Not SEQ_CLS and its like for an encoder's head: PEFT would then look for a whole copy of the classifier, which has an adapter instead.
_TASK_TYPES = {"decoder": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION", "encoder-decoder": "SEQ_2_SEQ_LM"}


def save(
    supernet: Supernet,
    folder: Path,
    source: str,
    sensitivity: Mapping[str, Mapping[str, float]],
    training: Mapping[str, Any],
    calibration: np.ndarray,
) -> None:
    """Write quantised/, adapters/, calibration.safetensors and, last, supernet.yaml into an existing folder.

    The caller writes graph/, model/ and meta_network.safetensors *before* this: supernet.yaml carries the sha256 of the latter.
    calibration: token windows [n, T] int64.
    """
    if supernet.adapters.kind not in SAVED:
        raise InputError(f"expected adapters of kind {' or '.join(SAVED)} to save a supernet, got {supernet.adapters.kind}")
    used = dict.fromkeys(name for names in supernet.kernels.values() for name in names)
    modules = [module for unit in supernet.units for module in unit.modules]
    embeddings = frozenset(module for module in modules if isinstance(supernet.model.get_submodule(module), nn.Embedding))
    arrays = supernet.arrays()
    for name in used:
        kernel = CATALOGUE[name]
        if not kernel.quantised:
            continue
        offered = [unit for unit in supernet.units if name in supernet.kernels[unit.name]]
        # Stored once where the graph calls them tied, and a reader therefore looks for the other one.
        holders = {supernet.tensor_key(unit) if unit.tied_to else unit.name: unit for unit in reversed(offered)}
        store.write_quantised(folder, kernel, {unit.name: supernet.quantized(unit, kernel) for unit in reversed(holders.values())})
        layers: dict[str, dict[str, np.ndarray]] = {}
        for module in (module for unit in offered for module in unit.modules):
            owner = supernet.owner(module)
            parts = {
                key.removeprefix(f"{name}/{owner}/"): array for key, array in arrays.items() if key.startswith(f"{name}/{owner}/")
            }
            if any(supernet.owner(other) == owner for other in layers):  # what tied layers start from is kept once
                parts = {part: array for part, array in parts.items() if not part.startswith("frozen_")}
            layers[module] = parts
        store.write_adapter(folder, name, layers, peft_config(supernet, name, source), embeddings)
    shared = {
        module: {part: arrays[f"{SHARED}/{supernet.owner(module)}/{part}"] for part in ("A", "B")}
        for unit in supernet.units
        if any(map(supernet.adapters.shares, supernet.kernels[unit.name]))
        for module in unit.modules
    }
    if shared:
        store.write_adapter(folder, SHARED, shared, peft_config(supernet, SHARED, source), embeddings)
    store.write_arrays(folder / "calibration.safetensors", {"tokens": np.asarray(calibration, np.int64)})
    store.write_description(
        folder,
        {
            "source": source,
            "rank": supernet.rank,
            "alpha": supernet.alpha,
            "adapters": supernet.adapters.kind,
            "training": dict(training),
            "kernels": {unit: list(names) for unit, names in supernet.kernels.items()},
            "sensitivity": {unit: {kernel: float(loss) for kernel, loss in row.items()} for unit, row in sensitivity.items()},
        },
    )


def restore(folder: store.SupernetFolder, device: torch.device | str = "cpu") -> Supernet:
    """The supernet of a folder, on a device, with everything that was trained. Raises what opening its parts does."""
    units = Graph.open(folder.graph_directory).units
    said = folder.description
    supernet = Supernet(
        load_model(folder.model_directory).to(device),
        units,
        folder.kernels,
        rank=said["rank"],
        alpha=said["alpha"],
        adapters=said.get("adapters", OWN),
        start=False,
    )
    supernet.load(folder.trained())
    return supernet


def peft_config(supernet: Supernet, name: str, source: str) -> dict[str, Any]:
    """adapter_config.json of a kernel's adapter, or the shared one, without its target_modules: what PEFT needs to add (alpha/r)·B·A to
    each layer.

    Of T5 it adapts the linears only: its stacks hold the embedding under names of their own and never call the one that PEFT replaces.
    """
    rank = supernet.adapters.rank_of(name)
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[supernet.kind],
        "base_model_name_or_path": source,
        "r": rank,
        "lora_alpha": supernet.alpha * rank / supernet.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
