"""A model's forward pass on windows of tokens, by its kind: what it is fed, and what it says of them. No other module asks.

    decoder           the window                                    → logits [B, T, V]
    encoder           the window                                    → last hidden state [B, T, H]
    … with a head     the window                                    → `Headed`: last hidden state and the head's logits
    encoder-decoder   first half → encoder, second half → decoder   → logits [B, T − T//2, V] of the second half

A decoder's windows are text; so is an encoder-decoder's pair, whose target continues its source. That is not the task such a model was
made for, but distillation does not need the task: the student is held to what the teacher says of a pair, and any likely one will serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from toolchain.errors import InputError
from toolchain.graph.build import kind_of


@dataclass(frozen=True)
class Headed:
    """Output of an encoder with a task head. hidden [B, T, H]: its last hidden state; task: what the logits mean.

    "classification"   one of L: labels [B, L], labels per token [B, T, L], or a masked token's vocabulary [B, T, V]
    "multi-label"      [B, L], every label for itself, yes or no
    "regression"       numbers [B, L], also where one label stands alone: of one class there is nothing to choose
    "span"             [B, T, 2], at which position an answer begins and at which it ends
    """

    hidden: Tensor
    logits: Tensor
    task: str

    def float(self) -> Headed:
        return Headed(self.hidden.float(), self.logits.float(), self.task)


Output: TypeAlias = Tensor | Headed


class Trace(NamedTuple):
    """A pass's output and, where they were asked for, the hidden states [B, T, H] behind each of the model's blocks."""

    output: Output
    hidden: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Pass:
    """kind: "decoder", "encoder" or "encoder-decoder". headed: an encoder with a task head, whose config may name its problem.
    start: an encoder-decoder's first target token."""

    kind: str
    headed: bool = False
    problem: str | None = None
    start: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Pass:
        """Of a Hugging Face model. Raises UnknownArchitectureError, InputError for an encoder-decoder without a first target token."""
        architecture, config = type(model).__name__, model.config
        kind = kind_of(architecture)
        if kind != "encoder-decoder":
            headed = kind == "encoder" and not architecture.endswith("Model")
            return cls(kind, headed, getattr(config, "problem_type", None))
        # The generation's settings above the model's, as `package/generate.py` reads them.
        stated = (getattr(place, "decoder_start_token_id", None) for place in (model.generation_config, config))
        start = next((token for token in stated if token is not None), None)
        if start is None:
            raise InputError(
                f"expected decoder_start_token_id in the config of {architecture}, found none", "set it (T5: 0) in config.json"
            )
        return cls(kind, start=start)

    def arguments(self, ids: Tensor, mask: Tensor | None = None, hidden: bool = False) -> dict[str, Any]:
        """Keyword arguments of the model's forward for windows int64 [B, T] and a mask 0/1 [B, T]: of padded ones, None: of full ones.

        The target is shifted right behind the start token, so that there are logits for each of its positions.
        Raises InputError for an encoder-decoder's windows of one token, or with a mask: text is cut into full windows.
        """
        asked = {"output_hidden_states": True} if hidden or self.headed else {}
        if self.kind == "decoder":
            return {"input_ids": ids, "attention_mask": mask, "use_cache": False, **asked}
        if self.kind == "encoder":
            return {"input_ids": ids, "attention_mask": mask, **asked}
        if mask is not None or ids.shape[1] < 2:
            got = "a mask" if mask is not None else f"windows of {ids.shape[1]}"
            raise InputError(f"expected full windows of 2 tokens or more for an encoder-decoder, got {got}")
        source, target = ids[:, : ids.shape[1] // 2], ids[:, ids.shape[1] // 2 :]
        shifted = torch.cat([torch.full_like(target[:, :1], self.start), target[:, :-1]], dim=1)
        return {"input_ids": source, "decoder_input_ids": shifted, "use_cache": False, **asked}

    def trace(self, result: Any, hidden: bool = False) -> Trace:
        """A forward's result, which was asked for its hidden states if they are wanted; the embedding's is none of them."""
        if not hidden:
            return Trace(self.output(result))
        if self.kind == "encoder-decoder":
            return Trace(self.output(result), (*result.encoder_hidden_states[1:], *result.decoder_hidden_states[1:]))
        return Trace(self.output(result), tuple(result.hidden_states[1:]))

    def output(self, result: Any) -> Output:
        """What of a forward's result is distilled: see the module's table."""
        if not self.headed:
            return result.last_hidden_state if self.kind == "encoder" else result.logits
        hidden = result.hidden_states[-1]
        if getattr(result, "start_logits", None) is not None:
            return Headed(hidden, torch.stack([result.start_logits, result.end_logits], -1), "span")
        return Headed(hidden, result.logits, self._task(result.logits))

    def _task(self, logits: Tensor) -> str:
        # A config names its problem for sequences only; for tokens the field is ignored, as transformers does.
        problem = self.problem if logits.ndim == 2 else None
        if problem == "regression" or logits.shape[-1] == 1:
            return "regression"
        return "multi-label" if problem == "multi_label_classification" else "classification"
