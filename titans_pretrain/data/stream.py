"""Shards end to end as one stream of tokens; any span of it at memory speed."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from data_prep.tar import BLOCK_TOKENS, data_offset, member_bytes
from titans_pretrain.data.mapping import keep, map_file
from titans_pretrain.data.storage import Storage, intact
from titans_pretrain.errors import TitansError


@dataclass(frozen=True)
class Arrays:
    """Where the arrays of tokens, or of masks, lie in a tar.

    Attributes:
        dtype: of their values.
        member_tokens: values of every one but the last.
        first: the byte at which the values of the first one start.
        stride: bytes from there to those of the next.
        last: the byte at which the values of the last one start.
        count: how many there are.
    """

    dtype: np.dtype[Any]
    member_tokens: int
    first: int
    stride: int
    last: int
    count: int

    def offset(self, member: int) -> int:
        """The byte at which the values of a member start."""
        return self.last if member == self.count - 1 else self.first + member * self.stride


@dataclass(frozen=True)
class TarLayout:
    """How the tars of a preparation are laid out.

    Attributes:
        dtype: of stored tokens.
        member_tokens: tokens of every member but a tar's last.
        masks: whether every member has a mask after it.
    """

    dtype: np.dtype[Any]
    member_tokens: int
    masks: bool

    def arrays(self, tokens: int, *, mask: bool) -> Arrays:
        """Where the tokens, or the masks, of a tar of so many tokens lie."""
        each, size = self.member_tokens, self.dtype.itemsize
        count = -(-tokens // each)
        first, second, last = (
            data_offset(member, each, size, masks=self.masks) for member in (0, 1, count - 1)
        )
        stride = second - first
        if mask:
            first += member_bytes(each * size)
            last += member_bytes((tokens - (count - 1) * each) * size)
        return Arrays(np.dtype(np.uint8) if mask else self.dtype, each, first, stride, last, count)


class Shard:
    """One tar's stream of tokens, and of masks.

    Args:
        storage: holds the tar and its index.
        entry: of the manifest.
        layout: of the tar.
        check: compare every block read with its checksum.
        damaged: makes the error for a file of this shard and what is wrong with it.
    """

    def __init__(
        self,
        storage: Storage,
        entry: Mapping[str, Any],
        layout: TarLayout,
        *,
        check: bool,
        damaged: Callable[[str, str], TitansError],
    ) -> None:
        self._storage, self._entry, self._layout = storage, entry, layout
        self._check, self._damaged = check, damaged
        self.name: str = entry["name"]
        self.tokens: int = entry["tokens"]
        self.masks = layout.masks

    def read(self, start: int, stop: int, *, mask: bool = False) -> NDArray[Any]:
        """The tokens, or their masks, at positions [start, stop), (stop - start,), as stored.

        Raises:
            UserError: a block that differs from its checksum, told apart from a damaged index.
        """
        if not self._check:
            return self._values(start, stop, mask)
        low, high = start - start % BLOCK_TOKENS, stop + -stop % BLOCK_TOKENS
        if high > self.tokens:
            high = self.tokens
        content = self._copied(low, high, mask)
        if not self._matches(content, low // BLOCK_TOKENS, mask):
            content = self._again(low, high, mask)
        return content[start - low : stop - low]

    def provenance(self) -> Path:
        """The table of the shard's documents, whole by its checksum.

        Raises:
            UserError: it is missing or damaged.
        """
        return self._intact(self._entry["provenance"])

    def release(self) -> None:
        """Let go of the maps; the next read makes them anew."""
        for name in ("_whole", "_members", "_sums"):
            self.__dict__.pop(name, None)

    def _intact(self, entry: Mapping[str, Any]) -> Path:
        path = intact(self._storage, entry["name"], entry["sha256"])
        if path is None:
            raise self._damaged(entry["name"], "it has another sha256 than the manifest tells")
        return path

    def _copied(self, start: int, stop: int, mask: bool) -> NDArray[Any]:
        """Positions [start, stop) in memory: hashing pages still on disk would stop all threads."""
        return self._values(start, stop, mask).copy()

    def _values(self, start: int, stop: int, mask: bool) -> NDArray[Any]:
        """Positions [start, stop); a view where they lie in one member."""
        arrays = self._arrays[mask]
        size, each = arrays.dtype.itemsize, arrays.member_tokens
        member, inside = divmod(start, each)
        if inside + stop - start <= each:
            members = self._members[mask]
            if members is not None and member < len(members):
                return members[member, inside : inside + stop - start]
            offset = arrays.offset(member) + inside * size
            content = self._storage.read(self.name, offset, offset + (stop - start) * size)
            return content.view(arrays.dtype)
        borders = [start, *range((member + 1) * each, stop, each), stop]
        return np.concatenate(
            [self._values(low, high, mask) for low, high in itertools.pairwise(borders)]
        )

    def _matches(self, content: NDArray[Any], block: int, mask: bool) -> bool:
        """Whether the blocks from ``block`` on have their checksums."""
        view, sums = content.data, self._sums[mask]
        for at in range(0, len(view), BLOCK_TOKENS):
            if xxh3_64_intdigest(view[at : at + BLOCK_TOKENS]) != sums[block]:
                return False
            block += 1
        return True

    def _again(self, start: int, stop: int, mask: bool) -> NDArray[Any]:
        """Blocks of which one failed its checksum, each read anew until it has it."""
        borders = [*range(start, stop, BLOCK_TOKENS), stop]
        return np.concatenate(
            [self._mended(low, high, mask) for low, high in itertools.pairwise(borders)]
        )

    def _mended(self, start: int, stop: int, mask: bool) -> NDArray[Any]:
        """One block, after its index and then its bytes were fetched again where that may help."""
        first = self._place(start, mask)
        last = self._place(stop - 1, mask) + self._arrays[mask].dtype.itemsize
        for help_it in (
            lambda: None,
            self._check_index,
            lambda: self._storage.forget(self.name, first, last),
        ):
            help_it()
            content = self._copied(start, stop, mask)
            if self._matches(content, start // BLOCK_TOKENS, mask):
                return content
        raise self._damaged(self.name, f"bytes {first} to {last} do not have their checksum")

    def _check_index(self) -> None:
        """Only here: a damaged index makes no damaged block pass, and its hash takes its time."""
        self._intact(self._entry["index"])
        self.__dict__.pop("_sums", None)

    def _place(self, position: int, mask: bool) -> int:
        """The byte of the tar at which the value of a position starts."""
        arrays = self._arrays[mask]
        member, inside = divmod(position, arrays.member_tokens)
        return arrays.offset(member) + inside * arrays.dtype.itemsize

    @cached_property
    def _arrays(self) -> list[Arrays]:
        """Where tokens, and masks, lie; made at the first read: few of 10,000 come soon."""
        kinds = (False, True) if self.masks else (False,)
        return [self._layout.arrays(self.tokens, mask=kind) for kind in kinds]

    @cached_property
    def _whole(self) -> NDArray[np.uint8] | None:
        """All bytes of a tar that lies here for good."""
        content = self._storage.whole(self.name)
        if content is not None:
            keep(self)
        return content

    @cached_property
    def _members(self) -> list[NDArray[Any] | None]:
        """The members of full length as views, (members, member_tokens); None to read otherwise."""
        content = self._whole
        if content is None:
            return [None] * len(self._arrays)
        return [_full_members(content, arrays) for arrays in self._arrays]

    @cached_property
    def _sums(self) -> list[memoryview]:
        """The checksums of tokens and of masks, (blocks,) each."""
        index, rows = self._entry["index"], len(self._arrays)
        blocks = -(-self.tokens // BLOCK_TOKENS)
        content = map_file(self._storage.local(index["name"]))
        keep(self)
        if len(content) != index["bytes"]:
            what = f"it has {len(content)} bytes instead of {index['bytes']}"
            raise self._damaged(index["name"], what)
        sums = content[-8 * rows * blocks :].view("<u8").reshape(rows, blocks)
        return [row.data for row in sums]


def _full_members(content: NDArray[np.uint8], arrays: Arrays) -> NDArray[Any] | None:
    """Every array but a tar's last, (members, member_tokens); None if it has or holds none."""
    count, size = arrays.count - 1, arrays.dtype.itemsize
    end = arrays.first + (count - 1) * arrays.stride + arrays.member_tokens * size
    if not count or end > len(content):
        return None
    shape = (count, arrays.member_tokens)
    return np.ndarray(shape, arrays.dtype, content, arrays.first, (arrays.stride, size))


class Stream:
    """Shards one after another.

    Args:
        shards: in order.

    Attributes:
        shards: the same.
        tokens: in all of them.
        masks: whether some targets are not trained on.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self._until = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)[1:]
        self._starts = [0, *self._until.tolist()]
        self.tokens = self._starts[-1]
        self.masks = any(shard.masks for shard in shards)

    def copy(
        self,
        rows: Sequence[NDArray[Any]],
        starts: NDArray[np.int64],
        stops: NDArray[np.int64],
        *,
        mask: bool = False,
    ) -> None:
        """Copy the spans [starts, stops) into the beginnings of rows.

        Args:
            rows: n arrays, (at least stop - start,) each.
            starts: (n,), positions in the stream.
            stops: (n,).
            mask: copy masks instead of tokens.
        """
        first = np.searchsorted(self._until, starts, side="right").tolist()
        for row, start, stop, shard in zip(
            rows, starts.tolist(), stops.tolist(), first, strict=True
        ):
            begun = start
            while start < stop:
                origin, end = self._starts[shard], self._starts[shard + 1]
                if end > stop:
                    end = stop
                part = self.shards[shard].read(start - origin, end - origin, mask=mask)
                row[start - begun : end - begun] = part
                start, shard = end, shard + 1

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens of one span, (stop - start,)."""
        self._within(start, stop)
        out = np.empty(stop - start, np.int64)
        self.copy([out], np.array([start]), np.array([stop]))
        return out

    def place(self, position: int) -> tuple[Shard, int]:
        """The shard of a position of the stream, and the position in that shard's."""
        shard = int(np.searchsorted(self._until, position, side="right"))
        return self.shards[shard], position - self._starts[shard]

    def _within(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"span {start}..{stop} of {self.tokens} tokens")


@dataclass(frozen=True)
class Spans:
    """Consecutive spans of tokens [start, stop) of a stream, the last padded.

    Span p holds the tokens [start + p * length, start + (p + 1) * length + 1): the inputs and the
    last target. So every token but the first is a target of exactly one span.

    Attributes:
        stream: is cut.
        start: first token of the part.
        stop: end of the part.
        length: inputs of a span.
        pad: fills the last one; pads are no targets.
    """

    stream: Stream
    start: int
    stop: int
    length: int
    pad: int

    @property
    def count(self) -> int:
        """Number of spans."""
        return max(0, -(-(self.stop - self.start - 1) // self.length))

    @property
    def padding(self) -> int:
        """Pads of the last span."""
        return self.count * self.length - max(0, self.stop - self.start - 1)

    def place(self, span: int) -> int:
        """The position of the stream at which a span begins."""
        return self.start + span * self.length

    def read(
        self,
        tokens: Sequence[NDArray[np.int64]],
        masks: Sequence[NDArray[np.bool_]] | None,
        spans: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Fill rows with spans.

        Args:
            tokens: n rows, (length + 1,) each.
            masks: likewise, all True; become False where there is no loss. None asks for none.
            spans: (n,), which.

        Returns:
            (n,), tokens of each row that are no pads.
        """
        starts = self.start + spans * self.length
        stops = np.minimum(starts + self.length + 1, self.stop)
        self.stream.copy(tokens, starts, stops)
        if masks is not None and self.stream.masks:
            self.stream.copy(masks, starts, stops, mask=True)
        real = stops - starts
        for row in np.flatnonzero(real <= self.length).tolist():
            tokens[row][real[row] :] = self.pad
            if masks is not None:
                masks[row][real[row] :] = False
        return real
