"""Signs of life: every rank tells every ten seconds where it stands. No torch here.

A thread of its own writes them, so that they go on while the main thread is in a collective or a
save, and so that a file system that hangs holds up no other watch. It also ends a rank whose run
another start has taken over.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_pretrain.errors import FAILED
from titans_pretrain.parallel.whereabouts import Whereabouts
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import leave

if TYPE_CHECKING:
    from titans_pretrain.train.lease import Lease

SECONDS = 10.0
POLL_SECONDS = 1.0
FROZEN_SECONDS = 5.0
END_SECONDS = 1.0
RECORD_BYTES = 1024
_NAME = re.compile(r"rank-(\d+)\.json")


def write(directory: RunDirectory, record: dict[str, Any]) -> None:
    """Put a rank's record in the place of its last one, in one write and without syncing.

    Args:
        directory: the run's.
        record: ``start``, ``attempt``, ``rank``, ``host``, ``pid``, ``time`` (seconds since 1970),
            ``phase``, ``step`` and ``told``.

    Raises:
        OSError: the file system refuses.
    """
    path = directory.heartbeat / f"rank-{record['rank']}.json"
    text = json.dumps(record).ljust(RECORD_BYTES - 1) + "\n"  # of one length: nothing to cut off
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    except FileNotFoundError:
        directory.heartbeat.mkdir(exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(handle, text.encode(), 0)
    finally:
        os.close(handle)


def read(directory: RunDirectory) -> dict[int, dict[str, Any]]:
    """The newest record of each rank, of whatever start; those that cannot be read are left out."""
    records = {}
    with contextlib.suppress(OSError):
        for path in directory.heartbeat.iterdir():
            match, record = _NAME.fullmatch(path.name), _read(path)
            if match and record:
                records[int(match[1])] = record
    return dict(sorted(records.items()))


class Heartbeat:
    """Writes a rank's records, and ends the rank when its run is another start's.

    Args:
        directory: the run's.
        rank: this rank.
        whereabouts: where the main thread stands.
        lease: of this start.
        complain: prints on the terminal.
    """

    def __init__(
        self,
        directory: RunDirectory,
        rank: int,
        whereabouts: Whereabouts,
        lease: "Lease",
        complain: Callable[[str], None],
    ) -> None:
        self._directory, self._rank, self._whereabouts = directory, rank, whereabouts
        self._lease, self._complain = lease, complain
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def end(self) -> None:
        """The run needs no sign of life any more; the last one says where it ended.

        It is waited for, but not for a file system that hangs.
        """
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(END_SECONDS)

    def _run(self) -> None:
        beaten = looked = float("-inf")
        while True:
            now = time.monotonic()
            due = now - beaten >= SECONDS
            frozen = now - looked >= FROZEN_SECONDS  # others may have gone on meanwhile
            if due or frozen or self._rank == 0:
                self._end_if_fenced()
            if due:
                beaten = now
                self._beat()
            looked = now
            if self._ended.wait(POLL_SECONDS):
                self._end_if_fenced()
                self._beat()
                return

    def _beat(self) -> None:
        place = self._whereabouts.place
        record = {
            "start": self._lease.start,
            "attempt": self._lease.attempt,
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "phase": place.phase,
            "step": place.step,
            "told": str(place),
        }
        with contextlib.suppress(OSError):
            write(self._directory, record)

    def _end_if_fenced(self) -> None:
        if taken := self._lease.successor():
            try:
                sentence = f"error: this start is over: {taken} has taken the run over"
                self._complain(f"{sentence}; rank {self._rank} ends")
            finally:
                leave(FAILED)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
