"""Eight transformers architectures, built from configurations, with dropout: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "attention_dropout": 0.1,
}
_ENCODER = {name: _DECODER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
_ENCODER |= {"num_attention_heads": 2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": 64, "n_positions": 16, "bos_token_id": 0}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}

_CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _DECODER,
    "MistralForCausalLM": _DECODER | {"sliding_window": 8},
    "Qwen3ForCausalLM": _DECODER | {"head_dim": 16},
    "MixtralForCausalLM": _DECODER | _MIXTRAL,
    "GPT2LMHeadModel": _GPT2 | {"eos_token_id": 0},
    "BertForMaskedLM": _ENCODER | {"vocab_size": 64},
    "T5ForConditionalGeneration": _T5 | {"decoder_start_token_id": 0},
    "ViTForImageClassification": _ENCODER | {"image_size": 16, "patch_size": 4, "num_labels": 4},
}

BLOCKS: dict[str, list[str]] = {
    "LlamaForCausalLM": [f"model.layers.{index}" for index in range(4)],
    "MistralForCausalLM": [f"model.layers.{index}" for index in range(4)],
    "Qwen3ForCausalLM": [f"model.layers.{index}" for index in range(4)],
    "MixtralForCausalLM": [f"model.layers.{index}" for index in range(4)],
    "GPT2LMHeadModel": [f"transformer.h.{index}" for index in range(4)],
    "BertForMaskedLM": [f"bert.encoder.layer.{index}" for index in range(4)],
    "T5ForConditionalGeneration": [f"{half}.block.{index}" for half in ("encoder", "decoder") for index in range(2)],
    "ViTForImageClassification": [f"vit.layers.{index}" for index in range(4)],
}
"""By architecture, every block's name."""

ARCHITECTURES = tuple(BLOCKS)


def build(architecture: str) -> Any:
    """The same weights at every call; in training mode."""
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    return model_class(model_class.config_class(**_CONFIGS[architecture])).train()


def loss_of(architecture: str, **options: Any) -> Callable[[Any], Tensor]:
    """One training forward of such a model, wrapped or not: the loss."""
    if architecture.startswith("ViT"):
        inputs = {"pixel_values": PIXELS, "labels": torch.tensor([1, 3])}
    else:
        inputs = {"input_ids": TOKENS, "labels": TOKENS}
    return lambda model: model(**inputs, **options).loss
