"""Compressed files unpacked once, for all processes of a task, in $TMPDIR.

A file is unpacked by whoever asks first, while others wait for it. Few of them are kept; the one
used longest ago goes. The folder is its task's alone: the task removes it at its end, and the next
task on the machine removes what a killed one left.
"""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

from data_prep import inputs
from data_prep.inputs import Input
from titans_pretrain.errors import TitansError

KEPT, KEPT_IN_TURN = 256, 4  # files; fewer where they are wanted one after another
BLOCK, READ_AHEAD = 2**20, 2**23  # bytes unpacked, and fetched, at a time
WINDOW = 2**31  # bytes back that zstd may refer to, as of `zstd --long=31`
SKIPPABLE, REPEATED_BYTE, CHECKSUM = 0x184D2A50, 1, 4  # of RFC 8878
PACKED = (".gz", ".zst")
ALIVE = "alive.lock"


def is_packed(item: Input) -> bool:
    """Whether the file must be unpacked before a part of it can be read."""
    return item.url.endswith(PACKED)


@contextlib.contextmanager
def shared(kept: int = KEPT) -> Iterator[Path]:
    """A folder for unpacked files, removed at the end; its path may be given to other processes.

    Args:
        kept: the most files in it.

    Raises:
        TitansError: $TMPDIR cannot be written.
    """
    with _told("cannot use $TMPDIR"):
        base = _base()
        with _locked(base / "new.lock"):
            _remove_dead(base)
            folder = Path(tempfile.mkdtemp(dir=base))
            alive = os.open(folder / ALIVE, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(alive, fcntl.LOCK_EX)
            os.write(alive, str(kept).encode())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(alive)


def unpacked(folder: Path, item: Input) -> IO[bytes]:
    """The unpacked file, opened; it is unpacked first where it is not there.

    Args:
        folder: of ``shared``.
        item: a compressed file.

    Raises:
        TitansError: $TMPDIR is full.
        Exception: the file cannot be read, as its library says it.
    """
    path = folder / hashlib.sha256(item.url.encode()).hexdigest()
    with contextlib.suppress(FileNotFoundError):
        return _used(path)
    with contextlib.ExitStack() as locked:
        with _told(f"cannot unpack {item.url}"):
            locked.enter_context(_locked(path.with_suffix(".lock")))
        with contextlib.suppress(FileNotFoundError):
            return _used(path)
        _unpack(item, path.with_suffix(".part"))
        with _told(f"cannot unpack {item.url}"):
            handle = _used(path.with_suffix(".part"))
            os.rename(path.with_suffix(".part"), path)
    _keep_few(folder)
    return handle


def _used(path: Path) -> IO[bytes]:
    handle = open(path, "rb")  # noqa: SIM115 - the caller closes it
    os.utime(handle.fileno())
    return handle


def blocks(item: Input) -> Iterator[bytes]:
    """The file's content, unpacked, in blocks of about a MiB.

    Raises:
        EOFError: a compressed file ends too early.
        Exception: the file cannot be read, as its library says it.
    """
    if is_packed(item) and not item.size:
        raise EOFError("the file is empty, even no text has some bytes when compressed")
    with (
        inputs.open_file(item) as stored,
        io.BufferedReader(cast(io.RawIOBase, stored), READ_AHEAD) as handle,
    ):
        if item.url.endswith(".gz"):
            yield from _read_on(gzip.GzipFile(fileobj=handle))
        elif item.url.endswith(".zst"):
            yield from _zst_blocks(handle)
        else:
            yield from _read_on(handle)


def _read_on(stream: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while block := stream.read(BLOCK):
        yield block


def _zst_blocks(packed: IO[bytes]) -> Iterator[bytes]:
    """All frames; zstandard's own reader takes a cut file for a whole one.

    A block of zstd holds at most 128 KiB, but 4 stored bytes may tell them all: blocks are unpacked
    one by one, so that memory does not grow with the ratio.
    """
    while start := packed.read(4):
        if int.from_bytes(start, "little") & ~0xF == SKIPPABLE:
            size = int.from_bytes(_exactly(packed, 4), "little")
            for first in range(0, size, BLOCK):
                _exactly(packed, min(BLOCK, size - first))
        else:
            yield from _zst_frame(start + _exactly(packed, 1), packed)


def _zst_frame(start: bytes, packed: IO[bytes]) -> Iterator[bytes]:
    """The blocks of a frame, of which the first 5 bytes are read."""
    frame = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
    frame.decompress(start + _exactly(packed, zstandard.frame_header_size(start) - len(start)))
    while not frame.eof:
        header = _exactly(packed, 3)
        last, kind, size = header[0] & 1, header[0] >> 1 & 3, int.from_bytes(header, "little") >> 3
        stored = 1 if kind == REPEATED_BYTE else size
        checksum = 4 if last and start[4] & CHECKSUM else 0
        yield frame.decompress(header + _exactly(packed, stored + checksum))


def _exactly(packed: IO[bytes], size: int) -> bytes:
    content = packed.read(size)
    if len(content) < size:
        raise EOFError("the file ends inside a zstd frame")
    return content


def _unpack(item: Input, part: Path) -> None:
    failed = f"cannot unpack {item.url}"
    try:
        with _told(failed):
            handle = open(part, "wb")  # noqa: SIM115 - closed below
        with handle:
            for block in blocks(item):
                with _told(failed):
                    handle.write(block)
            with _told(failed):
                handle.flush()
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _keep_few(folder: Path) -> None:
    """Remove what was used longest ago; says once that this happens with a great many files."""
    kept, times = int((folder / ALIVE).read_text()), {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if not path.suffix:
                times[path] = path.stat().st_mtime_ns
    for path in sorted(times, key=times.__getitem__)[: max(0, len(times) - kept)]:
        path.unlink(missing_ok=True)
        if kept < KEPT:
            continue
        with contextlib.suppress(FileExistsError):
            (folder / "told.lock").touch(exist_ok=False)
            print(
                f"over {KEPT} compressed inputs: each is unpacked again and again; "
                "parquet would be faster",
                file=sys.stderr,
            )


def _base() -> Path:
    """This user's own folder of spools on this machine."""
    base = Path(tempfile.gettempdir()) / f"titans-spool-{os.getuid()}-{socket.gethostname()}"
    base.mkdir(mode=0o700, exist_ok=True)
    status = base.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, f"{base} is another user's")
    return base


def _remove_dead(base: Path) -> None:
    """Remove the folders whose tasks are gone; ``new.lock`` is held, so none is being made."""
    for folder in base.iterdir():
        if not folder.is_dir():
            continue
        try:
            with _locked(folder / ALIVE, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError):
            continue  # its task lives, or ends now


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _told(failed: str) -> Iterator[None]:
    """Name the disk that a file cannot be unpacked to."""
    try:
        yield
    except OSError as error:
        raise TitansError(
            f"{failed}: {error.strerror}",
            where=tempfile.gettempdir(),
            fix="point TMPDIR at a disk of this machine with room for the unpacked files",
        ) from None
