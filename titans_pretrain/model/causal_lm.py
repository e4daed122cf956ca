"""What the causal language models have in common: head and loss, and how ``generate`` calls them.

Shapes: B batch, T tokens of a call, V vocabulary.
"""

from collections.abc import Mapping, Set
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import TitansCache
from .layers import full_precision

HARMLESS = frozenset(("cache_position", "output_attentions", "is_first_iteration", "return_dict"))


class CausalLMGenerationMixin(GenerationMixin):
    """A language-modelling head ``lm_head`` over ``model``; comes before the class of weights."""

    _tied_weights_keys = {  # noqa: RUF012 - Hugging Face's attribute
        "lm_head.weight": "model.embed_tokens.weight"
    }

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
                document_starts: see the model without a head.
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
        """Give ``generate`` a TitansCache; any other kind cannot hold a state."""
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


def embedded(embed: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """What the first block reads, (B, T, D), of one of the two."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    hidden: Tensor = embed(input_ids) if inputs_embeds is None else inputs_embeds
    if not hidden.shape[1]:
        raise ValueError("no tokens: give at least one column of input_ids or inputs_embeds")
    return hidden


def refuse(
    arguments: Mapping[str, Any], who: str, *, why: str = "", harmless: Set[str] = HARMLESS
) -> None:
    """Refuse arguments that would be ignored and are not known to be harmless.

    Args:
        arguments: by name; those that are None ask for nothing.
        who: would ignore them.
        why: ends the message.
        harmless: names that change nothing; attention weights are not kept all the same.
    """
    bad = sorted(n for n, v in arguments.items() if v is not None and n not in harmless)
    if arguments.get("output_attentions"):
        bad.append("output_attentions")
    if bad:
        raise TypeError(f"{who} does not take {', '.join(bad)}{why}")
