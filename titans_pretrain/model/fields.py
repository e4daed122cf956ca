"""The model's fields: names, types, defaults, bounds and the rules between them. No torch here.

``TitansConfig``, the run configuration and the planner all read this one table.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

VARIANTS = ("lmm", "mac", "mag", "mal", "transformer")
WITH_MEMORY = ("lmm", "mac", "mag", "mal")
WITH_ATTENTION = ("mac", "mag", "mal", "transformer")


@dataclass(frozen=True, kw_only=True)
class ModelField:
    """One field of the model's configuration.

    Attributes:
        name: the field's name, Hugging Face's where it has one.
        kind: the Python type of its value.
        default: the value when nothing is given.
        doc: what it means, with its unit.
        low, high: inclusive bounds of a number.
        above: exclusive lower bound of a number.
        choices: the allowed values of a string.
        optional: whether None is allowed.
        variants: the variants that use the field.
    """

    name: str
    kind: type
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    variants: tuple[str, ...] = VARIANTS


FIELDS: tuple[ModelField, ...] = (
    ModelField(
        name="variant",
        kind=str,
        default="mac",
        choices=VARIANTS,
        doc="Memory alone (lmm), as context (mac), gate (mag) or layer (mal); or Transformer++.",
    ),
    ModelField(name="vocab_size", kind=int, default=32000, low=2, doc="Pieces of the tokenizer."),
    ModelField(name="hidden_size", kind=int, default=768, low=1, doc="Width of the residual."),
    ModelField(name="num_hidden_layers", kind=int, default=12, low=1, doc="Blocks."),
    ModelField(
        name="num_attention_heads",
        kind=int,
        default=12,
        low=1,
        doc="Heads of the attention; each is hidden_size / num_attention_heads wide.",
    ),
    ModelField(
        name="intermediate_size", kind=int, default=2048, low=1, doc="Width of the SwiGLU layer."
    ),
    ModelField(
        name="rope_theta",
        kind=float,
        default=10000.0,
        above=0,
        variants=WITH_ATTENTION,
        doc="Base of the rotary frequencies.",
    ),
    ModelField(
        name="partial_rotary_factor",
        kind=float,
        default=None,
        optional=True,
        low=0,
        high=1,
        variants=WITH_ATTENTION,
        doc="Share of each attention head that rotates, rounded down to an even width; persistent "
        "tokens, which have no position, are keyed in the rest. Null takes 0.5 for mac and mag, "
        "else 1.",
    ),
    ModelField(name="rms_norm_eps", kind=float, default=1e-6, above=0, doc="RMSNorm's epsilon."),
    ModelField(
        name="tie_word_embeddings", kind=bool, default=True, doc="One matrix embeds and predicts."
    ),
    ModelField(
        name="initializer_range",
        kind=float,
        default=0.02,
        above=0,
        doc="Standard deviation of projections and embeddings at the start.",
    ),
    ModelField(
        name="memory_heads",
        kind=int,
        default=None,
        optional=True,
        low=1,
        variants=WITH_MEMORY,
        doc="Independent memories per layer, each hidden_size / memory_heads wide; null takes "
        "num_attention_heads.",
    ),
    ModelField(
        name="memory_depth",
        kind=int,
        default=2,
        low=1,
        high=4,
        variants=WITH_MEMORY,
        doc="Layers of the memory MLP (L_M).",
    ),
    ModelField(
        name="memory_expansion",
        kind=int,
        default=4,
        low=1,
        variants=WITH_MEMORY,
        doc="Hidden width of the memory MLP over its head width; unused at depth 1.",
    ),
    ModelField(
        name="memory_activation",
        kind=str,
        default="gelu",
        choices=("gelu", "silu"),
        variants=WITH_MEMORY,
        doc="Activation inside the memory MLP (gelu is the exact erf form).",
    ),
    ModelField(
        name="memory_residual",
        kind=bool,
        default=True,
        variants=WITH_MEMORY,
        doc="M(x) = x + f(x) instead of f(x).",
    ),
    ModelField(
        name="chunk_size",
        kind=int,
        default=64,
        low=1,
        variants=WITH_MEMORY,
        doc="Tokens whose surprise is taken at the same weights; part of the function, kept at "
        "inference.",
    ),
    ModelField(
        name="segment_length",
        kind=int,
        default=512,
        low=1,
        variants=("mac",),
        doc="Tokens of one attention segment; a multiple of chunk_size.",
    ),
    ModelField(
        name="window_size",
        kind=int,
        default=512,
        low=1,
        variants=("mag", "mal"),
        doc="Tokens the sliding-window attention sees, the token itself included.",
    ),
    ModelField(
        name="attention_window",
        kind=int,
        default=None,
        optional=True,
        low=1,
        variants=("transformer",),
        doc="Tokens the attention sees, the token itself included; null sees all before it.",
    ),
    ModelField(
        name="num_persistent_tokens",
        kind=int,
        default=16,
        low=0,
        variants=WITH_MEMORY,
        doc="Learned input-independent tokens per layer (N_p); 0 turns them off.",
    ),
    ModelField(
        name="conv_width",
        kind=int,
        default=4,
        low=0,
        variants=WITH_MEMORY,
        doc="Taps of the causal depthwise convolution on q, k, v; 0 turns it off.",
    ),
    ModelField(
        name="surprise_clip",
        kind=float,
        default=1.0,
        above=0,
        optional=True,
        variants=WITH_MEMORY,
        doc="Bound on the norm of one token's surprise per memory layer; null gives the paper's "
        "bare rule, which diverges.",
    ),
    ModelField(
        name="max_step",
        kind=float,
        default=1.0,
        above=0,
        variants=WITH_MEMORY,
        doc="theta = max_step (1 - eta) sigmoid(.), the inner learning rate.",
    ),
    ModelField(
        name="use_momentum",
        kind=bool,
        default=True,
        variants=WITH_MEMORY,
        doc="Past surprise (Eq. 10); off means eta = 0.",
    ),
    ModelField(
        name="use_forgetting",
        kind=bool,
        default=True,
        variants=WITH_MEMORY,
        doc="Weight decay of the memory (Eq. 13); off means alpha = 0.",
    ),
    ModelField(
        name="forget_bias",
        kind=float,
        default=-4.6,
        variants=WITH_MEMORY,
        doc="Bias of the forget gate at the start of training: alpha begins near its sigmoid.",
    ),
    ModelField(
        name="gate_per",
        kind=str,
        default="token",
        choices=("token", "chunk"),
        variants=WITH_MEMORY,
        doc="Gates per token, or one value a chunk, taken from the chunk's first token.",
    ),
    ModelField(
        name="attend_across_documents",
        kind=bool,
        default=True,
        variants=WITH_ATTENTION,
        doc="Attention reaches earlier documents of the row; off, a token's own alone.",
    ),
    ModelField(
        name="remember_across_documents",
        kind=bool,
        default=True,
        variants=WITH_MEMORY,
        doc="The memory goes on from document to document; off, each begins with the memory of a "
        "sequence's start, and a chunk of its own.",
    ),
)

TABLE: dict[str, ModelField] = {field.name: field for field in FIELDS}


@dataclass(frozen=True)
class Problem:
    """A value the model cannot have: which field, what is wrong, how to mend it."""

    field: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}; {self.fix}"


def defaults() -> dict[str, Any]:
    """A fresh mapping of every field to its default."""
    return {field.name: field.default for field in FIELDS}


def unused(variant: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that ``variant`` does not read."""
    return [name for name in names if name in TABLE and variant not in TABLE[name].variants]


def separates_documents(values: Mapping[str, Any]) -> bool:
    """Whether a model with these fields needs to know where documents begin; others never do.

    Args:
        values: all fields, or the keys of another library's model.
    """
    names = ("attend_across_documents", "remember_across_documents")
    return any(
        not values.get(name, True) and values["variant"] in TABLE[name].variants for name in names
    )


def problems(values: Mapping[str, Any]) -> list[Problem]:
    """Everything wrong with a mapping of field names to values; missing fields take defaults."""
    found = [_unknown(name) for name in values if name not in TABLE]
    full = defaults() | {name: value for name, value in values.items() if name in TABLE}
    single = [problem for name in TABLE for problem in _one(TABLE[name], full[name])]
    found += single
    if not single:
        found += _between(full)
    return found


def misspelt(name: str) -> list[Problem]:
    """A problem if ``name`` is no field but so like one that it must be meant."""
    close = difflib.get_close_matches(name, TABLE, n=1, cutoff=0.85)
    return [_unknown(name)] if close and name not in TABLE else []


def _unknown(name: str) -> Problem:
    match = difflib.get_close_matches(name, TABLE, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}?" if match else f"known fields: {', '.join(TABLE)}"
    return Problem(name, "no such field of the model", hint)


def _one(field: ModelField, value: Any) -> Iterable[Problem]:
    if value is None and field.optional:
        return
    if field.kind is float and isinstance(value, float) and not math.isfinite(value):
        yield Problem(field.name, f"{value} is not finite", "give a finite number")
    elif not _has_kind(field.kind, value):
        wanted = field.kind.__name__ + (" or null" if field.optional else "")
        yield Problem(field.name, f"{value!r} is no {wanted}", f"give a value of type {wanted}")
    elif field.choices and value not in field.choices:
        match = difflib.get_close_matches(str(value), field.choices, n=1)
        hint = f"did you mean {match[0]!r}? " if match else ""
        yield Problem(field.name, f"{value!r} is unknown", f"{hint}use one of {field.choices}")
    elif field.kind in (int, float):
        if field.low is not None and value < field.low:
            yield Problem(field.name, f"{value} is too small", f"use at least {field.low}")
        if field.high is not None and value > field.high:
            yield Problem(field.name, f"{value} is too large", f"use at most {field.high}")
        if field.above is not None and not value > field.above:
            yield Problem(field.name, f"{value} is too small", f"use more than {field.above}")


def _has_kind(kind: type, value: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _between(v: Mapping[str, Any]) -> Iterable[Problem]:
    variant, width = v["variant"], v["hidden_size"]
    heads = {"num_attention_heads": v["num_attention_heads"]} if variant in WITH_ATTENTION else {}
    if variant in WITH_MEMORY:
        heads["memory_heads"] = v["memory_heads"] or v["num_attention_heads"]
    for name, count in heads.items():
        if width % count:
            yield Problem(
                name,
                f"{count} heads do not divide hidden_size {width}",
                f"use {_nearest_divisor(width, count)} heads or hidden_size "
                f"{_multiple(width, count)}",
            )
    head, factor = width // v["num_attention_heads"], rotary_factor(v)
    if (
        variant in ("mac", "mag")
        and v["num_persistent_tokens"]
        and rotated_width(head, factor) == head
    ):
        yield Problem(
            "partial_rotary_factor",
            f"{factor} leaves no unrotated part to key the persistent tokens",
            "use 0.5, or num_persistent_tokens 0",
        )
    ungated = variant in WITH_MEMORY and not v["use_forgetting"]
    if ungated and v["forget_bias"] != TABLE["forget_bias"].default:
        yield Problem(
            "forget_bias",
            f"{v['forget_bias']} has no gate: use_forgetting is off",
            "leave it out, or turn use_forgetting on",
        )
    if variant == "mac" and v["chunk_size"] > v["segment_length"]:
        yield Problem(
            "chunk_size",
            f"{v['chunk_size']} exceeds segment_length {v['segment_length']}",
            f"use chunk_size {v['segment_length']} or less, or a longer segment",
        )
    elif variant == "mac" and v["segment_length"] % v["chunk_size"]:
        yield Problem(
            "segment_length",
            f"{v['segment_length']} is no multiple of chunk_size {v['chunk_size']}",
            f"use {_multiple(v['segment_length'], v['chunk_size'])}",
        )


def rotary_factor(values: Mapping[str, Any]) -> float:
    """``partial_rotary_factor``, or what the variant takes when it is null."""
    given: float | None = values["partial_rotary_factor"]
    if given is not None:
        return given
    return 0.5 if values["variant"] in ("mac", "mag") else 1.0


def rotated_width(head_width: int, factor: float) -> int:
    """How many of a head's dimensions rotate: the largest even width within ``factor``."""
    return 2 * int(head_width * factor / 2)


def _multiple(value: int, step: int) -> int:
    return max(step, round(value / step) * step)


def _nearest_divisor(width: int, wanted: int) -> int:
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - wanted))
