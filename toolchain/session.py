"""Opening an ONNX folder on stock onnxruntime, and reading from the session itself what a decoder's cache looks like.

An encoder-decoder is three graphs under the names that optimum gives them, so that it loads the folder too.

Knows onnxruntime and numpy only: no graph library, no config files. What it is fed is read from the session's own inputs.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toolchain.errors import DamagedFileError, InputError
from toolchain.ops import refusal
from toolchain.spec import CPU, CUDA

if TYPE_CHECKING:
    import onnxruntime

LOGITS_TO_KEEP = "logits_to_keep"
"""Input of a decoder that has a default, 1: how many of the last positions get logits. transformers' name for the same thing."""

MODEL, ENCODER, FIRST_STEP, STEP = "model.onnx", "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
MODEL_FILES = {"decoder": (MODEL,), "encoder": (MODEL,), "encoder-decoder": (ENCODER, FIRST_STEP, STEP)}
"""The graphs of a folder, by the kind of its model."""

ENCODER_DECODER_CONTEXT = 512
"""Longest source and longest target where a T5's config does not say: what T5 was trained on; its relative positions set no limit."""

SESSION_OPTIONS = {"enable_mem_pattern": False}
"""How sessions are opened, and what a package's manifest tells those who open it. Memory patterns plan one block for a whole run, the
second time a shape is seen, beside what the first run left: an encoder's peak rose by a fifth, and its runs
were no faster (`benchmarks/session_options.py`)."""

PROVIDER_OPTIONS: dict[str, dict[str, str]] = {CUDA: {"arena_extend_strategy": "kSameAsRequested"}}
"""What a provider is opened with besides. By default CUDA's arena takes the next power of two of what is asked, so that a package of
33 MB and one of 63 MB would weigh the same."""

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class CacheSlot:
    """One KV tensor of a decoder: its input and output name, heads H, head width D and dtype; the tensor is [1, H, T, D]."""

    past: str
    present: str
    heads: int
    width: int
    dtype: np.dtype

    def zeros(self, capacity: int) -> np.ndarray:
        return np.zeros((1, self.heads, capacity, self.width), self.dtype)


def is_encoder_decoder(directory: Path) -> bool:
    """Whether the folder holds an encoder-decoder's graphs."""
    return (Path(directory) / ENCODER).is_file()


def memory_of(provider: str) -> str:
    """onnxruntime's name for the memory that a provider computes in: what is bound there is not copied."""
    return "cuda" if provider == CUDA else "cpu"


@cache
def _load_libraries() -> None:
    """CUDA's libraries where pip put them; onnxruntime prints what it does not find, and stdout is the agent's."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def open_session(
    directory: Path, threads: int = 0, provider: str = CPU, shared_pool: bool = False, name: str = MODEL, only: bool = False
) -> onnxruntime.InferenceSession:
    """A session on the graph `directory/name`; threads 0 = onnxruntime's own choice.

    shared_pool: use the process's one thread pool (`set_global_thread_pool_sizes` must have been called) instead of an own one. Pools
    spin for a while after work, so sessions timed in rotation would steal each other's cores if each had its own.

    Nodes that the provider has no kernel for run on the CPU, as onnxruntime does it; only: refuse a graph that has such nodes.

    Raises InputError for a folder without that file, a graph with ops that are not run (`ops.py`) or a provider that does not start,
    DamagedFileError for a graph that onnxruntime cannot load.
    """
    import onnxruntime

    path = Path(directory) / name
    if not path.is_file():
        raise InputError(f"expected a folder with {name}, got {directory}", "make one: bittailor export MODEL --out PACKAGE")
    try:
        refused = refusal(path)
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"expected an ONNX graph in {path}, got {error}") from error
    if refused:
        raise InputError(
            f"expected a graph of ONNX's and onnxruntime's own ops, without loops and functions, got {refused} in {path}"
        )
    options = onnxruntime.SessionOptions()
    if shared_pool:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads
    for name, value in SESSION_OPTIONS.items():
        setattr(options, name, value)
    # Not in the middle of a progress line, and not beside the one line of a refusal, which says what went wrong. On a GPU errors alone: a
    # provider that does not start says why nowhere else.
    options.log_severity_level = 4 if provider == CPU else 3
    if only and provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.log_severity_level = 4  # who asks expects to be refused
    if provider == CUDA:
        _load_libraries()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where onnxruntime says that it tries again; stdout is the command's
            session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, PROVIDER_OPTIONS.get(provider, {}))])
    except Exception as error:  # onnxruntime's exceptions share no other base class
        raise DamagedFileError(f"expected {path} to load in onnxruntime {onnxruntime.__version__}, got: {error}") from error
    if provider not in session.get_providers():  # it goes on without one that does not start: numbers of another device
        raise InputError(
            f"expected {provider} to start in onnxruntime {onnxruntime.__version__}, got {', '.join(session.get_providers())} alone",
            "put the lib folders of the CUDA and cuDNN packages on LD_LIBRARY_PATH" if provider == CUDA else "",
        )
    return session


def cache_slots(session: onnxruntime.InferenceSession) -> tuple[CacheSlot, ...]:
    """The KV tensors of a decoder that grow with every token, in the graph's order; empty for an encoder.

    Raises InputError for a cache that is not [batch, heads, tokens, width] with outputs named present.* for past_key_values.*.
    """
    return _slots(session, session, cross=False)


def cross_slots(session: onnxruntime.InferenceSession, encoder: onnxruntime.InferenceSession) -> tuple[CacheSlot, ...]:
    """The KV tensors of an encoder-decoder's source, which `encoder` makes once and every step reads. Raises as `cache_slots` does."""
    return _slots(session, encoder, cross=True)


def _slots(session: onnxruntime.InferenceSession, maker: onnxruntime.InferenceSession, cross: bool) -> tuple[CacheSlot, ...]:
    outputs = {output.name for output in maker.get_outputs()}
    slots = []
    for item in session.get_inputs():
        if not item.name.startswith("past_key_values.") or (".encoder." in item.name) != cross:
            continue
        present = item.name.replace("past_key_values.", "present.", 1)
        shape = item.shape
        if present not in outputs or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
            raise InputError(f"expected a cache input [batch, heads, tokens, width] with output {present}, got {item.name} {shape}")
        if item.type not in _DTYPES:
            raise InputError(f"expected a float cache, got {item.name} of {item.type}")
        slots.append(CacheSlot(item.name, present, shape[1], shape[3], np.dtype(_DTYPES[item.type])))
    return tuple(slots)


@dataclass(frozen=True)
class TokenInputs:
    """What a session wants besides its cache: name → dtype, and whether it can be asked for the logits of earlier positions.

    Read from the session once: asking it anew before every token shows in a small model's time per token.
    """

    dtypes: Mapping[str, type]
    keeps_positions: bool

    @classmethod
    def of(cls, session: onnxruntime.InferenceSession) -> TokenInputs:
        """Raises InputError for an input that we do not know how to fill."""
        wanted = [item for item in session.get_inputs() if not item.name.startswith("past_key_values.")]
        if unknown := [item.name for item in wanted if item.name not in _FILLED]:
            raise InputError(f"expected a graph with inputs among {', '.join(_FILLED)} and a cache, got {unknown[0]!r}")
        keeps = any(item.name == LOGITS_TO_KEEP for item in session.get_overridable_initializers())
        return cls({item.name: np.int32 if item.type == "tensor(int32)" else np.int64 for item in wanted}, keeps)

    def feeds(self, ids: np.ndarray, past: int = 0, every_position: bool = False) -> dict[str, np.ndarray]:
        """Inputs for tokens ids [B, T] after `past` earlier ones.

        every_position: logits of all T positions, where the graph would give the last one's alone.
        """
        filled: dict[str, np.ndarray] = {
            name: np.ascontiguousarray(_FILLED[name](ids, past), kind) for name, kind in self.dtypes.items()
        }
        if every_position and self.keeps_positions:
            filled[LOGITS_TO_KEEP] = np.array([ids.shape[1]], np.int64)
        return filled


_FILLED: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "input_ids": lambda ids, past: ids,
    "attention_mask": lambda ids, past: np.ones((ids.shape[0], past + ids.shape[1]), np.int64),
    "position_ids": lambda ids, past: np.broadcast_to(np.arange(past, past + ids.shape[1], dtype=np.int64), ids.shape),
    "token_type_ids": lambda ids, past: np.zeros(ids.shape, np.int64),
}


def token_feeds(
    session: onnxruntime.InferenceSession, ids: np.ndarray, past: int = 0, every_position: bool = False
) -> dict[str, np.ndarray]:
    """`TokenInputs.feeds` for one call. Raises InputError for an input that we do not know how to fill."""
    return TokenInputs.of(session).feeds(ids, past, every_position)
