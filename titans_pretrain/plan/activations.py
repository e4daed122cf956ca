"""What a block keeps of a forward pass for its backward, and needs there besides. No torch here.

Counted are tensors as autograd and the package's own functions keep them: inputs of products and
norms, a norm's input in float32, the rotations' cosines. One sum for each part of a block; ``d`` is
the width and ``i`` the feed-forward's as a tensor rank has them, ``a`` the bytes of an activation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titans_pretrain.model.fields import WITH_ATTENTION, WITH_MEMORY, rotated_width
from titans_pretrain.plan.parameters import memory_heads, memory_layers

FULL = 4  # bytes of a float32
STRETCH = 256  # tokens, or one chunk, of the scan between two states that are kept
SCAN_BLOCK = 64  # most tokens whose reads and writes the scan does at once
KERNEL_DEPTH, KERNEL_WIDTH = 2, 128  # of a memory and its head, at most, in Triton kernels
BRANCHES = 3  # queries, keys and values


@dataclass(frozen=True)
class Span:
    """The tokens that a rank takes through a block at once, and its share of the block.

    Attributes:
        model: resolved fields of TitansConfig.
        rows: sequences.
        tokens: of each.
        tensor: ranks that share a layer.
        activation: bytes of an activation's number.
        kernels: whether memories that Triton kernels support are scanned by these.
    """

    model: Mapping[str, Any]
    rows: int
    tokens: int
    tensor: int
    activation: int
    kernels: bool = False

    @property
    def all_tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.tokens

    @property
    def whole_width(self) -> int:
        """The residual's."""
        return int(self.model["hidden_size"])

    @property
    def width(self) -> int:
        """Of queries, keys or values: all heads of the rank."""
        return self.whole_width // self.tensor

    @property
    def memories(self) -> int:
        """Memory heads of the rank."""
        return memory_heads(self.model) // self.tensor

    @property
    def attention_heads(self) -> int:
        """Attention heads of the rank."""
        return int(self.model["num_attention_heads"]) // self.tensor

    @property
    def by_kernels(self) -> bool:
        """Whether Triton kernels scan this memory."""
        return (
            self.kernels
            and self.model["memory_depth"] <= KERNEL_DEPTH
            and self.width // self.memories <= KERNEL_WIDTH
            and bool(self.model["remember_across_documents"])
        )

    @property
    def state(self) -> int:
        """Bytes of a row's memory state: weights and momentum of all heads, float32."""
        weights = sum(out * into for out, into in memory_layers(self.model))
        return 2 * self.memories * weights * FULL


@dataclass(frozen=True)
class Kept:
    """Bytes that a block keeps from forward to backward.

    Attributes:
        mixer: of its first norm and of its mixer up to the memory's scan, without states.
        after: of its mixer after the scan; backward has done with it when it comes to the scan.
        feed_forward: of its second norm and its feed-forward layer.
        states: memory states before each stretch of the scan.
    """

    mixer: int
    after: int
    feed_forward: int
    states: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.mixer + self.after + self.feed_forward + self.states


def kept(span: Span) -> Kept:
    """What a block keeps that is not recomputed; its own input is part of it, in float32."""
    hidden = span.model["intermediate_size"] // span.tensor
    feed_forward = (_norm(span) + 4 * hidden * span.activation) * span.all_tokens
    variant = span.model["variant"]
    mixer, after = _norm(span) * span.all_tokens, 0
    if variant in WITH_ATTENTION:
        mixer += _attention(span)
    if variant in WITH_MEMORY:
        own, after = _memory(span), _after_scan(span)
        if variant == "mal":
            mixer, after = mixer - _attention(span), after + _attention(span)
        if variant == "mac":  # whose segments go through all of it one after another
            own, after = own + after, 0
        mixer += own
    states = _states(span) if variant in WITH_MEMORY else 0
    return Kept(mixer=mixer, after=after, feed_forward=feed_forward, states=states)


def backward(span: Span) -> tuple[int, int]:
    """Bytes that a block's backward needs besides what is kept.

    Returns:
        In the feed-forward layer, and in the memory's scan.
    """
    hidden = span.model["intermediate_size"] // span.tensor
    residual = span.whole_width * span.activation * span.all_tokens
    feed_forward = 2 * hidden * span.activation * span.all_tokens + residual
    if span.model["variant"] not in WITH_MEMORY:
        return feed_forward, 0
    joined = 2 * span.width * span.activation * span.all_tokens  # of the read and its gate
    return feed_forward, residual + joined + scan(span)


def scan(span: Span) -> int:
    """Bytes that the backward of one call of ``memory_scan`` needs besides what is kept."""
    return _in_kernels(span) if span.by_kernels else _in_torch(span)


def _in_torch(span: Span) -> int:
    """Gradients of the scan's inputs, and of one stretch all of this in float32.

    Its inputs and their gradients, what the surprises and reads of all its blocks went through, the
    blocks' coefficients with what autograd keeps of them, and the states before its blocks.
    """
    length = _length_of_scan(span)
    stretch, block = min(_stretch(span), length), min(_block(span), length)
    width = span.width // span.memories
    layers = memory_layers(span.model)
    inner = sum(out for out, _ in layers[:-1])
    clipped = span.model["surprise_clip"] is not None
    tokens = (2 * BRANCHES + 1) * width  # and the gradient of the read
    through = 7 * inner + 4 * width + ((3 + clipped) * len(layers) - 1) * block
    of_head = (tokens + through + 8 * block) * FULL
    of_chunk = 2 * (inner + width) * FULL  # gradients of its surprises
    vectors = of_head * stretch + of_chunk * min(int(span.model["chunk_size"]), stretch)
    blocks = -(-stretch // block)
    states = (blocks - 1 + 4) * span.state
    gradients = BRANCHES * span.width * span.activation * length
    return span.rows * (gradients + states + vectors * span.memories)


def _in_kernels(span: Span) -> int:
    """Copies of the scan's inputs, their gradients, and all blocks' coefficients with theirs."""
    length = _length_of_scan(span)
    block = max(16, 1 << (_block(span) - 1).bit_length())
    chunk = min(int(span.model["chunk_size"]), length)
    per_chunk = -(-chunk // block)
    padded = -(-length // chunk) * per_chunk * block
    vectors = (2 * BRANCHES + 1) * span.width * span.activation * length
    coefficients = 2 * (block + 4) * FULL * span.memories * padded
    return span.rows * (vectors + coefficients + (per_chunk - 1 + 3) * span.state)


def _states(span: Span) -> int:
    """Memory states that a block's scans keep: before each stretch, or chunk in kernels."""
    length, apart = _length_of_scan(span), _stretch(span)
    last = 0
    if span.by_kernels:
        apart, last = int(span.model["chunk_size"]), int(span.model["memory_depth"] > 1)
    whole, rest = divmod(span.tokens, length)
    count = whole * (-(-length // apart) + last) + (-(-rest // apart) + last if rest else 0)
    if span.model["variant"] == "mac":
        # each segment reads the weights at its start, a copy of their own
        return span.rows * span.state * count + span.rows * span.state // 2 * (whole + (rest > 0))
    alone = 3 if span.model["num_persistent_tokens"] else 1  # of persistent tokens, without rows
    return span.rows * span.state * count + alone * span.state


def _length_of_scan(span: Span) -> int:
    """Tokens of a row that one call of ``memory_scan`` takes."""
    if span.model["variant"] == "mac":
        return min(int(span.model["segment_length"]), span.tokens)
    return span.tokens


def _stretch(span: Span) -> int:
    chunk = int(span.model["chunk_size"])
    return max(1, STRETCH // chunk) * chunk


def _block(span: Span) -> int:
    return min(SCAN_BLOCK, int(span.model["chunk_size"]))


def _norm(span: Span) -> int:
    """Of a norm over the residual, a token: float32 input, scaled, output."""
    return (FULL + 2 * span.activation) * span.whole_width + FULL


def _memory(span: Span) -> int:
    """Of what ``memory_scan`` takes and what leads there: branches, gates, MAC's recall."""
    a, d, variant = span.activation, span.width, span.model["variant"]
    convolved = a if span.model["conv_width"] else 0
    branch = (2 * a + convolved + FULL) * d  # of queries or keys, which are made unit vectors
    branches = 2 * branch + (2 * a + convolved) * d
    gates = (2 * BRANCHES + 4) * span.memories * FULL
    alone = 0 if variant == "mac" else int(span.model["num_persistent_tokens"])
    written = (branches + gates) * (span.all_tokens + alone)
    if variant == "mac":  # asks first, layer by layer, and norms what it is told
        inner = sum(out for out, _ in memory_layers(span.model)[:-1]) * span.memories
        return written + (branch + 2 * inner * FULL + _read(span)) * span.all_tokens
    if variant == "mag":
        return written
    return written + a * d * span.all_tokens  # the gate before its SiLU


def _read(span: Span) -> int:
    """Of the norm of what a memory returned, a token: float32 input, scaled, output."""
    return (FULL + 2 * span.activation) * span.width


def _after_scan(span: Span) -> int:
    """Of the read's norm, the SiLU that gates and the product; of MAG's norm of its heads too."""
    norms = 2 if span.model["variant"] == "mag" else 1
    return (norms * _read(span) + 2 * span.activation * span.width) * span.all_tokens


def _attention(span: Span) -> int:
    """Of attention's projections, products, masks and of what follows them."""
    a, d, model = span.activation, span.width, span.model
    variant = model["variant"]
    factor = model["partial_rotary_factor"]
    if factor is None:
        factor = 0.5 if variant in ("mac", "mag") else 1.0
    rotated = rotated_width(d // span.attention_heads, factor)
    rotations = 2 * rotated * a * span.tokens
    each = 2 * a * d + FULL * span.attention_heads  # queries, heads and their softmax's sums
    if variant == "mac":  # the heads' norm; in float32 it takes the heads as they are
        each += (FULL + (2 if a < FULL else 1) * a) * d
    elif variant != "mag":  # the heads side by side
        each += a * d
    keys, pairs = _keys(span)
    return each * span.all_tokens + rotations + 2 * a * d * keys * span.rows + a * pairs


def _keys(span: Span) -> tuple[int, int]:
    """Keys of a row that the blocks of attention keep together, and elements of their masks."""
    model, variant = span.model, span.model["variant"]
    persistent = int(model.get("num_persistent_tokens") or 0)
    if variant == "mac":
        keys = pairs = 0
        for first in range(0, span.tokens, model["segment_length"]):
            own = min(model["segment_length"], span.tokens - first)
            keys += persistent + 2 * own
            pairs += own * (persistent + 2 * own)
        return keys, pairs
    window = model["attention_window"] if variant == "transformer" else model["window_size"]
    if window is None:
        return span.tokens, 0
    in_front = persistent if variant == "mag" else 0
    keys = pairs = 0
    size = min(window, span.tokens)
    for first in range(0, span.tokens, size):
        last = min(first + size, span.tokens)
        seen = last - max(0, first - window + 1) + in_front
        keys += seen
        pairs += (last - first) * seen
    # without tokens in front the blocks' keys are parts of one tensor
    return (keys if in_front else span.tokens), pairs
