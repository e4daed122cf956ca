"""From texts to ids: two encoders, which differ in speed and never in an id."""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep import bpe
from data_prep.manifest import token_type
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import UserError, nearest

KINDS = ("sentencepiece", "fast")
PART_CHARACTERS = 200
_WORD_END = re.compile(rf"(?<![ {bpe.SPACE}]) (?!\Z)")


class Encoded(NamedTuple):
    """The ids of texts, one text after the other, no BOS, no EOS.

    Attributes:
        ids: (tokens,) of the vocabulary's dtype.
        lengths: (texts,) tokens of each text, int64.
    """

    ids: NDArray[np.unsignedinteger]
    lengths: NDArray[np.int64]


class Encoder(Protocol):
    """Turns texts into ids on one thread; made inside the process that uses it."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text."""
        ...


def make(kind: str, tokenizer: Tokenizer) -> Encoder:
    """The encoder of a kind.

    Args:
        kind: ``sentencepiece``, or ``fast`` (see ``data_prep.fast``).
        tokenizer: whose ids it gives.

    Raises:
        UserError: no such kind; or the fast one is not installed, or not proven for the model.
    """
    if kind == "sentencepiece":
        return SentencepieceEncoder(tokenizer)
    if kind == "fast":
        from data_prep.fast import FastEncoder

        return FastEncoder(tokenizer)
    raise UserError(f"no encoder {kind!r}", where="--encoder", fix=nearest(kind, KINDS))


class SentencepieceEncoder:
    """sentencepiece itself, given long texts in short parts where the model permits it.

    Its time grows faster than the text. A plain model's pieces never reach over the space after
    a word (``bpe.departure``), and the space that sentencepiece puts in front of every text
    stands for the one taken out, so the parts' ids are the text's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_type(tokenizer.vocab_size))
        self._cuts = not bpe.departure(bpe.parse(tokenizer.content))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text."""
        if not self._cuts:
            return flat(self._tokenizer.encode_arrays(texts), self._dtype)
        parts = [cut(text) for text in texts]
        arrays = self._tokenizer.encode_arrays([part for text in parts for part in text])
        ids, lengths = flat(arrays, self._dtype)
        last = np.cumsum([len(text) for text in parts], dtype=np.int64) - 1
        return Encoded(ids, np.diff(np.cumsum(lengths)[last], prepend=0))


def flat(arrays: Sequence[NDArray[np.integer]], dtype: np.dtype[np.unsignedinteger]) -> Encoded:
    """The ids of each text as one array."""
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    if not arrays:
        return Encoded(np.zeros(0, dtype), lengths)
    return Encoded(np.concatenate(arrays, dtype=dtype, casting="unsafe"), lengths)


def cut(text: str) -> list[str]:
    """Parts of a text, each without the space after it; at least one."""
    parts, start = [], 0
    while found := _WORD_END.search(text, start + PART_CHARACTERS):
        parts.append(text[start : found.start()])
        start = found.end()
    return [*parts, text[start:]]
