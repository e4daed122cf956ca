"""From texts to ids: two encoders, which differ in speed and never in an id."""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep import bpe, proof
from data_prep.manifest import token_type
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import TitansError, UserError, nearest

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
    stands for the one taken out, so the parts' ids are the text's. A model that does not prove it
    when the encoder is made is given whole texts, and so is a sample of the documents.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_type(tokenizer.vocab_size))
        proto = bpe.parse(tokenizer.content)
        self._cuts = not bpe.departure(proto) and self._proven(list(proof.trials(proto)))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text.

        Raises:
            TitansError: a text of the sample has other ids than when it is encoded whole.
        """
        if not self._cuts:
            return flat(self._tokenizer.encode_arrays(texts), self._dtype)
        encoded = self._in_parts(texts, PART_CHARACTERS)
        sample = [place for place, text in enumerate(texts) if _is_compared(text)]
        chosen = [texts[place] for place in sample]
        ends = np.cumsum(encoded.lengths)
        starts = ends - encoded.lengths
        given = [encoded.ids[starts[place] : ends[place]] for place in sample]
        if found := self._difference(chosen, given):
            raise TitansError(
                f"in parts, sentencepiece itself {found[0]}",
                where=found[1],
                fix="report it with this document and the model: its texts cannot be cut",
            )
        return encoded

    def _proven(self, texts: list[str]) -> bool:
        """Whether texts cut after every word have the ids of the whole."""
        ids, lengths = self._in_parts(texts, 1)
        return not self._difference(texts, np.split(ids, np.cumsum(lengths)[:-1]))

    def _difference(self, texts: list[str], given: proof.Arrays) -> tuple[str, str] | None:
        expected = self._tokenizer.encode_arrays(texts)
        return proof.difference(self._tokenizer, texts, given, expected)

    def _in_parts(self, texts: Sequence[str], characters: int) -> Encoded:
        parts = [cut(text, characters) for text in texts]
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


def _is_compared(text: str) -> bool:
    return PART_CHARACTERS < len(text) <= proof.WHOLE_CHARACTERS and proof.is_sampled(text)


def cut(text: str, characters: int = PART_CHARACTERS) -> list[str]:
    """Parts of a text, each without the space after it; at least one.

    Args:
        text: to be cut.
        characters: that a part has at least, but for the last; 1 or more.
    """
    parts, start = [], 0
    while found := _WORD_END.search(text, start + characters):
        parts.append(text[start : found.start()])
        start = found.end()
    return [*parts, text[start:]]
