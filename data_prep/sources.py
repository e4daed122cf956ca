"""Reading text out of parquet, arrow, jsonl[.gz|.zst] and txt files.

The unit of work is the row group: of parquet its own, of arrow a record batch, of jsonl every 1000
lines, a whole .txt file (one document). Any unit can be read on its own, in any order.
"""

import contextlib
import gzip
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from numpy.typing import NDArray

from data_prep import inputs, rows, spool
from data_prep.inputs import Input
from data_prep.rows import Columns as Columns
from data_prep.rows import Row as Row
from titans_pretrain.errors import UserError

ROWS = 1000  # of a unit of jsonl, and at most of a batch
BATCH_CHARACTERS = 2**23  # a batch ends with the row that reaches them
COLUMN_BYTES = 2**20  # of columns turned into rows at a time, as far as their sizes are known
LINE_BYTES = 2**23  # of lines read at a time
OPEN_FILES = 16
READERS = 32  # files looked at, at the same time
PARQUET_BUFFER = 2**20  # bytes read ahead of a column
REMOTE_BUFFER = 2**23  # the same, where each read is a request
WHOLE_GROUP = 2**28  # bytes of a remote row group that may be fetched at once
ARROW_FILE = b"ARROW1"
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class Layout:
    """How a file is cut: the number of units and, for jsonl and arrow streams, their starts.

    Attributes:
        units: how many.
        starts: the byte at which each begins.
    """

    units: int
    starts: tuple[int, ...] = ()


def documents(items: Sequence[Input], columns: Columns) -> Iterator[str]:
    """The texts of all inputs in a fixed random order, so that any start is a sample.

    Some files are drawn and their units shuffled, then the next: whoever stops early reads few.
    """
    drawn = [items[index] for index in shuffled(len(items), 0)]
    with Reader(columns) as reader:
        for first in range(0, len(drawn), READERS):
            some = drawn[first : first + READERS]
            units = [
                (item, shape, unit)
                for item, shape in zip(some, layouts(some), strict=True)
                for unit in range(shape.units)
            ]
            for index in shuffled(len(units), 1, first):
                for batch in reader.rows(*units[index]):
                    yield from (row.prompt + row.text for row in batch if not row.problem)


def shuffled(count: int, *key: int) -> list[int]:
    """``permutation`` as a list."""
    return permutation(count, *key).tolist()


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that depends on the key alone, on any numpy."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")


def layouts(items: Sequence[Input]) -> list[Layout]:
    """``layout`` of every file, several looked at together."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(layout, items))


def layout(item: Input) -> Layout:
    """Count a file's units; reads a parquet file's footer, or a jsonl file once.

    Raises:
        UserError: the file cannot be read.
    """
    kind = inputs.kind(item.url)
    with _readable(item):
        if kind == "parquet":
            with pq.ParquetFile(_native(item)) as file:
                return Layout(file.num_row_groups)
        if kind == "arrow":
            return _arrow_layout(item)
        return _lines_layout(item) if kind == "jsonl" else Layout(1)


def _lines_layout(item: Input) -> Layout:
    """A unit begins at the file's start and after every 1000th line end, unless there it ends."""
    starts, lines, position = [0], 0, 0
    for block in spool.blocks(item):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        starts += (position + 1 + ends[-(lines + 1) % ROWS :: ROWS]).tolist()
        lines, position = lines + len(ends), position + len(block)
    if starts[-1] == position:
        starts.pop()
    return Layout(len(starts), tuple(starts))


def _arrow_layout(item: Input) -> Layout:
    with _native(item) as handle:
        if handle.read(len(ARROW_FILE)) == ARROW_FILE:
            return Layout(pa.ipc.open_file(handle).num_record_batches)
        handle.seek(max(0, item.size - len(ARROW_END)))
        if handle.read() != ARROW_END:
            raise EOFError("the stream has no end, it was cut")
        starts, position = [], 0
        while position < item.size - len(ARROW_END):
            handle.seek(position)
            message = pa.ipc.read_message(handle)
            if message.type == "record batch":
                starts.append(position)
            elif message.type != "schema":
                raise UserError(
                    f"a stream with a {message.type} cannot be read in parts",
                    where=item.url,
                    fix="write it as an Arrow file or as parquet",
                )
            position = handle.tell()
    return Layout(len(starts), tuple(starts))


class Reader:
    """Reads units; keeps the last files open.

    Use as a context manager: the end closes them.

    Args:
        columns: which hold what.
        spool: folder of unpacked files (``spool.shared``) that several readers use; None: one of
            its own, made when needed.
    """

    def __init__(self, columns: Columns, spool: Path | None = None) -> None:
        self.columns = columns
        self._spool = spool
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._own = contextlib.ExitStack()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._open.values():
            handle.close()
        self._open.clear()
        self._own.close()

    def rows(self, item: Input, shape: Layout, unit: int) -> Iterator[list[Row]]:
        """A unit's rows, at most 1000 at a time, and fewer where texts are long.

        Raises:
            UserError: a damaged file, a missing column, or a row that cannot be read (text that
                is no UTF-8, invalid JSON) where bad rows stop.
        """
        batch: list[Row] = []
        characters = 0
        for row in self._each_row(item, shape, unit):
            batch.append(row)
            characters += len(row.text) + len(row.prompt)
            if len(batch) == ROWS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _each_row(self, item: Input, shape: Layout, unit: int) -> Iterator[Row]:
        kind = inputs.kind(item.url)
        if kind == "parquet":
            return self._parquet_rows(item, unit)
        if kind == "arrow":
            return self._arrow_rows(item, shape, unit)
        if kind == "jsonl":
            return self._jsonl_rows(item, shape, unit)
        return self._txt_row(item)

    def _parquet_rows(self, item: Input, unit: int) -> Iterator[Row]:
        with _readable(item):
            file = self._kept(item, lambda: _Parquet(item))
        for name in self.columns.required():
            if name not in file.names:
                raise rows.no_column(name, file.names, item.url)
        wanted = [name for name in self.columns.wanted() if name in file.names]
        with _readable(item):
            batches = file.batches(unit, wanted)
        first = 0
        while True:
            with _readable(item):
                batch = next(batches, None)
            if batch is None:
                return
            yield from self._rows(batch, item, unit, first)
            first += batch.num_rows

    def _arrow_rows(self, item: Input, shape: Layout, unit: int) -> Iterator[Row]:
        with _readable(item):
            batch = self._kept(item, lambda: _Arrow(item, shape)).batch(unit)
        size = _at_a_time(batch.num_rows, batch.nbytes)
        for first in range(0, batch.num_rows, size):
            yield from self._rows(batch.slice(first, size), item, unit, first)

    def _rows(self, batch: pa.RecordBatch, item: Input, unit: int, first: int) -> list[Row]:
        def where(index: int) -> str:
            return f"{item.url}, row {first + index} of row group {unit}"

        return rows.from_batch(batch, self.columns, item.url, where)

    def _jsonl_rows(self, item: Input, shape: Layout, unit: int) -> Iterator[Row]:
        def where(index: int) -> str:
            return f"{item.url}:{unit * ROWS + 1 + index}"

        for index, line in enumerate(self._unit_lines(item, shape, unit)):
            yield rows.from_line(line, self.columns, where, index)

    def _unit_lines(self, item: Input, shape: Layout, unit: int) -> Iterator[bytes]:
        """A unit's lines without their ends, a few MiB of them in memory."""
        position = shape.starts[unit]
        end = shape.starts[unit + 1] if unit + 1 < len(shape.starts) else None
        with _readable(item):
            handle = self._kept(item, lambda: self._lines(item))
        begun: list[bytes] = []  # a line of which the end has not been read
        while position != end:
            with _readable(item):
                handle.seek(position)
                left = LINE_BYTES if end is None else end - position
                content = handle.read(min(LINE_BYTES, left))
                if not content and end is not None:
                    raise EOFError(f"it ends before byte {end}")
            if not content:
                break
            position += len(content)
            first, *others = content.split(b"\n")
            begun.append(first)
            if others:
                yield b"".join(begun)
                yield from others[:-1]
                begun = [others[-1]]
        if last := b"".join(begun):
            yield last

    def _txt_row(self, item: Input) -> Iterator[Row]:
        with _readable(item), inputs.open_file(item) as handle:
            content = handle.read()
        yield rows.from_bytes(content, item.name, self.columns, item.url)

    def _lines(self, item: Input) -> IO[bytes]:
        if not spool.is_packed(item):
            return inputs.open_file(item)
        for url in [url for url in self._open if url.endswith(spool.PACKED)]:
            self._open.pop(url).close()  # a removed file keeps its disk space while it is open
        if self._spool is None:
            self._spool = self._own.enter_context(spool.shared())
        return spool.unpacked(self._spool, item)

    def _kept(self, item: Input, make: Callable[[], Any]) -> Any:
        """The open file, opened when it is not; the one used longest ago is closed."""
        if item.url not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[item.url] = make()
        self._open.move_to_end(item.url)
        return self._open[item.url]


class _Arrow:
    """An open Arrow file or stream and what it begins with."""

    def __init__(self, item: Input, shape: Layout) -> None:
        self._handle = _native(item)
        self._starts = shape.starts
        opened = pa.ipc.open_stream if shape.starts else pa.ipc.open_file
        self._source = opened(self._handle)

    def batch(self, unit: int) -> pa.RecordBatch:
        """One record batch."""
        if not self._starts:
            return self._source.get_batch(unit)
        self._handle.seek(self._starts[unit])
        message = pa.ipc.read_message(self._handle)
        return pa.ipc.read_record_batch(message, self._source.schema)

    def close(self) -> None:
        self._handle.close()


class _Parquet:
    """An open parquet file and its footer.

    Attributes:
        names: of the columns, those within structs dotted.
    """

    def __init__(self, item: Input) -> None:
        self._handle = _native(item)
        self._remote = inputs.is_remote(item.url)
        self._footer = pq.ParquetFile(self._handle).metadata
        self.names = rows.known(self._footer.schema.to_arrow_schema())

    def batches(self, unit: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """A row group's columns; what was fetched of them is dropped with the last batch.

        Of a remote file they are fetched together, unless they are large; of a local one bit by
        bit.
        """
        group = self._footer.row_group(unit)
        inside = tuple(f"{name}." for name in columns)
        chunks = [
            chunk
            for chunk in map(group.column, range(group.num_columns))
            if chunk.path_in_schema in columns or chunk.path_in_schema.startswith(inside)
        ]
        whole = self._remote and sum(one.total_compressed_size for one in chunks) <= WHOLE_GROUP
        buffer = 0 if whole else REMOTE_BUFFER if self._remote else PARQUET_BUFFER
        file = pq.ParquetFile(
            self._handle, metadata=self._footer, pre_buffer=whole, buffer_size=buffer
        )
        size = _at_a_time(group.num_rows, sum(one.total_uncompressed_size for one in chunks))
        yield from file.iter_batches(size, row_groups=[unit], columns=columns, use_threads=False)

    def close(self) -> None:
        self._handle.close()


def _at_a_time(count: int, size: int) -> int:
    """How many of ``count`` rows of ``size`` bytes to take at a time."""
    return max(1, min(ROWS, count * COLUMN_BYTES // max(size, 1)))


def _native(item: Input) -> pa.NativeFile:
    if inputs.is_remote(item.url):
        return pa.PythonFile(inputs.open_file(item), mode="r")
    return pa.OSFile(str(inputs.local(item)))


@contextlib.contextmanager
def _readable(item: Input) -> Iterator[None]:
    """Name the file when it cannot be read to its end."""
    damage: tuple[type[Exception], ...]
    damage = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, pa.ArrowException)
    damage += () if inputs.is_remote(item.url) else (OSError,)
    with inputs.reaching(item.url, where=item.url):
        try:
            yield
        except damage as error:
            raise UserError(
                f"cannot read the input: {error}".splitlines()[0],
                where=item.url,
                fix="replace the file, or leave it out",
            ) from None
