"""Token ids of a text that comes in parts: those of the whole text, at constant memory.

A tokenizer of sentencepiece's kind merges characters into pieces of its vocabulary. Where no piece
holds two characters side by side, no token crosses from one to the other, whatever stands around
them: what is before such a border and what is behind it can be tokenized apart.
"""

import json
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from titans_pretrain.errors import UserError

SPACE = "▁"
BYTES = 256
_PLAIN = frozenset(string.ascii_lowercase + string.digits)
_COLLAPSING = {(r"\A +| +\z", ""), (" {2,}", " ")}


@dataclass(frozen=True)
class Borders:
    """Between which characters of a text no token can lie.

    Attributes:
        inside: all pairs of characters that stand side by side in a piece.
        closed: characters at which a control piece begins or ends.
        known: the characters that have a token, None where bytes spell the others.
        normalized: the text is normalized, so that only plain characters are what they seem.
    """

    inside: frozenset[str]
    closed: frozenset[str]
    known: frozenset[str] | None
    normalized: bool

    @classmethod
    def of(cls, tokenizer: Any) -> "Borders":
        """Those of a transformers tokenizer.

        Raises:
            UserError: it works in another way than sentencepiece, or adds tokens to a text.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _refusal("it is none of the tokenizers library")
        parts = json.loads(backend.to_str())
        model, added = parts["model"], parts["added_tokens"]
        if parts["pre_tokenizer"] is not None:
            raise _refusal("it has a pre-tokenizer")
        if tokenizer("")["input_ids"]:
            raise _refusal("it adds tokens to a text")
        if model["type"] not in ("BPE", "Unigram"):
            raise _refusal(f"it is a {model['type']}")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(name):
                raise _refusal(f"it has a {name}")
        strips = ("lstrip", "rstrip", "single_word")
        if any(not one["special"] or any(one[name] for name in strips) for one in added):
            raise _refusal("it has user-defined pieces")
        literal = [one["content"] for one in added]
        pieces = [entry[0] if isinstance(entry, list) else entry for entry in model["vocab"]]
        bytes_ = {f"<0x{value:02X}>" for value in range(BYTES)}
        if any("<0x" in piece and piece not in bytes_ for piece in pieces):
            raise _refusal("it merges bytes")
        spelt = model.get("byte_fallback") and bytes_ <= set(pieces)
        return cls(
            inside=frozenset(pair for piece in (*pieces, *literal) for pair in _pairs(piece)),
            closed=frozenset(end for piece in literal for end in (piece[0], piece[-1])),
            known=None if spelt else frozenset("".join(pieces)),
            normalized=_normalizes(parts["normalizer"]),
        )

    def between(self, before: str, after: str) -> bool:
        """Whether a text may be cut between two characters."""
        if self.normalized and not (before in _PLAIN and (after in _PLAIN or after == " ")):
            return False
        pair = _spaced(before + after)
        if pair in self.inside or not self.closed.isdisjoint((before, after)):
            return False
        return self.known is None or self.known.issuperset(pair)

    def last(self, text: str) -> int:
        """Characters of ``text`` before its last border, 0 where it has none."""
        cuts = range(len(text) - 1, 0, -1)
        return next((cut for cut in cuts if self.between(text[cut - 1], text[cut])), 0)


class TokenStream:
    """The ids of a text, part by part.

    Args:
        tokenizer: of transformers, of sentencepiece's kind.
        context: the character before ``pending``, empty at the beginning of the text.
        pending: what the text held behind its last border.

    Attributes:
        context, pending: the same now: with them another stream goes on.

    Raises:
        UserError: the tokenizer works in another way.
    """

    def __init__(self, tokenizer: Any, context: str = "", pending: str = "") -> None:
        self._tokenizer = tokenizer
        self._borders = Borders.of(tokenizer)
        self.context, self.pending = context, pending

    def feed(self, text: str) -> list[int]:
        """The ids that are certain once ``text`` has come; the rest waits for what follows."""
        searched = max(len(self.pending) - 1, 0)
        joined = self.pending + text
        cut = self._borders.last(joined[searched:])
        if not cut:
            self.pending = joined
            return []
        cut += searched
        ids = self._ids(joined[:cut])
        self.context, self.pending = joined[cut - 1], joined[cut:]
        return ids

    def finish(self, text: str = "") -> list[int]:
        """The ids of all that is left if the text ends with ``text``."""
        return self._ids(self.pending + text)

    def _ids(self, text: str) -> list[int]:
        """Ids of a text that stands behind the context."""
        known = len(self._encode(self.context)) if self.context else 0
        return self._encode(self.context + text)[known:]

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])


def _pairs(piece: str) -> Iterable[str]:
    return (piece[at : at + 2] for at in range(len(piece) - 1))


def _spaced(text: str) -> str:
    return text.replace(" ", SPACE)


def _normalizes(normalizer: Any) -> bool:
    """Whether a tokenizer changes more than spaces."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    found = False
    for step in steps:
        pattern = step.get("pattern", {})
        content, regex = step.get("content"), pattern.get("Regex", "")
        prefix = step["type"] == "Prepend" or (regex.startswith(r"\A(?!") and content == SPACE)
        if prefix or (pattern.get("String") == " " and content == SPACE):
            continue
        if step["type"] != "Precompiled" and (regex, content) not in _COLLAPSING:
            raise _refusal(f"its normalizer has a step {step['type']}")
        found = True
    return found


def _refusal(reason: str) -> UserError:
    return UserError(
        f"the tokenizer cannot read a text in parts: {reason}",
        where="tokenizer.json",
        fix="use the tokenizer that titans export wrote",
    )
