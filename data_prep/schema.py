"""What the JSON files of a prepared directory must hold, checked before anything uses it.

A shape is a type, a test of one value, a list of one shape, or a dict of shapes; keys beyond a
dict's are allowed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError

FORMAT = 1


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
    if misfit(entry, {"name": str, "size": _count, "units": _count}):
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


FILE = {"name": _file_name, "bytes": _count, "sha256": str}
SHARD = {"task": _count, "tokens": _some, "documents": _some, **FILE, "provenance": FILE}
SETTINGS = {"prompt_column": lambda value: value is None or isinstance(value, str)}
VOCABULARY = {"tokenizer_sha256": str, "vocab_size": _some, "eos_id": _count}
PLAN = {"inputs": [_input], "settings": SETTINGS, "tasks": _some, "command": [str], **VOCABULARY}
TASK = {
    "task": _count,
    "plan": str,
    "documents": _counts,
    "shards": [SHARD],
    "unigrams": {"name": _file_name, "sha256": str},
}
MANIFEST = {
    "tokens": _some,
    "documents": _counts,
    "unigram_entropy": float,
    "dtype": lambda value: value in ("uint16", "uint32"),
    "masks": lambda value: isinstance(value, bool),
    "settings": {"member_tokens": _some, **SETTINGS},
    "tasks": _some,
    "shards": [SHARD],
    "fingerprint": str,
    **VOCABULARY,
}
