"""How many tokens texts are, and the ids of long ones. No torch here."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Self

from data_prep.encoder import cut

Encode = Callable[[list[str]], list[list[int]]]

PART_CHARACTERS = 2000
WHOLE_CHARACTERS = 2**16  # of which tokenizers make ids at once in a fraction of a second
PROOF_CHARACTERS = 2**15
_PARTS_AT_ONCE = 64
_INTEGERS = "q"  # 64 bits


class TextTokens:
    """A tokenizer without its special tokens.

    Args:
        encode: ids of each of several texts.
        decode: the text of ids.
    """

    def __init__(self, encode: Encode, decode: Callable[[list[int]], str]) -> None:
        self._encode, self._decode = encode, decode
        one, two = encode(["a", "a a"])
        # some put a space in front of every text themselves
        self._space = "" if two == one + one else " "

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Of a tokenizer of transformers; a special token that a text spells is plain text."""

        def encode(texts: list[str]) -> list[list[int]]:
            ids: list[list[int]] = tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
            return ids

        def decode(ids: list[int]) -> str:
            text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            return text

        return cls(encode, decode)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text where it stands behind a space."""
        return self._encode([self._space + text for text in texts]) if texts else []

    def count(self, text: str) -> int:
        """Tokens of a text behind a space."""
        return len(self.ids([text])[0])

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, without white space around it or a character that is not whole."""
        return self._decode(list(ids)).rstrip("\N{REPLACEMENT CHARACTER}").strip()

    def long(self, text: str) -> "array[int]":
        """The ids of a text that begins a document, 8 bytes each.

        A long one is encoded in parts, cut at spaces, if the ids of its two ends are then the same
        as those of the ends whole: a tokenizer's time and memory may grow faster than the text.
        """
        ends = (text[:PROOF_CHARACTERS], text[-PROOF_CHARACTERS:])
        if len(text) > WHOLE_CHARACTERS and all(
            self._in_parts(end) == self._whole(end) for end in ends
        ):
            return self._in_parts(text)
        return self._whole(text)

    def _whole(self, text: str) -> "array[int]":
        return array(_INTEGERS, self._encode([text])[0])

    def _in_parts(self, text: str) -> "array[int]":
        first, *rest = cut(text, PART_CHARACTERS)
        ids = self._whole(first)
        for place in range(0, len(rest), _PARTS_AT_ONCE):
            for part in self.ids(rest[place : place + _PARTS_AT_ONCE]):
                ids.extend(part)
        return ids


def whole_ids(tokenizer: Any, text: str) -> "array[int]":
    """What a tokenizer of transformers makes of a text, special tokens around it included.

    One that the text itself spells, such as ``</s>``, is plain text.
    """
    if len(text) > WHOLE_CHARACTERS:
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        for first in range(len(whole) - len(plain) + 1):
            last = first + len(plain)
            if whole[first:last] == plain:
                ids = array(_INTEGERS, whole[:first])
                ids.extend(TextTokens.of(tokenizer).long(text))
                ids.extend(whole[last:])
                return ids
    ids = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
    return array(_INTEGERS, ids)
