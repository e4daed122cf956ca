"""Configuration of the baselines that no library keeps, as Hugging Face knows it."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

KINDS = (
    "retnet",
    "gla",
    "deltanet",
    "gated_deltanet",
    "ttt_linear",
    "ttt_mlp",
    "window",
    "mamba",
    "mamba2",
)
TTT_KINDS = ("ttt_linear", "ttt_mlp")
MAMBA2_HEAD = 64
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "intermediate_size",
    "window_size",
    "conv_width",
    "chunk_size",
    "mini_batch_size",
    "state_size",
    "expand",
    "segment_length",
)
_ABOVE_ZERO = ("rope_theta", "inner_learning_rate", "rms_norm_eps", "initializer_range")


class BaselineConfig(PretrainedConfig):
    """A stack of blocks, each a mixer and a feed-forward layer, both pre-norm and residual.

    Args:
        mixers: kinds of the blocks' mixers, out of ``KINDS``, repeated from the first block on.
        vocab_size: pieces of the tokenizer.
        hidden_size: width of the residual, D.
        num_hidden_layers: blocks.
        num_heads: heads of every mixer but Mamba's.
        intermediate_size: width of the SwiGLU layer.
        window_size: tokens that a window reaches, the token itself included.
        rope_theta: base of the rotary frequencies.
        conv_width: taps of the causal convolutions.
        chunk_size: tokens a linear recurrence takes at once; changes rounding only.
        mini_batch_size: tokens whose gradients TTT takes at the same weights.
        inner_learning_rate: of TTT at a gate of one.
        state_size: of Mamba (N).
        expand: inner width of Mamba and Mamba2 over D.
        memory_embeddings: of RMT, read at the start and written at the end of each segment; 0 for
            none.
        segment_length: tokens between two writes of RMT's memory.
        rms_norm_eps: RMSNorm's epsilon.
        initializer_range: standard deviation of projections and embeddings at the start.
        use_cache: whether calls return a cache to continue, whose size does not grow.

    Raises:
        ValueError: a value the model cannot have.
    """

    model_type = "titans_baseline"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        mixers: Sequence[str] = ("gated_deltanet",),
        vocab_size: int = 32000,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_heads: int = 6,
        intermediate_size: int = 2048,
        window_size: int = 2048,
        rope_theta: float = 10000.0,
        conv_width: int = 4,
        chunk_size: int = 64,
        mini_batch_size: int = 16,
        inner_learning_rate: float = 1.0,
        state_size: int = 16,
        expand: int = 2,
        memory_embeddings: int = 0,
        segment_length: int = 512,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.mixers = list(mixers or ())
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.intermediate_size = intermediate_size
        self.window_size = window_size
        self.rope_theta = rope_theta
        self.conv_width = conv_width
        self.chunk_size = chunk_size
        self.mini_batch_size = mini_batch_size
        self.inner_learning_rate = inner_learning_rate
        self.state_size = state_size
        self.expand = expand
        self.memory_embeddings = memory_embeddings
        self.segment_length = segment_length
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._check()
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def grid(self) -> int:
        """Tokens after which a row's mini-batch or segment begins anew."""
        if self.memory_embeddings:
            return self.segment_length
        return self.mini_batch_size if set(self.mixers) & set(TTT_KINDS) else 1

    @property
    def mamba2_head_width(self) -> int:
        """Of Mamba2, whose heads are as many as fill its inner width."""
        return min(MAMBA2_HEAD, self.hidden_size * self.expand // self.num_heads)

    def kinds(self) -> list[str]:
        """The mixer of every block."""
        return [self.mixers[i % len(self.mixers)] for i in range(self.num_hidden_layers)]

    def _check(self) -> None:
        unknown = [kind for kind in self.mixers if kind not in KINDS]
        if unknown or not self.mixers:
            raise ValueError(
                f"mixers {unknown or self.mixers}: use names out of {', '.join(KINDS)}"
            )
        self._check_numbers()
        if self.hidden_size % (8 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of 8 * num_heads {self.num_heads}"
            )
        inside = self.hidden_size * self.expand
        if "mamba2" in self.mixers and inside % self.mamba2_head_width:
            raise ValueError(
                f"hidden_size {self.hidden_size} * expand {self.expand} is no multiple of mamba2's "
                f"head width {self.mamba2_head_width}"
            )
        if self.memory_embeddings and set(self.mixers) != {"window"}:
            raise ValueError(f"memory_embeddings need mixers ['window'], not {self.mixers}")
        needed = self.segment_length + 2 * self.memory_embeddings
        if self.memory_embeddings and self.window_size < needed:
            raise ValueError(
                f"window_size {self.window_size} does not reach over a segment and its memory: "
                f"{needed} is the smallest (segment_length + 2 * memory_embeddings)"
            )

    def _check_numbers(self) -> None:
        for name, least in (dict.fromkeys(_COUNTS, 1) | {"memory_embeddings": 0}).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} {value} is no whole number")
            if value < least:
                raise ValueError(f"{name} {value} is less than {least}")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} {value} is no finite number above 0")


__all__ = ["BaselineConfig"]
