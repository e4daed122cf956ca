"""The saves of a run: which state is on disk, and what a save takes."""

import contextlib
import json
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from titans_pretrain.checkpoint import evaluations, retention
from titans_pretrain.checkpoint.save import AsyncSaver, Saved
from titans_pretrain.config import CheckpointSection, RunConfig
from titans_pretrain.files import write_json
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.shards import FlatShard
from titans_pretrain.train.deadline import Save
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.lease import Lease

RECENT = 8


def awaited(config: RunConfig, directory: RunDirectory, lease: Lease) -> retention.Spared:
    """Which checkpoints stay until they are evaluated: none where no attempt has that done."""
    asked = config.pipeline.eval
    if not asked.every or not lease.attempt:
        return retention.spare_none
    return partial(evaluations.awaited, directory.path, asked.every, asked.at_once)


class Saves:
    """An ``AsyncSaver`` of a start that knows what it saved and how long that took.

    Args:
        config: how many checkpoints stay.
        directory: the run's.
        lease: of this start.
        told: on rank 0, is given the step of each save of this start that has become whole.
        spared: of the steps of the checkpoints, those that stay for now.

    Attributes:
        begun: the step of the last state whose save was begun or that was loaded; None before.
        whole: the step of the last state that is whole on disk; None before.
    """

    def __init__(
        self,
        config: CheckpointSection,
        directory: RunDirectory,
        lease: Lease,
        told: Callable[[int], None] = lambda step: None,
        spared: retention.Spared = retention.spare_none,
    ) -> None:
        self._directory, self._lease, self._told = directory, lease, told
        self._saver = AsyncSaver(
            directory.checkpoints,
            keep=config.keep,
            keep_every=config.keep_every,
            spared=spared,
            owner=lease.start,
            fence=lease.check,
        )
        self._seconds: deque[float] = deque(_earlier_seconds(directory), maxlen=RECENT)
        self._noted: Saved | None = None
        self.begun: int | None = None
        self.whole: int | None = None

    def loaded(self, step: int) -> None:
        """The state after ``step`` came from its checkpoint."""
        self.begun = self.whole = step

    def begin(
        self,
        step: int,
        shards: Sequence[FlatShard],
        *,
        state: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> None:
        """Like ``AsyncSaver.begin``."""
        self._saver.begin(step, shards, state=state, files=files)
        self._note()  # the save before had to become whole
        self.begun = step

    def poll(self) -> int:
        """Like ``AsyncSaver.poll``."""
        return self._saver.poll()

    def advance(self, states: Collection[int]) -> None:
        """Like ``AsyncSaver.advance``."""
        self._saver.advance(states)
        self._note()

    def wait(self) -> None:
        """Like ``AsyncSaver.wait``."""
        self._saver.wait()
        self._note()

    @property
    def under_way(self) -> Save | None:
        """The save that is not whole yet."""
        save = self._saver.under_way
        return Save(*save) if save else None

    @property
    def slowest(self) -> float | None:
        """Seconds of the slowest of the run's recent saves; None if none was measured."""
        return max(self._seconds, default=None)

    @property
    def last_seconds(self) -> float:
        """Seconds of the newest save of this start; 0 before the first."""
        return self._noted.seconds if self._noted else 0.0

    def _note(self) -> None:
        """Keep what a save took that has become whole."""
        last = self._saver.last
        if last is None or last is self._noted:
            return
        self._noted, self.whole = last, last.step
        self._seconds.append(last.seconds)
        if devices.rank() == 0:
            self._lease.check()
            with contextlib.suppress(OSError):  # the checkpoint is what counts
                write_json(self._directory.last_save, asdict(last))
            self._told(last.step)


def _earlier_seconds(directory: RunDirectory) -> list[float]:
    """What the newest save of an earlier start took, if that was written down."""
    try:
        seconds = json.loads(directory.last_save.read_text(encoding="utf-8"))["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [seconds] if isinstance(seconds, float) and math.isfinite(seconds) else []
