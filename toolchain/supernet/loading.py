"""A model folder → the torch model that is distilled: safetensors only, transformers' own classes only; nothing the folder ships runs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from toolchain.errors import InputError, UnknownArchitectureError, UnsafeModelError
from toolchain.graph.build import check_size, kind_of, read_config
from toolchain.supernet.passes import Pass


def load_model(folder: Path) -> nn.Module:
    """The Hugging Face model of a local folder in float32, in evaluation mode. Never runs or unpickles what the folder ships.

    Its class is the first architecture that its config names, one of transformers' own: a task's model comes with its head.
    Raises UnsafeModelError where there are no safetensors, UnknownArchitectureError, InputError for anything else that does not load.
    """
    import transformers

    if not any(folder.glob("*.safetensors")):
        raise UnsafeModelError(f"expected *.safetensors in {folder}, got none", "convert the checkpoint to safetensors first")
    said = read_config(folder)
    architecture = said["architectures"][0]
    kind, loader = kind_of(architecture), getattr(transformers, architecture, None)
    if loader is None or not issubclass(loader, transformers.PreTrainedModel):
        raise UnknownArchitectureError(f"expected a model class of transformers in {folder / 'config.json'}, got {architecture}")
    check_size(folder, said)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, loader.config_class):
            raise ValueError(f"architecture {architecture} with model_type {config.model_type!r}")
        model = loader.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation="eager" if kind == "encoder-decoder" else "sdpa",  # T5 has no other: its position biases are added
            local_files_only=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # what transformers and torch make of a strange config or file: types of many kinds
        raise InputError(f"expected a model that transformers loads in {folder}, got: {error}") from error
    Pass.of(model)  # what it would refuse, it refuses here, before any work
    return model.eval()
