"""Mixers of one row of several documents, as loops that follow the definitions line by line."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.model.memory import MemoryState
from titans_pretrain.model.memory_reference import memory_scan as reference_scan

Gates = tuple[Tensor, Tensor, Tensor]


class Row:
    """One row: where each token's document begins, and what may be looked across."""

    def __init__(self, starts: list[int], config: Any) -> None:
        self.starts = starts
        self.attends = config.attend_across_documents
        self.remembers = config.remember_across_documents
        self.apart = config.separates_documents

    def opens_chunk(self, t: int, chunk: int) -> bool:
        return t % chunk == 0 or (not self.remembers and self.starts[t] == t)

    def chunk_of(self, t: int, chunk: int) -> int:
        """First token of a token's chunk."""
        while not self.opens_chunk(t, chunk):
            t -= 1
        return t

    def visible(self, t: int, first: int) -> list[int]:
        """Tokens from ``first`` on that token t attends to."""
        return list(range(first if self.attends else max(first, self.starts[t]), t + 1))


def convolved(memory: Any, name: str, x: Tensor, row: Row) -> Tensor:
    """Projection, convolution and SiLU of (1, T, D) in heads (1, H, T, d)."""
    projected = getattr(memory, f"{name}_proj")(x)
    convolution = getattr(memory, f"{name}_conv")
    if convolution is not None:
        past = convolution.width - 1
        outputs = []
        for t in range(x.shape[1]):
            total = torch.zeros_like(projected[:, 0])
            for tap in range(convolution.width):
                source = t - past + tap
                if source >= (row.starts[t] if row.apart else 0):
                    total = total + projected[:, source] * convolution.weight[:, tap]
            outputs.append(total)
        projected = torch.stack(outputs, 1)
    return F.silu(projected).unflatten(-1, (-1, memory.head_width)).transpose(1, 2)


def gates(memory: Any, x: Tensor, row: Row) -> Gates:
    """Alpha, eta and theta (1, H, T)."""
    columns = list(range(x.shape[1]))
    if memory.gate_per_chunk:
        columns = [row.chunk_of(t, memory.chunk_size) for t in columns]
    source = x[:, columns]
    zero = torch.zeros(1, memory.initial.layer_0.shape[0], x.shape[1], dtype=x.dtype)

    def sigmoid(gate: Any) -> Tensor:
        return zero if gate is None else torch.sigmoid(gate(source)).mT

    eta = sigmoid(memory.momentum_gate)
    theta = memory.max_step * (1 - eta) * sigmoid(memory.step_gate)
    return sigmoid(memory.forget_gate), eta, theta


def remembered(
    memory: Any, x: Tensor, row: Row, start: MemoryState, first: int, state: MemoryState
) -> tuple[Tensor, MemoryState]:
    """What the memory returns for tokens [first, ...) of (1, T, D), and its state afterwards."""
    q, k, v = (convolved(memory, name, x, row) for name in "qkv")
    inputs = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, *gates(memory, x, row))
    reads, time = [], x.shape[1]
    while first < time:
        if not row.remembers and row.starts[first] == first:
            state = start
        last = first + 1
        while last < time and not row.opens_chunk(last, memory.chunk_size):
            last += 1
        chunk = (tensor[:, :, first:last] for tensor in inputs)
        read, state = reference_scan(*chunk, state, chunk_size=time, **memory.rule._asdict())
        reads.append(read)
        first = last
    return torch.cat(reads, 2), state


def attended(
    queries: Tensor, keys: list[Tensor], values: list[Tensor], prefix: Any = None
) -> Tensor:
    """Softmax attention of one query (1, H, h) over keys and values (1, H, h), and the prefix."""
    if prefix is not None:
        keys, values = ([*x.unbind(2), *own] for x, own in zip(prefix, (keys, values), strict=True))
    k, v = torch.stack(keys, 2), torch.stack(values, 2)
    scores = (k @ queries[..., None])[..., 0] / math.sqrt(queries.shape[-1])
    return (scores.softmax(-1)[..., None] * v).sum(2)


def window(attention: Any, x: Tensor, row: Row, prefix: Any) -> Tensor:
    """Heads (1, H, T, h) of a sliding window, or of full attention."""
    positions = torch.arange(x.shape[1])
    queries = attention.project.queries(x, positions)
    keys, values = attention.project.keys_values(x, positions)
    outputs = []
    for t in range(x.shape[1]):
        first = 0 if attention.window is None else max(0, t - attention.window + 1)
        seen = row.visible(t, first)
        own = ([x[:, :, j] for j in seen] for x in (keys, values))
        outputs.append(attended(queries[:, :, t], *own, prefix))
    return torch.stack(outputs, 2)


def joined(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def oracle(mixer: Any, variant: str, x: Tensor, row: Row) -> Tensor:
    """What a mixer makes of (1, T, D)."""
    if variant == "transformer":
        return mixer.o_proj(joined(window(mixer.attention, x, row, None)))
    persistent = None if mixer.persistent is None else mixer.persistent()
    if variant == "mac":
        return mixer.o_proj(context(mixer, x, row, persistent))
    memory = mixer.memory
    start = memory.start(x, persistent)
    reads = memory.finish(remembered(memory, x, row, start, 0, start)[0])
    if variant == "lmm":
        return mixer.o_proj(reads * F.silu(mixer.gate_proj(x)))
    if variant == "mal":
        gated = reads * F.silu(mixer.gate_proj(x))
        return mixer.o_proj(joined(window(mixer.attention, gated, row, None)))
    prefix = None if persistent is None else mixer.attention.project.prefix(persistent)
    heads = mixer.attention_norm(window(mixer.attention, x, row, prefix))
    return mixer.o_proj(joined(heads) * F.silu(reads))


def context(mixer: Any, x: Tensor, row: Row, persistent: Tensor | None) -> Tensor:
    """MAC before its output projection."""
    memory, project, length = mixer.memory, mixer.attention.project, mixer.segment
    prefix = None if persistent is None else project.prefix(persistent)
    state = start = memory.start(x)
    asked = F.normalize(convolved(memory, "q", x, row), dim=-1)
    attends = x[:, :0]
    outputs = []
    for first in range(0, x.shape[1], length):
        tokens = range(first, min(first + length, x.shape[1]))
        recalled = []
        for t in tokens:
            anew = not row.remembers and row.starts[t] >= first
            weights = (start if anew else state).weights
            recalled.append(memory.retrieve(asked[:, :, t : t + 1], weights))
        cells = torch.arange(len(tokens))
        reads = project.keys_values(torch.cat(recalled, 1), cells)
        part = x[:, first : tokens[-1] + 1]
        own, queries = project.keys_values(part, cells), project.queries(part, cells)
        heads = []
        for t in tokens:
            seen = [j - first for j in row.visible(t, first)]
            keys, values = (
                [x[:, :, j] for x in (read, token) for j in seen]
                for read, token in zip(reads, own, strict=True)
            )
            heads.append(attended(queries[:, :, t - first], keys, values, prefix))
        new = joined(mixer.attention_norm(torch.stack(heads, 2)))
        attends = torch.cat([attends, new], 1)
        returned, state = remembered(memory, attends, row, start, first, state)
        outputs.append(new * F.silu(memory.finish(returned)))
    return torch.cat(outputs, 1)
