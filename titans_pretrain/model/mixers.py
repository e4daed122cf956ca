"""How a block mixes tokens: the four ways of Section 4 to use the memory, and plain attention.

Every mixer maps (B, T, D) to (B, T, D) and carries its state in a flat dict of tensors with the
batch first; without a layout (training) it neither takes nor gives one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionProjections, SegmentAttention, WindowAttention
from .configuration_titans import TitansConfig
from .documents import Bounds, Documents
from .layers import RMSNorm, merge_heads
from .layout import Layout, choose
from .memory_chunk import MemoryState, Resets
from .memory_open import scan_open
from .neural_memory import NeuralMemory, persistent_tokens

Cached = dict[str, Tensor]


def _scoped(cached: Cached, scope: str) -> Cached:
    """The entries of one part of a mixer, without the part's name."""
    return {
        name.removeprefix(f"{scope}/"): tensor
        for name, tensor in cached.items()
        if name.startswith(f"{scope}/")
    }


def _scope(cached: Cached, scope: str) -> Cached:
    return {f"{scope}/{name}": tensor for name, tensor in cached.items()}


class MemoryMixer(nn.Module):
    """LMM: the memory is the only sequence mixer, its read gated by the input."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.persistent = persistent_tokens(config)
        self.memory = NeuralMemory(config)
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        cached: Cached | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Cached]:
        """Mix (B, T, D)."""
        persistent = None if self.persistent is None else self.persistent()
        gate = F.silu(self.gate_proj(x))
        reads, after = self.memory(x, persistent, layout, cached or {}, documents)
        return self.o_proj(reads * gate), after


class MemoryAsGate(nn.Module):
    """MAG: window attention gated by the memory's read of the same tokens (Eq. 26-28)."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.persistent = persistent_tokens(config)
        self.attention = WindowAttention(config, config.window_size)
        self.attention_norm = RMSNorm(width // config.num_attention_heads, config.rms_norm_eps)
        self.memory = NeuralMemory(config)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        cached: Cached | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Cached]:
        """Mix (B, T, D)."""
        cached = cached or {}
        persistent = None if self.persistent is None else self.persistent()
        window = _scoped(cached, "attention")
        heads, kv = self.attention(x, persistent, layout, window, documents)
        known = _scoped(cached, "memory")
        reads, state = self.memory(x, persistent, layout, known, documents)
        mixed = merge_heads(self.attention_norm(heads)) * F.silu(reads)
        return self.o_proj(mixed), _scope(kv, "attention") | _scope(state, "memory")


class MemoryAsLayer(nn.Module):
    """MAL: window attention over the memory's gated reads (Eq. 29-31)."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.persistent = persistent_tokens(config)
        self.memory = NeuralMemory(config)
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.gather_heads = nn.Identity()
        self.attention = WindowAttention(config, config.window_size)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        cached: Cached | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Cached]:
        """Mix (B, T, D)."""
        cached = cached or {}
        persistent = None if self.persistent is None else self.persistent()
        gate = F.silu(self.gate_proj(x))
        known = _scoped(cached, "memory")
        reads, state = self.memory(x, persistent, layout, known, documents)
        gated = self.gather_heads(reads * gate)
        window = _scoped(cached, "attention")
        heads, kv = self.attention(gated, None, layout, window, documents)
        after = _scope(kv, "attention") | _scope(state, "memory")
        return self.o_proj(merge_heads(heads)), after


class AttentionMixer(nn.Module):
    """Transformer++: causal attention, over all tokens or the last ``attention_window``."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.attention = WindowAttention(config, config.attention_window)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        cached: Cached | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Cached]:
        """Mix (B, T, D)."""
        heads, after = self.attention(x, None, layout, cached, documents)
        return self.o_proj(merge_heads(heads)), after


class MemoryAsContext(nn.Module):
    """MAC: attention inside segments over what the memory recalls, which it then learns.

    Per segment: read the memory as it was before (Eq. 21), attend over persistent, recalled and
    own tokens (Eq. 22-23), write the result into the memory (Eq. 24), and gate the result by what
    the memory, token by token, then returns for it (Eq. 25).
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.segment = config.segment_length
        self.attends_across = config.attend_across_documents
        self.persistent = persistent_tokens(config)
        self.attention = SegmentAttention(config)
        self.attention_norm = RMSNorm(width // config.num_attention_heads, config.rms_norm_eps)
        self.memory = NeuralMemory(config)
        self.gather_heads = nn.Identity()
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        cached: Cached | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Cached]:
        """Mix (B, T, D)."""
        prefix = None
        if self.persistent is not None:
            prefix = self.attention.project.prefix(self.persistent())
        if layout is None:
            bounds = self.memory.bounds(documents, x)
            return self.o_proj(self._train(x, prefix, bounds)), {}
        mixed, after = self._continue(x, prefix, layout, cached or {})
        return self.o_proj(mixed), after

    def _train(
        self, x: Tensor, prefix: tuple[Tensor, Tensor] | None, bounds: Bounds | None
    ) -> Tensor:
        """Whole sequences, or spans of whole segments."""
        project, memory = self.attention.project, self.memory
        cells = torch.arange(x.shape[1], device=x.device) % self.segment
        asked, _ = memory.queries(x, None, None, bounds)
        queries = project.queries(x, cells)
        keys, values = project.keys_values(x, cells)
        resets = memory.resets(x, None, bounds)
        state, carried = memory.enter(x, histories=True, resets=resets)
        outputs = []
        for first in range(0, x.shape[1], self.segment):
            part = slice(first, min(first + self.segment, x.shape[1]))
            within = None if bounds is None else bounds.part(part)
            begun = None if resets is None else resets.at(part.start, part.stop)
            recalled = self.gather_heads(self._recall(asked[:, :, part], state, within, begun))
            reads = project.keys_values(recalled, cells[part])
            own = keys[:, :, part], values[:, :, part]
            reach = None if within is None or self.attends_across else within.reach
            heads = self.attention.attend(
                queries[:, :, part], reads, own, prefix, cells[part], reach
            )
            attended = merge_heads(self.attention_norm(heads))
            written = memory.project(self.gather_heads(attended), None, carried, within)
            carried = written.carried
            returned, state = memory.scan(written.tokens, state, begun)
            outputs.append(attended * F.silu(memory.finish(returned)))
        return memory.leave(torch.cat(outputs, 1), state, carried)

    def _recall(
        self, asked: Tensor, state: MemoryState, bounds: Bounds | None, resets: Resets | None
    ) -> Tensor:
        """What the memory knew before the segment; before its document, where one begins inside."""
        recalled = self.memory.retrieve(asked, state.weights)
        begun = None if bounds is None or resets is None else bounds.begun()
        if begun is None or resets is None:
            return recalled
        return torch.where(
            begun[..., None], self.memory.retrieve(asked, resets.state.weights), recalled
        )

    def _continue(
        self,
        x: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        layout: Layout,
        cached: Cached,
    ) -> tuple[Tensor, Cached]:
        """Rows that stand anywhere in a segment."""
        memory = self.memory
        asked, asked_history = memory.queries(x, cached.get("asked_history"), layout)
        opened = memory.open(x, None, _scoped(cached, "memory"))
        carried = _scoped(cached, "memory")
        segment = _Segment.begin(opened.state, cached, self.attention.project, x, self.segment)
        kept, outputs = segment, []
        for index, first in enumerate(range(0, x.shape[1], self.segment)):
            part = layout.part(first, self.segment)
            slots = slice(first, first + part.valid.shape[1])
            if index:
                segment = _Segment.begin(opened.state, {}, self.attention.project, x, self.segment)
            heads, segment = self._attend(x[:, slots], asked[:, :, slots], prefix, part, segment)
            attended = merge_heads(self.attention_norm(heads))
            written = memory.project(self.gather_heads(attended), part, carried)
            carried = carried | written.carried
            returned, opened = scan_open(
                written.tokens, opened, part, memory.chunk_size, memory.rule
            )
            outputs.append(attended * F.silu(memory.finish(returned)))
            kept = segment.where(part.count > 0, kept)
        fresh = _Segment.begin(opened.state, {}, self.attention.project, x, self.segment)
        kept = fresh.where((layout.end % self.segment == 0) & (layout.count > 0), kept)
        after = kept.pack() | _scope(carried | opened.pack("memory"), "memory")
        if asked_history is not None:
            after["asked_history"] = asked_history
        return torch.cat(outputs, 1), after

    def _attend(
        self,
        x: Tensor,
        asked: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        part: Layout,
        segment: "_Segment",
    ) -> tuple[Tensor, "_Segment"]:
        project, cells = self.attention.project, part.cells
        recalled = self.gather_heads(self.memory.retrieve(asked, segment.weights))
        segment = segment.take(
            (*project.keys_values(recalled, cells), *project.keys_values(x, cells)), part
        )
        own = (segment.buffers[2], segment.buffers[3])
        reads = (segment.buffers[0], segment.buffers[1])
        return self.attention.attend(project.queries(x, cells), reads, own, prefix, cells), segment


class _Segment:
    """A row's open segment: the memory it reads, and keys and values of its tokens so far.

    Attributes:
        weights: the memory's weights before the segment, (B, H, out, in) each.
        buffers: keys and values of the reads, then of the tokens, (B, H, segment, h) each.
    """

    NAMES = ("read_keys", "read_values", "token_keys", "token_values")

    def __init__(self, weights: tuple[Tensor, ...], buffers: tuple[Tensor, ...]) -> None:
        self.weights = weights
        self.buffers = buffers

    @classmethod
    def begin(
        cls,
        state: MemoryState,
        cached: Cached,
        project: AttentionProjections,
        x: Tensor,
        length: int,
    ) -> "_Segment":
        """The segment a cache holds, or an empty one that reads ``state``."""
        if "read_keys" in cached:
            depth = len(state.weights)
            weights = tuple(cached[f"segment.{layer}"] for layer in range(depth))
            return cls(weights, tuple(cached[name] for name in cls.NAMES))
        heads = x.shape[-1] // project.head_width
        empty = x.new_zeros(x.shape[0], heads, length, project.head_width)
        return cls(state.weights, (empty,) * 4)

    def take(self, new: tuple[Tensor, ...], part: Layout) -> "_Segment":
        """Put the slots' tensors (B, H, n, h) into their cells."""
        length = self.buffers[0].shape[2]
        # slots without a token go to a spare cell that is cut off
        cells = torch.where(part.valid, part.cells, length)[:, None, :, None]
        buffers = tuple(
            F.pad(old.to(tensor.dtype), (0, 0, 0, 1)).scatter(2, cells.expand_as(tensor), tensor)[
                :, :, :length
            ]
            for old, tensor in zip(self.buffers, new, strict=True)
        )
        return _Segment(self.weights, buffers)

    def where(self, row: Tensor, other: "_Segment") -> "_Segment":
        """This segment in rows (B,) that are true, the other elsewhere."""
        pairs = (
            zip(self.weights, other.weights, strict=True),
            zip(self.buffers, other.buffers, strict=True),
        )
        weights, buffers = (tuple(choose(row, a, b) for a, b in pair) for pair in pairs)
        return _Segment(weights, buffers)

    def pack(self) -> Cached:
        """As named tensors, for a cache."""
        weights = {f"segment.{layer}": w for layer, w in enumerate(self.weights)}
        return weights | dict(zip(self.NAMES, self.buffers, strict=True))


MIXERS: dict[str, type[nn.Module]] = {
    "lmm": MemoryMixer,
    "mac": MemoryAsContext,
    "mag": MemoryAsGate,
    "mal": MemoryAsLayer,
    "transformer": AttentionMixer,
}
