"""Tiny models of every variant and switch, lively enough that every part matters."""

from typing import Any

import torch
from torch import Tensor

from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.fields import VARIANTS, WITH_MEMORY
from titans_pretrain.model.modeling_titans import TitansForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "memory_expansion": 2,
    "chunk_size": 4,
    "segment_length": 8,
    "window_size": 6,
    "num_persistent_tokens": 3,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "depth 1": {"memory_depth": 1},
    "depth 3": {"memory_depth": 3},
    "depth 4": {"memory_depth": 4},
    "no momentum": {"use_momentum": False},
    "no forgetting": {"use_forgetting": False},
    "no convolution": {"conv_width": 0},
    "one-tap convolution": {"conv_width": 1},
    "no persistent tokens": {"num_persistent_tokens": 0},
    "many persistent tokens": {"num_persistent_tokens": 9},
    "gates per chunk": {"gate_per": "chunk"},
    "no residual": {"memory_residual": False},
    "silu": {"memory_activation": "silu"},
    "no clamp": {"surprise_clip": None, "max_step": 0.1},
    "four memory heads": {"memory_heads": 4},
    "no rotation": {"partial_rotary_factor": 0.0},
    "chunks of one": {"chunk_size": 1},
    "chunk as long as the segment": {"chunk_size": 8},
    "one chunk": {"chunk_size": 64, "segment_length": 64},
    "untied": {"tie_word_embeddings": False},
}
FORMS: dict[str, dict[str, Any]] = {variant: {"variant": variant} for variant in VARIANTS} | {
    f"{variant}, {name}": {"variant": variant} | changes
    for variant in WITH_MEMORY
    for name, changes in SWITCHES.items()
}
FORMS["transformer, window"] = {"variant": "transformer", "attention_window": 6}


def tiny_config(**changes: Any) -> TitansConfig:
    return TitansConfig(**SMALL | {"eos_token_id": None, "pad_token_id": 0} | changes)


def tiny_model(*, dtype: torch.dtype = torch.float64, **changes: Any) -> TitansForCausalLM:
    """In evaluation mode, with weights large enough that a leak would show."""
    torch.manual_seed(7)
    model = TitansForCausalLM(tiny_config(**{"initializer_range": 0.2} | changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens(rows: int, time: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SMALL["vocab_size"], (rows, time), generator=generator)


def logits(model: TitansForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **{"use_cache": False} | options).logits
