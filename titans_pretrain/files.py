"""Files that are whole or absent: temporary name, sync, rename. No torch here."""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

TEMPORARY_SUFFIX = ".tmp"
DIRECTORY_SUFFIX = ".dir"
ABANDONED_SECONDS = 3600.0
FIRST_TAIL_BYTES, LARGEST_TAIL_BYTES = 2**16, 2**24


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes ``path`` when the block ends well, else vanishes.

    Its name is this writer's alone, and it stays locked until it is renamed, so that
    ``remove_abandoned`` can tell a killed writer's from one that is being written.
    """
    temporary = _temporary(path)
    try:
        with _locked(temporary, mode) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that no other writer has."""
    unique = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{unique}{TEMPORARY_SUFFIX}")


def _locked(path: Path, mode: str) -> IO[Any]:
    """Open a new file and lock it; begins again if someone took it for abandoned in between."""
    while True:
        handle = open(path, mode, encoding=None if "b" in mode else "utf-8")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists():
            return handle
        handle.close()


def remove_abandoned(directory: Path, pattern: str) -> None:
    """Remove what writers that are gone left of files and directories whose names match a glob.

    Locks may be a host's own, so another host's file must also have been left for an hour. Where
    the file system has no locks nothing is removed.
    """
    for path in directory.glob(f".{pattern}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError), open(path, "rb+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = f".{socket.gethostname()}-" in path.name
            if ours or time.time() - _last_written(path) > ABANDONED_SECONDS:
                shutil.rmtree(path.with_suffix(DIRECTORY_SUFFIX), ignore_errors=True)
                path.unlink()


def _last_written(path: Path) -> float:
    """When a temporary file, or anything in the directory beside it, was last written."""
    directory = path.with_suffix(DIRECTORY_SUFFIX)
    return max(one.stat().st_mtime for one in (path, *directory.rglob("*")))


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically; equal values give equal bytes."""
    with atomic_file(path, "w") as handle:
        json.dump(value, handle, indent=2, sort_keys=True, allow_nan=False)
        handle.write("\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where it is missing, torn or anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def last_lines(path: Path, count: int, *, end: int | None = None) -> bytes:
    """The last lines of a file, of which no more is read than it takes; at most 16 MiB.

    Args:
        path: the file, of any size.
        count: lines, a last one that has no end included.
        end: what comes after so many bytes does not count; None takes the whole file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        end = size if end is None else min(end, size)
        read = FIRST_TAIL_BYTES
        while True:
            first = max(0, end - read)
            handle.seek(first)
            lines = handle.read(end - first).splitlines(keepends=True)
            if first == 0 or len(lines) > count or read >= LARGEST_TAIL_BYTES:
                return b"".join(lines[-count:])
            read *= 4


def last_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The last JSON objects of a file with one a line; lines that are torn or none are left out."""
    try:
        lines = last_lines(path, count).splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def sha256_file(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_cached(path: Path) -> str:
    """As ``sha256_file``; the file is read again only if its size or time has changed."""
    told = path.stat()
    return _sha256(path, told.st_size, told.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold the lock of a file, made where it is missing; False if another process does.

    Where the file system has no locks everyone gets it.

    Raises:
        OSError: the file cannot be opened.
    """
    with open(path, "a") as handle:
        yield _is_free(handle)


def _is_free(handle: IO[Any]) -> bool:
    """Lock a file; whether no other process holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes ``path`` when the block ends well.

    It is this writer's alone; a locked file beside it lets ``remove_abandoned`` tell a killed
    writer's. The caller syncs the files it writes (``atomic_file`` does).

    Raises:
        FileExistsError: ``path`` is there by the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, glob.escape(path.name))
    guard = _temporary(path)
    temporary = guard.with_suffix(DIRECTORY_SUFFIX)
    try:
        with _locked(guard, "wb"):
            temporary.mkdir()
            yield temporary
            sync_directory(temporary)
            _rename_directory(temporary, path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        guard.unlink(missing_ok=True)


def _rename_directory(temporary: Path, path: Path) -> None:
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        told = "another writer has made it in the meantime"
        raise FileExistsError(errno.EEXIST, told, str(path)) from None
