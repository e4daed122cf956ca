"""Whole files or none, with errors that name the file and the cause."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from titans_pretrain import files
from titans_pretrain.errors import TitansError, UserError

LOCK = ".plan.lock"


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn a failed write (a full disk, no permission) into an error that names the file."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"cannot write {path.name}: {error.filename} is no directory",
            where=str(path),
            fix="choose another --output",
        ) from None
    except OSError as error:
        raise TitansError(
            f"cannot write {path.name}: {error.strerror or error}",
            where=str(path.parent),
            fix="make room or permit it, then repeat the command: what is finished is kept",
        ) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """``atomic_file`` that makes the folder and whose failures name the file."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with told(path), files.atomic_file(path) as handle:
        yield handle


def write_json(path: Path, content: object) -> None:
    """``files.write_json`` whose failures name the file."""
    with told(path):
        files.write_json(path, content)


def write_json_once(path: Path, content: object) -> None:
    """``write_json`` that leaves a file alone that is there, whoever writes it at the same time."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with (
        told(path),
        contextlib.suppress(FileExistsError),
        files.atomic_file(path, "w") as handle,
    ):
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
        _link(Path(handle.name), path)


def _link(source: Path, target: Path) -> None:
    """A second name of a file, where there are hard links; renaming the first to it does nothing.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(source, target)
    except OSError:
        if target.exists():
            raise FileExistsError(str(target)) from None


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Make a directory and hold its lock, where the file system has locks.

    The lock is on a file opened for writing: such locks hold between the nodes of a cluster, too.
    """
    path = output / LOCK
    with told(output):
        output.mkdir(parents=True, exist_ok=True)
        handle = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path) -> int:
    """Open and lock a file; begins again if its last holder has removed it in between."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        os.close(handle)
