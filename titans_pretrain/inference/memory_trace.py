"""Numbers of a model's memory along a text, taken while it reads.

The text goes through the model a chunk at a time; what the layer's memory is given then, and the
weights that the chunk begins with, are all that its surprise depends on (Eq. 12).

Shapes: B batch (one), H memory heads, T tokens, N slots of a call.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.errors import TitansError
from titans_pretrain.inference.prefill import new_cache
from titans_pretrain.model.memory_chunk import Anchors, Rule, Tokens, norm, surprise


@dataclass
class LayerTrace:
    """A layer's memory along a text; lists have one number a token, or one a chunk.

    Norms are Frobenius norms over all layers of the memory's MLP. What heads have each of their own
    is given as the mean over heads, norms of states over all heads at once.

    Attributes:
        surprise: norm of the gradient at each token, before the clip.
        clip: share of that norm which the clip leaves.
        forget, momentum, step: the gates alpha, eta and theta.
        written: norm of what the token adds to the momentum: theta times the clipped surprise.
        remembered: norm of what is left of it in the weights at the end of the text.
        chunk_ends: tokens read at the end of each chunk.
        change: norm of the difference between the weights then and before the first token.
        momentum_norm: norm of the momentum then.
        start: norm of the weights before the first token.
    """

    surprise: list[float] = field(default_factory=list)
    clip: list[float] = field(default_factory=list)
    forget: list[float] = field(default_factory=list)
    momentum: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    remembered: list[float] = field(default_factory=list)
    chunk_ends: list[int] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    momentum_norm: list[float] = field(default_factory=list)
    start: float = 0.0


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        tokens: the text of every token.
        layers: number of a layer to its trace.
        most: positions of the tokens that moved the memory most, the first the most.
        moved: per token, the mean over layers of how far it moved the memory.
    """

    tokens: list[str]
    layers: dict[int, LayerTrace]
    most: list[int]
    moved: list[float]


def trace(model: Any, ids: Sequence[int], layers: Sequence[int]) -> dict[int, LayerTrace]:
    """Read a text and take the numbers of some layers.

    Args:
        model: a Titans model with memory, on its device.
        ids: the text.
        layers: their numbers.

    Raises:
        TitansError: a number is not finite.
    """
    probes = {number: _Probe(model.model.layers[number].mixer.memory) for number in layers}
    cache = new_cache(model)
    chunk = model.config.chunk_size
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        for probe in probes.values():
            stack.enter_context(probe.attached())
        for first in range(0, len(ids), chunk):
            piece = torch.tensor([ids[first : first + chunk]], device=model.device)
            model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for number, probe in probes.items():
                probe.take(cache.layers[number].state)
        traces = {number: probe.finish() for number, probe in probes.items()}
    for number, one in traces.items():
        if not bool(torch.tensor([*one.written, *one.change, *one.momentum_norm]).isfinite().all()):
            raise TitansError(
                f"the memory of layer {number} is not finite",
                where="the model's memory",
                fix="use another checkpoint; with bfloat16 weights, export float32 ones",
            )
    return traces


class _Probe:
    """Listens to one layer's memory, chunk by chunk."""

    def __init__(self, memory: Any) -> None:
        self._memory, self._rule = memory, memory.rule
        self._start: tuple[Tensor, ...] = ()
        self._anchor: tuple[Tensor, ...] = ()
        self._tokens: Tokens | None = None
        self._gates: list[Tensor] = []
        self._trace = LayerTrace()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Keep what the memory starts with and what it is given."""
        project, start = self._memory.project, self._memory.start

        def kept_project(x: Tensor, layout: Any, *rest: Any) -> Any:
            projected = project(x, layout, *rest)
            if layout is not None:  # persistent tokens come without
                valid = layout.valid[0]
                columns = (tensor[:, :, valid] for tensor in projected.tokens)
                self._tokens = Tokens(*(c.to(self._dtype) for c in columns))
            return projected

        def kept_start(*given: Any) -> Any:
            state = start(*given)
            self._start = self._anchor = state.weights
            return state

        self._memory.project, self._memory.start = kept_project, kept_start
        try:
            yield
        finally:
            del self._memory.project, self._memory.start

    @property
    def _dtype(self) -> torch.dtype:
        return self._start[0].dtype

    def take(self, state: dict[str, Tensor]) -> None:
        """The numbers of the chunk that has just been read into a cache's state."""
        assert self._tokens is not None
        tokens, one = self._tokens, self._trace
        raw, clipped = _norms(tokens, self._anchor, self._rule)
        written = tokens.step * clipped
        one.surprise += _over_heads(raw)
        one.clip += _over_heads(torch.where(raw > 0, clipped / raw, 1))
        one.written += _over_heads(written)
        one.forget += _over_heads(tokens.forget)
        one.momentum += _over_heads(tokens.momentum)
        one.step += _over_heads(tokens.step)
        self._gates.append(torch.stack([tokens.forget[0], tokens.momentum[0], written[0]]))
        self._anchor = _named(state, "weights", len(self._start))
        one.chunk_ends.append(len(one.surprise))
        change = [after - before for after, before in zip(self._anchor, self._start, strict=True)]
        one.change.append(_norm_of(change))
        one.momentum_norm.append(_norm_of(_named(state, "momentum", len(self._start))))

    def finish(self) -> LayerTrace:
        """The trace, once the text has ended."""
        forget, momentum, written = torch.cat(self._gates, -1)
        self._trace.start = _norm_of(self._start)
        self._trace.remembered = _over_heads((_left(forget, momentum) * written)[None])
        return self._trace


def _norms(tokens: Tokens, anchor: tuple[Tensor, ...], rule: Rule) -> tuple[Tensor, Tensor]:
    """(1, H, T) norm of each token's gradient over the memory's layers, bare and clipped."""
    bare = rule._replace(surprise_clip=None)
    found = surprise(tokens.keys, tokens.values, Anchors(anchor, None), bare)
    layers = [(norm(error) * norm(x))[..., 0] for x, error in zip(*found, strict=True)]
    norms = torch.stack(layers)
    clip = rule.surprise_clip
    clipped = norms if clip is None else norms * (clip / (norms + clip))
    return norms.norm(dim=0), clipped.norm(dim=0)


def _left(forget: Tensor, momentum: Tensor) -> Tensor:
    """How much of each token's write (H, T) the weights hold after the last token (Eq. 13-14)."""
    weight = torch.ones_like(forget[:, 0])
    share = weight
    left = [share]
    for t in range(forget.shape[1] - 1, 0, -1):
        weight = weight * (1 - forget[:, t])
        share = weight + momentum[:, t] * share
        left.append(share)
    return torch.stack(left[::-1], 1)


def _named(state: dict[str, Tensor], group: str, depth: int) -> tuple[Tensor, ...]:
    """The memory's tensors in a cache, whatever mixer they are part of."""
    endings = [f"memory.{group}.{layer}" for layer in range(depth)]
    return tuple(next(t for name, t in state.items() if name.endswith(end)) for end in endings)


def _norm_of(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5)


def _over_heads(tensor: Tensor) -> list[float]:
    """(1, H, T) to its mean over heads."""
    return [float(value) for value in tensor[0].mean(0)]
