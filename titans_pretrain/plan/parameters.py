"""How many parameters a model has, from its fields. No torch here.

D hidden_size, H memory heads of width d, h width of an attention head.
"""

from collections.abc import Mapping
from typing import Any

from titans_pretrain.model.fields import WITH_ATTENTION, WITH_MEMORY


def count(model: Mapping[str, Any]) -> int:
    """All parameters of a model; a head tied to the embedding counts once.

    Args:
        model: resolved fields of TitansConfig.
    """
    return sum(parts(model).values())


def parts(model: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of a model by part; ``blocks`` is all of them."""
    width, vocabulary = model["hidden_size"], model["vocab_size"]
    return {
        "embedding": vocabulary * width,
        "blocks": model["num_hidden_layers"] * sum(block(model).values()),
        "final_norm": width,
        "head": 0 if model["tie_word_embeddings"] else vocabulary * width,
    }


def block(model: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of one block by part."""
    width, variant = model["hidden_size"], model["variant"]
    found = {"norms": 2 * width, "feed_forward": 3 * width * model["intermediate_size"]}
    if variant in WITH_ATTENTION:
        found["attention"] = 3 * width * width
        if variant in ("mac", "mag"):
            found["attention"] += width // model["num_attention_heads"]
    if variant in WITH_MEMORY:
        found["memory"] = _memory(model)
        found["persistent_tokens"] = model["num_persistent_tokens"] * width
    gated = variant in ("lmm", "mal")
    found["output"] = (1 + gated) * width * width
    return found


def memory_layers(model: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The (out, in) widths of the layers of one head's memory."""
    width = model["hidden_size"] // memory_heads(model)
    hidden = width * model["memory_expansion"]
    widths = [width] + [hidden] * (model["memory_depth"] - 1) + [width]
    return list(zip(widths[1:], widths[:-1], strict=True))


def memory_heads(model: Mapping[str, Any]) -> int:
    """Memories of a layer."""
    return int(model["memory_heads"] or model["num_attention_heads"])


def _memory(model: Mapping[str, Any]) -> int:
    """Projections, convolutions, gates, initial weights and norm of one layer's memory."""
    width, heads = model["hidden_size"], memory_heads(model)
    gates = 1 + model["use_forgetting"] + model["use_momentum"]
    return int(
        3 * width * width
        + 3 * width * model["conv_width"]
        + gates * (width + 1) * heads
        + heads * sum(out * into for out, into in memory_layers(model))
        + width // heads
    )
