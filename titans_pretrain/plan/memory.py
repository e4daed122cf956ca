"""What a training step takes on one rank's device, in bytes by term. No torch here.

Three moments of a step can be its fullest: the loss, the backward pass of the last block, and the
update. ``moments`` counts each; the step takes the largest. Terms are tensors: what CUDA, its
libraries and an allocator's fragments take besides is not among them.
"""

from dataclasses import dataclass, fields

from titans_pretrain.config import RunConfig
from titans_pretrain.model.fields import VARIANTS
from titans_pretrain.parallel import wavefront
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.plan import activations, parameters
from titans_pretrain.plan.activations import FULL, Span
from titans_pretrain.plan.handover import ACTIVATION_BYTES, rows

BUCKET_ELEMENTS = 100_000_000  # as DeepSpeed is told in ``parallel/zero_settings.py``
REUSE_ELEMENTS = 10 * BUCKET_ELEMENTS
LOGITS_BYTES = 1 << 28  # of a chunk of the loss, ``parallel/linear_cross_entropy.py``
ALIGNED_TOKENS = 128


@dataclass(frozen=True)
class Terms:
    """Bytes on one rank's device at one moment of a step.

    Attributes:
        weights: this rank's shard, in the precision of the passes.
        gathered: other ranks' shards.
        gradients: the shard that micro-batches are summed in, float32.
        optimizer: float32 weights and two moments of the shard.
        communication: buckets of gradients that are reduced together.
        kept: what blocks other than the one at work keep for backward: all, or their inputs.
        block: activations and gradients of the block at work.
        states: memory states of the block at work.
        scan: what the memory's backward needs besides.
        loss: the head's input and its gradient, and the logits of a chunk of tokens.
        update: what the optimizer's arithmetic needs.
    """

    weights: int = 0
    gathered: int = 0
    gradients: int = 0
    optimizer: int = 0
    communication: int = 0
    kept: int = 0
    block: int = 0
    states: int = 0
    scan: int = 0
    loss: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def is_counted(config: RunConfig) -> bool:
    """Whether the model is one whose activations are known."""
    return config.model.get("variant") in VARIANTS


def total(config: RunConfig, mesh: Mesh, length: int | None = None) -> int:
    """Bytes of a step at its fullest; see ``moments``."""
    return max(terms.total for terms in moments(config, mesh, length).values())


def moments(config: RunConfig, mesh: Mesh, length: int | None = None) -> dict[str, Terms]:
    """Bytes at the loss, in the backward pass of a block, and at the update.

    Args:
        config: the run; see ``is_counted``.
        mesh: its grid of ranks.
        length: tokens of a sequence, if not data.sequence_length.
    """
    length = length or config.data.sequence_length
    span = Span(
        config.model,
        rows=rows(config, length),
        tokens=length // mesh.sequence,
        tensor=mesh.tensor,
        activation=ACTIVATION_BYTES[config.train.precision],
        kernels=config.train.memory_kernels == "triton",
    )
    always = _always(config, mesh)
    return {
        "loss": Terms(**always, **_at_loss(config, mesh, span)),
        "backward": Terms(**always, **_in_backward(config, mesh, span)),
        "update": Terms(**always | {"gathered": 0}, update=_update(config, mesh)),
    }


def largest_micro_batch(config: RunConfig, mesh: Mesh, size: float, length: int) -> int:
    """Most sequences of full length in a micro-batch whose step takes ``size`` bytes; 0 for none.

    The number of micro-batches stays, the global batch grows with them.
    """

    def fits(sequences: int) -> bool:
        return total(_with_micro_batch(config, mesh, sequences), mesh, length) <= size

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with_micro_batch(config: RunConfig, mesh: Mesh, sequences: int) -> RunConfig:
    """The same run with micro-batches of another size."""
    batch = sequences * mesh.data * mesh.accumulation(config.train)
    sizes = {"micro_batch_size": sequences, "global_batch_size": batch}
    return config.model_copy(update={"train": config.train.model_copy(update=sizes)})


def _elements(config: RunConfig, mesh: Mesh) -> int:
    """Parameters that the data ranks of one tensor rank share."""
    return -(-parameters.count(config.model) // mesh.tensor)


def _always(config: RunConfig, mesh: Mesh) -> dict[str, int]:
    """What there is throughout a step."""
    elements, a = _elements(config, mesh), ACTIVATION_BYTES[config.train.precision]
    shard = -(-elements // mesh.data)
    on_device = 0 if config.train.offload_optimizer else shard
    bucket = min(BUCKET_ELEMENTS, elements)
    # what is not shared is used where it lies; DeepSpeed keeps what it will use again soon
    live = min(elements, REUSE_ELEMENTS + bucket)
    return {
        "weights": shard * a,
        "gathered": (live - live // mesh.data) * a,
        "gradients": on_device * FULL,
        "optimizer": 3 * on_device * FULL,
        "communication": bucket * FULL * (1 + (elements > bucket)),
    }


def _in_flight(config: RunConfig, mesh: Mesh) -> int:
    """Micro-batches whose forward pass is kept at a time, on the rank that keeps the most."""
    if mesh.sequence == 1 or not wavefront.is_interleaved(config):
        return 1
    return int(min(mesh.accumulation(config.train), mesh.sequence))


def _kept(config: RunConfig, span: Span, blocks: int) -> int:
    """Bytes that a micro-batch's blocks keep for backward."""
    if config.train.activation_checkpointing:
        return blocks * _residual(span)
    return blocks * activations.kept(span).total


def _residual(span: Span) -> int:
    return span.whole_width * span.activation * span.all_tokens


def _at_loss(config: RunConfig, mesh: Mesh, span: Span) -> dict[str, int]:
    """All blocks are kept; the head's gradient is under way."""
    blocks = int(config.model["num_hidden_layers"])
    kept = _in_flight(config, mesh) * _kept(config, span, blocks)
    share = -(-config.model["vocab_size"] // mesh.tensor)
    tokens = min(_chunk_tokens(share), span.all_tokens)
    full = span.activation == FULL
    logits = tokens * share * (span.activation + (0 if full else FULL))
    weight = share * span.whole_width * FULL
    product = 0 if full else share * span.whole_width * span.activation
    norm = (FULL + 2 * span.activation) * span.whole_width * span.all_tokens
    return {"kept": kept, "loss": norm + _residual(span) + weight + max(logits, product)}


def _chunk_tokens(share: int) -> int:
    tokens = LOGITS_BYTES // (FULL * share)
    return max(1, tokens - tokens % ALIGNED_TOKENS if tokens > ALIGNED_TOKENS else tokens)


def _in_backward(config: RunConfig, mesh: Mesh, span: Span) -> dict[str, int]:
    """The last block's backward pass, recomputed first with activation checkpointing."""
    blocks, checkpointed = config.model["num_hidden_layers"], config.train.activation_checkpointing
    own = activations.kept(span)
    others = _in_flight(config, mesh) * _kept(config, span, blocks) - _kept(config, span, 1)
    if checkpointed:
        others += _residual(span) if span.activation != FULL else 0
    in_feed_forward, in_scan = activations.backward(span)
    gradients = sum(parameters.block(config.model).values()) // mesh.tensor * span.activation
    head = config.model["vocab_size"] // mesh.tensor * span.whole_width * span.activation
    first = own.total + in_feed_forward
    second = own.mixer + own.states + in_scan
    at_scan = second > first
    scan = activations.scan(span) if at_scan else 0
    return {
        "kept": others,
        "block": max(first, second) - own.states - scan + gradients,
        "states": own.states,
        "scan": scan,
        "loss": head if config.model["tie_word_embeddings"] else 0,
    }


def _update(config: RunConfig, mesh: Mesh) -> int:
    """Gradients of one group of parameters and two numbers for each of its elements."""
    if config.train.offload_optimizer:
        return 0
    elements = max(_groups(config)) // (mesh.tensor * mesh.data)
    return 3 * min(elements, REUSE_ELEMENTS) * FULL


def _groups(config: RunConfig) -> tuple[int, int]:
    """Parameters that decay and others."""
    model, block = config.model, parameters.block(config.model)
    width = model["hidden_size"]
    decayed = block["feed_forward"] + block["output"]
    decayed += 3 * width * width * (("attention" in block) + ("memory" in block))
    decayed *= model["num_hidden_layers"]
    if not model["tie_word_embeddings"]:
        decayed += parameters.parts(model)["head"]
    return decayed, parameters.count(model) - decayed
