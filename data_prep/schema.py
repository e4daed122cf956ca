"""What the JSON files of a prepared directory must hold, checked before anything uses it.

A shape is a type, a test of one value, a list of one shape, or a dict of shapes; keys beyond a
dict's are allowed.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError

FORMAT = 2


def read(path: Path, shape: Mapping[str, Any], *, fix: str) -> dict[str, Any]:
    """Read a JSON object of this version's format.

    Raises:
        UserError: a file that is missing, no JSON object, of another format, or lacks something.
    """
    content = read_json(path, fix=fix)
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path.name} has format {content['format']!r}, this version reads {FORMAT}",
            where=str(path),
            fix="prepare the data with this version, into another --output",
        )
    if place := misfit(content, {"format": int, **shape}):
        raise UserError(f"{path.name} is damaged at {place!r}", where=str(path), fix=fix)
    return content


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: a file that is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "no JSON"
        raise UserError(f"cannot read {path.name}: {reason}", where=str(path), fix=fix) from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path.name}: no JSON object", where=str(path), fix=fix)
    return content


def misfit(value: Any, shape: Any, place: str = "") -> str:
    """Where a value first departs from a shape, as ``shards.0.name``; an empty string if nowhere.

    Args:
        value: what JSON gave.
        shape: see the module.
        place: of ``value`` within the file.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return place or "its start"
        found = (
            misfit(value[key], part, _within(place, key)) if key in value else _within(place, key)
            for key, part in shape.items()
        )
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return place
        found = (misfit(part, shape[0], _within(place, i)) for i, part in enumerate(value))
    elif isinstance(shape, type):
        return "" if isinstance(value, shape) and not isinstance(value, bool) else place
    else:
        return "" if shape(value) else place
    return next(filter(None, found), "")


def _within(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _some(value: Any) -> bool:
    return _count(value) and value > 0


def _file_name(value: Any) -> bool:
    """A plain name: what a manifest lists lies beside it."""
    return isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\0"} & set(value)


def _input(entry: Any) -> bool:
    """A planned input; ``starts``, of jsonl, has a place for every unit."""
    if misfit(entry, {"name": str, "url": str, "size": _count, "units": _count}):
        return False
    starts = entry.get("starts", [])
    return (
        isinstance(starts, list)
        and all(map(_count, starts))
        and (not starts or len(starts) == entry["units"])
    )


def _counts(value: Any) -> bool:
    """How many documents were read, were kept, and were dropped by each filter."""
    return not misfit(value, {"read": _count, "kept": _count}) and all(map(_count, value.values()))


def _place(value: Any) -> bool:
    """A place in a task's work: index of the unit, and of the batch within it."""
    return isinstance(value, list) and len(value) == 2 and all(map(_count, value))


def _maybe(shape: Any) -> Callable[[Any], bool]:
    """The test of a value that may be null."""
    return lambda value: value is None or not misfit(value, shape, "value")


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _digest(value: Any) -> bool:
    """The hex sha256 of something."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


FILE = {"name": _file_name, "bytes": _count, "sha256": _digest}
SHARD = {
    "task": _count,
    "tokens": _some,
    "documents": _some,
    **FILE,
    "provenance": FILE,
    "index": FILE,
}
SETTINGS = {
    **dict.fromkeys(("text_column", "id_column", "score_column", "language_column"), str),
    **dict.fromkeys(("url_column", "dump_column", "bad_rows"), str),
    **dict.fromkeys(("prompt_column", "language"), _maybe(str)),
    **dict.fromkeys(("min_characters", "max_characters"), _maybe(_count)),
    "min_score": _maybe(_number),
    "held_out": _number,
    "bos": _flag,
    "seed": _count,
    "shard_bytes": _some,
    "member_tokens": _some,
}
VOCABULARY = {
    "tokenizer_sha256": _digest,
    "vocab_size": _some,
    "eos_id": _count,
    "bos_id": _maybe(_count),
}
EXPECTED = dict.fromkeys(("tokens", "documents", "bytes", "text_bytes", "units"), _count)
PLAN = {
    "inputs": [_input],
    "settings": SETTINGS,
    "tasks": _some,
    "command": [str],
    "expected": EXPECTED,
    "duplicates": _maybe({**FILE, "documents": _count}),
    **VOCABULARY,
}
WINDOW = {
    "first": _place,
    "last": _place,
    "documents": _counts,
    "shard": _maybe(SHARD),
    "held_out": _maybe(SHARD),
}
PARTIAL = {"task": _count, "plan": _digest, "documents": _counts, "windows": [WINDOW]}
TAIL = {"first": _place, "last": _place, "documents": _counts}
TASK = {**PARTIAL, "tail": TAIL, "unigrams": FILE}
PROGRESS = {
    **dict.fromkeys(("units_done", "units", "tokens", "documents", "pid"), _count),
    "rate": _number,
    "host": str,
    "state": lambda value: value in ("running", "failed"),
    "error": _maybe(str),
}
MANIFEST = {
    "tokens": _some,
    "held_out_tokens": _count,
    "documents": _counts,
    "unigram_entropy": float,
    "dtype": lambda value: value in ("uint16", "uint32"),
    "masks": _flag,
    "bos": _flag,
    "settings": SETTINGS,
    "tasks": _some,
    "shards": [SHARD],
    "held_out": [SHARD],
    "fingerprint": _digest,
    **VOCABULARY,
}
