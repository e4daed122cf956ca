"""A directory's manifest: every file with its size and sha256. No torch here."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.errors import TitansError
from titans_pretrain.files import atomic_file, sha256_file, write_json

NAME = "manifest.json"
_SELF = "manifest_sha256"
_PARALLEL_READS = 8
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Unreadable(TitansError):
    """A file may be good or damaged: the system does not let us read it now."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be.

    Attributes:
        name: its plain name in the manifest's directory.
        bytes: its size.
        sha256: hex digest of its contents.
    """

    name: str
    bytes: int
    sha256: str


def write_file(directory: Path, name: str, contents: bytes) -> FileRecord:
    """Write and sync one small file; its record."""
    with atomic_file(directory / name) as handle:
        handle.write(contents)
    return FileRecord(name, len(contents), hashlib.sha256(contents).hexdigest())


def record_file(directory: Path, name: str) -> FileRecord:
    """Sync a file that others wrote; its record."""
    path = directory / name
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    return FileRecord(name, path.stat().st_size, sha256_file(path))


def write(directory: Path, files: Iterable[FileRecord], facts: Mapping[str, Any]) -> None:
    """Write the manifest, the last file of ``directory``.

    Args:
        directory: where the files lie.
        files: their records.
        facts: further keys, JSON values.
    """
    body = {**facts, "files": [asdict(record) for record in sorted(files, key=lambda r: r.name)]}
    write_json(directory / NAME, {**body, _SELF: _digest(body)})


def read(directory: Path) -> dict[str, Any]:
    """The manifest of ``directory``.

    Raises:
        TitansError: it is missing or damaged.
        Unreadable: it cannot be read now.
    """
    path = directory / NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(value, dict) and value.pop(_SELF, None) == _digest(value)
    except _ABSENT:
        raise TitansError(f"{NAME} is missing", where=str(directory)) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise TitansError(f"{NAME} cannot be read: {error}", where=str(path)) from None
    if not whole:
        raise TitansError(f"{NAME} does not match its own checksum", where=str(path))
    try:
        plain = all(is_plain(FileRecord(**entry).name) for entry in value["files"])
    except (KeyError, TypeError):
        plain = False
    if not plain:
        raise TitansError(f"{NAME} is no manifest", where=str(path)) from None
    return value


def unreadable(path: Path, error: OSError) -> Unreadable:
    """The error of a file that the system did not let us read."""
    return Unreadable(
        f"{path.name} cannot be read: {error.strerror or error}",
        where=str(path),
        fix="mend that (permissions, file system) and try again; the file may be good",
    )


def is_plain(name: object) -> bool:
    """Whether ``name`` can only mean a file in the directory itself."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"}


def problems(directory: Path, *, contents: bool = True) -> list[str]:
    """What differs from the manifest; empty if all is well.

    Args:
        directory: the directory to check.
        contents: also read every byte; else only presence and sizes are looked at.

    Raises:
        Unreadable: what differs cannot be told, as a file cannot be read now.
    """
    try:
        records = [FileRecord(**entry) for entry in read(directory)["files"]]
    except Unreadable:
        raise
    except TitansError as error:
        return [error.what]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        found = pool.map(lambda record: _problem(directory, record, contents), records)
        return [problem for problem in found if problem]


def _problem(directory: Path, record: FileRecord, contents: bool) -> str:
    path = directory / record.name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{record.name} has {size} bytes instead of {record.bytes}"
        if contents and sha256_file(path) != record.sha256:
            return f"{record.name} differs from its checksum"
    except _ABSENT:
        return f"{record.name} is missing"
    except OSError as error:
        raise unreadable(path, error) from None
    return ""


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
