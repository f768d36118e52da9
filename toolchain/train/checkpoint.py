"""Training state at rest: one safetensors file, so that it is whole or absent after a kill at any moment.

Holds the trained tensors and their averages, AdamW's moments, the meta-network with its own, the step, and what the meta-network imitates.
Knows nothing of how they are used. A checkpoint belongs to one set-up (`identity`); another set-up's is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.files import write_atomic
from toolchain.progress import note
from toolchain.reading import json_of

FILE = "checkpoint.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """step: how many steps are done. extra: JSON data of the loop's own."""

    step: int
    extra: Mapping[str, Any]


def save(
    folder: Path, identity: str, state: State, named: Mapping[str, nn.Parameter], optimisers: Sequence[torch.optim.Optimizer]
) -> None:
    """Write every parameter, with the moments of those that an optimiser has moved."""
    from safetensors.torch import save as to_bytes

    moments = {parameter: values for optimiser in optimisers for parameter, values in optimiser.state.items()}
    tensors = {}
    for name, parameter in named.items():
        tensors[f"value:{name}"] = parameter.detach()
        if parameter in moments:
            tensors |= {f"{part}:{name}": moments[parameter][part] for part in _MOMENTS}
    header = {"identity": identity, "state": json.dumps({"step": state.step, "extra": state.extra})}
    write_atomic(folder / FILE, to_bytes({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata=header))


def load(
    folder: Path, identity: str, named: Mapping[str, nn.Parameter], optimisers: Sequence[torch.optim.Optimizer]
) -> State | None:
    """Put a checkpoint of this identity back into parameters and optimisers; None (and everything as it was) if there is none."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            header = stored.metadata() or {}
            if header.get("identity") != identity:
                note(f"bittailor: {path} is of another set-up (model, text, costs or settings): starting over")
                return None
            state = json_of(header["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        found = State(int(state["step"]), dict(state["extra"]))
        _check(tensors, named)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        note(f"bittailor: {path} does not read back ({error}): starting over")
        return None
    owner = {
        id(parameter): optimiser for optimiser in optimisers for group in optimiser.param_groups for parameter in group["params"]
    }
    for name, parameter in named.items():
        parameter.data.copy_(tensors[f"value:{name}"])
        if f"step:{name}" in tensors:
            moments = {part: tensors[f"{part}:{name}"] for part in _MOMENTS}
            optimiser = owner[id(parameter)]
            # AdamW counts its steps on the CPU, wherever the parameter lives, unless it is fused.
            counted = parameter.device if optimiser.defaults["fused"] else torch.device("cpu")
            optimiser.state[parameter] = {
                part: value.to(counted if part == "step" else parameter.device) for part, value in moments.items()
            }
    return found


def _check(tensors: Mapping[str, torch.Tensor], named: Mapping[str, nn.Parameter]) -> None:
    """ValueError or KeyError unless these are the parameters' values, and of each all moments or none: before anything is put back."""
    for name, parameter in named.items():
        parts = ["value", *(_MOMENTS if f"step:{name}" in tensors else ())]
        for part in parts:
            tensor, shape = tensors[f"{part}:{name}"], () if part == "step" else parameter.shape
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(f"{part} of {name!r} as {tensor.dtype} {tuple(tensor.shape)} instead of {tuple(shape)}")
