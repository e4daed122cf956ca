"""Memory-mapped files that hold no file descriptor, so that 10,000 shards may be open at once."""

import contextlib
import ctypes
import errno
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.errors import TitansError

KEPT = 40_000  # of the 65,530 maps that Linux allows a process by default

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


class Owner(Protocol):
    """What holds maps that it can make again."""

    def release(self) -> None:
        """Let go of them."""


_owners: deque[weakref.ref[Owner]] = deque()


def keep(owner: Owner) -> None:
    """Count a map that an owner made; beyond ``KEPT`` the owner of the oldest lets go of its own.

    Readers go on with the arrays that they have.
    """
    _owners.append(weakref.ref(owner))
    while len(_owners) > KEPT:
        oldest = _owners.popleft()()
        if oldest is not None:
            oldest.release()


class _Mapping:
    """Owns an address range until the last array that views it is gone."""

    def __init__(self, descriptor: int, size: int) -> None:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        # At the interpreter's end threads may still read: the system unmaps then.
        weakref.finalize(self, _libc.munmap, address, size).atexit = False
        self.__array_interface__: dict[str, Any] = {
            "data": (address, True),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def map_file(file: Path | int, size: int | None = None) -> NDArray[np.uint8]:
    """The bytes of a file, read-only; ``mmap.mmap`` would keep a descriptor for each.

    Args:
        file: its path or an open descriptor.
        size: bytes mapped; None maps all that there are.

    Returns:
        (size,).

    Raises:
        OSError: the file cannot be opened or mapped.
        TitansError: the kernel allows this process no more maps, or no more address space.
    """
    with _descriptor(file) as descriptor:
        size = os.fstat(descriptor).st_size if size is None else size
        try:
            return np.asarray(_Mapping(descriptor, size)) if size else np.empty(0, np.uint8)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise TitansError(
                f"the kernel refuses a memory map of {size} bytes",
                where=str(Path(f"/proc/self/fd/{descriptor}").readlink()),
                fix="lift the limit of address space (ulimit -v) or of maps (vm.max_map_count)",
            ) from None


@contextlib.contextmanager
def _descriptor(file: Path | int) -> Iterator[int]:
    if isinstance(file, int):
        yield file
        return
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
