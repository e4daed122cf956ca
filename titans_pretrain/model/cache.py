"""What decoding keeps per layer: states, convolution tails, a window or segment of keys.

Nothing in it grows with the tokens seen, but for the Transformer++ baseline's keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .layout import Layout


class TitansCacheLayer(CacheLayerMixin):
    """One layer's state, a flat dict of tensors with the batch first."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.state: dict[str, Tensor] = {}
        self.seen = 0

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to allocate: the first call brings the tensors."""

    def update(self, *_: Any, **__: Any) -> Any:
        """Refuse keys and values: a memory is not a list of them."""
        raise NotImplementedError("a Titans layer keeps its state in .state")

    def get_seq_length(self, *_: Any) -> int:
        """Columns seen, pads included."""
        return self.seen

    def get_max_length(self) -> int:
        """No bound on the tokens seen."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No bound on the tokens seen (older name)."""
        return -1

    def get_mask_sizes(self, query_length: Any, *_: Any) -> tuple[int, int]:
        """Length and offset of a mask over all columns."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + new, 0

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows by index, for beam search."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._map(lambda tensor: tensor[indices])

    def crop(self, *_: Any) -> None:
        """Refuse: what a memory has learned cannot be taken back."""
        raise NotImplementedError("a memory cannot be rolled back; keep a copy of the cache")

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen = {}, 0

    def offload(self) -> None:
        """Move to host memory."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing: tensors move where they are used."""


class TitansCache(Cache):
    """The state of all layers of a Titans model or a baseline between calls."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(layers=[TitansCacheLayer() for _ in range(config.num_hidden_layers)])

    @property
    def is_initialized(self) -> bool:
        """Whether a call has filled it."""
        return any(layer.state for layer in self.layers)

    def count_anew(self) -> None:
        """Begin masks with the next call; nothing is forgotten."""
        for layer in self.layers:
            layer.seen = 0

    def position(self, batch: int, device: torch.device) -> Tensor:
        """(B,) tokens each row has consumed."""
        position = self.layers[0].state.get("position")
        if position is None:
            return torch.zeros(batch, dtype=torch.long, device=device)
        if position.shape[0] != batch:
            raise ValueError(f"the cache holds {position.shape[0]} rows, the call brings {batch}")
        return position.to(device)

    def advance(self, layout: Layout, columns: int) -> None:
        """Count a call's columns and the tokens of each row among them."""
        for layer in self.layers:
            layer.state["position"] = layout.position + layout.count
            layer.seen += columns


def cache_of_call(model: Any, given: Any, use_cache: bool | None) -> TitansCache | None:
    """What a call continues, or begins to fill; None where nothing is kept.

    Args:
        model: has ``config``, ``training`` and ``gradient_checkpointing``.
        given: ``past_key_values``.
        use_cache: whether a cache is wanted; None as ``config.use_cache`` says; never in
            training.
    """
    if use_cache is None:
        use_cache = model.config.use_cache
    if given is not None and not isinstance(given, TitansCache):
        raise TypeError(f"past_key_values is a {type(given).__name__}, expected a TitansCache")
    if given is not None and model.training and model.gradient_checkpointing:
        raise ValueError("gradient checkpointing cannot continue a cache; call eval() first")
    if given is not None:
        return given
    return TitansCache(model.config) if use_cache and not model.training else None


def layout_of_call(
    hidden: Tensor, mask: Tensor | None, cache: TitansCache | None, grid: int
) -> Layout | None:
    """Where the tokens lie; None when every row begins here and has no pads, as in training.

    Args:
        hidden: (B, T, D).
        mask: ``attention_mask``, (B, T) or (B, seen + T), 0 for pads on any side.
        cache: what the call continues.
        grid: tokens after which a row's chunk begins anew.
    """
    batch, columns = hidden.shape[:2]
    seen = 0 if cache is None else cache.get_seq_length()
    if mask is not None:
        lengths = (columns, seen + columns)
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in lengths:
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
    if cache is None:
        position = torch.zeros(batch, dtype=torch.long, device=hidden.device)
    else:
        position = cache.position(batch, hidden.device)
    return Layout.build(mask, position, grid)
