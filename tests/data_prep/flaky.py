"""A file system behind a network that fails: ``flaky://``, its files are those of ``memory://``."""

from collections import Counter
from typing import ClassVar

from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

CUT = "cut"  # instead of an error: an answer without the bytes asked for


class FlakyFile:
    def __init__(self, file, system):
        self._file, self._system = file, system

    def read(self, size=-1):
        start = self._file.tell()
        self._system.requests.append((start, size))
        if self._system.fails("read") is CUT:
            size = 0
        return self._file.read(size)

    def __getattr__(self, name):
        return getattr(self._file, name)


class FlakySystem(MemoryFileSystem):
    protocol = "flaky"
    cachable = False
    left: ClassVar = Counter()
    error = None
    requests: ClassVar = []
    sound = "*"

    @classmethod
    def fail(cls, error, sound="*", **times):
        """Let the next so many calls fail: ``open=2, read=2, info=2, list=2``.

        ``sound`` is the end of a folder that can be listed whatever fails.
        """
        cls.error, cls.left, cls.requests, cls.sound = error, Counter(times), [], sound

    @classmethod
    def fails(cls, kind):
        if cls.left[kind] <= 0:
            return None
        cls.left[kind] -= 1
        if isinstance(cls.error, BaseException):
            raise cls.error
        return cls.error

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path, mode="rb", **kwargs):
        self.fails("open")
        return FlakyFile(super()._open(path, mode, **kwargs), self)

    def info(self, path, **kwargs):
        self.fails("info")
        return super().info(path, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        if not path.endswith(self.sound):
            self.fails("list")
        return super().ls(path, detail, **kwargs)

    find = AbstractFileSystem.find
