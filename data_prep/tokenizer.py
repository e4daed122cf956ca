"""The tokenizer: a sentencepiece model, trained Llama-2 style or imported.

Plain sentencepiece never makes a control piece out of text, so EOS marks document ends exactly;
a model in which text could forge one is refused when it is loaded.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from data_prep.output import writing
from titans_pretrain.errors import UserError

TRAINER_THREADS = 16  # stored in the model, so it has to be the same on every machine
LINE_CHARACTERS = 4096


class Tokenizer:
    """A loaded model.

    Args:
        path: a sentencepiece ``.model`` file.

    Raises:
        UserError: no such file, no sentencepiece model, or no EOS that only we can write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.content = _content(self.path)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self.content)
        except RuntimeError:
            raise UserError(
                "no sentencepiece model", where=str(path), fix="give a .model file"
            ) from None
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        bos = self._model.bos_id()
        self.bos_id: int | None = bos if bos >= 0 else None
        if self.eos_id < 0:  # also where EOS is a piece that text can make
            raise UserError(
                "the model has no EOS piece that only we can write",
                where=str(path),
                fix="give a model whose EOS is a control piece",
            )
        self._threads = len(os.sched_getaffinity(0))

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text, each (tokens,), no BOS, no EOS; on one thread."""
        return self._model.encode(list(texts), out_type="numpy", num_threads=1)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, no BOS, no EOS; on all cores."""
        return self._model.encode(list(texts), out_type=int, num_threads=self._threads)

    def encode_after(self, prompt: str, text: str) -> tuple[list[int], NDArray[np.uint8]]:
        """The ids of ``prompt + text`` and 1 for each that holds any of ``text``, (tokens,)."""
        pieces = self._model.encode(prompt + text, out_type="proto").pieces
        lengths = np.array([len(piece.surface) for piece in pieces], np.int64)
        ends = np.cumsum(lengths)
        # A character's bytes have no surface but the last, so their start tells where they are.
        own = (ends > len(prompt)) | (ends - lengths >= len(prompt))
        return [piece.id for piece in pieces], own.astype(np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._model.decode([int(token) for token in ids])


def train(
    texts: Iterable[str], vocab_size: int, output: Path, *, sample_bytes: int = 2**28
) -> Tokenizer:
    """Train a Llama-2 style model (BPE, byte fallback, split digits, spaces kept) and write it.

    Memory depends on the sample, not on the size of the input: about 16 bytes for each byte of
    prose (34 where the sample is a few MB), 75 where hardly a word occurs twice, 100 where no
    spaces part the words, as in Chinese.

    Args:
        texts: documents; those after the first ``sample_bytes`` bytes are not read.
        vocab_size: pieces, the 3 special and 256 byte pieces included.
        output: the ``.model`` file.
        sample_bytes: bound on the text used, UTF-8 bytes.

    Raises:
        UserError: no text, or a vocabulary that the text cannot fill or that cannot hold it.
    """
    model = io.BytesIO()
    lines = _lines(texts, sample_bytes)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, **LLAMA2
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return _save(model.getvalue(), output)


def import_model(source: Path, output: Path) -> Tokenizer:
    """Check an existing model and copy it.

    Raises:
        UserError: as for ``Tokenizer``.
    """
    return _save(Tokenizer(source).content, output)


LLAMA2: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "split_digits": True,
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "character_coverage": 0.99995,
    "max_sentence_length": 2**20,
    "num_threads": TRAINER_THREADS,
    "minloglevel": 2,
}


def _lines(texts: Iterable[str], sample_bytes: int) -> Iterator[str]:
    """Lines of bounded length, so that no piece holds a newline and none is skipped as too long."""
    left = sample_bytes
    for line in (line for text in texts for line in text.split("\n")):
        for start in range(0, len(line), LINE_CHARACTERS):
            part = line[start : start + LINE_CHARACTERS]
            if part.strip():
                left -= len(part.encode())
                yield part
            if left <= 0:
                return


def _training_error(message: str, vocab_size: int) -> UserError:
    if match := re.search(r"too high \((\d+)\)\D*(\d+)", message):
        return UserError(
            f"a vocabulary of {vocab_size} pieces is too large for this text",
            where="--vocab-size",
            fix=f"use at most {match[2]}, or give more text",
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"a vocabulary of {vocab_size} pieces is too small: the bytes and the text's "
            f"characters alone take {match[1]}",
            where="--vocab-size",
            fix=f"use more than {match[1]}",
        )
    if "sentences_.empty()" in message:
        return UserError("the input holds no text", where="--input", fix="give files with text")
    return UserError(f"sentencepiece: {message}", where="--input", fix="see the message")


def _save(content: bytes, output: Path) -> Tokenizer:
    with writing(output) as handle:
        handle.write(content)
    return Tokenizer(output)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer: {error.strerror}",
            where=str(path),
            fix="make one with `titans data tokenizer`",
        ) from None
