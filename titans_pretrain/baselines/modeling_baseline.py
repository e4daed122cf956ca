"""Baselines of Titans that no library keeps, as Hugging Face models.

Shapes: B batch, T time, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    Mamba2Config,
    Mamba2Model,
    MambaConfig,
    MambaModel,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from .baseline_layers import (
    CausalConvolution,
    RMSNorm,
    ShortConvolution,
    SwiGLU,
    WindowAttention,
    begin_as_mamba_ssm,
)
from .configuration_baseline import BaselineConfig
from .linear_mixers import LARGEST_A, PARTS, RATES, SMALLEST_A, HeadDecay, LinearMixer
from .recurrences import by_chunks  # noqa: F401 - each file the folder needs is named here
from .ttt import TTT, BeforeTTT

MAMBA2_HEAD = 64
TTT_KINDS = ("ttt_linear", "ttt_mlp")
CUT = 0.8796  # standard deviation of a normal that is cut at two of its own


def make_mixer(config: BaselineConfig, kind: str) -> nn.Module:
    """A mixer, (B, T, D) to the same shape, out of ``KINDS``."""
    if kind in PARTS:
        return LinearMixer(config, kind)
    if kind in TTT_KINDS:
        return TTT(config, kind)
    if kind == "window":
        return WindowAttention(
            config.hidden_size, config.num_heads, config.window_size, config.rope_theta
        )
    return _mamba(config, kind)


def _mamba(config: BaselineConfig, kind: str) -> nn.Module:
    """The mixer of transformers' Mamba or Mamba2, with the initial weights of mamba-ssm."""
    sizes = {
        "hidden_size": config.hidden_size,
        "state_size": config.state_size,
        "expand": config.expand,
        "conv_kernel": config.conv_width,
        "num_hidden_layers": 1,
        "vocab_size": 1,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        "initializer_range": config.initializer_range,
    }
    if kind == "mamba":
        mixer = MambaModel(MambaConfig(**sizes)).layers[0].mixer
    else:
        mixer = _mamba2(config, sizes)
    begin_as_mamba_ssm(mixer, 2 * config.num_hidden_layers)  # two residuals a block
    return mixer


def _mamba2(config: BaselineConfig, sizes: dict[str, Any]) -> nn.Module:
    head = min(MAMBA2_HEAD, config.hidden_size * config.expand // config.num_heads)
    return (
        Mamba2Model(
            Mamba2Config(
                num_heads=config.hidden_size * config.expand // head,
                head_dim=head,
                n_groups=1,
                chunk_size=config.chunk_size,
                **sizes,
            )
        )
        .layers[0]
        .mixer
    )


class BaselineBlock(GradientCheckpointingLayer):
    """Pre-norm mixer and feed-forward, each with its residual."""

    def __init__(self, config: BaselineConfig, kind: str) -> None:
        super().__init__()
        self.before = BeforeTTT(config) if kind in TTT_KINDS else None
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = make_mixer(config, kind)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) to the same shape."""
        if self.before is not None:
            hidden_states = self.before(hidden_states)
        hidden_states = hidden_states + self.mixer(self.mixer_norm(hidden_states))
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class MemoryEmbeddings(nn.Module):
    """What RMT's memory holds before the first segment."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.zeros(count, width))

    def forward(self, batch: int) -> Tensor:
        """(B, count, D)."""
        return self.embeddings.expand(batch, -1, -1)


class BaselinePreTrainedModel(PreTrainedModel):
    """What the baselines share: initial weights and what Hugging Face may assume."""

    config_class = BaselineConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BaselineBlock"]  # noqa: RUF012 - Hugging Face's attribute
    _is_stateful = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, ShortConvolution):
            bound = module.conv.kernel_size[0] ** -0.5
            nn.init.uniform_(module.conv.weight, -bound, bound)
        elif isinstance(module, CausalConvolution):
            wide = module.conv.kernel_size[0] ** -0.5 / CUT
            nn.init.trunc_normal_(module.conv.weight, std=wide, a=-2 * wide, b=2 * wide)
            if module.conv.bias is not None:
                nn.init.zeros_(module.conv.bias)
        elif isinstance(module, HeadDecay):
            if not getattr(module.A_log, "_is_hf_initialized", False):  # not read from a file
                nn.init.uniform_(module.A_log, 0.0, LARGEST_A)
                module.A_log.clamp_(min=SMALLEST_A).log_()
            nn.init.uniform_(module.dt_bias, *RATES)
        elif isinstance(module, MemoryEmbeddings):
            nn.init.normal_(module.embeddings, std=std)
        elif isinstance(module, TTT):
            for weight in module.inner_weights:
                nn.init.normal_(weight, std=std)
            for bias in module.inner_biases:
                nn.init.zeros_(bias)
            nn.init.zeros_(module.inner_shift)
            nn.init.zeros_(module.step_sizes)
            nn.init.ones_(module.inner_scale)


class BaselineModel(BaselinePreTrainedModel):
    """Embedding, blocks and final norm, and RMT's memory where there is one."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BaselineBlock(config, kind) for kind in config.kinds())
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.memory_embeddings:
            self.memory = MemoryEmbeddings(config.memory_embeddings, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **unused: Any,
    ) -> BaseModelOutput:
        """Hidden states (B, T, D) of token ids (B, T).

        Args:
            input_ids: (B, T), or give ``inputs_embeds`` (B, T, D).
            attention_mask: (B, T), 0 for pads on any side; pads change nothing.
            inputs_embeds: see ``input_ids``.
            unused: refused if it would change the result.
        """
        _refuse(unused)
        _check_positions(unused.get("position_ids"), attention_mask)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        back = None
        if attention_mask is not None and not bool(attention_mask.all()):
            order = (attention_mask == 0).int().argsort(dim=1, stable=True)
            back = order.argsort(1)  # tokens come first, so that no pad is before any of them
            hidden = _columns(hidden, order)
        hidden = self._segments(hidden) if self.config.memory_embeddings else self._blocks(hidden)
        return BaseModelOutput(last_hidden_state=hidden if back is None else _columns(hidden, back))

    def _blocks(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        normed: Tensor = self.norm(hidden)
        return normed

    def _segments(self, hidden: Tensor) -> Tensor:
        """RMT: the memory is read before a segment's tokens and written after them."""
        count = self.config.memory_embeddings
        memory = self.memory(hidden.shape[0]).to(hidden.dtype)
        outputs = []
        for segment in hidden.split(self.config.segment_length, 1):
            out = self._blocks(torch.cat([memory, segment, memory], 1))
            outputs.append(out[:, count:-count])
            memory = out[:, -count:]
        return torch.cat(outputs, 1)


class BaselineForCausalLM(BaselinePreTrainedModel, GenerationMixin):
    """A baseline with a language-modelling head; every call reads the whole row anew."""

    _tied_weights_keys = {  # noqa: RUF012 - Hugging Face's attribute
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.model = BaselineModel(config)
        self.repeats_blocks = bool(config.memory_embeddings)  # several times in a call
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean loss of the next tokens where ``labels`` are given.

        Args:
            input_ids, attention_mask, inputs_embeds: see BaselineModel.
            labels: (B, T) token ids, -100 for no loss; shifted here.
            use_cache: must not be True, as nothing is kept.
            logits_to_keep: last columns to predict from, 0 for all, or indices of columns.
            kwargs: refused if they would change the result.
        """
        if use_cache:
            raise ValueError("this baseline keeps no cache: call it with use_cache=False")
        hidden = self.model(input_ids, attention_mask, inputs_embeds, **kwargs).last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kept: Any = logits_to_keep
            hidden = hidden[:, slice(-kept, None) if isinstance(kept, int) else kept]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            predicted, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = F.cross_entropy(predicted, targets.to(logits.device))
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """No cache, whatever is asked: ``generate`` then gives every call the whole row."""
        if generation_config.cache_implementation is not None:
            raise ValueError("this baseline keeps no cache: leave cache_implementation unset")
        generation_config.use_cache = False
        model_kwargs["use_cache"] = False


def _columns(x: Tensor, order: Tensor) -> Tensor:
    """(B, T, D) with its columns taken in another order, (B, T)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


_HARMLESS = {"cache_position", "position_ids", "output_attentions", "is_first_iteration"}
_HARMLESS |= {"return_dict", "output_hidden_states"}


def _check_positions(given: Tensor | None, mask: Tensor | None) -> None:
    """Refuse positions other than the tokens' own: of the row's start or of its first token."""
    if given is None:
        return
    given = given.reshape(-1, given.shape[-1])
    plain = torch.arange(given.shape[-1], device=given.device)
    if bool((given == plain).all()):
        return
    wrong: Any = True
    if mask is not None and mask.shape[-1] == given.shape[-1]:
        wrong = ((given != mask.long().cumsum(-1) - 1) & (mask != 0)).any()
    if bool(wrong):
        raise TypeError(
            "the baseline takes no position_ids but 0, 1, 2, ... of a row or of its tokens that "
            "are no pads: leave them out, and give every document a row of its own"
        )


def _refuse(arguments: dict[str, Any]) -> None:
    """Arguments that would be ignored and are not known to be harmless."""
    bad = [name for name, value in arguments.items() if value is not None and name not in _HARMLESS]
    asked = [name for name in ("output_attentions", "output_hidden_states") if arguments.get(name)]
    if bad or asked:
        raise TypeError(f"the baseline does not take {', '.join(sorted(bad + asked))}")


__all__ = ["BaselineConfig", "BaselineForCausalLM", "BaselineModel", "BaselinePreTrainedModel"]
