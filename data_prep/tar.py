"""Token shards: USTAR tars of ``.npy`` members that hold one continuous stream of tokens.

Every member but the last holds ``member_tokens`` tokens. A member ``KEY.npy`` may be followed by
``KEY.mask.npy`` (uint8, 1 = train on this token as a target). Stock ``webdataset`` reads them.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from titans_pretrain.errors import UserError

BLOCK = 512
NPY_HEADER = 128
MEMBER_TOKENS = 2**18
BLOCK_TOKENS = 4096
MASK_SUFFIX = ".mask.npy"


class Member(NamedTuple):
    """An array inside a tar: its name, where its values start, how many, of which type."""

    name: str
    offset: int
    length: int
    dtype: np.dtype[Any]


def data_offset(member: int, member_tokens: int, itemsize: int, *, masks: bool = False) -> int:
    """Where the tokens of a member start in a tar that ``TarWriter`` made, bytes.

    Args:
        member: its number, from 0 (with masks: of the token arrays alone).
        member_tokens: tokens of every member before it.
        itemsize: bytes of a token.
        masks: whether each of them is followed by its mask.
    """
    before = member_bytes(member_tokens * itemsize) + (member_bytes(member_tokens) if masks else 0)
    return member * before + BLOCK + NPY_HEADER


def member_bytes(size: int) -> int:
    """Bytes that an array of ``size`` bytes takes in a tar: headers, values and padding."""
    return BLOCK + -(-(NPY_HEADER + size) // BLOCK) * BLOCK


class Writable(Protocol):
    """What bytes can be written to."""

    def write(self, content: Any, /) -> object:
        """Append bytes."""
        ...


class TarWriter:
    """Writes arrays as tar members that carry no clock and no owner.

    Args:
        file: whose ``write`` takes bytes, in order; it stays open.
    """

    def __init__(self, file: Writable) -> None:
        self._write = file.write
        self._bytes = 0

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Append a one-dimensional array as one ``.npy`` member."""
        info = tarfile.TarInfo(name)
        info.size = NPY_HEADER + array.nbytes
        info.mode = 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") + _npy_header(array))
        self._write(array.data)
        self._write(bytes(-info.size % BLOCK))
        self._bytes += member_bytes(array.nbytes)

    def close(self) -> None:
        """Write the end of the archive."""
        end = 2 * BLOCK
        self._write(bytes(end + -(self._bytes + end) % tarfile.RECORDSIZE))


def _npy_header(array: NDArray[Any]) -> bytes:
    """The header of version 1.0, written here so that no version of numpy changes a byte."""
    told = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': ({len(array)},), }}"
    length = NPY_HEADER - 10
    return b"\x93NUMPY\1\0" + length.to_bytes(2, "little") + told.ljust(length - 1).encode() + b"\n"


class BlockSums:
    """XXH3-64 of every block of ``BLOCK_TOKENS`` values of a stream, the last block shorter."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._hash, self._filled = xxhash.xxh3_64(), 0

    def add(self, array: NDArray[Any]) -> None:
        """Continue with an array's values."""
        while len(array):
            left = BLOCK_TOKENS - self._filled
            part, array = array[:left], array[left:]
            self._hash.update(part.data)
            self._filled += len(part)
            if self._filled == BLOCK_TOKENS:
                self._end_block()

    def finish(self) -> NDArray[np.uint64]:
        """The sums, (blocks,)."""
        if self._filled:
            self._end_block()
        return np.array(self._sums, np.uint64)

    def _end_block(self) -> None:
        self._sums.append(self._hash.intdigest())
        self._hash.reset()
        self._filled = 0


def walk(path: Path) -> Iterator[Member]:
    """The members of a tar, from its headers alone.

    Raises:
        UserError: a file that cannot be opened, a damaged header, a foreign member, or an archive
            that ends early.
    """
    with _opened(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        offset = 0
        while True:
            header = handle.read(BLOCK)
            if len(header) < BLOCK:
                raise _damaged(path, offset, "the archive ends without its end mark")
            if not header.strip(b"\0"):
                if size - offset < 2 * BLOCK or handle.read().strip(b"\0"):
                    raise _damaged(path, offset, "zeros where a header should be")
                return
            try:
                info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                raise _damaged(path, offset, f"damaged header ({error})") from None
            offset += BLOCK
            if offset + info.size > size:
                raise _damaged(path, offset, f"member {info.name} is cut")
            yield _array(path, info, offset, handle)
            offset += -(-info.size // BLOCK) * BLOCK
            handle.seek(offset)


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path.name}: {error.strerror}",
            where=str(path),
            fix="copy the file back, or permit reading it",
        ) from None


def _array(path: Path, info: tarfile.TarInfo, offset: int, handle: IO[bytes]) -> Member:
    """Read the ``.npy`` header at ``offset``."""
    if not info.isreg() or not info.name.endswith(".npy"):
        raise _damaged(path, offset, f"member {info.name} is no .npy file")
    try:
        version = np.lib.format.read_magic(handle)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
    except ValueError as error:
        raise _damaged(path, offset, f"member {info.name}: {error}") from None
    data = handle.tell()
    if len(shape) != 1 or data + shape[0] * dtype.itemsize != offset + info.size:
        raise _damaged(path, offset, f"member {info.name} has shape {shape} in {info.size} bytes")
    return Member(info.name, data, shape[0], dtype)


def _damaged(path: Path, offset: int, what: str) -> UserError:
    return UserError(
        f"{path.name} is damaged: {what} at byte {offset}",
        where=str(path),
        fix=f"run `titans data verify {path.parent}`",
    )


@dataclass(frozen=True)
class TarStream:
    """A shard's tokens, memory-mapped; any span is taken at memory speed.

    Attributes:
        tokens: how many there are.
        masks: whether every member has a mask.
    """

    path: Path
    tokens: int
    masks: bool
    _member_tokens: int
    _bytes: NDArray[np.uint8]
    _tokens: tuple[Member, ...]
    _masks: tuple[Member, ...]

    @classmethod
    def open(cls, path: Path, *, dtype: str, member_tokens: int) -> "TarStream":
        """Walk the headers and check that the members are what the format says.

        Raises:
            UserError: a damaged archive or members of another format.
        """
        found = list(walk(path))
        masks = tuple(member for member in found if member.name.endswith(MASK_SUFFIX))
        tokens = tuple(member for member in found if not member.name.endswith(MASK_SUFFIX))
        for member in tokens:
            if member.dtype != np.dtype(dtype):
                raise _damaged(path, member.offset, f"{member.name} holds {member.dtype}")
        for member in tokens[:-1]:
            if member.length != member_tokens:
                raise _damaged(path, member.offset, f"{member.name} holds {member.length} tokens")
        expected = [
            Member(t.name.removesuffix(".npy") + MASK_SUFFIX, 0, t.length, np.dtype(np.uint8))
            for t in tokens
        ]
        if masks and [m._replace(offset=0) for m in masks] != expected:
            raise _damaged(path, masks[0].offset, "masks do not match the tokens")
        content = np.memmap(path, dtype=np.uint8, mode="r")
        total = sum(member.length for member in tokens)
        return cls(path, total, bool(masks), member_tokens, content, tokens, masks)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """``count`` tokens from position ``start`` of the stream, (count,)."""
        return self._span(self._tokens, start, count, np.int64)

    def read_mask(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of those tokens are trained on as targets, (count,)."""
        if not self.masks:
            return np.ones(count, np.bool_)
        return self._span(self._masks, start, count, np.bool_)

    def chunks(self) -> Iterator[tuple[str, NDArray[Any], NDArray[Any] | None]]:
        """Each member's name, tokens and mask, as views."""
        for index, member in enumerate(self._tokens):
            mask = self._view(self._masks[index]) if self.masks else None
            yield member.name, self._view(member), mask

    def _view(self, member: Member) -> NDArray[Any]:
        end = member.offset + member.length * member.dtype.itemsize
        return self._bytes[member.offset : end].view(member.dtype)

    def _span(self, members: tuple[Member, ...], start: int, count: int, kind: Any) -> NDArray[Any]:
        if start < 0 or start + count > self.tokens:
            raise IndexError(f"span {start}..{start + count} of {self.tokens} tokens")
        out = np.empty(count, kind)
        done = 0
        while done < count:
            index, inside = divmod(start + done, self._member_tokens)
            part = self._view(members[index])[inside : inside + count - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out
