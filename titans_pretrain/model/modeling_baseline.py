"""Baselines of Titans that no library keeps, as Hugging Face models.

Shapes: B batch, T time, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2Model, MambaConfig, MambaModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers 4 exports only the modules that this file imports itself
from .attention_blocks import by_blocks  # noqa: F401
from .attention_flex import attend_window  # noqa: F401
from .baseline_layers import (
    CausalConvolution,
    ShortConvolution,
    WindowAttention,
    begin_as_mamba_ssm,
)
from .cache import TitansCache, cache_of_call, layout_of_call
from .causal_lm import HARMLESS, CausalLMGenerationMixin, embedded, refuse
from .configuration_baseline import TTT_KINDS, BaselineConfig
from .layers import RMSNorm, SwiGLU
from .layout import Layout, choose
from .linear_mixers import LARGEST_A, PARTS, RATES, SMALLEST_A, HeadDecay, LinearMixer
from .mamba_mixers import Mamba, Mamba2
from .recurrences import by_chunks  # noqa: F401
from .ttt import TTT, BeforeTTT, InnerModel

CUT = 0.8796  # standard deviation of a normal that is cut at two of its own


def make_mixer(config: BaselineConfig, kind: str) -> nn.Module:
    """A mixer, out of ``KINDS``: (B, T, D) to the same shape, and what the next call continues."""
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
    mixer.__class__ = Mamba if kind == "mamba" else Mamba2  # made by the library's model, run here
    begin_as_mamba_ssm(mixer, 2 * config.num_hidden_layers)  # two residuals a block
    return mixer


def _mamba2(config: BaselineConfig, sizes: dict[str, Any]) -> nn.Module:
    head = config.mamba2_head_width
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

    def __init__(self, config: BaselineConfig, kind: str, index: int = 0) -> None:
        super().__init__()
        self.index = index
        self.before = BeforeTTT(config) if kind in TTT_KINDS else None
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = make_mixer(config, kind)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        layout: Layout | None = None,
        past_key_values: TitansCache | None = None,
    ) -> Tensor:
        """(B, T, D) to the same shape; with a cache, continues and updates this layer's state."""
        known = {} if past_key_values is None else past_key_values.layers[self.index].state
        after = {}
        if self.before is not None:
            hidden_states, after["before"] = self.before(hidden_states, known.get("before"), layout)
        mixed, mixer_after = self.mixer(self.mixer_norm(hidden_states), layout, known)
        if past_key_values is not None:
            past_key_values.layers[self.index].state = mixer_after | after
        hidden_states = hidden_states + mixed
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
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - Hugging Face's attribute
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
            bound = module.kernel_size[0] ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, CausalConvolution):
            wide = module.kernel_size[0] ** -0.5 / CUT
            nn.init.trunc_normal_(module.weight, std=wide, a=-2 * wide, b=2 * wide)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, HeadDecay):
            if not getattr(module.A_log, "_is_hf_initialized", False):  # not read from a file
                nn.init.uniform_(module.A_log, 0.0, LARGEST_A)
                module.A_log.clamp_(min=SMALLEST_A).log_()
            nn.init.uniform_(module.dt_bias, *RATES)
        elif isinstance(module, MemoryEmbeddings):
            nn.init.normal_(module.embeddings, std=std)
        elif isinstance(module, InnerModel):
            for weight, bias in module():
                nn.init.normal_(weight, std=std)
                nn.init.zeros_(bias)
        elif isinstance(module, TTT):
            nn.init.zeros_(module.inner_shift)
            nn.init.zeros_(module.step_sizes)
            nn.init.ones_(module.inner_scale)


class BaselineModel(BaselinePreTrainedModel):
    """Embedding, blocks and final norm, and RMT's memory where there is one."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            BaselineBlock(config, kind, index) for index, kind in enumerate(config.kinds())
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.memory_embeddings:
            self.memory = MemoryEmbeddings(config.memory_embeddings, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) of token ids (B, T).

        Args:
            input_ids: (B, T), or give ``inputs_embeds`` (B, T, D).
            attention_mask: (B, T) or (B, seen + T), 0 for pads on any side; pads change nothing.
            past_key_values: the cache an earlier call returned.
            inputs_embeds: see ``input_ids``.
            use_cache: whether to return a cache; never while training.
            position_ids: refused if they are not those the tokens have anyway.
            unused: refused if it would change the result.
        """
        refuse(unused, "the baseline", harmless=HARMLESS | {"output_hidden_states"})
        if unused.get("output_hidden_states"):
            raise TypeError("the baseline does not take output_hidden_states")
        hidden = embedded(self.embed_tokens, input_ids, inputs_embeds)
        cache = cache_of_call(self, past_key_values, use_cache)
        layout = layout_of_call(hidden, attention_mask, cache, self.config.grid)
        _check_positions(position_ids, hidden.shape[1], layout, cache)
        columns = hidden.shape[1]
        if layout is not None:
            hidden = layout.enter(hidden)
        if cache is None or layout is None:  # rows begin here, in slots, too: pads come last
            hidden = self._whole(hidden)
        elif self.config.memory_embeddings:
            hidden = self._continue_segments(hidden, layout, cache)
        else:
            hidden = self._blocks(hidden, layout, cache)
        if layout is not None:
            hidden = layout.leave(hidden)
        if cache is not None and layout is not None:
            cache.advance(layout, columns)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _blocks(
        self, hidden: Tensor, layout: Layout | None = None, cache: TitansCache | None = None
    ) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, layout=layout, past_key_values=cache)
        normed: Tensor = self.norm(hidden)
        return normed

    def _whole(self, hidden: Tensor) -> Tensor:
        """RMT: the memory is read before a segment's tokens and written after them."""
        count = self.config.memory_embeddings
        if not count:
            return self._blocks(hidden)
        memory = self.memory(hidden.shape[0]).to(hidden)
        outputs = []
        for segment in hidden.split(self.config.segment_length, 1):
            out = self._blocks(torch.cat([memory, segment, memory], 1)).to(hidden.device)
            outputs.append(out[:, count:-count])
            memory = out[:, -count:]
        return torch.cat(outputs, 1)

    def _continue_segments(self, hidden: Tensor, layout: Layout, cache: TitansCache) -> Tensor:
        """RMT of rows that stand anywhere in a segment; the window's keys are the segment's."""
        length = self.config.segment_length
        memory = cache.layers[0].state.get("memory")
        if memory is None:
            memory = self.memory(hidden.shape[0]).to(hidden)
        place = layout.position % length
        inside = torch.where(place > 0, place + self.config.memory_embeddings, 0)
        outputs = []
        for first in range(0, hidden.shape[1], length):
            part = layout.part(first, length)
            tokens = hidden[:, first : first + length]
            out, memory, inside = self._segment(tokens, part, memory, inside, cache)
            outputs.append(out)
        cache.layers[0].state["memory"] = memory
        return torch.cat(outputs, 1)

    def _segment(
        self, tokens: Tensor, part: Layout, memory: Tensor, inside: Tensor, cache: TitansCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read the memory in rows that begin the segment, write it in those that end it.

        Args:
            tokens: (B, n, D) slots of one segment.
            part: their layout.
            memory: (B, count, D) as before the segment.
            inside: (B,) columns of the segment that the window has seen, its memory included.
            cache: of the blocks.
        """
        count = self.config.memory_embeddings
        begins = (part.count > 0) & (inside == 0)
        ends = (part.count > 0) & (part.end % self.config.segment_length == 0)
        every = torch.compiler.is_compiling()  # a graph cannot branch on what a tensor holds
        before, after = (
            memory[:, : count * (every or bool(rows.any()))] for rows in (begins, ends)
        )
        mask = [begins[:, None].expand(before.shape[:2]), part.valid]
        mask.append(ends[:, None].expand(after.shape[:2]))
        within = Layout.build(torch.cat(mask, 1), inside, 1)
        out = self._blocks(within.enter(torch.cat([before, tokens, after], 1)), within, cache)
        out = within.leave(out).to(tokens.device)
        inside = torch.where(ends, 0, inside + within.count)
        written = choose(ends, out[:, -count:], memory) if after.shape[1] else memory
        first = before.shape[1]
        return out[:, first : first + tokens.shape[1]], written, inside


class BaselineForCausalLM(CausalLMGenerationMixin, BaselinePreTrainedModel):
    """A baseline with a language-modelling head."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.model = BaselineModel(config)
        self.repeats_blocks = bool(config.memory_embeddings)  # several times in a call
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _check_positions(
    given: Tensor | None, columns: int, layout: Layout | None, cache: TitansCache | None
) -> None:
    """Refuse positions other than the columns' own, or the tokens' own among those of their row."""
    if given is None:
        return
    given = given.reshape(-1, given.shape[-1])
    fits = given.shape[-1] == columns
    seen = 0 if cache is None else cache.get_seq_length()
    if fits and bool((given == torch.arange(seen, seen + columns, device=given.device)).all()):
        return
    wrong = True
    if fits and layout is not None:
        own = layout.position[:, None] + layout.padding.long().cumsum(1) - 1
        wrong = bool(((given != own) & layout.padding).any())
    if wrong:
        raise TypeError(
            "the baseline takes no position_ids but 0, 1, 2, ... of a row or of its tokens that "
            "are no pads: leave them out, and give every document a row of its own"
        )


__all__ = ["BaselineConfig", "BaselineForCausalLM", "BaselineModel", "BaselinePreTrainedModel"]
