"""Titans as a Hugging Face causal language model.

Shapes: B batch, T tokens of a call, D hidden_size, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers 4 exports only the modules that this file imports itself
from .attention import WindowAttention  # noqa: F401
from .attention_blocks import by_blocks  # noqa: F401
from .attention_flex import attend_window  # noqa: F401
from .boundary import Boundary  # noqa: F401
from .cache import TitansCache, cache_of_call, layout_of_call
from .causal_lm import CausalLMGenerationMixin, embedded, refuse
from .configuration_titans import TitansConfig
from .documents import Documents
from .fields import FIELDS  # noqa: F401
from .layers import PersistentTokens, RMSNorm, ShortConvolution, SwiGLU
from .layout import Layout
from .memory import memory_scan  # noqa: F401
from .memory_blocks import read_and_write  # noqa: F401
from .memory_chunk import chunk_step  # noqa: F401
from .memory_coefficients import coefficients  # noqa: F401
from .memory_open import scan_open  # noqa: F401
from .memory_stretch import scan_stretch  # noqa: F401
from .mixers import MIXERS
from .neural_memory import Gate, InitialWeights

_WHY = (
    " (a token's position is its place among the row's tokens, and attention weights are not kept)"
)


class TitansBlock(GradientCheckpointingLayer):
    """Pre-norm mixer and feed-forward, each with its residual."""

    def __init__(self, config: TitansConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MIXERS[config.variant](config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        layout: Layout | None = None,
        past_key_values: TitansCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """(B, T, D) to the same shape; with a cache, continues and updates this layer's state."""
        cached = None if past_key_values is None else past_key_values.layers[self.index].state
        mixed, after = self.mixer(self.mixer_norm(hidden_states), layout, cached, documents)
        if past_key_values is not None:
            past_key_values.layers[self.index].state = after
        hidden_states = hidden_states + mixed
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class TitansPreTrainedModel(PreTrainedModel):
    """What all Titans models share: initial weights and what Hugging Face may assume."""

    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TitansBlock"]  # noqa: RUF012 - Hugging Face's attribute
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - Hugging Face's attribute
    _is_stateful = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, Gate):
            nn.init.normal_(module.weight, std=std)
            nn.init.constant_(module.bias, module.initial_bias)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, PersistentTokens):
            nn.init.normal_(module.weight)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, ShortConvolution):
            nn.init.uniform_(module.weight, -(module.width**-0.5), module.width**-0.5)
        elif isinstance(module, InitialWeights):
            for weights in module.parameters():
                nn.init.normal_(weights, std=weights.shape[-1] ** -0.5)


class TitansModel(TitansPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TitansBlock(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.separates_documents = config.separates_documents  # as the layers were built
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        document_starts: Tensor | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) of token ids (B, T).

        Args:
            input_ids: (B, T), or give ``inputs_embeds`` (B, T, D).
            attention_mask: (B, T) or (B, seen + T), 0 for pads on any side; pads change nothing.
            past_key_values: the cache an earlier call returned.
            inputs_embeds: see ``input_ids``.
            use_cache: whether to return a cache; never while training, or where documents are
                told apart.
            output_hidden_states: whether to return every block's input and the final output.
            document_starts: (B, T) integers, the column of the first token of each token's
                document, 0 where it began before the row; best on the host. Without effect where
                the configuration separates none; None makes each row one document.
            unused: refused if it would change the result.
        """
        refuse(unused, "Titans", why=_WHY)
        hidden = embedded(self.embed_tokens, input_ids, inputs_embeds)
        documents = self._documents(document_starts, hidden, past_key_values, use_cache)
        cache = cache_of_call(self, past_key_values, use_cache if documents is None else False)
        layout = layout_of_call(hidden, attention_mask, cache, self.config.grid)
        if documents is not None and layout is not None:
            raise ValueError("document_starts cannot be given for rows with pads")
        columns = hidden.shape[1]
        if layout is not None:
            hidden = layout.enter(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        collected = []
        for layer in self.layers:
            if output_hidden_states:
                collected.append(hidden if layout is None else layout.leave(hidden))
            hidden = layer(hidden, layout=layout, past_key_values=cache, documents=documents)
        hidden = self.norm(hidden)
        if layout is not None:
            hidden = layout.leave(hidden)
        if cache is not None and layout is not None:
            cache.advance(layout, columns)
        states = (*collected, hidden) if output_hidden_states else None
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=cache, hidden_states=states
        )

    def _documents(
        self, starts: Tensor | None, hidden: Tensor, cache: TitansCache | None, use: bool | None
    ) -> Documents | None:
        """None where a row is one document to this model, whatever the starts."""
        if starts is None:
            return None
        if starts.dtype not in (torch.int32, torch.int64) or starts.shape != hidden.shape[:2]:
            raise ValueError(
                f"document_starts is {starts.dtype} {tuple(starts.shape)}, expected integers "
                f"{tuple(hidden.shape[:2])}"
            )
        if not self.separates_documents:
            return None
        if cache is not None or use:
            raise ValueError(
                "document_starts cannot be given with a cache: what it continues is one document"
            )
        return Documents(starts)


class TitansForCausalLM(CausalLMGenerationMixin, TitansPreTrainedModel):
    """Titans with a language-modelling head."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["TitansConfig", "TitansForCausalLM", "TitansModel", "TitansPreTrainedModel"]
