"""Reading text out of parquet, jsonl[.gz|.zst] and txt files.

The unit of work is the row group: of parquet its own, of jsonl every 1000 lines, a whole .txt file
(one document). Any unit can be read on its own, in any order.
"""

import contextlib
import gzip
import json
import reprlib
import sys
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep import inputs
from data_prep.inputs import Input
from titans_pretrain.errors import TitansError, UserError, nearest

LINES_PER_UNIT = 1000
OPEN_FILES = 16
UNPACKED_FILES = 256


@dataclass(frozen=True)
class Layout:
    """How a file is cut: the number of units and, for jsonl, where each starts (bytes)."""

    units: int
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; ``needed`` are ``score`` and ``language`` when filtered on."""

    text: str = "text"
    id: str = "id"
    prompt: str | None = None
    needed: tuple[str, ...] = ()

    def required(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        return (self.text, *([self.prompt] if self.prompt else []), *self.needed)

    def wanted(self) -> tuple[str, ...]:
        """Columns read where they exist."""
        return tuple(dict.fromkeys((*self.required(), self.id, "url", "dump")))


@dataclass(frozen=True, slots=True)
class Row:
    """A document as read; what a source lacks is empty or None."""

    text: str
    prompt: str
    id: str
    url: str
    dump: str
    score: float | None
    language: str | None


def documents(items: Sequence[Input], columns: Columns) -> Iterator[str]:
    """The texts of all inputs, units in a fixed random order, so that any start is a sample."""
    units = [
        (item, shape, unit)
        for item in items
        for shape in [layout(item)]
        for unit in range(shape.units)
    ]
    with Reader(columns) as reader:
        for index in shuffled(len(units), 0):
            for rows in reader.rows(*units[index]):
                yield from (row.prompt + row.text for row in rows)


def shuffled(count: int, *key: int) -> list[int]:
    """A permutation of ``range(count)`` that depends on the key alone, on any numpy."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable").tolist()


def layout(item: Input) -> Layout:
    """Count a file's units; reads a parquet file's footer, or a jsonl file once."""
    kind = inputs.kind(item.url)
    with Reader(Columns()) as reader, _readable(item):
        if kind == "parquet":
            return Layout(reader.parquet(item).num_row_groups)
        if kind == "txt":
            return Layout(1)
        starts, position = [0], 0
        for number, line in enumerate(reader.lines(item), start=1):
            position += len(line)
            if number % LINES_PER_UNIT == 0:
                starts.append(position)
        if starts[-1] == position:
            starts.pop()
        return Layout(len(starts), tuple(starts))


class Reader:
    """Reads units; keeps the last files open, and compressed jsonl unpacked in $TMPDIR.

    At most ``OPEN_FILES`` and ``UNPACKED_FILES`` of them. Use as a context manager: the end closes
    and removes them.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._unpacked: OrderedDict[str, Any] = OrderedDict()
        self._times = 0

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in (*self._open.values(), *self._unpacked.values()):
            handle.close()

    def rows(self, item: Input, shape: Layout, unit: int) -> Iterator[list[Row]]:
        """A unit's rows, at most 1000 at a time.

        Raises:
            UserError: text that is no UTF-8, invalid JSON, a missing column, a damaged file.
        """
        kind = inputs.kind(item.url)
        if kind == "parquet":
            yield from self._parquet_rows(item, unit)
        elif kind == "jsonl":
            yield self._jsonl_rows(item, shape, unit)
        else:
            yield [self._txt_row(item)]

    def parquet(self, item: Input) -> pq.ParquetFile:
        """The open file."""
        return _recent(
            self._open,
            item.url,
            OPEN_FILES,
            lambda: pq.ParquetFile(inputs.open_file(item), pre_buffer=False),
        )

    def lines(self, item: Input) -> IO[bytes]:
        """The file's uncompressed bytes, seekable."""
        if not item.url.endswith((".gz", ".zst")):
            return _recent(self._open, item.url, OPEN_FILES, lambda: inputs.open_file(item))
        return _recent(self._unpacked, item.url, UNPACKED_FILES, lambda: self._unpack(item))

    def _unpack(self, item: Input) -> IO[bytes]:
        """Unpack a file; says once when files are dropped that may have to be unpacked again."""
        self._times += 1
        if self._times == UNPACKED_FILES + 1:
            print(
                f"over {UNPACKED_FILES} compressed inputs: each is unpacked again and again; "
                "parquet would be faster",
                file=sys.stderr,
            )
        return _unpack(item)

    def _parquet_rows(self, item: Input, unit: int) -> Iterator[list[Row]]:
        with _readable(item):
            file = self.parquet(item)
            known = file.schema_arrow.names
        for name in self.columns.required():
            if name not in known:
                raise _no_column(name, known, item.url)
        names = [name for name in self.columns.wanted() if name in known]
        batches = file.iter_batches(LINES_PER_UNIT, row_groups=[unit], columns=names)
        first = 0
        while True:
            with _readable(item):
                batch = next(batches, None)
            if batch is None:
                return
            yield [
                self._row(values, f"{item.url}, row {first + index} of row group {unit}")
                for index, values in enumerate(_pylist(batch, item, unit, first))
            ]
            first += batch.num_rows

    def _jsonl_rows(self, item: Input, shape: Layout, unit: int) -> list[Row]:
        end = shape.starts[unit + 1] if unit + 1 < len(shape.starts) else None
        with _readable(item):
            handle = self.lines(item)
            handle.seek(shape.starts[unit])
            content = handle.read(-1 if end is None else end - shape.starts[unit])
        lines = content.removesuffix(b"\n").split(b"\n")
        first = unit * LINES_PER_UNIT + 1
        return [
            self._row(_parse(line, f"{item.url}:{first + index}"), f"{item.url}:{first + index}")
            for index, line in enumerate(lines)
        ]

    def _txt_row(self, item: Input) -> Row:
        with _readable(item), inputs.open_file(item) as handle:
            content = handle.read()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise _no_utf8(f"{item.url}:{line}") from None
        name = _encodable(item.name, "the file's name", item.url)
        return Row(text, "", name, "", "", None, None)

    def _row(self, values: dict[str, Any] | None, where: str) -> Row:
        """Check one row's columns; a blank line is an empty document."""
        columns = self.columns
        if values is None:
            return Row("", "", "", "", "", None, None)
        for name in columns.required():
            if name not in values:
                raise _no_column(name, values, where)
        text, prompt = (
            _text(values[name], name, where) if name else ""
            for name in (columns.text, columns.prompt)
        )
        score, language = (
            values[name] if name in columns.needed else None for name in ("score", "language")
        )
        if score is not None and not isinstance(score, int | float):
            raise UserError(
                f"column 'score' holds {reprlib.repr(score)}, no number",
                where=where,
                fix="mend this row",
            )
        name, url, dump = (
            _label(values.get(key), key, where) for key in (columns.id, "url", "dump")
        )
        return Row(text, prompt, name, url, dump, score, language)


def _recent(kept: OrderedDict[str, Any], key: str, most: int, make: Callable[[], Any]) -> Any:
    """The file kept under a key, opened when it is not; the one used longest ago is closed."""
    if key not in kept:
        if len(kept) >= most:
            kept.popitem(last=False)[1].close()
        kept[key] = make()
    kept.move_to_end(key)
    return kept[key]


def _unpack(item: Input) -> IO[bytes]:
    """The decompressed content in an unnamed temporary file, so that any unit can be read."""
    spool: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the Reader
    with inputs.open_file(item) as packed:
        for block in _gz_blocks(packed) if item.url.endswith(".gz") else _zst_blocks(packed):
            try:
                spool.write(block)
            except OSError as error:
                raise TitansError(
                    f"cannot unpack {item.url}: {error.strerror}",
                    where=tempfile.gettempdir(),
                    fix="point TMPDIR at a disk with room for the unpacked file",
                ) from None
    spool.seek(0)
    return spool


def _gz_blocks(packed: IO[bytes]) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=packed)
    while block := stream.read(2**20):
        yield block


def _zst_blocks(packed: IO[bytes]) -> Iterator[bytes]:
    """All frames; zstandard's own reader takes a cut file for a whole one."""
    frame = None
    while chunk := packed.read(2**20):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends inside a zstd frame")


@contextlib.contextmanager
def _readable(item: Input) -> Iterator[None]:
    """Name the file when it cannot be read to its end."""
    damage: tuple[type[Exception], ...]
    damage = (EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException)
    damage += () if "://" in item.url else (OSError,)
    with inputs.reaching(item.url, where=item.url):
        try:
            yield
        except damage as error:
            raise UserError(
                f"cannot read the input: {error}".splitlines()[0],
                where=item.url,
                fix="replace the file, or leave it out",
            ) from None


def _parse(line: bytes, where: str) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _no_utf8(where) from None
    except json.JSONDecodeError as error:
        raise _bad_json(f"{error.msg} at column {error.colno}", where) from None
    except ValueError:
        raise _bad_json("a number of thousands of digits", where) from None
    except RecursionError:
        raise _bad_json("nested too deeply", where) from None
    if not isinstance(values, dict):
        raise UserError("the line is no JSON object", where=where, fix="mend this line")
    return values


def _bad_json(problem: str, where: str) -> UserError:
    return UserError(f"invalid JSON: {problem}", where=where, fix="mend this line")


def _pylist(batch: pa.RecordBatch, item: Input, unit: int, first: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        pass
    for index in range(batch.num_rows):
        try:
            batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError:
            raise _no_utf8(f"{item.url}, row {first + index} of row group {unit}") from None
    raise AssertionError("a batch that fails has a row that fails")


def _text(value: Any, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"column {column!r} holds {type(value).__name__}, not text",
            where=where,
            fix="name the column that holds text",
        )
    return _encodable(value, f"column {column!r}", where)


def _label(value: Any, column: str, where: str) -> str:
    """An identifier, which need not be text, as text; empty where there is none."""
    return _encodable("" if value is None else str(value), f"column {column!r}", where)


def _encodable(text: str, what: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _no_utf8(where, what) from None
    return text


def _no_utf8(where: str, what: str = "the text") -> UserError:
    return UserError(f"{what} is no UTF-8", where=where, fix="mend or remove this line")


def _no_column(name: str, known: Any, where: str) -> UserError:
    return UserError(f"no column {name!r}", where=where, fix=nearest(name, known))
