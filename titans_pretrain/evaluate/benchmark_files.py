"""Benchmarks as JSON lines files, in the columns they have on the Hub. No torch here."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError

Check = Callable[[Any, Mapping[str, Any]], Any]


def read(path: Path, columns: Mapping[str, Check]) -> list[dict[str, Any]]:
    """The rows of a file, these columns only, each as the Hub has it.

    Args:
        path: one JSON object a line.
        columns: name -> what returns the value, given it and its row, or raises ValueError.

    Raises:
        UserError: a line is no such object; names file, line and column.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(
            f"{path.name} is missing",
            where=str(path.parent),
            fix=f"put it there, a JSON object a line with {', '.join(columns)}; "
            "or leave out --task-data to take it from the Hub",
        ) from None
    except OSError as error:
        raise UserError(
            f"{path.name} cannot be read: {error.strerror}", where=str(path), fix="see its owner"
        ) from None
    rows = [
        _row(line, columns, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{path.name} is empty", where=str(path), fix="write a JSON object a line")
    return rows


def _row(line: bytes, columns: Mapping[str, Check], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"no JSON: {error}", where=where, fix="write a JSON object") from None
    if not isinstance(row, dict):
        raise UserError(
            f"a {type(row).__name__} instead of a JSON object",
            where=where,
            fix=f"write an object with {', '.join(columns)}",
        )
    found = {}
    for name, check in columns.items():
        if name not in row:
            raise UserError(
                f"column {name} is missing", where=where, fix=f"columns: {', '.join(columns)}"
            )
        try:
            found[name] = check(row[name], row)
        except ValueError as error:
            raise UserError(
                f"column {name} is {json.dumps(row[name], ensure_ascii=False)[:60]}",
                where=where,
                fix=str(error),
            ) from None
    return found


def text(value: Any, row: Mapping[str, Any]) -> str:
    """Any text."""
    if not isinstance(value, str):
        raise ValueError("write a text")
    return value


def words(value: Any, row: Mapping[str, Any]) -> str:
    """A text of two words or more, of which the last is asked for."""
    found = text(value, row)
    if " " not in found.strip():
        raise ValueError("write a text of two words or more")
    return found


def gap(value: Any, row: Mapping[str, Any]) -> str:
    """A text with a gap to fill."""
    found = text(value, row)
    if "_" not in found:
        raise ValueError("write a text with _ where the option goes")
    return found


def texts(value: Any, row: Mapping[str, Any]) -> list[str]:
    """Two texts or more."""
    good = isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)
    if not good:
        raise ValueError("write a list of two texts or more")
    return list(value)


def number(first: int, count: int) -> Check:
    """The index of an answer, from ``first`` on."""

    def check(value: Any, row: Mapping[str, Any]) -> int:
        known = [str(index) for index in range(first, first + count)]
        if isinstance(value, bool) or str(value) not in known:
            raise ValueError(f"write one of {', '.join(known)}")
        return int(value)

    return check


def numeral(first: int, count: int) -> Check:
    """Like ``number``, written as a text."""
    check = number(first, count)
    return lambda value, row: str(check(value, row))


def ending(value: Any, row: Mapping[str, Any]) -> str:
    """The index of one of the row's ``endings``, as a text."""
    listed = row.get("endings")
    return numeral(0, len(listed) if isinstance(listed, list) else 0)(value, row)


def choices(value: Any, row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Texts and as many labels."""
    if not isinstance(value, dict):
        raise ValueError('write {"text": [...], "label": [...]}')
    found = {name: texts(value.get(name), row) for name in ("text", "label")}
    if len(found["text"]) != len(found["label"]):
        raise ValueError("write as many labels as texts")
    return found


def answer_key(value: Any, row: Mapping[str, Any]) -> str:
    """One of the labels of the row's ``choices``."""
    listed = row.get("choices")
    labels = listed.get("label", []) if isinstance(listed, dict) else []
    if value not in labels:
        raise ValueError(f"write one of {', '.join(map(str, labels))}")
    return str(value)
