"""Writing a checkpoint while training goes on: whole or not at all, whatever dies when."""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from threading import Event
from typing import Any

import torch

from titans_pretrain.checkpoint import agreement, retention, snapshot, tensor_file
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint.background import Progress, Task
from titans_pretrain.checkpoint.manifest import FileRecord
from titans_pretrain.checkpoint.publish import Place, prepare, publish
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.shards import FlatShard

log = logging.getLogger(__name__)
_FIX = (
    "mend that (a full disk: free space; a directory that not all hosts share: move "
    "run.directory) and resume; earlier checkpoints are untouched"
)
_LONG = 1.0  # seconds


class _Cancelled(Exception):
    """This rank's file is no longer wanted."""


@dataclass(frozen=True)
class Saved:
    """A save that became whole.

    Attributes:
        step: whose state.
        seconds: what it takes alone: copying, the slowest rank's writing, publishing.
        bytes: of all ranks' files.
    """

    step: int
    seconds: float
    bytes: int


class _Phase(Enum):
    IDLE = "idle"
    WRITING = "writing"
    PUBLISHING = "publishing"


class AsyncSaver:
    """Saves checkpoints of a run; collective over the default process group, or alone without one.

    A save has three steps, and all ranks are always at the same one:

    1. ``begin`` agrees on who writes what, copies this rank's part to host memory and returns.
       A thread of each rank writes and syncs its file into ``root/.step-N.OWNER.tmp``.
    2. Once all have written, ``advance`` gathers their sizes and checksums. A thread of rank 0
       writes index and manifest, gives the directory its name, moves ``latest``, prunes.
    3. Once that is done, ``advance`` returns the checkpoint's path.

    Threads run no collective, and only ``wait`` (and ``begin``, if the save before is not done)
    waits for them. Each step of training asks ``poll`` on every rank, exchanges the answers in a
    collective it makes anyway, and gives them to ``advance``::

        saver.begin(step, engine.shards(), state=..., files=...)
        ...
        states = <saver.poll() of every rank>        # or just the smallest and the largest
        if path := saver.advance(states): print(f"{path} is whole")
        ...
        saver.wait()                                 # at the end, or before loading a checkpoint

    A failure of any rank's thread is raised on all ranks alike by the next ``advance``, ``wait``
    or ``begin``; then nothing is left of the attempt and the saver can be used again. A process
    that is killed loses the work since the last checkpoint that got its name.

    Host memory: what this rank writes, about 12 bytes for each parameter of its part; the buffer
    is kept for the next save. Disk: ``keep + 1`` checkpoints, and those kept for good.

    Args:
        root: directory of the run's checkpoints, on a file system that all ranks share. The
            remains of interrupted saves are removed from it, and named, at once.
        keep: how many of the newest checkpoints stay, at least 1.
        keep_every: checkpoints whose step is a multiple of it stay for good; 0 none.
        spared: of the steps of the checkpoints, those that stay for now; asked on rank 0.
        owner: the start's name. With it a checkpoint that this saver did not make gives way to its
            own of the same step: a writer of an earlier start may have been late.
        fence: raises where another start has taken the run over; asked on rank 0.

    Attributes:
        last: the newest save that became whole; None before the first.

    Raises:
        TitansError: on all ranks alike, if the remains cannot be removed.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_every: int = 0,
        spared: retention.Spared = retention.spare_none,
        owner: str = "",
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 1 or keep_every < 0:
            raise ValueError(f"keep {keep} must be at least 1, keep_every {keep_every} at least 0")
        self._root, self._keep, self._keep_every = root, keep, keep_every
        self._spared, self._owner, self._fence = spared, owner, fence
        self.last: Saved | None = None
        self._began = self._seconds = 0.0
        self._bytes = 0
        self._phase = _Phase.IDLE
        self._task: Task[Any] | None = None
        self._cancelled = Event()
        self._buffer = snapshot.HostBuffer()
        self._layout: tuple[object, ...] | None = None
        self._place: Place
        self._plan: snapshot.WritePlan
        self._plain: dict[str, bytes]
        agreement.on_first(f"opening {root}", self._clear, fix=_FIX)

    def begin(
        self,
        step: int,
        shards: Sequence[FlatShard],
        *,
        state: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> None:
        """Begin to save; what is passed may change as soon as this returns. Collective.

        Waits for the save before, if that is not done.

        Args:
            step: optimizer steps done. A damaged checkpoint of that step is replaced.
            shards: this rank's parts; together the ranks' parts cover every tensor. What several
                ranks hold alike is written once. float32 or bfloat16.
            state: rank 0's further state, values that JSON returns unchanged.
            files: rank 0's further files, plain names.

        Raises:
            TitansError: on all ranks alike, naming rank, file and cause; nothing is left of the
                attempt. Also if a checkpoint of that step is there already that is good, or that
                cannot be read now, and if the save before failed.
        """
        self._finish_earlier(step)
        self._began = time.perf_counter()
        self._place = place = Place(self._root, step, self._owner)
        known = agreement.on_all(place.doing, lambda: self._prepare(shards, state, files), fix=_FIX)
        with self._nothing_left_on_failure():
            if not all(known):
                self._plan = snapshot.plan(shards, place.doing, fix=_FIX)
                self._layout = snapshot.layout(shards)
            agreement.on_all(place.doing, lambda: self._buffer.fill(self._plan, shards), fix=_FIX)
        self._cancelled = Event()
        self._seconds = time.perf_counter() - self._began
        self._start(_Phase.WRITING, self._write)

    @property
    def under_way(self) -> tuple[int, float] | None:
        """Step of the save that is not whole yet, and seconds since it was begun."""
        if self._phase is _Phase.IDLE:
            return None
        return self._place.step, time.perf_counter() - self._began

    def poll(self) -> int:
        """How far this rank's thread is, as an integer to exchange; does not wait."""
        return (self._task.progress() if self._task else Progress.FINISHED).value

    def advance(self, states: Collection[int]) -> Path | None:
        """Take the save one step further if the ranks are ready, without waiting; collective.

        Args:
            states: ``poll`` of every rank; the smallest and the largest are enough.

        Returns:
            The checkpoint that has become whole by now; None if there is none new.

        Raises:
            TitansError: on all ranks alike, naming rank, file and cause: it could not be saved.
        """
        failed = Progress.FAILED in states
        if self._phase is _Phase.IDLE or (Progress.BUSY in states and not failed):
            return None
        if failed:
            self._cancelled.set()
        return self._advance()

    def wait(self) -> Path | None:
        """Finish the save that is under way, if any, waiting for the disk; collective.

        Returns:
            The checkpoint that has become whole; None if there was none under way.

        Raises:
            TitansError: like ``advance``.
        """
        path = None
        while self._phase is not _Phase.IDLE:
            path = self._advance()
        return path

    def _prepare(
        self, shards: Sequence[FlatShard], state: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> bool:
        """Rank 0 makes room; whether this rank's plan of the save before still holds."""
        if devices.rank() == 0:
            self._fence()
            foreign = self.last is None or self._place.step != self.last.step
            replace = bool(self._owner) and foreign
            self._plain = prepare(self._place, state, files, replace=replace)
        return snapshot.layout(shards) == self._layout

    def _write(self) -> FileRecord | None:
        """Write and sync this rank's file; None if there is none or it is no use. In a thread."""
        plan, cancelled = self._plan, self._cancelled
        if not plan.entries:
            return None

        def boxes() -> Iterator[torch.Tensor]:
            for box in self._buffer.boxes:
                if cancelled.is_set():
                    raise _Cancelled
                yield box

        try:
            return tensor_file.write(self._place.temporary / plan.file, plan.entries, boxes())
        except _Cancelled:
            return None

    def _publish(self, written: Sequence[FileRecord]) -> None:
        """Complete the checkpoint. In a thread of rank 0."""
        assert self._plan.index is not None
        publish(
            self._place,
            self._plan.index,
            written,
            self._plain,
            keep=self._keep,
            keep_every=self._keep_every,
            spared=self._spared,
            fence=self._fence,
        )

    def _clear(self) -> None:
        """Remove what saves of earlier starts left."""
        self._fence()
        retention.remove_leftovers(self._root)

    def _advance(self) -> Path | None:
        """Join the threads, then begin the next step of the save or end it."""
        with self._nothing_left_on_failure():
            outcomes = agreement.on_all(self._place.doing, self._joined, fix=_FIX)
        self._seconds += max(seconds for _, seconds in outcomes)
        if self._phase is _Phase.WRITING:
            written = [record for record, _ in outcomes if record is not None]
            self._bytes = sum(record.bytes for record in written)
            self._start(_Phase.PUBLISHING, lambda: self._publish(written), only_first=True)
            return None
        self._phase, self._task = _Phase.IDLE, None
        self.last = Saved(self._place.step, self._seconds, self._bytes)
        return self._place.path

    def _joined(self) -> tuple[Any, float]:
        """What this rank's thread returned, and its seconds."""
        return (self._task.result(), self._task.seconds) if self._task else (None, 0.0)

    def _start(
        self, phase: _Phase, action: Callable[[], object], *, only_first: bool = False
    ) -> None:
        self._phase = phase
        idle = only_first and devices.rank() != 0
        self._task = None if idle else Task(action, f"checkpoint {phase.value}")

    def _finish_earlier(self, step: int) -> None:
        """Wait for the save before, and say so where it took long."""
        began, busy = time.perf_counter(), self._phase is not _Phase.IDLE
        earlier = self.wait()
        seconds = time.perf_counter() - began
        if busy and seconds > _LONG and devices.rank() == 0:
            log.warning(
                "the save of step %d waited %.0f s for %s: the disk is slower than "
                "checkpoint.every allows",
                step,
                seconds,
                earlier,
            )

    @contextlib.contextmanager
    def _nothing_left_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._cancelled.set()
            self._phase, self._task = _Phase.IDLE, None
            if devices.rank() == 0:
                shutil.rmtree(self._place.temporary, ignore_errors=True)
            raise


def save(
    root: Path,
    step: int,
    shards: Sequence[FlatShard],
    *,
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write ``root/step-N`` and wait until it is whole; see ``AsyncSaver``. Collective.

    Returns:
        The checkpoint's directory.

    Raises:
        TitansError: on all ranks alike, naming rank, file and cause; nothing is left of the
            attempt.
    """
    saver = AsyncSaver(root, keep=keep, keep_every=keep_every)
    saver.begin(step, shards, state=state, files=files)
    saver.wait()
    return root / layout.step_name(step)
