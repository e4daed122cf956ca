"""Remote files (fsspec URLs), read by ranges and tried again when the network fails."""

import contextlib
import io
from typing import Any

import fsspec

from data_prep.retry import retry


class RemoteFile(io.RawIOBase):
    """A remote file's bytes, seekable; every read is one ranged request, retried.

    A read that ends early is a failed one: what is read is whole.

    Args:
        url: of the file.
        size: in bytes.
    """

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self._url, self._size, self._position = url, size, 0
        self._handle: Any = None
        retry(self._open, f"opening {url}")

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next read begins, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the start, from here or from the end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, fewer only at the end of the file.

        Raises:
            Exception: the file system's, of the last try.
        """
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        content = retry(lambda: self._fetch(wanted), f"reading {self._url}", again=self._drop)
        self._position += wanted
        return content

    def readall(self) -> bytes:
        """All that is left."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; fewer bytes only at the end of the file."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()

    def _open(self) -> None:
        filesystem, path = fsspec.core.url_to_fs(self._url)
        # Reads are large and their order is known: reading ahead would fetch what nobody wants.
        self._handle = filesystem.open(path, "rb", cache_type="none")

    def _fetch(self, wanted: int) -> bytes:
        if self._handle is None:
            self._open()
        self._handle.seek(self._position)
        found = self._handle.read(wanted)
        while len(found) < wanted:
            more = self._handle.read(wanted - len(found))
            if not more:
                raise ConnectionError(f"the answer ends {wanted - len(found)} bytes early")
            found += more
        return found

    def _drop(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(Exception):
                self._handle.close()
            self._handle = None
