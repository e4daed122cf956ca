"""Exact duplicates: which documents repeat the text of an earlier one.

Groups of units are read and their documents' texts hashed (128 bits of blake2b) into runs sorted by
hash. Then parts of the range of hashes are taken from all runs at once and compared, and last the
places found are put in input order. Groups and parts go to all cores; each leaves a file, and a
file that is there is not made again, so that a killed pass goes on. A core holds one run or one
part in memory, whatever the size of the input.
"""

import fcntl
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import filters, inputs, spool
from data_prep.cores import on_cores
from data_prep.inputs import Input
from data_prep.output import told, writing
from data_prep.rows import Row
from data_prep.settings import Settings
from data_prep.sources import Layout, Reader
from titans_pretrain.files import sha256_file

NAME, SCRATCH = "duplicates.npy", ".duplicates"
GROUP_UNITS, GROUPS = 64, 512  # units at least of a group, and groups at most
RUN_DOCUMENTS, PART_DOCUMENTS = 2**20, 2**22  # in memory of a core, about 100 bytes each
PLACE_BITS = 32

Unit = tuple[Input, Layout, int]
Words = NDArray[np.uint64]
"""Halves of hashes, or places: ordinal of the unit << 32 | row within the unit."""


class Duplicates:
    """The places of documents to drop, sorted; memory-mapped."""

    def __init__(self, places: Words) -> None:
        self._places = places

    @classmethod
    def open(cls, path: Path) -> "Duplicates":
        """Open a ``duplicates.npy``."""
        return cls(_mapped(path))

    def dropped(self, unit: int, first: int, count: int) -> NDArray[np.bool_]:
        """Which of ``count`` rows of a unit, from row ``first`` on, are to be dropped.

        Args:
            unit: its ordinal in the plan.
            first: row within the unit.
            count: of rows.

        Returns:
            (count,) bool.
        """
        start = _place(unit, first)
        found = self._places[_span(self._places, start, start + count)]
        dropped = np.zeros(count, np.bool_)
        dropped[found - np.uint64(start)] = True
        return dropped


def find(
    units: Sequence[Unit], settings: Settings, output: Path, workers: int | None = None
) -> dict[str, Any]:
    """Write ``duplicates.npy``: all but the first, in input order, of kept documents of equal text.

    With prompts, documents are equal when prompt and text are.

    Args:
        units: all units of the plan, in input order.
        settings: columns and filters; a document that these drop is nobody's first.
        output: directory of the plan; while this runs it also holds 24 bytes a document.
        workers: processes; None: one a core; 0: this one.

    Returns:
        Name, bytes and sha256 of the file and the number of ``documents`` in it.

    Raises:
        UserError: a source that cannot be read.
        TitansError: a file cannot be written, or a worker was killed.
    """
    with _scratch(output / SCRATCH, _digest(units, settings)) as scratch:
        return _found(units, settings, output, workers, scratch)


def _found(
    units: Sequence[Unit], settings: Settings, output: Path, workers: int | None, scratch: Path
) -> dict[str, Any]:
    with ExitStack() as spooled:
        packed = any(spool.is_packed(item) for item, _, _ in units)
        folder = spooled.enter_context(spool.shared(spool.KEPT // 8)) if packed else None
        size = max(GROUP_UNITS, -(-len(units) // GROUPS))
        groups = [
            _Group(scratch, first, tuple(units[first : first + size]), settings, folder)
            for first in range(0, len(units), size)
        ]
        on_cores(groups, workers, "hashing texts")
    words = sum(group.hashes.stat().st_size for group in groups) // 8
    parts = -(-words // (3 * PART_DOCUMENTS))
    on_cores([_Part(scratch, part, parts) for part in range(parts)], workers, "comparing hashes")
    path, dropped = output / NAME, sorted(scratch.glob(f"part-{parts}-*.npy"))
    documents = _write(path, groups, dropped)
    with told(path):
        size = path.stat().st_size
    return {"name": NAME, "bytes": size, "sha256": sha256_file(path), "documents": documents}


@contextmanager
def _scratch(folder: Path, name: str) -> Iterator[Path]:
    """A folder of this process alone: that of a killed pass of the same work, if it can be locked.

    It is removed when the block ends well, and with it what killed passes of other work left.
    """
    with ExitStack() as locks:
        chosen = folder / name
        with told(folder):
            if not _lock(chosen, locks):
                chosen = folder / f"{name}-{socket.gethostname()}-{secrets.token_hex(8)}"
                chosen.mkdir(parents=True)
        yield chosen
        others = [path for path in folder.iterdir() if "-" not in path.name and path != chosen]
        gone = [chosen, *(path for path in others if _lock(path, locks))]
        for path in gone:
            shutil.rmtree(path, ignore_errors=True)
    for path in (*gone, folder):  # over NFS a folder of open files cannot be removed
        with suppress(OSError):
            path.rmdir()


def _lock(folder: Path, locks: ExitStack) -> bool:
    """Make a folder and hold its lock until the end; False if another does, or without locks."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = locks.enter_context(path.open("a+b"))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(path.stat(), os.fstat(handle.fileno()))
    except BlockingIOError:
        return False
    except OSError:  # no locks here, so nobody works in it
        with suppress(OSError):
            path.unlink()
            folder.rmdir()
        return False


@dataclass(frozen=True)
class _Group:
    """Units whose texts are hashed together, and where their hashes go."""

    scratch: Path
    first: int
    units: tuple[Unit, ...]
    settings: Settings
    spool: Path | None

    @property
    def hashes(self) -> Path:
        """Runs: their length, then high and low halves of the hashes and places."""
        return self.scratch / f"group-{self.first:09d}.hashes"

    @property
    def dropped(self) -> Path:
        """Places of documents that repeat another one of their run, sorted."""
        return self.scratch / f"group-{self.first:09d}.npy"

    def __call__(self) -> None:
        """Write both files, where one is missing."""
        if self.hashes.exists() and self.dropped.exists():
            return
        dropped = [np.zeros(0, np.uint64)]
        with writing(self.hashes) as handle:
            for hashes, places in self._runs():
                order, repeats = _in_order(*hashes)
                dropped.append(np.sort(places[order[repeats]]))
                kept = order[~repeats]
                for values in (np.array([len(kept)], np.uint64), *hashes[:, kept], places[kept]):
                    handle.write(values.tobytes())
            _save(self.dropped, np.concatenate(dropped))

    def _runs(self) -> Iterator[tuple[Words, Words]]:
        """Hashes (2, documents) and places (documents,), in input order."""
        hashes, places = bytearray(), list[int]()
        for row, place in self._kept():
            hashes += _hash(row)
            places.append(place)
            if len(places) == RUN_DOCUMENTS:
                yield _words(hashes), np.array(places, np.uint64)
                hashes, places = bytearray(), []
        if places:
            yield _words(hashes), np.array(places, np.uint64)

    def _kept(self) -> Iterator[tuple[Row, int]]:
        with Reader(self.settings.columns(), self.spool) as reader:
            for ordinal, unit in enumerate(self.units, start=self.first):
                place = _place(ordinal, 0)
                for rows in reader.rows(*unit):
                    for row in rows:
                        if filters.verdict(row, self.settings) == "kept":
                            yield row, place
                        place += 1


@dataclass(frozen=True)
class _Part:
    """One of ``parts`` equal parts of the range of hashes."""

    scratch: Path
    part: int
    parts: int

    def __call__(self) -> None:
        """Write the places of documents that repeat one of an earlier run."""
        path = self.scratch / f"part-{self.parts}-{self.part:06d}.npy"
        if path.exists():
            return
        start, end = (2**64 * edge // self.parts for edge in (self.part, self.part + 1))
        pieces = [np.zeros((3, 0), np.uint64)]
        for group in sorted(self.scratch.glob("group-*.hashes")):
            for run in _stored_runs(group):
                pieces.append(np.array(run[:, _span(run[0], start, end)]))
        high, low, places = np.concatenate(pieces, axis=1)
        order, repeats = _in_order(high, low)
        _save(path, np.sort(places[order[repeats]]))


def _stored_runs(path: Path) -> Iterator[Words]:
    """The runs of a group, (3, documents) each, memory-mapped; their lengths go before them."""
    if not path.stat().st_size:
        return
    words = np.memmap(path, np.uint64, "r")
    start = 0
    while start < len(words):
        count = int(words[start])
        yield words[start + 1 : start + 1 + 3 * count].reshape(3, count)
        start += 1 + 3 * count


def _in_order(high: Words, low: Words) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The stable order of hashes, and which of them, in that order, equal the one before."""
    order = np.argsort(high, kind="stable")
    if np.any(_repeats(high[order]) & ~_repeats(low[order])):
        order = np.lexsort((low, high))  # other hashes with the same high half
    return order, _repeats(high[order]) & _repeats(low[order])


def _repeats(values: Words) -> NDArray[np.bool_]:
    return np.concatenate([np.zeros(min(1, len(values)), np.bool_), values[1:] == values[:-1]])


def _hash(row: Row) -> bytes:
    """128 bits of the text; of prompt and text where there is a prompt."""
    return filters.digest(row.text, row.prompt, b"equal", 16)


def _words(hashes: bytearray) -> Words:
    """High and low halves, (2, documents)."""
    return np.frombuffer(bytes(hashes), ">u8").reshape(-1, 2).T.astype(np.uint64)


def _place(unit: int, row: int) -> int:
    return unit << PLACE_BITS | row


def _span(values: Words, start: int, end: int) -> slice:
    """Where sorted values of [start, end) lie; the bounds are at most 2**64."""
    first, last = (
        len(values) if bound == 2**64 else int(np.searchsorted(values, np.uint64(bound)))
        for bound in (start, end)
    )
    return slice(first, last)


def _write(path: Path, groups: Sequence[_Group], parts: Sequence[Path]) -> int:
    """Put the places of all groups and parts in order, one group of units at a time."""
    count = sum(len(_mapped(file)) for file in (*(group.dropped for group in groups), *parts))
    header = {"descr": "<u8", "fortran_order": False, "shape": (count,)}
    with writing(path) as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        for group in groups:
            start, end = (_place(group.first + units, 0) for units in (0, len(group.units)))
            found = [_between(file, start, end) for file in (group.dropped, *parts)]
            handle.write(np.sort(np.concatenate(found)).tobytes())
    return count


def _between(path: Path, start: int, end: int) -> Words:
    """A copy of a file's places in [start, end); mapped ones would each keep their file open."""
    values = _mapped(path)
    return np.array(values[_span(values, start, end)])


def _save(path: Path, places: Words) -> None:
    with writing(path) as handle:
        np.lib.format.write_array(handle, places, version=(1, 0), allow_pickle=False)


def _mapped(path: Path) -> Words:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _digest(units: Sequence[Unit], settings: Settings) -> str:
    """Names what the files of a killed pass were made of."""
    layouts = {item: layout for item, layout, _ in units}
    made_of = [
        (item.name, item.size, inputs.sha256(item), layout.units)
        for item, layout in layouts.items()
    ]
    content = repr((made_of, GROUP_UNITS, GROUPS, asdict(settings)))
    return hashlib.sha256(content.encode()).hexdigest()[:16]
