"""A window: the batches that make one training shard, and the held-out shard beside it.

Its documents are shuffled and written once: a tar of token arrays, where each document came from,
and a checksum of every block.
"""

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep.batch import COUNTS, ORIGIN, Batch
from data_prep.output import writing
from data_prep.settings import Settings
from data_prep.sources import permutation
from data_prep.tar import MASK_SUFFIX, BlockSums, TarWriter
from titans_pretrain.errors import UserError

DOCUMENTS = 1  # stream of the seed
PART = 2**16  # documents gathered at a time
KINDS = ("shard", "held_out")
Place = list[int]
"""Where in a task's work: the unit's place within the task, and the batch within the unit."""


class Window:
    """Consecutive batches of a task.

    Args:
        first: the place of its first batch.
    """

    def __init__(self, first: Place) -> None:
        self.first = self.last = first
        self.batches: list[Batch] = []
        self.bytes = 0
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))

    def add(self, unit: int, index: int, batch: Batch) -> None:
        """Take the next batch."""
        self.last = [unit, index + 1]
        self.bytes += batch.bytes
        self.counts.update(batch.counts)
        if len(batch.lengths):
            self.batches.append(batch)


@dataclass(frozen=True)
class Written:
    """A window on disk: its entry in the task's journal, and (vocabulary,) counts of its tokens.

    The counts are of the training shard alone.
    """

    entry: dict[str, Any]
    unigrams: NDArray[np.int64]


class WindowWriter:
    """Writes a task's windows.

    Args:
        output: the directory.
        task: which task's.
        settings: of the plan.
        vocab_size: ids are below it.
    """

    def __init__(self, output: Path, task: int, settings: Settings, vocab_size: int) -> None:
        self._output, self._task, self._settings = output, task, settings
        self._vocab_size = vocab_size

    def write(
        self, index: int, window: Window, recorded: Mapping[str, Any] | None = None
    ) -> Written:
        """Write both shards of a window.

        Args:
            index: of the window within the task.
            window: has at least one document.
            recorded: the entry of a window that is made again: its tokens have to come out equal.

        Raises:
            UserError: they did not; the old files stay.
            TitansError: a file cannot be written.
        """
        stem = f"{self._task:05d}-{index:05d}"
        if recorded and not window.batches:
            raise _changed(self._output / f"{stem}.tar")
        documents = _Documents(window.batches)
        count = len(documents.lengths)
        order = permutation(count, self._settings.seed, DOCUMENTS, self._task, index)
        held_out = np.concatenate([batch.held_out for batch in window.batches])[order]
        unigrams = np.zeros(self._vocab_size, np.int64)
        entry: dict[str, Any] = {
            "first": window.first,
            "last": window.last,
            "documents": dict(window.counts),
        }
        for kind, name, chosen, counts in (
            ("shard", stem, order[~held_out], unigrams),
            ("held_out", f"held-out-{stem}", order[held_out], None),
        ):
            known = recorded[kind] if recorded else None
            if recorded and (known is None) != (not len(chosen)):
                raise _changed(self._output / f"{name}.tar")
            entry[kind] = self._shard(name, documents, chosen, counts, known)
        if recorded and _without_provenance(entry) != _without_provenance(recorded):
            raise _changed(self._output / f"{stem}.tar")
        return Written(entry, unigrams)

    def _shard(
        self,
        stem: str,
        documents: "_Documents",
        order: NDArray[np.int64],
        unigrams: NDArray[np.int64] | None,
        recorded: Mapping[str, Any] | None,
    ) -> dict[str, Any] | None:
        """Write the tar, provenance and index of one shard: documents in an order, or none."""
        if not len(order):
            return None
        with _hashed(self._output / f"{stem}.tar") as file:
            sums = self._tar(file, stem, documents, order, unigrams)
            if recorded is not None and file.sha256 != recorded["sha256"]:
                raise _changed(self._output / f"{stem}.tar")
        return {
            "task": self._task,
            "tokens": int(documents.lengths[order].sum()),
            "documents": len(order),
            **file.entry,
            "provenance": self._small(f"{stem}.documents.parquet", documents.provenance(order)),
            "index": self._small(f"{stem}.index.npy", npy(sums)),
        }

    def _tar(
        self,
        file: "_Hashed",
        stem: str,
        documents: "_Documents",
        order: NDArray[np.int64],
        unigrams: NDArray[np.int64] | None,
    ) -> NDArray[np.uint64]:
        """Write the members; the block sums of tokens (blocks,), with masks (2, blocks)."""
        writer, sums, mask_sums = TarWriter(file), BlockSums(), BlockSums()
        size = self._settings.member_tokens
        masks = regroup(documents.masks(order), size)
        for member, ids in enumerate(regroup(documents.ids(order), size)):
            writer.write(f"{stem}-{member:06d}.npy", ids)
            sums.add(ids)
            if unigrams is not None:
                unigrams += np.bincount(ids, minlength=len(unigrams))
            if documents.masked:
                mask = next(masks)
                writer.write(f"{stem}-{member:06d}{MASK_SUFFIX}", mask)
                mask_sums.add(mask)
        writer.close()
        told = sums.finish()
        return np.stack([told, mask_sums.finish()]) if documents.masked else told

    def _small(self, name: str, content: bytes) -> dict[str, Any]:
        with _hashed(self._output / name) as file:
            file.write(content)
        return file.entry


class _Documents:
    """The documents of a window, by number, in the order in which they were read."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self.lengths = np.concatenate([batch.lengths for batch in batches])
        self._ends = np.concatenate([np.cumsum(batch.lengths) for batch in batches])
        counts = [len(batch.lengths) for batch in batches]
        self._batch = np.repeat(np.arange(len(batches), dtype=np.int32), counts)
        self._first = np.cumsum([0, *counts])
        self.masked = batches[0].mask is not None

    def ids(self, order: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Each document's tokens."""
        return self._pieces([batch.ids for batch in self._batches], order)

    def masks(self, order: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        """Each document's mask; none without prompts."""
        masks = [batch.mask for batch in self._batches if batch.mask is not None]
        return self._pieces(masks, order if self.masked else order[:0])

    def _pieces(
        self, arrays: Sequence[NDArray[Any]], order: NDArray[np.int64]
    ) -> Iterator[NDArray[Any]]:
        for part in _parts(order):
            ends = self._ends[part]
            places = (self._batch[part], ends - self.lengths[part], ends)
            for batch, start, end in zip(*(place.tolist() for place in places), strict=True):
                yield arrays[batch][start:end]

    def provenance(self, order: NDArray[np.int64]) -> bytes:
        """A parquet file: which document lies where in the shard's stream.

        ``tokens`` counts the EOS (and BOS).
        """
        sink, offset = io.BytesIO(), 0
        schema = ORIGIN.append(pa.field("offset", pa.int64())).append(
            pa.field("tokens", pa.int64())
        )
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for part in _parts(order):
                lengths = self.lengths[part]
                ends = offset + np.cumsum(lengths)
                columns = [*self._origin(part).columns, ends - lengths, lengths]
                writer.write_table(pa.table(columns, schema=schema))
                offset = int(ends[-1])
        return sink.getvalue()

    def _origin(self, order: NDArray[np.int64]) -> pa.Table:
        """Where documents are from, one batch looked at after the other."""
        by_batch = np.argsort(self._batch[order], kind="stable")
        chosen, starts = np.unique(self._batch[order][by_batch], return_index=True)
        taken = [
            self._batches[batch].origin.take(pa.array(numbers - self._first[batch]))
            for batch, numbers in zip(
                chosen.tolist(), np.split(order[by_batch], starts[1:]), strict=True
            )
        ]
        back = np.empty_like(by_batch)
        back[by_batch] = np.arange(len(order))
        return pa.Table.from_batches(taken).take(pa.array(back))


def _parts(order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """An order, a bounded number of documents at a time."""
    return (order[first : first + PART] for first in range(0, len(order), PART))


class _Hashed:
    """A file under way that knows its size and checksum."""

    def __init__(self, name: str, handle: IO[bytes]) -> None:
        self._name, self._handle = name, handle
        self._hash, self._bytes = hashlib.sha256(), 0

    def write(self, content: Any, /) -> None:
        """Append bytes."""
        self._handle.write(content)
        self._hash.update(content)
        self._bytes += len(content) if isinstance(content, bytes) else content.nbytes

    @property
    def sha256(self) -> str:
        """Of what was written so far, hex."""
        return self._hash.hexdigest()

    @property
    def entry(self) -> dict[str, Any]:
        """Name, bytes and checksum, as manifests tell them."""
        return {"name": self._name, "bytes": self._bytes, "sha256": self.sha256}


@contextlib.contextmanager
def _hashed(path: Path) -> Iterator[_Hashed]:
    """A whole file or none."""
    with writing(path) as handle:
        yield _Hashed(path.name, handle)


def regroup(arrays: Iterable[NDArray[Any]], size: int) -> Iterator[NDArray[Any]]:
    """The values of arrays, ``size`` at a time; the last array is shorter."""
    held: list[NDArray[Any]] = []
    count = 0
    for array in arrays:
        rest = array
        while count + len(rest) >= size:
            cut = size - count
            yield np.concatenate([*held, rest[:cut]])
            held, count, rest = [], 0, rest[cut:]
        held.append(rest)
        count += len(rest)
    if count:
        yield np.concatenate(held)


def npy(array: NDArray[Any]) -> bytes:
    """An array as the bytes of a ``.npy`` file."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, array, version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def _without_provenance(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A window's entry without the bytes that depend on the version of pyarrow."""
    shards = {kind: entry[kind] and entry[kind] | {"provenance": ""} for kind in KINDS}
    return {**entry, **shards}


def _changed(path: Path) -> UserError:
    return UserError(
        f"{path.name}, made again, is not as recorded: the input or the tokenizer changed",
        where=str(path),
        fix="restore the input as it was, or prepare into an empty --output",
    )
