"""A layer's long-term memory: projections, gates and initial weights around ``memory_scan``.

Shapes: B batch, H memory heads, T time (or N slots), D width, d head width.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boundary import WHOLE, Boundary, Like, Tensors
from .configuration_titans import TitansConfig
from .documents import Bounds, Documents
from .layers import (
    PersistentTokens,
    RMSNorm,
    ShortConvolution,
    full_precision,
    merge_heads,
    split_heads,
    unit,
)
from .layout import Layout, choose
from .memory import memory_scan
from .memory_chunk import MemoryState, Resets, Rule, Tokens, retrieve, state_dtype, unflatten
from .memory_open import OpenMemory, scan_open

BRANCHES = ("q", "k", "v")
Carried = dict[str, Tensor]
MOMENTUM_BIAS = 2.2


class Gate(nn.Linear):
    """One scalar per head from each token, before its sigmoid; starts at ``initial_bias``."""

    def __init__(self, width: int, heads: int, initial_bias: float) -> None:
        self.initial_bias = initial_bias
        super().__init__(width, heads)


class InitialWeights(nn.Module):
    """The memory MLP's weights before the first token, learned, one MLP per head."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        width = config.hidden_size // config.memory_heads
        hidden = width * config.memory_expansion
        widths = [width] + [hidden] * (config.memory_depth - 1) + [width]
        self.depth = config.memory_depth
        self.widths = list(zip(widths[1:], widths[:-1], strict=True))  # (out, in) by layer
        for layer, width in enumerate(self.widths):
            weights = nn.Parameter(torch.empty(config.memory_heads, *width))
            self.register_parameter(f"layer_{layer}", weights)

    def forward(self) -> tuple[Tensor, ...]:
        """One (1, H, out, in) tensor per layer in state precision."""
        layers = (getattr(self, f"layer_{layer}") for layer in range(self.depth))
        return tuple(full_precision(weights)[None] for weights in layers)


class Projected(NamedTuple):
    """What a stretch of tokens brings to the memory, and what the next stretch needs to know."""

    tokens: Tokens
    carried: Carried


class NeuralMemory(nn.Module):
    """The memory with everything that feeds it (Eq. 11-15, Section 4.4).

    Callers that only write and read use ``forward``; MAC reads before it writes and uses the
    parts. State between calls is a flat dict of tensors with the batch first.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.memory_heads
        self.head_width = width // heads
        self.chunk_size = config.chunk_size
        self.max_step = config.max_step
        self.gate_per_chunk = config.gate_per == "chunk"
        self.rule = Rule(config.memory_activation, config.memory_residual, config.surprise_clip)
        self.depth = config.memory_depth
        self.memory_scan: Any = memory_scan  # training may put kernels here
        self.across_documents = config.remember_across_documents
        self.boundary: Boundary = WHOLE
        for name in BRANCHES:
            self.add_module(f"{name}_proj", nn.Linear(width, width, bias=False))
            conv = ShortConvolution(width, config.conv_width) if config.conv_width else None
            self.add_module(f"{name}_conv", conv)
        forgets = config.use_forgetting
        self.forget_gate = Gate(width, heads, config.forget_bias) if forgets else None
        self.momentum_gate = Gate(width, heads, MOMENTUM_BIAS) if config.use_momentum else None
        # a chunk of like keys then moves the weights by about one step; more, and gradients explode
        self.step_gate = Gate(width, heads, -math.log(config.chunk_size))
        self.initial = InitialWeights(config)
        self.norm = RMSNorm(self.head_width, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        persistent: Tensor | None,
        layout: Layout | None,
        cached: Carried,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Carried]:
        """Write (B, T, D) into the memory and read it back, normalised, as (B, T, D).

        Args:
            x: the layer's input.
            persistent: (1, P, D) tokens written before the first one, or None.
            layout: the slots when decoding or padded.
            cached: the rows' state from earlier calls, or empty.
            documents: of the rows, without a layout; None for one a row.
        """
        if layout is None:
            bounds = self.bounds(documents, x)
            tokens = self.project(x, None, None, bounds).tokens
            resets = self.resets(x, persistent, bounds)
            state, _ = self.enter(x, persistent, resets=resets)
            reads, state = self.scan(tokens, state, resets)
            return self.finish(self.leave(reads, state)), {}
        memory = self.open(x, persistent, cached)
        projected = self.project(x, layout, cached)
        reads, memory = scan_open(projected.tokens, memory, layout, self.chunk_size, self.rule)
        return self.finish(reads), projected.carried | memory.pack("memory")

    def scan(
        self, tokens: Tokens, state: MemoryState, resets: Resets | None = None
    ) -> tuple[Tensor, MemoryState]:
        """``memory_scan`` under this layer's rule."""
        options = self.rule._asdict() | {"chunk_size": self.chunk_size, "resets": resets}
        found: tuple[Tensor, MemoryState] = self.memory_scan(*tokens, state, **options)
        return found

    def bounds(self, documents: Documents | None, x: Tensor) -> Bounds | None:
        """What the tokens (B, T, D) of this layer's span may not look across."""
        return None if documents is None else documents.bounds(self.boundary, x.device)

    def resets(self, x: Tensor, persistent: Tensor | None, bounds: Bounds | None) -> Resets | None:
        """Where the memory starts anew in (B, T, D), and as what; None if it never does."""
        if bounds is None or self.across_documents:
            return None
        return Resets(bounds.begins, self.start(x, persistent))

    def start(self, x: Tensor, persistent: Tensor | None = None) -> MemoryState:
        """The state before the first token of (B, T, D), persistent tokens written."""
        weights = self.initial()
        state = MemoryState(weights, tuple(torch.zeros_like(w) for w in weights))
        if persistent is not None:
            _, state = self.scan(self.project(persistent, None, {}).tokens, state)
        batch, dtype = x.shape[0], state_dtype(x)
        return MemoryState(
            *(
                tuple(t.to(dtype).expand(batch, -1, -1, -1) for t in tensors)
                for tensors in (state.weights, state.momentum)
            )
        )

    def enter(
        self,
        x: Tensor,
        persistent: Tensor | None = None,
        *,
        histories: bool = False,
        resets: Resets | None = None,
    ) -> tuple[MemoryState, Carried]:
        """The state before the span (B, T, D): its start, or what the span before handed on.

        Args:
            x: the layer's input.
            persistent: see ``start``.
            histories: whether the convolutions' last inputs belong to the state.
            resets: where the state at the start is known already.
        """
        carried = self._no_history(x) if histories else {}

        def start() -> Tensors:
            state = self.start(x, persistent) if resets is None else resets.state
            zeros = (x.new_zeros(like.shape) for like in carried.values())
            return *state.weights, *state.momentum, *zeros

        dtype = state_dtype(x)
        weights = [Like((x.shape[0], *w.shape), dtype, x.device) for w in self.initial.parameters()]
        entered = self.boundary.enter(start, (*weights, *weights, *carried.values()))
        size = 2 * self.depth
        return unflatten(entered[:size]), dict(zip(carried, entered[size:], strict=True))

    def leave(self, tied: Tensor, state: MemoryState, carried: Carried | None = None) -> Tensor:
        """Hand the state after the span on; use what is returned in place of ``tied``."""
        histories = (carried or {}).values()
        return self.boundary.leave(tied, (*state.weights, *state.momentum, *histories))

    def _no_history(self, x: Tensor) -> dict[str, Like]:
        """What the convolutions' last inputs look like."""
        likes = {}
        for name in BRANCHES:
            convolution: Any = getattr(self, f"{name}_conv")
            if convolution is not None:
                shape = (x.shape[0], convolution.width - 1, convolution.weight.shape[0])
                likes[f"{name}_history"] = Like(shape, x.dtype, x.device)
        return likes

    def open(self, x: Tensor, persistent: Tensor | None, cached: Carried) -> OpenMemory:
        """The rows' memory as a cache holds it, or at its start if the cache is empty."""
        if cached:
            return OpenMemory.unpack(cached, "memory", self.depth)
        state = self.start(x, persistent)
        return OpenMemory(state.weights, state)

    def finish(self, reads: Tensor) -> Tensor:
        """Normalise every head of (B, H, T, d) and join them to (B, T, D)."""
        return merge_heads(self.norm(reads))

    def queries(
        self,
        x: Tensor,
        history: Tensor | None,
        layout: Layout | None,
        bounds: Bounds | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Unit queries (B, H, T, d), and the convolution's inputs to carry on."""
        cached = None if layout is None else {} if history is None else {"q_history": history}
        branches, carried = self._branches(("q",), x, layout, cached, bounds)
        return unit(branches["q"]), carried.get("q_history")

    def retrieve(self, queries: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Read without writing: (B, H, T, d) to normalised (B, T, D)."""
        return self.finish(retrieve(queries, weights, self.rule))

    def project(
        self,
        x: Tensor,
        layout: Layout | None,
        cached: Carried | None,
        bounds: Bounds | None = None,
    ) -> Projected:
        """Queries, keys, values and gates of (B, T, D), and what later tokens need of these.

        Args:
            x: the tokens to write.
            layout: the slots when decoding or padded.
            cached: what earlier tokens carried; None asks the boundary of the span.
            bounds: what the tokens may not look across, without a layout.
        """
        branches, carried = self._branches(BRANCHES, x, layout, cached, bounds)
        gates = self._gates(x, layout, cached or {}, carried, bounds)
        queries, keys = unit(branches["q"]), unit(branches["k"])
        return Projected(Tokens(queries, keys, branches["v"], *gates), carried)

    def _branches(
        self,
        names: tuple[str, ...],
        x: Tensor,
        layout: Layout | None,
        cached: Carried | None,
        bounds: Bounds | None,
    ) -> tuple[dict[str, Tensor], Carried]:
        """Projection, convolution and SiLU, each (B, H, T, d); and what convolutions carry on."""
        projected: Tensors = tuple(self.get_submodule(f"{name}_proj")(x) for name in names)
        convolutions: list[Any] = [getattr(self, f"{name}_conv") for name in names]
        carried: Carried = {}
        reach = None if bounds is None else bounds.reach
        if convolutions[0] is not None:
            histories: Sequence[Tensor | None]
            if cached is None:
                past = convolutions[0].width - 1
                projected, histories = self.boundary.halo(past, projected, dim=1)
            else:
                histories = [cached.get(f"{name}_history") for name in names]
            mixed = []
            for name, convolution, own, before in zip(
                names, convolutions, projected, histories, strict=True
            ):
                convolved, carried[f"{name}_history"] = convolution(own, before, layout, reach)
                mixed.append(convolved)
            projected = tuple(mixed)
        heads = (split_heads(F.silu(tensor), self.head_width) for tensor in projected)
        return dict(zip(names, heads, strict=True)), carried

    def _gates(
        self,
        x: Tensor,
        layout: Layout | None,
        cached: Carried,
        carried: Carried,
        bounds: Bounds | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Alpha, eta and theta, each (B, H, T), from the token or from its chunk's first one."""
        logits = [self._logit(gate, x) for gate in (self.forget_gate, self.momentum_gate)]
        logits.append(self._logit(self.step_gate, x))
        stacked = torch.stack([x for x in logits if x is not None], 1)
        if self.gate_per_chunk:
            stacked = self._hold(stacked, layout, cached, carried, bounds)
        rest = iter(stacked.unbind(1))
        forget, momentum, step = (None if x is None else torch.sigmoid(next(rest)) for x in logits)
        assert step is not None
        if forget is None:
            forget = torch.zeros_like(step)
        if momentum is None:
            momentum = torch.zeros_like(step)
        return forget, momentum, self.max_step * (1 - momentum) * step

    @staticmethod
    def _logit(gate: Gate | None, x: Tensor) -> Tensor | None:
        return None if gate is None else full_precision(gate(x)).transpose(1, 2)

    def _hold(
        self,
        gates: Tensor,
        layout: Layout | None,
        cached: Carried,
        carried: Carried,
        bounds: Bounds | None,
    ) -> Tensor:
        """Spread the gates (B, G, H, T) of each chunk's first token over the chunk."""
        time, chunk = gates.shape[-1], self.chunk_size
        if bounds is not None and not self.across_documents:
            opening = bounds.own_chunk(chunk)[:, None, None]
            return gates.gather(-1, opening.expand_as(gates))
        slots = torch.arange(time, device=gates.device)
        held = gates[..., slots // chunk * chunk]
        if layout is None:
            return held
        # rows that stand inside a chunk keep the gates its first token had
        running = cached.get("gates", gates[..., 0])
        opened, inside = layout.start // chunk, layout.start % chunk > 0
        in_open = (layout.cells // chunk == opened[:, None]) & inside[:, None]
        held = torch.where(in_open[:, None, None, :], running[..., None], held)
        last = (layout.lead + layout.count - 1).clamp(min=0)
        newest = held.gather(-1, last.view(-1, 1, 1, 1).expand(*held.shape[:3], 1)).squeeze(-1)
        carried["gates"] = choose(layout.count > 0, newest, running)
        return held


def persistent_tokens(config: TitansConfig) -> PersistentTokens | None:
    """The layer's persistent tokens, None when it has none."""
    count = config.num_persistent_tokens
    return PersistentTokens(count, config.hidden_size) if count else None
