"""What a model can go on from: its token ids, and its positions."""

from collections.abc import Sequence
from typing import Any

from titans_pretrain.errors import Misfit, UserError


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
    check_some(ids, text, where)
    return ids


def check_some(ids: Sequence[int], text: str, where: str) -> None:
    """Refuse a text of no tokens."""
    if not ids:
        raise UserError(
            f"the tokenizer makes no token of {text!r}",
            where=where,
            fix="give a prompt with more in it",
        )


def check_ids(ids: Sequence[int], model: Any, where: str = "tokenizer.json") -> None:
    """Refuse token ids that the model has no embedding for."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if max(ids, default=0) >= vocabulary:
        raise UserError(
            f"the tokenizer's ids exceed the model's {vocabulary}",
            where=where,
            fix="export the model again",
        )


def positions(model: Any) -> int | None:
    """Tokens that a model's positions allow; None where its configuration bounds none."""
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    return longest


def check_positions(where: str, tokens: int, longest: int | None, *, more: int = 0) -> None:
    """Refuse a text that goes beyond a model's positions.

    Args:
        where: what names the text, or gives its length.
        tokens: of the text.
        longest: the model's positions; None takes any length.
        more: tokens to add to the text.

    Raises:
        Misfit: it is too long.
    """
    if longest is None or tokens + more <= longest:
        return
    new = f" and {more} new ones" if more else ""
    fix = f"use at most {longest - more}" if longest > more else ""
    raise Misfit(
        f"{tokens} tokens{new} are more than the model's {longest} positions",
        where=where,
        fix=fix or f"ask for fewer new tokens than {longest}",
    )
