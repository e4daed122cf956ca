"""Where a prepared directory's bytes come from: a local directory, or a URL and a cache of it."""

import contextlib
import json
import os
import re
import tempfile
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
import numpy as np
from numpy.typing import NDArray

from data_prep.retry import can_pass, retry
from titans_pretrain.data.cache import Cache, File
from titans_pretrain.data.mapping import map_file
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import sha256_file

VERSIONS = (
    *("ETag", "etag", "md5Hash", "content_md5", "crc32c", "generation", "VersionId", "blob_id"),
    *("checksum", "mtime", "LastModified", "Last-Modified", "last_modified", "updated"),
)
REFRESH = 30.0  # seconds between looks at what other processes removed from the cache
AT_ONCE = 32  # questions to a server whose listing tells no sizes


class MissingFile(UserError):
    """There is no such file."""


class Storage(Protocol):
    """The files of one prepared directory, by their plain names; threads may share it."""

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Bytes of each of these files that is there.

        Raises:
            UserError: no such directory, or no permission.
            TitansError: a server that does not answer.
        """

    def read(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of a file, (stop - start,), memory-mapped and read-only.

        Raises:
            UserError: no such file, or one that ends before ``stop``.
            TitansError: a server that does not answer.
        """

    def whole(self, name: str) -> NDArray[np.uint8] | None:
        """All bytes of a file that lies here for good, memory-mapped; None of any other."""

    def local(self, name: str) -> Path:
        """A whole small file on this machine's disk.

        Raises:
            MissingFile: no such file.
            UserError: one that cannot be read.
            TitansError: a server that does not answer.
        """

    def forget(self, name: str, start: int, stop: int) -> bool:
        """Bytes [start, stop) failed their checksum: drop what a cache holds of them.

        Returns:
            Whether reading again may give other bytes: of a URL once, of a local file never.
        """


def open_storage(place: str, *, cache: Path | None, cache_bytes: int) -> Storage:
    """The storage of a prepared directory.

    Args:
        place: a directory, or the fsspec URL of one.
        cache: where pieces of a URL's files are kept; None takes a folder of this user in $TMPDIR.
        cache_bytes: of disk, the most that the cache takes.

    Raises:
        UserError: a URL of an unknown kind, or a cache that cannot be written.
    """
    local = place.removeprefix("file://")
    if "://" not in local:
        return LocalStorage(Path(local))
    return RemoteStorage(place, Cache(cache or _own_folder(), cache_bytes))


def intact(storage: Storage, name: str, sha256: str) -> Path | None:
    """A whole small file, fetched again once if its checksum is another; None if it stays so.

    Raises:
        UserError: see ``Storage.local``.
        TitansError: see ``Storage.local``.
    """
    for _ in range(2):
        path = storage.local(name)
        try:
            if sha256_file(path) == sha256:
                return path
            size = path.stat().st_size
        except OSError as error:
            raise _unreadable(path, error) from None
        if not storage.forget(name, 0, size):
            break
    return None


def _own_folder() -> Path:
    """The default cache; in a directory that all may write, so another's folder is refused."""
    folder = Path(tempfile.gettempdir()) / f"titans-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(
            f"{str(folder)!r} belongs to another user",
            where="data.cache",
            fix="give a folder of your own on the node's disk",
        )
    return folder


class LocalStorage:
    """Files of a directory, each mapped at its first read.

    Args:
        directory: where they lie.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._maps = weakref.WeakValueDictionary[str, NDArray[np.uint8]]()

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """See ``Storage``."""
        wanted, found = frozenset(names), {}
        try:
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    if entry.name in wanted:
                        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                            found[entry.name] = entry.stat().st_size
            return found
        except OSError as error:
            raise UserError(
                f"cannot list {str(self._directory)!r}: {error.strerror}",
                where=str(self._directory),
                fix="give the directory of the manifest that `titans data prepare` wrote",
            ) from None

    def read(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """See ``Storage``."""
        content = self.whole(name)
        part = content[start:stop]
        if len(part) != stop - start:
            raise _cut(str(self._directory / name), len(content), stop)
        return part

    def whole(self, name: str) -> NDArray[np.uint8]:
        """See ``Storage``."""
        content = self._maps.get(name)
        if content is None:
            content = self._maps[name] = self._map(name)
        return content

    def local(self, name: str) -> Path:
        """See ``Storage``."""
        path = self._directory / name
        try:
            open(path, "rb").close()
        except OSError as error:
            raise _unreadable(path, error) from None
        return path

    def forget(self, name: str, start: int, stop: int) -> bool:
        """See ``Storage``: the file itself is damaged."""
        return False

    def _map(self, name: str) -> NDArray[np.uint8]:
        path = self._directory / name
        try:
            return map_file(path)
        except OSError as error:
            raise _unreadable(path, error) from None


class _Entry(NamedTuple):
    """A remote file's bytes, and what tells its content from a later one; empty if unknown."""

    size: int
    version: str


class RemoteStorage:
    """Files under an fsspec URL, fetched in pieces into a cache.

    A file is told from a later one of the same name and size by what the server says (an ETag or
    its like); where it says nothing, small files are fetched anew by every process.

    Args:
        url: of the directory.
        cache: of this node.

    Raises:
        UserError: a URL of an unknown kind, or one whose package is missing.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self._url, self._cache = shown(url).rstrip("/"), cache
        with self._reaching(""):
            self._filesystem, path = fsspec.core.url_to_fs(url)
            self._filesystem.invalidate_cache()
        self._path = path.rstrip("/")
        self._files: dict[tuple[str, bool], File] = {}
        self._opening = threading.Lock()
        self._next_refresh = time.monotonic() + REFRESH

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """See ``Storage``; what the listing does not tell is asked for."""
        rest = [name for name in names if name not in self._entries]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = dict(zip(rest, pool.map(self._asked_if_there, rest), strict=True))
        self._entries |= {name: entry for name, entry in answers.items() if entry is not None}
        return {name: self._entries[name].size for name in names if name in self._entries}

    def read(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """See ``Storage``."""
        if time.monotonic() > self._next_refresh:
            self._refresh()
        file = self._files.get((name, False)) or self._open(name, whole=False)
        if stop > file.size:
            raise _cut(f"{self._url}/{name}", file.size, stop)
        return file.read(start, stop)

    def whole(self, name: str) -> None:
        """See ``Storage``: pieces come and go."""

    def local(self, name: str) -> Path:
        """See ``Storage``."""
        return (self._files.get((name, True)) or self._open(name, whole=True)).fetch_all()

    def forget(self, name: str, start: int, stop: int) -> bool:
        """See ``Storage``."""
        for whole in (False, True):
            if file := self._files.get((name, whole)):
                file.forget(start, stop)
        return True

    def _open(self, name: str, *, whole: bool) -> File:
        with self._opening:
            if (name, whole) not in self._files:
                entry = self._entries.get(name)
                if entry is None or not entry.version:
                    entry = self._asked(name)
                identity = json.dumps([self._url, name, *entry])
                file = self._cache.file(
                    identity,
                    name,
                    entry.size,
                    lambda start, stop: self._fetch(name, start, stop),
                    whole=whole,
                )
                if whole and not entry.version:
                    file.forget(0, entry.size)
                self._files[name, whole] = file
        return self._files[name, whole]

    @cached_property
    def _entries(self) -> dict[str, _Entry]:
        """What one listing tells; all processes take it, so that they share what is cached."""
        with self._reaching(""):
            found = retry(
                lambda: self._filesystem.ls(self._path, detail=True), f"listing {self._url}"
            )
        files = [item for item in found if item["type"] == "file" and item["size"] is not None]
        return {item["name"].rpartition("/")[2]: _entry(item) for item in files}

    def _asked_if_there(self, name: str) -> _Entry | None:
        with contextlib.suppress(MissingFile):
            return self._asked(name)
        return None

    def _asked(self, name: str) -> _Entry:
        """What the server tells of one file."""
        with self._reaching(name):
            info = retry(
                lambda: self._filesystem.info(f"{self._path}/{name}"),
                f"asking for {self._url}/{name}",
            )
        if info["size"] is None:
            raise UserError(
                "the server does not tell the size",
                where=f"{self._url}/{name}",
                fix="copy the data to a disk or an object store",
            )
        return _entry(info)

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        def get() -> bytes:
            body = self._filesystem.cat_file(f"{self._path}/{name}", start=start, end=stop)
            if len(body) < stop - start:
                raise EOFError(f"{len(body)} bytes came instead of {stop - start}")
            return bytes(body)

        with self._reaching(name):
            body = retry(get, f"reading {self._url}/{name}")
        if len(body) > stop - start:
            raise UserError(
                f"the server sends {len(body)} bytes where {stop - start} are asked for",
                where=f"{self._url}/{name}",
                fix="serve the data from one that knows range requests, or copy it here",
            )
        return body

    def _refresh(self) -> None:
        self._next_refresh = time.monotonic() + REFRESH
        for file in list(self._files.values()):
            file.refresh()

    @contextlib.contextmanager
    def _reaching(self, name: str) -> Iterator[None]:
        """Name the cause when the server cannot be asked; that may be any exception."""
        where = f"{self._url}/{name}" if name else self._url
        try:
            yield
        except TitansError:
            raise
        except FileNotFoundError:
            raise MissingFile(
                f"cannot read {where.rpartition('/')[2]}: no such file",
                where=where,
                fix="check data.manifest, or copy the file back",
            ) from None
        except Exception as error:
            reason = shown(str(error) or type(error).__name__).splitlines()[0]
            what = f"cannot read {where.rpartition('/')[2]}: {reason}"
            if can_pass(error):
                fix = "check the network, then go on with --resume"
                raise TitansError(what, where=where, fix=fix) from None
            fix = "check the URL and the credentials, and install the package that it needs"
            raise UserError(what, where=where, fix=fix) from None


def _entry(info: Mapping[str, Any]) -> _Entry:
    version = json.dumps([str(info[key]) for key in VERSIONS if info.get(key)])
    return _Entry(int(info["size"]), "" if version == "[]" else version)


def shown(text: str) -> str:
    """A text without the passwords and signatures that URLs in it may carry."""
    return re.sub(r"(?<=//)[^/\s@]+@|\?\S+", "", text)


def _unreadable(path: Path, error: OSError) -> UserError:
    kind = MissingFile if isinstance(error, FileNotFoundError) else UserError
    return kind(
        f"cannot read {path.name}: {error.strerror}",
        where=str(path),
        fix=f"copy the file back, or run `titans data verify {path.parent}`",
    )


def _cut(where: str, size: int, stop: int) -> UserError:
    return UserError(
        f"{where.rpartition('/')[2]} ends at byte {size}, before {stop}",
        where=where,
        fix="run `titans data verify` on the prepared directory and do what it says",
    )
