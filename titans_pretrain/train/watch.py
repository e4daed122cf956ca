"""Ending a run that hangs, and saying where every rank stood. No torch here.

A thread of each rank compares the time of the work under way with that of earlier work. It talks to
the other ranks' threads through files of the run's directory alone, so it works whatever the ranks'
communication, or their main threads, are stuck in.
"""

import contextlib
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

from titans_pretrain.errors import FAILED, STOPPED
from titans_pretrain.files import atomic_file
from titans_pretrain.parallel.whereabouts import Whereabouts
from titans_pretrain.train import hang
from titans_pretrain.train.directory import RunDirectory, failure_record
from titans_pretrain.train.lease import Fenced, Lease
from titans_pretrain.train.signals import leave

POLL_SECONDS = 1.0
LEAST_SECONDS = 35.0  # with what the watch takes itself, a frozen rank is told within a minute
PATIENCE_SECONDS = 1800.0
SLOWER = 10
LOOK_SECONDS = 5.0
GATHER_SECONDS = 15.0
REPEATED = ("step", "validation batch")


class Watch:
    """A rank's watch over its own progress, and over the failures of others.

    Args:
        directory: the run's; its ``hang`` directory takes the records.
        rank: this rank.
        ranks: number of ranks.
        whereabouts: where the main thread stands.
        lease: of this start; what was written for another one does not count, and where another
            one has the run nothing is written.
        seconds: limit of repeated work; 0 takes ten times the slowest recent one, at least 35 s.
        complain: prints on the terminal.
    """

    def __init__(
        self,
        directory: RunDirectory,
        rank: int,
        ranks: int,
        whereabouts: Whereabouts,
        *,
        lease: Lease,
        seconds: float,
        complain: Callable[[str], None],
    ) -> None:
        self._directory, self._rank, self._ranks = directory, rank, ranks
        self._whereabouts, self._seconds, self._complain = whereabouts, seconds, complain
        self._lease, self._start = lease, lease.start
        self._known: dict[int, dict[str, Any]] = {}
        self._broken: set[str] = set()
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
        if work not in REPEATED:
            return PATIENCE_SECONDS
        if self._seconds:
            return self._seconds
        recent = self._recent.get(work)
        return max(LEAST_SECONDS, SLOWER * max(recent)) if recent else PATIENCE_SECONDS

    def _run(self) -> None:
        current, waited, last = self._work, 0.0, time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            now = time.monotonic()
            if self._work is not current:
                current, waited = self._work, 0.0
            waited += min(now - last, 3 * POLL_SECONDS)  # a process that was stopped did not hang
            last = now
            limit = self.limit(current[0])
            looks = waited > LOOK_SECONDS
            if waited > limit or (looks and self._records()):
                self._report(waited, limit)
            elif looks:
                self._follow()

    def _report(self, waited: float, limit: float) -> None:
        """Record this rank's place, wait for the other records, tell them all, end the process."""
        try:
            late = threading.Timer(3 * GATHER_SECONDS, self._give_up, ("the file system hangs",))
            late.daemon = True
            late.start()
            self._lease.check()
            self._record(waited, limit)
            records = self._gather()
            if min(records) == self._rank:
                self._tell(records, waited)
            else:
                self._wait_for(self._directory.error.exists)
        except Fenced as fenced:
            self._complain(str(fenced))
            leave(FAILED)
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
        finally:
            leave(STOPPED)

    def _give_up(self, why: str) -> None:
        try:
            place = self._whereabouts.place
            self._complain(
                f"error: rank {self._rank} hangs: {place}; what the other ranks do cannot be told: "
                f"{why}"
            )
        finally:
            os._exit(STOPPED)

    def _follow(self) -> None:
        """End this process if another rank failed: what this one waits for may never come."""
        failure = self._failure()
        if failure is None or failure.get("rank") == self._rank:
            return  # this rank's own failure is told by its main thread
        try:
            with contextlib.suppress(OSError):
                print(f"rank {failure.get('rank')} failed: {failure.get('what')}", file=sys.stderr)
        finally:
            code = failure.get("exit_code")
            leave(code if isinstance(code, int) else FAILED)

    def _failure(self) -> dict[str, Any] | None:
        """This start's ``error.json``."""
        try:
            failure = json.loads(self._directory.error.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return failure if self._is_own(failure) else None

    def _is_own(self, record: object) -> bool:
        """Whether a rank of this start wrote it."""
        return isinstance(record, dict) and record.get("start") == self._start

    def _record(self, waited: float, limit: float) -> None:
        record = {
            "start": self._start,
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": self._whereabouts.place.as_json(),
            "told": str(self._whereabouts.place),
            "seconds": round(waited, 1),
            "limit": round(limit, 1),
            "stacks": _stacks(),
        }
        self._known[self._rank] = record
        self._directory.hang.mkdir(exist_ok=True)
        with atomic_file(self._path(self._rank), "w") as handle:
            json.dump(record, handle, indent=2)

    def _gather(self) -> dict[int, dict[str, Any]]:
        """The records by rank; of all ranks, or of those that wrote one in time."""
        self._wait_for(lambda: len(self._records()) == self._ranks)
        return self._records()

    def _tell(self, records: dict[int, dict[str, Any]], waited: float) -> None:
        report = hang.explain(
            records, self._ranks, _started(self._directory.ranks), str(self._directory.hang)
        )
        record = failure_record(
            report.error,
            report.culprit,
            report.host,
            report.stack,
            start=self._start,
            attempt=self._lease.attempt,
        )
        try:
            first = self._directory.keep_failure(record | {"ranks": list(records.values())})
        except OSError:
            first = True
        if first:
            self._complain(str(report))
            with contextlib.suppress(OSError):
                print(report, file=sys.stderr, flush=True)
        time.sleep(2 * POLL_SECONDS)  # the others' watches see the report and end their ranks

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + GATHER_SECONDS
        while not condition() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)

    def _records(self) -> dict[int, dict[str, Any]]:
        """The records of this start's ranks that are there, by rank."""
        try:
            names = {path.name for path in self._directory.hang.iterdir()}
        except OSError:
            names = set()
        for rank in range(self._ranks):
            path = self._path(rank)
            if rank not in self._known and path.name in names:
                record = self._read(path)
                if self._is_own(record):
                    self._known[rank] = record
        return dict(sorted(self._known.items()))

    def _read(self, path: Path) -> Any:
        """A record; None, and once a complaint, where it is none."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if path.name not in self._broken:
                self._broken.add(path.name)
                self._complain(f"the watch cannot read {path}: {error}")
            return None

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
