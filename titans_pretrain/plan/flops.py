"""How many FLOPs a model takes, from its fields and a sequence length. No torch here.

A multiply-add of a matrix product or of a convolution is two FLOPs; elementwise work, norms and the
embedding's look-up are none. Products are counted as the model needs them: causal attention over
the keys a query sees, so about half of a square, a window over the window. ``performed`` counts
what plain SDPA does instead, all of each block of queries and keys, masked or not, which is what
torch's own counter finds. The memory is made of blocks and counts the same in both, but for a
momentum that the model does not use: it is zero, and multiplied all the same.

D hidden_size, T tokens of a sequence.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from titans_pretrain.baselines import foreign
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import UserError
from titans_pretrain.model.fields import WITH_MEMORY
from titans_pretrain.plan import flops_baselines
from titans_pretrain.plan.attention_pairs import segment_pairs, window_pairs
from titans_pretrain.plan.handover import rows as rows_of
from titans_pretrain.plan.parameters import memory_heads, memory_layers

MEMORY_BLOCK = 64
PARTS = ("projections", "convolutions", "attention", "memory", "feed_forward", "head")
TRAINING = 3  # a backward pass takes twice its forward pass; recomputed passes are not counted
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
PROJECTIONS = {"lmm": 5, "mac": 10, "mag": 7, "mal": 8, "transformer": 4}


def forward(
    model: Mapping[str, Any], length: int, rows: int = 1, *, performed: bool = False
) -> dict[str, int]:
    """FLOPs of one forward pass by part, out of ``PARTS``.

    Documents inside a row are not told apart: the count is that of one document a row.

    Args:
        model: resolved fields of TitansConfig, or the keys of one of this package's baselines.
        length: T, tokens of a sequence.
        rows: sequences of the pass; what persistent tokens bring is made once for all of them.
        performed: count masked products of attention and of a baseline's recurrence too, and those
            of a momentum that is not used.

    Raises:
        UserError: the model's FLOPs are not counted, see ``is_counted``.
    """
    if not is_counted(model):
        raise UserError(
            f"the FLOPs of {foreign.name_of(model)} are not counted",
            where=f"model.{foreign.KEY}",
            fix="count a model of this package without mixers of Mamba",
        )
    width, tokens = model["hidden_size"], length * rows
    if foreign.is_foreign(model):
        blocks = flops_baselines.blocks(model, length, performed=performed)
        found = {part: rows * blocks[part] for part in PARTS}
    else:
        block = _block(model, length, rows, performed=performed)
        found = {part: model["num_hidden_layers"] * block[part] for part in PARTS}
    return found | {"head": 2 * tokens * width * model["vocab_size"]}


def is_counted(model: Mapping[str, Any]) -> bool:
    """Whether the FLOPs of a model are known: not of other libraries' models and mixers."""
    if not foreign.is_foreign(model):
        return True
    if model[foreign.KEY] not in foreign.OWN:
        return False
    return not set(flops_baselines.mixers(model)) & set(flops_baselines.UNCOUNTED)


def token(model: Mapping[str, Any], length: int) -> dict[str, float]:
    """FLOPs of one token's forward pass by part: the mean over a sequence of ``length`` tokens."""
    return {part: count / length for part, count in forward(model, length).items()}


def training(model: Mapping[str, Any], length: int, rows: int = 1) -> int:
    """FLOPs of one forward and backward pass, see ``forward``; recompute does not count."""
    return TRAINING * sum(forward(model, length, rows).values())


def step(config: RunConfig, length: int | None = None) -> int:
    """Model FLOPs of one optimizer step, over all ranks.

    Args:
        config: the run.
        length: tokens of a sequence at that step, if not data.sequence_length.
    """
    length = length or config.data.sequence_length
    passes = config.train.global_batch_size // config.train.micro_batch_size
    return passes * training(config.model, length, rows_of(config, length))


def scaled(count: float) -> str:
    """``41.2 T``: three digits and the prefix of a unit, with a blank before it."""
    power = 0
    while count >= 999.5 and power < len(PREFIXES) - 1:
        count, power = count / 1000, power + 1
    digits = 2 - (count >= 9.995) - (count >= 99.95)
    return f"{count:.{digits}f} {PREFIXES[power]}"


def memory(model: Mapping[str, Any], tokens: int, *, performed: bool = False) -> int:
    """FLOPs of one layer's memory scan over tokens of a sequence that begin a chunk, all heads.

    Reads and writes go by blocks of at most MEMORY_BLOCK tokens inside a chunk. Per block of b
    tokens, and memory layer of out x in:

    - surprise: keys forward, and errors back through all layers but the first;
    - reads of weights and momentum, and writes of both; of weights alone where the model has no
      momentum, though what is ``performed`` has both;
    - within the block, b x b scores of queries and keys and their application to errors.

    Besides, once a block, the products of b x b coefficients. Masked halves count: they are what
    a block is made of.
    """
    layers = memory_layers(model)
    products = 2 * sum(out * into for out, into in layers)
    back = 2 * sum(out * into for out, into in layers[1:])
    inside = 2 * sum(out + into for out, into in layers)
    whole = 3 + 2 * (performed or bool(model["use_momentum"]))
    flops = 0
    for b, count in memory_blocks(tokens, model["chunk_size"]).items():
        per_token = whole * products + back + b * inside
        coefficients = 2 * b**2 * (b + 1)
        flops += count * (b * per_token + coefficients)
    return memory_heads(model) * flops


def memory_blocks(tokens: int, chunk: int) -> Counter[int]:
    """How many blocks of each size a scan is made of."""
    chunks, rest = divmod(tokens, chunk)
    found = Counter[int]()
    for size, count in ((chunk, chunks), (rest, 1)):
        whole, tail = divmod(size, MEMORY_BLOCK)
        found[MEMORY_BLOCK] += count * whole
        found[tail] += count
    return Counter({size: count for size, count in found.items() if size and count})


def _block(model: Mapping[str, Any], length: int, rows: int, *, performed: bool) -> Counter[str]:
    """One block of the Titans family."""
    width, tokens, found = model["hidden_size"], length * rows, Counter[str]()
    found["projections"] = 2 * PROJECTIONS[model["variant"]] * tokens * width**2
    found["feed_forward"] = 2 * 3 * tokens * width * model["intermediate_size"]
    found["attention"] = 4 * rows * width * _pairs(model, length, performed=performed)
    if model["variant"] in WITH_MEMORY:
        found += _memory(model, length, rows, performed=performed)
        found += _persistent(model, performed=performed)
    return found


def _pairs(model: Mapping[str, Any], length: int, *, performed: bool) -> int:
    """Pairs of a query and a key in one layer's attention to one sequence."""
    variant, persistent = model["variant"], model["num_persistent_tokens"]
    if variant == "mac":
        return segment_pairs(length, model["segment_length"], persistent, performed=performed)
    if variant in ("mag", "mal"):
        prefix = persistent if variant == "mag" else 0
        pairs = window_pairs(length, model["window_size"], performed=performed)
        return pairs + prefix * length
    if variant == "transformer":
        return window_pairs(length, model["attention_window"], performed=performed)
    return 0


def _memory(model: Mapping[str, Any], length: int, rows: int, *, performed: bool) -> Counter[str]:
    """One layer's scan with its convolutions and gates; MAC recalls by queries of its own."""
    found, tokens, branches = Counter[str](), length * rows, 3
    found["projections"] = _gates(model, tokens)
    if model["variant"] == "mac":
        branches = 4
        spans = Counter({model["segment_length"]: length // model["segment_length"]})
        spans[length % model["segment_length"]] += 1
        scans = (n * memory(model, span, performed=performed) for span, n in spans.items())
        found["memory"] = rows * sum(scans)
        weights = sum(out * into for out, into in memory_layers(model))
        found["memory"] += 2 * tokens * memory_heads(model) * weights
    else:
        found["memory"] = rows * memory(model, length, performed=performed)
    found["convolutions"] = _convolutions(model, tokens, branches)
    return found


def _persistent(model: Mapping[str, Any], *, performed: bool) -> Counter[str]:
    """What one layer does with persistent tokens, once a pass: they are written, or keys."""
    found, tokens = Counter[str](), model["num_persistent_tokens"]
    projection = 2 * tokens * model["hidden_size"] ** 2
    if model["variant"] in ("mac", "mag"):
        found["projections"] += 2 * projection
    if model["variant"] != "mac":
        found["projections"] += 3 * projection + _gates(model, tokens)
        found["convolutions"] = _convolutions(model, tokens, 3)
        found["memory"] = memory(model, tokens, performed=performed)
    return found


def _gates(model: Mapping[str, Any], tokens: int) -> int:
    """Step size, and what of forgetting and momentum the memory has."""
    gates = 1 + model["use_forgetting"] + model["use_momentum"]
    return int(2 * tokens * gates * model["hidden_size"] * memory_heads(model))


def _convolutions(model: Mapping[str, Any], tokens: int, branches: int) -> int:
    """Depthwise, over as many branches of projections."""
    return int(2 * tokens * branches * model["hidden_size"] * model["conv_width"])
