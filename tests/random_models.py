"""Tiny transformers of random weights as Hugging Face folders without a tokenizer: every architecture, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

HIDDEN, VOCABULARY, CONTEXT = 64, 512, 256
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": HIDDEN,
    "hidden_dim": 128,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": CONTEXT,
}

_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": 160,
    "num_layers": 2,
    "num_heads": 4,
    "n_positions": CONTEXT,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
    "feed_forward_proj": "gated-gelu",
}

DECODERS = ("llama", "qwen2", "mistral")
ENCODERS = ("bert", "roberta", "distilbert")
TIED_T5: dict[str, Any] = {"tie_word_embeddings": True, "feed_forward_proj": "relu", "num_decoder_layers": 3, "d_kv": 8}
"""Changes from a T5 of version 1.1 to one of the first version, with stacks of unequal depth and attention narrower than the model."""
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": None}),
    "bert": ("BertModel", "BertConfig", _ENCODER),
    # RoBERTa keeps two positions for itself (padding): two more make its longest sequence CONTEXT.
    "roberta": ("RobertaModel", "RobertaConfig", {**_ENCODER, "max_position_embeddings": CONTEXT + 2, "type_vocab_size": 1}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", _DISTILBERT),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
}


def random_model(name: str, architecture: str = "", **changes: Any) -> Any:
    """A model in eval mode, the same for the same arguments. `architecture`: another class for the same config (BertForMaskedLM).

    Weights are larger than an untrained model's, so that logits differ enough for a wrong node to show; biases and norms are not the
    zeros and ones they start as, so that a dropped one shows too.
    """
    class_name, config_name, arguments = _MODELS[name]
    config = getattr(transformers, config_name)(**{**arguments, **changes})
    model = getattr(transformers, architecture or class_name)(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                # By fan-in, so that activations neither vanish nor blow up; embeddings about 1.
                parameter.copy_(noise if "embed" in key or key == "shared.weight" else noise * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(noise * 0.2)
    return model


def save_random_model(name: str, folder: Path, architecture: str = "", **changes: Any) -> Path:
    """`random_model` as config.json and model.safetensors in `folder`, which is returned."""
    random_model(name, architecture, **changes).save_pretrained(folder, safe_serialization=True)
    return folder


def save_word_tokenizer(folder: Path) -> None:
    """A tokenizer of a few words, which frames sentences and pairs as BERT's does."""
    words = {word: place for place, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *"abcdefg"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=special
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
