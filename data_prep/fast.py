"""The fast encoder: gigatoken, an optional library in Rust, held to sentencepiece's ids.

It is given the rules of ``bpe.rules`` and no special pieces, so that text can make none. Models
that are not plain (``bpe.departure``) and other versions of the library are refused, a self-test
runs when it is made, and one document in ``SAMPLE`` is encoded by sentencepiece too.
"""

import importlib.metadata
import json
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import bpe
from data_prep.encoder import Encoded, SentencepieceEncoder, flat
from data_prep.manifest import token_type
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import TitansError, UserError

LIBRARY, VERSION = "gigatoken", "0.10.0"
SAMPLE = 256
CACHE_BYTES = 2**28
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TESTED_PIECES = 20_000
_ENDS = 64  # characters at each end of a text that, with its length, decide on the sample


class FastEncoder:
    """Ids of the fast library.

    Args:
        tokenizer: a plain model.

    Raises:
        UserError: the library is missing or of another version, or the model is not plain.
        TitansError: the library's ids are not sentencepiece's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_type(tokenizer.vocab_size))
        self._reference = SentencepieceEncoder(tokenizer)
        proto = bpe.parse(tokenizer.content)
        if what := bpe.departure(proto):
            raise UserError(
                f"the fast encoder is not proven for this model: {what}",
                where=str(tokenizer.path),
                fix="use --encoder sentencepiece",
            )
        self._make = _library()
        self._library: Any = None
        self._description = _description(proto)
        self._renew()
        texts = list(_self_test(proto))
        self._compare(texts, self._ids(texts), tokenizer.encode_arrays(texts))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text.

        Raises:
            TitansError: a text of the sample has other ids than sentencepiece gives.
        """
        if _resident_bytes() - self._resident > CACHE_BYTES:
            self._renew()
        arrays = self._ids(texts)
        sample = [place for place, text in enumerate(texts) if _sampled(text)]
        if sample:
            chosen = [texts[place] for place in sample]
            ids, lengths = self._reference.encode(chosen)
            expected = np.split(ids, np.cumsum(lengths)[:-1])
            self._compare(chosen, [arrays[place] for place in sample], expected)
        return flat(arrays, self._dtype)

    def _renew(self) -> None:
        """Drop the library's cache of words, which knows no bound."""
        self._library = None
        self._library = self._make(self._description)
        self._resident = _resident_bytes()

    def _ids(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encode = self._library.encode
        return [encode(text) for text in texts]

    def _compare(
        self,
        texts: Sequence[str],
        arrays: Sequence[NDArray[np.integer]],
        expected: Sequence[NDArray[np.integer]],
    ) -> None:
        for text, ids, right in zip(texts, arrays, expected, strict=True):
            if not np.array_equal(ids, right):
                raise self._difference(text, ids, right)

    def _difference(
        self, text: str, ids: NDArray[np.integer], right: NDArray[np.integer]
    ) -> TitansError:
        shorter = min(len(ids), len(right))
        differing = np.flatnonzero(ids[:shorter] != right[:shorter])
        place = int(differing[0]) if len(differing) else shorter
        before = len(self._tokenizer.decode(right[:place].tolist()))
        return TitansError(
            f"the fast encoder gives {ids[place : place + 4].tolist()} where sentencepiece gives "
            f"{right[place : place + 4].tolist()}",
            where=f"token {place}, at {text[before : before + 20]!r}, of the document that begins "
            f"{text[:60]!r}",
            fix="prepare again, with --encoder sentencepiece, into another --output",
        )


def _library() -> Any:
    """What makes an encoder of the library from its description."""
    try:
        from gigatoken.gigatoken_rs import load_hf_json

        version = importlib.metadata.version(LIBRARY)
    except ImportError:
        version = "none"
    if version != VERSION:
        raise UserError(
            f"the fast encoder needs {LIBRARY} {VERSION}, installed is {version}",
            where="--encoder fast",
            fix="pip install 'titans-pretrain[fast]', or use --encoder sentencepiece",
        )
    return load_hf_json


def _description(proto: Any) -> str:
    """The model as the library reads it: the form of Hugging Face's ``tokenizer.json``."""
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": bpe.SPACE},
                    {"type": "Replace", "pattern": {"String": " "}, "content": bpe.SPACE},
                ],
            },
            "pre_tokenizer": None,
            "model": {
                "type": "BPE",
                "byte_fallback": True,
                "vocab": {piece.piece: place for place, piece in enumerate(proto.pieces)},
                "merges": bpe.rules(bpe.scores(proto)),
            },
        }
    )


def _self_test(proto: Any) -> Iterator[str]:
    """Texts with nearly all pieces, all special ones, runs of spaces and planes of characters."""
    pieces = list(bpe.scores(proto))
    special = [piece.piece for piece in proto.pieces if piece.type != bpe.NORMAL]
    yield from ("", *special, " ".join(special), "".join(special))
    longest = max(len(piece) for piece in pieces if not piece.strip(bpe.SPACE))
    runs = (" " * n for n in range(4 * longest + 2))
    yield from (before + run + after for run in runs for before, after in _AROUND)
    yield "".join(map(chr, range(0xD800)))
    yield "".join(map(chr, range(0xE000, 0x110000, 37)))
    draw = random.Random(0)
    for between in ("", " ", "\n"):
        chosen = draw.sample(pieces, min(len(pieces), _TESTED_PIECES))
        yield from (between.join(chosen[i : i + 50]) for i in range(0, len(chosen), 50))


_AROUND = (("", ""), ("", "a"), ("a", "a"), ("\n", "."), (bpe.SPACE, "\n"))


def _sampled(text: str) -> bool:
    """Whether a text belongs to the sample: the same texts in every preparation."""
    ends = text[:_ENDS] + text[-_ENDS:]
    return zlib.crc32(ends.encode(), len(text)) % SAMPLE == 0


def _resident_bytes() -> int:
    """Memory of this process, mapped files not counted."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * PAGE_BYTES
