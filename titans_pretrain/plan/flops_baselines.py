"""FLOPs of a forward pass of this package's own baselines, see ``plan/flops.py``.

Recurrences and inner models count as ``memory``. The mixers of Mamba are transformers' code, with
kernels of their own: a model that has one is not counted.

D hidden_size, T tokens of a sequence.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from titans_pretrain.plan.attention_pairs import window_pairs

UNCOUNTED = ("mamba", "mamba2")


def blocks(model: Mapping[str, Any], length: int, *, performed: bool) -> Counter[str]:
    """All blocks' FLOPs for one sequence by part.

    Args:
        model: the keys of ``titans_baseline``.
        length: T.
        performed: count masked products and padding too.
    """
    found, kinds = Counter[str](), mixers(model)
    for span, count in _spans(model, length).items():
        for kind in kinds:
            for part, flops in _block(model, kind, span, performed=performed).items():
                found[part] += count * flops
    return found


def mixers(model: Mapping[str, Any]) -> list[str]:
    """The mixer of every block."""
    return [*itertools.islice(itertools.cycle(model["mixers"]), model["num_hidden_layers"])]


def _spans(model: Mapping[str, Any], length: int) -> Counter[int]:
    """How often the blocks run on how many tokens: RMT's memory is before and after a segment."""
    memory = model["memory_embeddings"]
    if not memory:
        return Counter({length: 1})
    whole, rest = divmod(length, model["segment_length"])
    found = Counter({model["segment_length"] + 2 * memory: whole})
    if rest:
        found[rest + 2 * memory] += 1
    return found


def _block(model: Mapping[str, Any], kind: str, tokens: int, *, performed: bool) -> Counter[str]:
    width = model["hidden_size"]
    found = Counter({"feed_forward": 2 * 3 * tokens * width * model["intermediate_size"]})
    if kind == "window":
        pairs = window_pairs(tokens, model["window_size"], performed=performed)
        return found + Counter(
            {"projections": 2 * 4 * tokens * width**2, "attention": 4 * width * pairs}
        )
    if kind.startswith("ttt"):
        return found + _ttt(model, kind, tokens)
    return found + _linear(model, kind, tokens, performed=performed)


def _linear(model: Mapping[str, Any], kind: str, tokens: int, *, performed: bool) -> Counter[str]:
    """A linear recurrence by chunks between projections."""
    from titans_pretrain.model.linear_mixers import GLA_CHUNK, GLA_RANK, PARTS

    parts, width, heads = PARTS[kind], model["hidden_size"], model["num_heads"]
    key, value = int(width * parts.key), int(width * parts.value)
    columns = 2 * key + (2 + parts.gate) * value + parts.delta * heads
    of_decay = {"head": width * heads, "channel": (width + key) * GLA_RANK}.get(parts.decay, 0)
    found = Counter({"projections": 2 * tokens * (width * columns + of_decay)})
    if parts.delta:
        found["convolutions"] = 2 * tokens * (2 * key + value) * model["conv_width"]
    chunk = min(GLA_CHUNK if kind == "gla" else model["chunk_size"], tokens)
    sizes = Counter({chunk: tokens // chunk})
    sizes[chunk if performed else tokens % chunk] += bool(tokens % chunk)
    found["memory"] = sum(
        count * _chunk(size, key, value, heads, delta=parts.delta, performed=performed)
        for size, count in sizes.items()
    )
    return found


def _chunk(size: int, key: int, value: int, heads: int, *, delta: bool, performed: bool) -> int:
    """One chunk's products, of all heads: what is read and written of the state, and inside.

    The delta rule reads the keys too, and solves a triangle of scores among them.
    """
    state = (2 + delta) * size * key * value // heads
    seen = size**2 if performed else size * (size + 1) // 2
    before = size * (size - 1) // 2
    inside = seen * (key + value)
    if delta:
        inside += (size**2 if performed else before) * key + before * value
    return 2 * (state + inside)


def _ttt(model: Mapping[str, Any], kind: str, tokens: int) -> Counter[str]:
    """TTT: the inner model learns and is read by mini-batches, in its dual form."""
    from titans_pretrain.model.ttt import EXPANSION

    width, heads, batch = model["hidden_size"], model["num_heads"], model["mini_batch_size"]
    head = width // heads
    widths = [head, head] if kind == "ttt_linear" else [head, EXPANSION * head, head]
    layers = [*itertools.pairwise(widths)]
    products = sum(into * out for into, out in layers)
    back = sum(into * out for into, out in layers[1:])
    whole, rest = divmod(tokens, batch)
    squares = whole * batch**2 + rest**2
    learned = tokens * (3 * products + back) + squares * sum(into + out for into, out in layers)
    return Counter(
        {
            "projections": 2 * tokens * width * (4 * width + heads),
            "convolutions": 2 * tokens * 3 * width * model["conv_width"],
            "memory": 2 * heads * learned,
        }
    )
