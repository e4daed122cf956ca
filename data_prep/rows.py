"""Rows of text: what a line of JSON or a batch of Arrow columns says about its documents."""

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from titans_pretrain.errors import UserError, nearest

SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_ESCAPE = re.compile(rb"\\u[dD]")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; a dotted name reaches into structs and nested objects."""

    text: str = "text"
    id: str = "id"
    prompt: str | None = None
    needed: tuple[str, ...] = ()
    """Which of ``score`` and ``language`` are filtered on: every row must have these."""
    score: str = "score"
    language: str = "language"
    url: str = "url"
    dump: str = "dump"
    bad_rows: Literal["stop", "skip"] = "stop"
    """Whether a row that cannot be read is an error or a ``Row`` with a problem."""

    def required(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        return (self.text, *([self.prompt] if self.prompt else []), *self.needed)

    def wanted(self) -> tuple[str, ...]:
        """Columns read where they exist."""
        return tuple(dict.fromkeys((*self.required(), self.id, self.url, self.dump)))


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
    problem: str = ""
    """``bad`` when it cannot be read (all else is empty then), or empty."""
    repaired: bool = False
    """Whether lone surrogates were replaced by U+FFFD."""


BAD = Row("", "", "", "", "", None, None, "bad")
BLANK = Row("", "", "", "", "", None, None)

Where = Callable[[int], str]
"""Names the place of a row, by its position."""


def from_line(line: bytes, columns: Columns, where: Where, position: int) -> Row:
    """The document of one line of JSON; a blank line is an empty one.

    Raises:
        UserError: the line is bad and bad rows stop.
    """
    try:
        values = _parse(line)
        if values is None:
            return BLANK
        return _from_object(values, columns, SURROGATE_ESCAPE.search(line) is not None)
    except RecursionError:
        problem = _bad_json("nested too deeply")
    except UserError as error:
        problem = error
    if columns.bad_rows == "skip":
        return BAD
    raise UserError(problem.what, where=where(position), fix=problem.fix)


def from_bytes(content: bytes, name: str, columns: Columns, source: str) -> Row:
    """The document that a whole file is.

    Raises:
        UserError: the text is no UTF-8 and bad rows stop; its line is named.
    """
    try:
        return Row(content.decode(), "", name, "", "", None, None)
    except UnicodeDecodeError as error:
        if columns.bad_rows == "skip":
            return BAD
        line = content.count(b"\n", 0, error.start) + 1
        raise no_utf8(where=f"{source}:{line}") from None


def from_batch(batch: pa.RecordBatch, columns: Columns, source: str, where: Where) -> list[Row]:
    """The documents of a batch of Arrow columns.

    Raises:
        UserError: a column is missing or of another type, or text is no UTF-8 and bad rows stop.
    """
    for name in columns.required():
        if _reach_column(batch, name) is None:
            raise no_column(name, known(batch.schema), source)
    bad: set[int] = set()
    prompt, score, language = columns.prompt, columns.score, columns.language

    def column(name: str) -> _Column:
        return _Column(batch, name, source, bad)

    rows = list(
        map(
            Row,
            column(columns.text).texts(),
            column(prompt).texts() if prompt else repeat(""),
            *(column(name).labels() for name in (columns.id, columns.url, columns.dump)),
            column(score).numbers() if score in columns.needed else repeat(None),
            column(language).texts() if language in columns.needed else repeat(None),
        )
    )
    for index in sorted(bad):
        if columns.bad_rows == "stop":
            raise no_utf8(where=where(index))
        rows[index] = BAD
    return rows


def known(schema: pa.Schema) -> list[str]:
    """The names by which a schema's columns can be reached, those within structs dotted."""
    return [name for field in schema for name in _within(field)]


def _within(field: pa.Field) -> list[str]:
    inner = field.type if pa.types.is_struct(field.type) else ()
    return [field.name, *(f"{field.name}.{name}" for part in inner for name in _within(part))]


class _Column:
    """One column's values; those that are no UTF-8 are None, their rows are added to ``bad``."""

    def __init__(self, batch: pa.RecordBatch, name: str, source: str, bad: set[int]) -> None:
        self._name, self._source, self._bad = name, source, bad
        self._count = batch.num_rows
        self._array = _reach_column(batch, name)
        if self._array is not None and pa.types.is_dictionary(self._array.type):
            self._array = self._array.dictionary_decode()

    def texts(self) -> list[str]:
        """Text, empty where null."""
        if not _is_text(self._array.type):
            raise self._other_type("text")
        return [value or "" for value in self._values()]

    def labels(self) -> list[str]:
        """Identifiers, which need not be text, as text; empty where there is none."""
        if self._array is None:
            return [""] * self._count
        if _is_text(self._array.type):
            return [value or "" for value in self._values()]
        return ["" if value is None else str(value) for value in self._values()]

    def numbers(self) -> list[float | None]:
        """Numbers, None where null."""
        kind = self._array.type
        if not any(is_a(kind) for is_a in (*NUMBERS, pa.types.is_null)):
            raise self._other_type("numbers")
        return self._values()

    def _values(self) -> list[Any]:
        try:
            return self._array.to_pylist()
        except UnicodeDecodeError:
            return [self._value(index) for index in range(self._count)]

    def _value(self, index: int) -> Any:
        try:
            return self._array[index].as_py()
        except UnicodeDecodeError:
            self._bad.add(index)
            return None

    def _other_type(self, wanted: str) -> UserError:
        return UserError(
            f"column {self._name!r} holds {self._array.type}, not {wanted}",
            where=self._source,
            fix=f"name the column that holds {wanted}",
        )


NUMBERS = (pa.types.is_floating, pa.types.is_integer)
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)


def _is_text(kind: pa.DataType) -> bool:
    return any(is_a(kind) for is_a in TEXTS)


def _reach_column(batch: pa.RecordBatch, name: str) -> Any:
    """A column, or of a dotted name the part of a struct; None where there is none."""
    if name in batch.schema.names:
        return batch.column(name)
    top, *rest = name.split(".")
    if top not in batch.schema.names:
        return None
    array = batch.column(top)
    for part in rest:
        if not pa.types.is_struct(array.type) or array.type.get_field_index(part) < 0:
            return None
        array = pc.struct_field(array, part)
    return array


def _from_object(values: dict[str, Any], columns: Columns, may_hold_surrogates: bool) -> Row:
    """Check the columns of a line's object; lone surrogates can come from escapes alone."""
    for name in columns.required():
        if _reach(values, name) is MISSING:
            raise no_column(name, _keys(values), "")
    score, language = (
        _reach(values, name) if name in columns.needed else None
        for name in (columns.score, columns.language)
    )
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise UserError(
            f"column {columns.score!r} holds {reprlib.repr(score)}, no number", fix="mend this row"
        )
    text = _text(_reach(values, columns.text), columns.text)
    prompt = _text(_reach(values, columns.prompt), columns.prompt) if columns.prompt else ""
    name, url, dump = (
        _label(_reach(values, column)) for column in (columns.id, columns.url, columns.dump)
    )
    found = (text, prompt, name, url, dump)
    if not may_hold_surrogates or all(map(str.isascii, found)):
        return Row(*found, score, language)
    text, prompt, name, url, dump = (SURROGATE.sub("\ufffd", part) for part in found)
    repaired = (text, prompt, name, url, dump) != found
    return Row(text, prompt, name, url, dump, score, language, repaired=repaired)


MISSING: Any = object()


def _reach(values: dict[str, Any], name: str) -> Any:
    """A value, or of a dotted name one within objects; ``MISSING`` where there is none."""
    if name in values or "." not in name:
        return values.get(name, MISSING)
    found: Any = values
    for part in name.split("."):
        found = found.get(part, MISSING) if isinstance(found, dict) else MISSING
    return found


def _keys(values: dict[str, Any]) -> Iterator[str]:
    """The names by which an object's values can be reached, those within objects dotted."""
    for key, value in values.items():
        yield key
        if isinstance(value, dict):
            yield from (f"{key}.{name}" for name in _keys(value))


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"column {column!r} holds {type(value).__name__}, not text",
            fix="mend this row, or name the column that holds text",
        )
    return value


def _label(value: Any) -> str:
    return "" if value is None or value is MISSING else str(value)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of a line, None of a blank one."""
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        raise no_utf8() from None
    except json.JSONDecodeError as error:
        if not line.strip():
            return None
        raise _bad_json(f"{error.msg} at column {error.colno}") from None
    except ValueError:
        raise _bad_json("a number of thousands of digits") from None
    if not isinstance(values, dict):
        raise UserError("the line is no JSON object", fix="mend this line")
    return values


def _bad_json(problem: str) -> UserError:
    return UserError(f"invalid JSON: {problem}", fix="mend this line, or use --bad-rows skip")


def no_utf8(what: str = "the text", *, where: str = "") -> UserError:
    """Bytes that are no text."""
    fix = "mend or remove this row, or use --bad-rows skip"
    return UserError(f"{what} is no UTF-8", where=where, fix=fix)


def no_column(name: str, columns: Iterable[str], where: str) -> UserError:
    """A column that is wanted and not there."""
    return UserError(f"no column {name!r}", where=where, fix=nearest(name, columns))
