"""Token ids of a text that comes in parts: those of the whole text, at constant memory.

A tokenizer of sentencepiece's kind merges characters into pieces of its vocabulary. Where no piece
holds two characters side by side, no token crosses from one to the other, whatever stands around
them: what is before such a border and what is behind it can be tokenized apart.
"""

import base64
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from titans_pretrain.errors import UserError

SPACE = "▁"
BYTE_PIECES = tuple(f"<0x{value:02X}>" for value in range(256))
LONGEST = 2**16  # characters that may wait for a border
_COLLAPSING = {(r"\A +| +\z", ""), (" {2,}", " ")}
_JOINING_KINDS = {"Mn", "Mc", "Me", "Cc", "Cf", "Cn"}
_JAMO = (range(0x1100, 0x1200), range(0xA960, 0xA980), range(0xD7B0, 0xD800))
_JOINING = {"\u0e33", "\u0eb3"} | {chr(code) for block in _JAMO for code in block}


@dataclass(frozen=True)
class Borders:
    """Between which characters of a text no token can lie.

    Attributes:
        inside: all pairs of characters that stand side by side in a piece.
        closed: characters at which a control piece or a piece of the user's begins or ends.
        known: the characters that have a token, None where bytes spell the others.
        normalizer: of the tokenizers library, what changes more than spaces; None where none does.
        collapsing: runs of spaces become one.
    """

    inside: frozenset[str]
    closed: frozenset[str]
    known: frozenset[str] | None
    normalizer: Any
    collapsing: bool

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
        if any(one[name] for one in added for name in strips):
            raise _refusal("its pieces take in what stands around them")
        literal = _literal(backend, added)
        pieces = [entry[0] if isinstance(entry, list) else entry for entry in model["vocab"]]
        bytes_ = set(BYTE_PIECES)
        if any("<0x" in piece and piece not in bytes_ for piece in pieces):
            raise _refusal("it merges bytes")
        spelt = model.get("byte_fallback") and bytes_ <= set(pieces)
        normalizer, collapsing = _normalizing(parts["normalizer"])
        return cls(
            inside=frozenset(pair for piece in (*pieces, *literal) for pair in _pairs(piece)),
            closed=frozenset(end for piece in literal for end in (piece[0], piece[-1])),
            known=None if spelt else frozenset("".join(pieces)),
            normalizer=normalizer,
            collapsing=collapsing,
        )

    def between(self, before: str, after: str, following: str = "") -> bool:
        """Whether a text may be cut between two characters; ``following`` is the one behind."""
        pair = _spaced(before + after)
        if pair in self.inside or not self.closed.isdisjoint((before, after, *pair)):
            return False
        if self.known is not None and not self.known.issuperset(pair):
            return False
        if self.collapsing and before == " ":
            return False
        return self.normalizer is None or self._stays(before, after, following)

    def last(self, text: str) -> int:
        """Characters of ``text`` before its last border, 0 where it has none."""
        cuts = range(len(text) - 1, 0, -1)
        found = (c for c in cuts if self.between(text[c - 1], text[c], text[c + 1 : c + 2]))
        return next(found, 0)

    def _stays(self, before: str, after: str, following: str) -> bool:
        """Whether two characters are left as they are, whatever stands around them."""
        if not following or any(map(_joins, (before, after, following))):
            return False
        return all(self.normalizer.normalize_str(t) == t for t in (before, after, before + after))


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
        searched = max(len(self.pending) - 2, 0)  # a border may depend on the character behind it
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

    def check_waiting(self, where: str, read: int) -> None:
        """Refuse a text of which too much waits for a border.

        Args:
            where: the text's name.
            read: bytes of it that ``pending`` ends at.

        Raises:
            UserError: more than 65,536 characters wait.
        """
        if len(self.pending) > LONGEST:
            first = max(read - len(self.pending.encode()), 0)
            raise UserError(
                f"in {LONGEST:,} characters from byte {first:,} on no token is sure to end",
                where=where,
                fix="break the text into lines there, or leave that part out",
            )

    def _ids(self, text: str) -> list[int]:
        """Ids of a text that stands behind the context."""
        known = len(self._encode(self.context)) if self.context else 0
        return self._encode(self.context + text)[known:]

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])


def _literal(backend: Any, added: Iterable[dict[str, Any]]) -> list[str]:
    """The pieces that are looked for before all others, and as they are once normalized."""
    found = [one["content"] for one in added]
    if backend.normalizer is not None:
        found += [
            backend.normalizer.normalize_str(one["content"]) for one in added if one["normalized"]
        ]
    return [_spaced(piece) for piece in found if piece]


def _pairs(piece: str) -> Iterable[str]:
    return (piece[at : at + 2] for at in range(len(piece) - 1))


def _spaced(text: str) -> str:
    return text.replace(" ", SPACE)


def _joins(character: str) -> bool:
    """Whether a character may become one with the one before or behind it."""
    return character in _JOINING or unicodedata.category(character) in _JOINING_KINDS


def _normalizing(normalizer: Any) -> tuple[Any, bool]:
    """What of a tokenizer's normalizer changes more than spaces, and whether it removes some."""
    from tokenizers import normalizers

    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    found, collapsing = None, False
    for step in steps:
        pattern = step.get("pattern", {})
        content, regex = step.get("content"), pattern.get("Regex", "")
        prefix = step["type"] == "Prepend" or (regex.startswith(r"\A(?!") and content == SPACE)
        if prefix or (pattern.get("String") == " " and content == SPACE):
            continue
        if (regex, content) in _COLLAPSING:
            collapsing = True
        elif step["type"] == "Precompiled" and found is None:
            found = normalizers.Precompiled(base64.b64decode(step["precompiled_charsmap"]))
        else:
            raise _refusal(f"its normalizer has a step {step['type']}")
    return found, collapsing


def _refusal(reason: str) -> UserError:
    return UserError(
        f"the tokenizer cannot read a text in parts: {reason}",
        where="tokenizer.json",
        fix="use the tokenizer that titans export wrote",
    )
