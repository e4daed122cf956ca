"""From rows to ids: a task's units, filtered and encoded one batch of rows at a time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep import encoder, filters
from data_prep.inputs import Input
from data_prep.manifest import token_type
from data_prep.rows import Row
from data_prep.settings import Settings
from data_prep.sources import Layout, Reader
from data_prep.tokenizer import Tokenizer
from titans_pretrain.errors import UserError

COUNTS = (
    *("read", "kept", "empty", "score", "language", "short", "long", "duplicate", "bad"),
    *("held_out", "repaired"),
)
DOCUMENT_BYTES = 64  # a document's length, place and turn, while its window is written
ORIGIN = pa.schema([(name, pa.string()) for name in ("id", "url", "dump")])

Unit = tuple[int, Input, Layout, int]
"""A unit's ordinal in the plan, its file, the file's layout, and its number within the file."""


class Span(NamedTuple):
    """Batches of one unit: ``unit`` is its place within the task, ``stop`` None: to its end."""

    unit: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of at most 1000 rows; documents lie one after the other.

    Attributes:
        ids: (tokens,) of the vocabulary's dtype, each document with its EOS (and BOS).
        mask: (tokens,) uint8, 1 = train on this token as a target; None without prompts.
        lengths: (documents,) tokens of each, int64.
        held_out: (documents,) bool.
        origin: id, url and dump of each.
        counts: of the rows, by ``COUNTS``.
    """

    ids: NDArray[Any]
    mask: NDArray[np.uint8] | None
    lengths: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    origin: pa.RecordBatch
    counts: dict[str, int]

    @property
    def bytes(self) -> int:
        """Memory that it takes; a function of its values, whichever process made it."""
        names = sum(pc.sum(pc.binary_length(column)).as_py() or 0 for column in self.origin)
        masks = 0 if self.mask is None else self.mask.nbytes
        return self.ids.nbytes + masks + names + DOCUMENT_BYTES * len(self.lengths)


@dataclass(frozen=True)
class Work:
    """All that a process needs to encode a task's units; it travels to the workers.

    Attributes:
        units: the task's, in order.
        settings: of the plan.
        model: the tokenizer's file.
        encoder: its kind.
        duplicates: which documents to drop; None keeps all.
        spool: folder of unpacked files that the processes share; None where none is packed.
    """

    units: Sequence[Unit]
    settings: Settings
    model: Path
    encoder: str
    duplicates: Path | None = None
    spool: Path | None = None


class Encoding:
    """Reads and encodes units in this process; use as a context manager."""

    def __init__(self, work: Work) -> None:
        self._work, self._settings = work, work.settings
        self._tokenizer = Tokenizer(work.model)
        self._dtype = np.dtype(token_type(self._tokenizer.vocab_size))
        if self._settings.prompt_column and work.encoder != "sentencepiece":
            raise UserError(
                f"--encoder {work.encoder} gives no places of pieces, which masks of prompts need",
                where="--encoder",
                fix="use --encoder sentencepiece",
            )
        self._encoder = encoder.make(work.encoder, self._tokenizer)
        self._reader = Reader(work.settings.columns(), work.spool)
        self._duplicates = _open_duplicates(work.duplicates)

    def __enter__(self) -> "Encoding":
        self._reader.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def batches(self, spans: Sequence[Span]) -> Iterator[tuple[Span, int, Batch]]:
        """The batches of spans, in order, each with its span and its number within the unit."""
        for span in spans:
            for index, batch in self.span(span):
                yield span, index, batch

    def span(self, span: Span) -> Iterator[tuple[int, Batch]]:
        """The batches of one span, each with its number within the unit.

        Raises:
            UserError: a source that cannot be read.
            TitansError: ids that differ from sentencepiece's.
        """
        ordinal, item, layout, unit = self._work.units[span.unit]
        first = 0
        for index, rows in enumerate(self._reader.rows(item, layout, unit)):
            if span.stop is not None and index >= span.stop:
                return
            if index >= span.start:
                yield index, self._batch(rows, ordinal, first)
            first += len(rows)

    def _batch(self, rows: list[Row], ordinal: int, first: int) -> Batch:
        """Filter and encode rows, of which the first has the number ``first`` within its unit."""
        verdicts = [filters.verdict(row, self._settings) for row in rows]
        if self._duplicates is not None:
            dropped = self._duplicates.dropped(ordinal, first, len(rows))
            for index in np.flatnonzero(dropped).tolist():
                if verdicts[index] == "kept":
                    verdicts[index] = "duplicate"
        kept = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict == "kept"]
        share = self._settings.held_out
        sides = [filters.is_held_out(row.text, share, row.prompt) for row in kept]
        held_out = np.array(sides, np.bool_)
        counts = Counter(dict.fromkeys(COUNTS, 0))
        counts.update(verdicts)
        counts["read"], counts["held_out"] = len(rows), int(held_out.sum())
        counts["repaired"] = sum(row.repaired for row in kept)
        columns = [
            pa.array([getattr(row, name) for row in kept], pa.string()) for name in ORIGIN.names
        ]
        origin = pa.RecordBatch.from_arrays(columns, schema=ORIGIN)
        return Batch(*self._encode(kept), held_out, origin, dict(counts))

    def _encode(
        self, kept: list[Row]
    ) -> tuple[NDArray[Any], NDArray[np.uint8] | None, NDArray[np.int64]]:
        """Ids, mask and lengths, with EOS (and BOS)."""
        masks: list[NDArray[np.uint8]] | None = None
        if self._settings.prompt_column:
            pairs = [self._tokenizer.encode_after(row.prompt, row.text) for row in kept]
            documents = [np.asarray(ids, self._dtype) for ids, _ in pairs]
            masks = [mask for _, mask in pairs]
        else:
            encoded = self._encoder.encode([row.text for row in kept])
            documents = _split(encoded.ids, encoded.lengths)
        bos_id = self._tokenizer.bos_id
        bos = [bos_id] if self._settings.bos and bos_id is not None else []
        ids = _framed(documents, bos, [self._tokenizer.eos_id], self._dtype)
        mask = None if masks is None else _framed(masks, [0] * len(bos), [1], np.dtype(np.uint8))
        extra = len(bos) + 1
        lengths = np.array([len(document) + extra for document in documents], np.int64)
        return ids, mask, lengths


def _split(array: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    ends = np.cumsum(lengths).tolist()
    return [array[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _framed(
    parts: list[NDArray[Any]], before: list[int], after: list[int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Parts one after the other, each with the same values before and after it."""
    head, tail = np.array(before, dtype), np.array(after, dtype)
    pieces = [piece for part in parts for piece in (head, part, tail)]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)


def _open_duplicates(path: Path | None) -> Any:
    if path is None:
        return None
    from data_prep.duplicates import Duplicates

    return Duplicates.open(path)
