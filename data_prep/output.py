"""Whole files or none, with errors that name the file and the cause."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from titans_pretrain import files
from titans_pretrain.errors import TitansError, UserError


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


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Make a directory and hold its lock, where the file system has locks."""
    with told(output):
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
