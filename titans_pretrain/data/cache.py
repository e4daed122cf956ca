"""A bounded cache of remote files on a node's disk, shared by its processes.

A file is kept sparse, beside a table of the CRC-32 of every piece that is there. No piece is used
before its CRC matches, so what is cut, damaged or half-written is fetched anew.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.data.mapping import keep, map_file
from titans_pretrain.errors import TitansError, UserError

PIECE = 2**19
LOCKS = 64
SHARDS, WHOLE = "shards", "whole"  # folders: what may go at any time, and what is used by its path
KEPT_WHOLE = 24 * 3600  # seconds since the last use; a process may hold the path
SLACK = 1 / 8  # of the bound; made free whenever it is reached
ENTRY = struct.Struct("<I")
COUNT = struct.Struct("<QQ")
BLOCK = 4096  # bytes of disk that a file's end or its table may take beyond its content
FULL = (errno.ENOSPC, errno.EDQUOT)

Fetch = Callable[[int, int], bytes]


class Cache:
    """A folder of pieces of files that takes at most ``limit`` bytes of disk.

    Args:
        root: the folder, made if need be.
        limit: bytes.

    Raises:
        UserError: a folder that cannot be written, or a limit below two pieces.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self._limit = root, limit
        if limit < 2 * PIECE:
            raise UserError(
                f"a cache of {limit} bytes holds no two pieces of {PIECE}",
                where="data.cache_bytes",
                fix=f"give at least {2 * PIECE}, better the bytes of the whole data set",
            )
        try:
            with self.locked("usage"):
                pass
        except OSError as error:
            raise UserError(
                f"cannot write the cache {str(root)!r}: {error.strerror}",
                where=f"data.cache on {socket.gethostname()}",
                fix="give a folder on the node's own disk that you may write",
            ) from None

    def file(self, identity: str, name: str, size: int, fetch: Fetch, *, whole: bool) -> "File":
        """A remote file's place in the cache.

        Args:
            identity: differs whenever the file's content does.
            name: its plain name.
            size: bytes.
            fetch: gives its bytes [start, stop).
            whole: its path is handed out, so it may not vanish while in use.
        """
        key = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        return File(self, self.root / (WHOLE if whole else SHARDS) / key, name, size, fetch)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[int]:
        """Hold a lock between all threads and processes; it ends with its holder.

        Yields:
            The lock file's descriptor.
        """
        descriptor = _open_or_make(self.root / "locks" / name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def reserve(self, size: int) -> None:
        """Count bytes about to be written; where they do not fit, the longest unused files go.

        Raises:
            UserError: files that must stay leave no room.
        """
        with self.locked("usage") as descriptor:
            used = self._count(descriptor)
            if used is None or used + size > self._limit:
                used = self._used()
            if used + size > self._limit:
                used = self._evict(used, int(self._limit * (1 - SLACK)) - size)
            if used + size > self._limit:
                raise UserError(
                    f"{used} bytes of indexes and manifests in use leave no room for {size} more",
                    where="data.cache_bytes",
                    fix=f"give at least {2 * (used + size)}",
                )
            os.pwrite(descriptor, COUNT.pack(used + size, ~(used + size) % 2**64), 0)

    def make_room(self) -> None:
        """Free half of what the cache takes: its disk is full."""
        with self.locked("usage") as descriptor:
            used = self._used()
            self._evict(used, used // 2)
            os.ftruncate(descriptor, 0)

    def _count(self, descriptor: int) -> int | None:
        """The bytes counted so far; None if the count is lost."""
        stored = os.pread(descriptor, COUNT.size, 0)
        if len(stored) < COUNT.size:
            return None
        used, inverse = COUNT.unpack(stored)
        return int(used) if used == ~inverse % 2**64 else None

    def _folders(self) -> list[tuple[float, int, Path]]:
        """Last use, bytes on disk and place of every file, longest unused first."""
        found = []
        for folder in (*self.root.glob(f"{SHARDS}/*"), *self.root.glob(f"{WHOLE}/*")):
            stats = [path.stat() for path in folder.iterdir()]
            used = max((stat.st_mtime for stat in stats), default=0.0)
            found.append((used, sum(stat.st_blocks * 512 for stat in stats), folder))
        return sorted(found)

    def _used(self) -> int:
        return sum(size for _, size, _ in self._folders())

    def _evict(self, used: int, goal: int) -> int:
        """Remove files until ``goal`` bytes are left, and say how many are.

        A process that has one mapped keeps its bytes until it notices.
        """
        for last_use, size, folder in self._folders():
            if used <= goal:
                break
            if folder.parent.name == WHOLE and time.time() - last_use < KEPT_WHOLE:
                continue
            shutil.rmtree(folder)
            used -= size
        return used


class _Mapped(NamedTuple):
    """A cached file as one process sees it: its bytes, and which pieces' CRCs it has checked."""

    content: NDArray[np.uint8]
    checked: bytearray
    inode: int


class File:
    """One remote file in the cache; made by ``Cache.file``, and shared by threads."""

    def __init__(self, cache: Cache, folder: Path, name: str, size: int, fetch: Fetch) -> None:
        self._cache, self._folder, self._fetch = cache, folder, fetch
        self._table = folder / ".pieces"
        self._whole = folder.parent.name == WHOLE
        self._mapped: _Mapped | None = None
        self._in_use = False
        self.path = folder / name
        self.size = size

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), (stop - start,), fetched where the cache lacks them."""
        self._in_use = True
        first, end = start // PIECE, -(-stop // PIECE)
        mapped = self._mapped
        if mapped is not None and all(mapped.checked[first:end]):
            return mapped.content[start:stop]
        with self._told():
            pieces = [self._piece(index) for index in range(first, end)]
        mapped = self._mapped
        if mapped is not None and all(mapped.checked[first:end]):
            return mapped.content[start:stop]
        # A small cache may lose the first piece while the last one comes; the views outlive that.
        found = np.concatenate([np.empty(0, np.uint8), *pieces])
        return found[start - first * PIECE : stop - first * PIECE]

    def fetch_all(self) -> Path:
        """Make the file whole and give its path."""
        self._in_use = True
        with self._told():
            self._map()
            for index in range(-(-self.size // PIECE)):
                self._piece(index)
        return self.path

    def forget(self, start: int, stop: int) -> None:
        """Fetch the pieces that hold bytes [start, stop) again at their next read."""
        with self._told(), self._opened(self._table) as table:
            mapped = self._map()
            for index in range(start // PIECE, -(-stop // PIECE)):
                os.pwrite(table, bytes(ENTRY.size), index * ENTRY.size)
                mapped.checked[index] = 0

    def release(self) -> None:
        """Let go of the map; the next read makes it anew."""
        self._mapped = None

    def refresh(self) -> None:
        """Tell other processes that the file is in use, and let go of it if they removed it."""
        mapped = self._mapped
        if mapped is None:
            return
        try:
            if self.path.stat().st_ino != mapped.inode:
                self._mapped = None
            elif self._in_use or self._whole:
                os.utime(self.path)
        except FileNotFoundError:
            self._mapped = None
        self._in_use = False

    def _piece(self, index: int) -> NDArray[np.uint8]:
        """A piece whose CRC this process has checked."""
        start, stop = index * PIECE, min((index + 1) * PIECE, self.size)
        mapped = self._mapped or self._map()
        if not mapped.checked[index] and not self._intact(mapped, index):
            number = int(self._folder.name, 16) + index
            with self._cache.locked(f"{number % LOCKS:02d}"):
                mapped = self._map()
                if not self._intact(mapped, index):
                    mapped = self._store(index, self._fetch(start, stop))
        mapped.checked[index] = 1
        return mapped.content[start:stop]

    def _intact(self, mapped: _Mapped, index: int) -> bool:
        """Whether the table has the piece and its CRC is right."""
        with self._opened(self._table) as table:
            entry = os.pread(table, ENTRY.size, index * ENTRY.size)
        piece = mapped.content[index * PIECE : (index + 1) * PIECE]
        # No piece of zeros has the CRC zero, so a hole in either file never matches.
        return entry == ENTRY.pack(zlib.crc32(piece.data))

    def _store(self, index: int, body: bytes) -> _Mapped:
        """Write a piece; on a full disk once more, after making room."""
        self._cache.reserve(len(body) + 2 * BLOCK)
        try:
            return self._write(index, body)
        except OSError as error:
            if error.errno not in FULL:
                raise
        self._cache.make_room()
        return self._write(index, body)

    def _write(self, index: int, body: bytes) -> _Mapped:
        """Write a piece, then its CRC, into the file as it is in the cache now."""
        with self._opened(self.path) as data, self._opened(self._table) as table:
            mapped = self._map_opened(data)
            left, place = memoryview(body), index * PIECE
            while left:
                done = os.pwrite(data, left, place)
                left, place = left[done:], place + done
            os.pwrite(table, ENTRY.pack(zlib.crc32(body)), index * ENTRY.size)
        return mapped

    def _map(self) -> _Mapped:
        """The file as it is in the cache now, made if need be."""
        with self._opened(self.path) as data:
            return self._map_opened(data)

    def _map_opened(self, data: int) -> _Mapped:
        stat, mapped = os.fstat(data), self._mapped
        if stat.st_size != self.size:
            os.ftruncate(data, self.size)
        if mapped is None or mapped.inode != stat.st_ino:
            checked = bytearray(-(-self.size // PIECE))
            mapped = _Mapped(map_file(data, self.size), checked, stat.st_ino)
            self._mapped = mapped
            keep(self)
        return mapped

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            with self._cache.locked("usage"):
                descriptor = _open_or_make(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TitansError(
                f"cannot use the cache: {error.strerror or error}",
                where=str(self._cache.root),
                fix="make room or permit writing there, or give another data.cache",
            ) from None


def _open_or_make(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, flags, 0o666)
