"""Titans as a Hugging Face causal language model.

Shapes: B batch, T tokens of a call, D hidden_size, V vocab_size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# transformers 4 exports only the modules that this file imports itself
from .attention import WindowAttention  # noqa: F401
from .boundary import Boundary  # noqa: F401
from .cache import TitansCache
from .configuration_titans import TitansConfig
from .documents import Documents
from .fields import FIELDS  # noqa: F401
from .layers import PersistentTokens, RMSNorm, ShortConvolution, SwiGLU, full_precision
from .layout import Layout
from .memory import memory_scan  # noqa: F401
from .memory_chunk import chunk_step  # noqa: F401
from .memory_coefficients import coefficients  # noqa: F401
from .memory_open import scan_open  # noqa: F401
from .mixers import MIXERS
from .neural_memory import Gate, InitialWeights


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
        _refuse(unused)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if not hidden.shape[1]:
            raise ValueError("no tokens: give at least one column of input_ids or inputs_embeds")
        documents = self._documents(document_starts, hidden, past_key_values, use_cache)
        cache = self._cache(past_key_values, use_cache if documents is None else False)
        layout = self._layout(hidden, attention_mask, cache)
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
            for state in cache.layers:
                state.state["position"] = layout.position + layout.count
                state.seen += columns
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

    def _cache(self, given: Any, use_cache: bool | None) -> TitansCache | None:
        if use_cache is None:
            use_cache = self.config.use_cache
        if given is not None and not isinstance(given, TitansCache):
            raise TypeError(f"past_key_values is a {type(given).__name__}, expected a TitansCache")
        if given is not None and self.training and self.gradient_checkpointing:
            raise ValueError("gradient checkpointing cannot continue a cache; call eval() first")
        if given is not None:
            return given
        return TitansCache(self.config) if use_cache and not self.training else None

    def _layout(
        self, hidden: Tensor, mask: Tensor | None, cache: TitansCache | None
    ) -> Layout | None:
        """None when every row begins here and has no pads, which is how training runs."""
        batch, columns = hidden.shape[:2]
        seen = 0 if cache is None else cache.get_seq_length()
        if mask is not None:
            if (
                mask.dim() != 2
                or mask.shape[0] != batch
                or mask.shape[1]
                not in (
                    columns,
                    seen + columns,
                )
            ):
                raise ValueError(
                    f"attention_mask is {tuple(mask.shape)}, expected ({batch}, {seen + columns})"
                )
            mask = mask[:, -columns:]
            asks = not torch.compiler.is_compiling()  # a graph cannot branch on what a tensor holds
            if asks and not bool(((mask == 0) | (mask == 1)).all()):
                raise ValueError("attention_mask holds values other than 0 (pad) and 1 (token)")
            mask = mask.bool()
            if asks and cache is None and bool(mask.all()):
                mask = None
        if mask is None and cache is None:
            return None
        if mask is None:
            mask = torch.ones(batch, columns, dtype=torch.bool, device=hidden.device)
        position = (
            torch.zeros(batch, dtype=torch.long, device=hidden.device)
            if cache is None
            else cache.position(batch, hidden.device)
        )
        return Layout.build(mask, position, self.config.grid)


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """Titans with a language-modelling head."""

    _tied_weights_keys = {  # noqa: RUF012 - Hugging Face's attribute
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_starts: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V), and the mean loss of the next tokens where ``labels`` are given.

        Args:
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache,
                document_starts: see TitansModel.
            labels: (B, T) token ids, -100 for no loss; shifted here.
            output_hidden_states: whether to return every block's input and the final output.
            logits_to_keep: last columns to predict from, 0 for all, or indices of columns.
            return_dict: False for a tuple.
            kwargs: ``num_items_in_batch`` for the loss; anything else is refused.
        """
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            document_starts=document_starts,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if isinstance(logits_to_keep, int) and not logits_to_keep:
            kept = slice(None)
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels, **loss_kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )
        return result if return_dict is not False else result.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: TitansCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``generate`` gives to a call.

        Where a prompt comes in pieces, transformers 4 adds positions, which count pads, too.
        """
        kwargs.pop("position_ids", None)
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate`` a TitansCache; any other kind cannot hold a memory."""
        if generation_config.use_cache is False:
            model_kwargs["use_cache"] = False
            return None
        if model_kwargs.get("past_key_values") is not None:
            return None
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot hold a "
                "memory; leave it unset"
            )
        model_kwargs["past_key_values"] = TitansCache(self.config)
        return None


def next_token_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of each next token, in the logits' full precision.

    Args:
        logits: (B, T, V).
        labels: (B, T), -100 where no loss is wanted; token t is predicted by column t - 1.
        num_items_in_batch: what the sum is divided by instead of the number of targets.
    """
    predicted = full_precision(logits[:, :-1]).flatten(0, 1)
    targets = labels[:, 1:].flatten().to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(predicted, targets)
    return F.cross_entropy(predicted, targets, reduction="sum") / num_items_in_batch


_HARMLESS = {"cache_position", "output_attentions", "is_first_iteration", "return_dict"}


def _refuse(arguments: dict[str, Any]) -> None:
    """Arguments that would be ignored and are not known to be harmless."""
    bad = sorted(n for n, v in arguments.items() if v is not None and n not in _HARMLESS)
    if arguments.get("output_attentions"):
        bad.append("output_attentions")
    if bad:
        raise TypeError(
            f"Titans does not take {', '.join(bad)} (a token's position is its place among the "
            "row's tokens, and attention weights are not kept)"
        )


__all__ = ["TitansConfig", "TitansForCausalLM", "TitansModel", "TitansPreTrainedModel"]
