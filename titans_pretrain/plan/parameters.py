"""How many parameters a model has, from its fields. Another library's is built, without weights.

D hidden_size, H memory heads of width d, h width of an attention head.
"""

from collections.abc import Mapping
from typing import Any

from titans_pretrain.baselines import foreign
from titans_pretrain.model.fields import WITH_ATTENTION, WITH_MEMORY


def count(model: Mapping[str, Any]) -> int:
    """All parameters of a model; a head tied to the embedding counts once.

    Args:
        model: resolved fields of TitansConfig, or the keys of another library's model.
    """
    return sum(parts(model).values())


def parts(model: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of a model by part; ``blocks`` is all of them."""
    if foreign.is_foreign(model):
        return _parts_of_foreign(model)
    width, vocabulary = model["hidden_size"], model["vocab_size"]
    return {
        "embedding": vocabulary * width,
        "blocks": model["num_hidden_layers"] * sum(block(model).values()),
        "final_norm": width,
        "head": 0 if model["tie_word_embeddings"] else vocabulary * width,
    }


def layers(model: Mapping[str, Any]) -> int:
    """Blocks of a model."""
    if foreign.is_foreign(model):
        return int(foreign.configuration(model).num_hidden_layers)
    return int(model["num_hidden_layers"])


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


def _parts_of_foreign(model: Mapping[str, Any]) -> dict[str, int]:
    """Its embedding and head are told apart; ``blocks`` is all the rest."""
    network: Any = foreign.skeleton(model)
    total = sum(parameter.numel() for parameter in network.parameters())
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    known = {id(parameter): parameter.numel() for parameter in embedding.parameters()}
    inside = sum(known.values())
    outside = (
        0
        if head is None
        else sum(parameter.numel() for parameter in head.parameters() if id(parameter) not in known)
    )
    blocks = total - inside - outside
    return {"embedding": inside, "blocks": blocks, "final_norm": 0, "head": outside}


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
