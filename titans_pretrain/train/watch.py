"""Ending a run that hangs, and saying where every rank stood. No torch here.

A thread of each rank compares the time of the work under way with that of earlier work. It talks to
the other ranks' threads through files of the run's directory alone, so it works whatever the ranks'
communication, or their main threads, are stuck in.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titans_pretrain.errors import STOPPED
from titans_pretrain.files import atomic_file
from titans_pretrain.parallel.whereabouts import Whereabouts
from titans_pretrain.train import hang
from titans_pretrain.train.directory import RunDirectory, failure_record, write_first

POLL_SECONDS = 1.0
LEAST_SECONDS = 45.0
PATIENCE_SECONDS = 1800.0
SLOWER = 10
LOOK_SECONDS = 5.0
GATHER_SECONDS = 15.0
REPEATED = ("step", "validation batch")


class Watch:
    """A rank's watch over its own progress.

    Args:
        directory: the run's; its ``hang`` directory takes the records.
        rank: this rank.
        ranks: number of ranks.
        whereabouts: where the main thread stands.
        seconds: limit of repeated work; 0 takes ten times the slowest recent one, at least 45 s.
        complain: prints on the terminal.
    """

    def __init__(
        self,
        directory: RunDirectory,
        rank: int,
        ranks: int,
        whereabouts: Whereabouts,
        *,
        seconds: float,
        complain: Callable[[str], None],
    ) -> None:
        self._directory, self._rank, self._ranks = directory, rank, ranks
        self._whereabouts, self._seconds, self._complain = whereabouts, seconds, complain
        self._work: tuple[str, float] = ("start", time.monotonic())
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def begin(self, work: str) -> None:
        """The main thread begins a piece of work, and has ended the one before it.

        Args:
            work: ``"step"`` or ``"validation batch"``, whose limit follows from earlier ones; any
                other may take half an hour.
        """
        before, since = self._work
        now = time.monotonic()
        self._recent[before].append(now - since)
        self._work = (work, now)

    def end(self) -> None:
        """The main thread needs no watch any more."""
        self._ended.set()

    def settle(self) -> None:
        """If the run is known to hang, let the watch end this process: a failure is its outcome."""
        if self._thread.is_alive() and not self._ended.is_set() and self._records():
            self._thread.join(2 * GATHER_SECONDS)

    def limit(self, work: str) -> float:
        """Seconds that a piece of work may take."""
        recent = self._recent.get(work)
        if work not in REPEATED or not recent:
            return PATIENCE_SECONDS
        return self._seconds or max(LEAST_SECONDS, SLOWER * max(recent))

    def _run(self) -> None:
        current, waited, last = self._work, 0.0, time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            now = time.monotonic()
            if self._work is not current:
                current, waited = self._work, 0.0
            waited += min(now - last, 3 * POLL_SECONDS)  # a process that was stopped did not hang
            last = now
            limit = self.limit(current[0])
            if waited > limit or (waited > LOOK_SECONDS and self._records()):
                self._report(waited, limit)

    def _report(self, waited: float, limit: float) -> None:
        """Record this rank's place, wait for the other records, tell them all, end the process."""
        late = threading.Timer(3 * GATHER_SECONDS, self._give_up)  # the disk may be what hangs
        late.daemon = True
        late.start()
        try:
            self._record(waited, limit)
            records = self._gather()
            if min(records) == self._rank:
                self._tell(records, waited)
            else:
                self._wait_for(self._directory.error.exists)
        except OSError as error:
            self._complain(f"the watch cannot use {self._directory.hang}: {error}")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STOPPED)

    def _give_up(self) -> None:
        place, hang = self._whereabouts.place, self._directory.hang
        self._complain(f"error: rank {self._rank} hangs: {place}; {hang} cannot be written")
        os._exit(STOPPED)

    def _record(self, waited: float, limit: float) -> None:
        record = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": self._whereabouts.place.as_json(),
            "told": str(self._whereabouts.place),
            "seconds": round(waited, 1),
            "limit": round(limit, 1),
            "stacks": _stacks(),
        }
        self._directory.hang.mkdir(exist_ok=True)
        with atomic_file(self._path(self._rank), "w") as handle:
            json.dump(record, handle, indent=2)

    def _gather(self) -> dict[int, dict[str, Any]]:
        """The records by rank; of all ranks, or of those that wrote one in time."""
        self._wait_for(lambda: len(self._records()) == self._ranks)
        return {rank: json.loads(self._path(rank).read_text()) for rank in self._records()}

    def _tell(self, records: dict[int, dict[str, Any]], waited: float) -> None:
        report = hang.explain(
            records, self._ranks, _started(self._directory.ranks), str(self._directory.hang)
        )
        record = failure_record(report.error, report.culprit, report.host, report.stack)
        if write_first(self._directory.error, record | {"ranks": list(records.values())}):
            print(report, file=sys.stderr, flush=True)
            self._complain(str(report))
        time.sleep(2 * POLL_SECONDS)  # the others' watches see the report and end their ranks

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + GATHER_SECONDS
        while not condition() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)

    def _records(self) -> list[int]:
        """Ranks whose record is there."""
        try:
            names = [path.name for path in self._directory.hang.iterdir()]
        except OSError:
            return []
        found = (name.removeprefix("rank-").removesuffix(".json") for name in names)
        return sorted(int(number) for number in found if number.isdecimal())

    def _path(self, rank: int) -> Path:
        return self._directory.hang / f"rank-{rank}.json"


def _stacks() -> dict[str, list[str]]:
    """Where each thread but the watch's own stands, by name, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = {}
    for number, frame in sys._current_frames().items():
        if number != threading.get_ident():
            walk = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)
            lines = [f"{call.filename}:{call.lineno} {call.name}" for call in reversed(walk)]
            stacks[names.get(number, f"thread {number}")] = lines
    return stacks


def _started(path: Path) -> dict[str, Any]:
    """Host and process of each rank, as far as the start wrote them down."""
    try:
        started: dict[str, Any] = json.loads(path.read_text())
        return started
    except (OSError, ValueError):
        return {}
