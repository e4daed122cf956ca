"""The fast encoder: gigatoken, an optional library in Rust, held to sentencepiece's ids.

It is given the rules of ``bpe.rules`` and no special pieces, so that text can make none. Models
that are not plain (``bpe.departure``) and other versions of the library are refused, a self-test
runs when it is made, and a sample of the documents is encoded by sentencepiece too.
"""

import ctypes
import importlib.metadata
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import bpe, proof
from data_prep.encoder import Encoded, SentencepieceEncoder, flat
from data_prep.manifest import token_type
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import TitansError, UserError

LIBRARY, VERSION = "gigatoken", "0.10.0"
CACHE_BYTES = 2**26
CHECK_CHARACTERS = 2**20  # of text, after which the cache is looked at
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class FastEncoder:
    """Ids of the fast library.

    Args:
        tokenizer: a plain model.

    Raises:
        UserError: the library is missing or of another version, the model is not plain, or the
            library's ids are not sentencepiece's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_type(tokenizer.vocab_size))
        proto = bpe.parse(tokenizer.content)
        if what := bpe.departure(proto):
            raise _unproven(tokenizer, what)
        self._make = _library()
        self._library: Any = None
        self._description = _description(proto)
        self._used = _resident_bytes()
        self._renew()
        texts = list(proof.trials(proto))
        expected = tokenizer.encode_arrays(texts)
        if found := proof.difference(tokenizer, texts, self._ids(texts), expected):
            raise _unproven(tokenizer, f"of the text {found[1]} it {found[0]}")

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text.

        Raises:
            TitansError: a text of the sample has other ids than sentencepiece gives.
        """
        self._bound_cache(0)
        arrays = self._ids(texts)
        sample = [place for place, text in enumerate(texts) if proof.is_sampled(text)]
        chosen = [texts[place] for place in sample]
        given = [arrays[place] for place in sample]
        found = proof.difference(self._tokenizer, chosen, given, self._expected(chosen))
        if found:
            raise TitansError(
                f"the fast encoder {found[0]}",
                where=found[1],
                fix="prepare again, with --encoder sentencepiece, into another --output",
            )
        return flat(arrays, self._dtype)

    @cached_property
    def _reference(self) -> SentencepieceEncoder:
        return SentencepieceEncoder(self._tokenizer)

    def _expected(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """What sentencepiece gives for whole texts, and for very long ones in parts."""
        return [
            self._reference.encode([text]).ids
            if len(text) > proof.WHOLE_CHARACTERS
            else self._tokenizer.encode_arrays([text])[0]
            for text in texts
        ]

    def _ids(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        arrays: list[NDArray[np.uint32]] = []
        held = unchecked = 0
        for text in texts:
            arrays.append(self._library.encode(text))
            held += arrays[-1].nbytes
            unchecked += len(text)
            if unchecked >= CHECK_CHARACTERS:
                self._bound_cache(held)
                unchecked = 0
        return arrays

    def _bound_cache(self, held: int) -> None:
        """Drop the library's cache of words, which knows no bound, when it has grown.

        Args:
            held: bytes of ids that are not the library's.
        """
        used = _resident_bytes() - held
        self._used = min(self._used, used)
        if used - self._used > CACHE_BYTES:
            self._renew(held)

    def _renew(self, held: int = 0) -> None:
        self._library = None
        _give_back()
        self._library = self._make(self._description)
        self._used = _resident_bytes() - held


def _unproven(tokenizer: Tokenizer, why: str) -> UserError:
    return UserError(
        f"the fast encoder is not proven for this model: {why}",
        where=str(tokenizer.path),
        fix="use --encoder sentencepiece",
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


def _give_back() -> None:
    """Return freed memory to the system, where the C library can; else it piles up in pieces."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _resident_bytes() -> int:
    """Memory of this process, mapped files not counted."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * PAGE_BYTES
