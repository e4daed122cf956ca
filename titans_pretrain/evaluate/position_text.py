"""Long documents to score, from text files or from prepared data."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from titans_pretrain.errors import Misfit, UserError
from titans_pretrain.evaluate import heldout
from titans_pretrain.evaluate.loaded import Loaded
from titans_pretrain.evaluate.text_tokens import whole_ids
from titans_pretrain.files import sha256_file

READ_BYTES = 32  # of text for each token wanted: more than any tokenizer's tokens have


@dataclass(frozen=True)
class Document:
    """What is read from its first token on.

    Attributes:
        tokens: (T + 1,) int64 on the host.
        counts: (T,) bool, which targets count; None counts all.
        joined: whether it is several documents, one after the other.
    """

    tokens: Any
    counts: Any
    joined: bool


class Source(Protocol):
    """Where documents come from."""

    def identity(self) -> dict[str, Any]:
        """What tells its content from any other, JSON values."""

    def documents(self, model: Loaded, length: int, count: int) -> Iterator[Document]:
        """At most ``count`` documents of ``length`` tokens and one more.

        Raises:
            UserError: there is none, or it does not fit the model.
        """


class TextFiles:
    """Text files, a document each; those that are too short are joined with an EOS between.

    Args:
        paths: UTF-8 files, read from their beginning as far as needed.

    Raises:
        UserError: one cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        try:
            self._hashes = [sha256_file(path) for path in paths]
        except OSError as error:
            raise UserError(
                f"the text cannot be read: {error.strerror}",
                where=f"--text {error.filename}",
                fix="name text files",
            ) from None

    def identity(self) -> dict[str, Any]:
        """The files' hashes, in order."""
        return {"text": self._hashes}

    def documents(self, model: Loaded, length: int, count: int) -> Iterator[Document]:
        """Documents in the order of the files; a long one's end is left out."""
        import torch

        end = model.tokenizer.eos_token_id
        waiting = array("q")
        found = parts = total = 0
        for path in self._paths:
            ids = whole_ids(model.tokenizer, _beginning(path, READ_BYTES * (length + 1)))
            waiting, parts, total = waiting + ids, parts + 1, total + len(ids)
            if len(waiting) > length:
                tokens = torch.frombuffer(waiting, dtype=torch.int64)
                yield Document(tokens[: length + 1], None, parts > 1)
                waiting, parts, found = array("q"), 0, found + 1
                if found == count:
                    return
            elif end is not None:
                waiting.append(end)
        if not found:
            raise Misfit(
                f"the text files hold {total} tokens, no document of {length + 1}",
                where="--text",
                fix="give more or longer files, or smaller --lengths",
            )


class HeldOut:
    """Sequences that prepared data holds out, as the trainer's validation reads them.

    Args:
        data: path or URL of a manifest.json.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, data: str) -> None:
        from titans_pretrain.data.mixture import Corpus

        self._corpus = Corpus.open([(data, 1.0)])

    def identity(self) -> dict[str, Any]:
        """The data's fingerprint."""
        return {"data": self._corpus.fingerprint}

    def documents(self, model: Loaded, length: int, count: int) -> Iterator[Document]:
        """Held-out sequences, each read as one document wherever others begin in it."""
        facts = heldout.training_facts(model.directory)
        source = self._corpus.sources[0]
        if not source.held_out_share and "validation_fraction" not in facts:
            raise Misfit(
                "the model does not tell which share of the data its training left out",
                where=f"--data {source.place}",
                fix="give data prepared with --held-out, or text files with --text",
            )
        choice = heldout.Choice(sequence_length=length)
        loader = heldout.held_out(self._corpus, facts, choice, separates=False)
        heldout.check_fit(model.network, model.tokenizer, self._corpus, length)
        for row in loader.validation_batches(sequences=1, limit=count, rank=0, ranks=1):
            tokens = row.tokens[0]
            counts = None if row.target_mask is None else row.target_mask[0]
            joined = bool((tokens[:-1] == self._corpus.eos_id).any())
            yield Document(tokens, counts, joined)


def _beginning(path: Path, size: int) -> str:
    """The first bytes of a file as text, but for a character that the end cuts."""
    with open(path, "rb") as handle:
        content, more = handle.read(size), handle.read(1)
    for cut in range(4 if more else 1):
        try:
            return content[: len(content) - cut].decode()
        except UnicodeDecodeError:
            continue
    raise UserError("it is not UTF-8 text", where=f"--text {path}", fix="give text files")
