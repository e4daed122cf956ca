"""What a model can go on from: its token ids, and its positions."""

from collections.abc import Sequence
from typing import Any

from titans_pretrain.errors import UserError


def opening(tokenizer: Any, where: str) -> str:
    """The text of the token that begins a document.

    Raises:
        UserError: there is none.
    """
    text = tokenizer.bos_token or tokenizer.eos_token
    if not text:
        raise UserError(
            "the model has no token to begin a document with", where=where, fix="give a prompt"
        )
    return str(text)


def prompt_ids(tokenizer: Any, prompt: str, where: str = "PROMPT") -> list[int]:
    """A prompt's tokens as the tokenizer begins a text; a document's beginning for an empty one.

    Raises:
        UserError: there are none.
    """
    text = prompt or opening(tokenizer, where)
    ids = list(tokenizer(text, add_special_tokens=bool(prompt), verbose=False)["input_ids"])
    if not ids:
        raise UserError(
            f"the tokenizer makes no token of {text!r}",
            where=where,
            fix="give a prompt with more in it",
        )
    return ids


def check_ids(ids: Sequence[int], model: Any) -> None:
    """Refuse token ids that the model has no embedding for."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if max(ids, default=0) >= vocabulary:
        raise UserError(
            f"the tokenizer's ids exceed the model's {vocabulary}",
            where="tokenizer.json",
            fix="export the model again",
        )


def check_positions(model: Any, tokens: int, new: int, where: str = "PROMPT") -> None:
    """Refuse a prompt whose continuation would go beyond the model's positions.

    Args:
        model: of transformers; one whose configuration bounds no positions takes any length.
        tokens: of the prompt.
        new: tokens to add.
        where: the prompt's name.
    """
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    if longest is None or tokens + new <= longest:
        return
    fix = f"use a prompt of at most {longest - new} tokens" if longest > new else ""
    raise UserError(
        f"{tokens} tokens and {new} new ones are more than the model's {longest} positions",
        where=where,
        fix=fix or f"ask for fewer new tokens than {longest}",
    )
