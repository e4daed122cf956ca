"""Holding an encoder to sentencepiece's ids: texts to try it on, and a sample of the documents."""

import random
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import bpe
from data_prep.tokenizer import Tokenizer

SAMPLE = 256
WHOLE_CHARACTERS = 200_000  # of a text whose whole takes sentencepiece twice as long as its parts
_TESTED_PIECES = 20_000
_ENDS = 64  # characters at each end of a text that, with its length, decide on the sample
_AROUND = (("", ""), ("", "a"), ("a", "a"), ("\n", "."), (bpe.SPACE, "\n"))

Arrays = Sequence[NDArray[np.integer]]


def trials(proto: Any) -> Iterator[str]:
    """Texts with nearly all pieces, all special ones, runs of spaces and planes of characters."""
    pieces = list(bpe.scores(proto))
    special = [piece.piece for piece in proto.pieces if piece.type != bpe.NORMAL]
    yield from ("", *special, " ".join(special), "".join(special))
    longest = max((len(piece) for piece in pieces if not piece.strip(bpe.SPACE)), default=0)
    runs = (" " * n for n in range(4 * longest + 2))
    yield from (before + run + after for run in runs for before, after in _AROUND)
    yield "".join(map(chr, range(0xD800)))
    yield "".join(map(chr, range(0xE000, 0x110000, 37)))
    draw = random.Random(0)
    for between in ("", " ", "\n"):
        chosen = draw.sample(pieces, min(len(pieces), _TESTED_PIECES))
        yield from (between.join(chosen[i : i + 50]) for i in range(0, len(chosen), 50))


def is_sampled(text: str) -> bool:
    """Whether a text belongs to the sample: the same texts in every preparation."""
    ends = text[:_ENDS] + text[-_ENDS:]
    return zlib.crc32(ends.encode(), len(text)) % SAMPLE == 0


def difference(
    tokenizer: Tokenizer, texts: Sequence[str], given: Arrays, expected: Arrays
) -> tuple[str, str] | None:
    """What the first text's ids that differ are and should be, and where, in words; None: nowhere.

    Args:
        tokenizer: tells the text of ids.
        texts: that were encoded.
        given: ids of each, (tokens,).
        expected: those that sentencepiece gives, (tokens,).
    """
    for text, ids, right in zip(texts, given, expected, strict=True):
        if not np.array_equal(ids, right):
            shorter = min(len(ids), len(right))
            differing = np.flatnonzero(ids[:shorter] != right[:shorter])
            place = int(differing[0]) if len(differing) else shorter
            before = len(tokenizer.decode(right[:place].tolist()))
            return (
                f"gives {ids[place : place + 4].tolist()} where sentencepiece gives "
                f"{right[place : place + 4].tolist()}",
                f"token {place}, at {text[before : before + 20]!r}, of the document that begins "
                f"{text[:60]!r}",
            )
    return None
