"""``titans logs``: what a run's job or one of its ranks wrote, and goes on to write. No torch."""

import contextlib
import mmap
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from launchers import history, run_state
from launchers.history import Attempt
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import last_lines
from titans_pretrain.train.directory import RunDirectory

POLL_SECONDS = 0.5
OVER_SECONDS = 5.0  # between questions whether the run goes on
BLOCK_BYTES = 2**20
TRACEBACK_LINES = 12
_START = re.compile(rb"^(\S+) start of rank \d+$", re.MULTILINE)


def logs(
    run: Path,
    *,
    rank: int | None = None,
    attempt: int | None = None,
    lines: int = 50,
    follow: bool = False,
) -> int:
    """Print the end of a log, after the first error of a start that failed.

    Args:
        run: the run's directory.
        rank: whose log; None takes the newest job's, or rank 0's of a run without jobs.
        attempt: of which attempt; None takes the newest.
        lines: how many, the last.
        follow: go on with what comes, also of the jobs that follow, until the run has ended.

    Returns:
        The exit code.

    Raises:
        UserError: no run, no such log or attempt.
    """
    run_state.check(run)
    if follow and attempt is not None:
        raise UserError(
            "--follow is for the newest attempt", where="--attempt", fix="leave one of them out"
        )
    directory = RunDirectory(run)
    sizes = _sizes(directory)
    chosen = None if attempt is None else _attempt(run, attempt)
    path = _log(directory, rank, chosen)
    if not path.is_file() and not (follow and not run_state.read([run])[0].is_over):
        raise _missing(directory, path)
    if chosen is None:
        _show_error(run)
    _put(f"==> {path} <==\n".encode())
    if chosen is not None and rank is not None:
        _put(_of_attempt(path, chosen, lines))
        return 0
    size = path.stat().st_size if path.is_file() else 0
    if size:
        _put(last_lines(path, lines, end=size))
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(directory, rank, _Tail(path, size), sizes)
    return 0


def _log(directory: RunDirectory, rank: int | None, attempt: Attempt | None) -> Path:
    """The log that is meant, whether it is there or not."""
    if rank is not None:
        return directory.log(rank)
    if attempt is not None:
        own = [log for log in _job_logs(directory) if _job(log) == attempt.job]
        return own[0] if own else Path(attempt.log or directory.logs / f"slurm-{attempt.job}.log")
    return _newest(directory) or directory.log(0)


def _missing(directory: RunDirectory, path: Path) -> UserError:
    ranks = [p.stem.removeprefix("rank-") for p in directory.logs.glob("rank-*.log")]
    there = ", ".join(sorted(ranks, key=lambda rank: (len(rank), rank))) or "none"
    return UserError(
        f"there is no {path.name}",
        where=str(directory.logs),
        fix=f"ranks that left one: {there}; see `titans status {directory.path}`",
    )


def _newest(directory: RunDirectory) -> Path | None:
    """The log of the job that wrote last."""
    found = {}
    for path in _job_logs(directory):
        with contextlib.suppress(OSError):
            found[path] = path.stat().st_mtime_ns
    return max(found, key=lambda path: (found[path], path.name), default=None)


def _job_logs(directory: RunDirectory) -> list[Path]:
    """Logs of the jobs that train; of a sweep they lie beside its runs, of others anywhere."""
    rows = run_state.submitted_jobs(directory.path)
    others = {row.job for row in rows if row.stage != run_state.TRAIN}
    own = [p for p in directory.logs.glob("slurm-*.log") if run_state.base(_job(p)) not in others]
    beside = directory.path.resolve().parent / "logs"
    elements = [beside / f"slurm-{row.job}.log" for row in rows if "_" in row.job]
    told: list[Path] = []
    with contextlib.suppress(TitansError, OSError):
        told = [Path(one.log) for one in history.attempts(directory.path) if one.log]
    found = {path.resolve(): path for path in reversed([*own, *elements, *told]) if path.is_file()}
    return list(found.values())


def _job(log: Path) -> str:
    return log.stem.removeprefix("slurm-")


def _attempt(run: Path, number: int) -> Attempt:
    attempts = {attempt.number: attempt for attempt in history.attempts(run)}
    if number not in attempts:
        there = f"1 to {max(attempts)}" if attempts else "none: no job of this run has begun"
        raise UserError(
            f"there is no attempt {number}", where=str(history.directory(run)), fix=f"give {there}"
        )
    return attempts[number]


def _of_attempt(path: Path, attempt: Attempt, lines: int) -> bytes:
    """The last lines that a rank wrote in an attempt.

    A rank begins its log within the attempt, which begins and ends on the clock of its first node.

    Raises:
        UserError: there are none.
    """
    text = b""
    if path.stat().st_size:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as log:
            text = b"".join(_between(log, attempt))
    if not text:
        raise UserError(
            f"the rank began no work in attempt {attempt.number}",
            where=str(path),
            fix=f"leave out --rank to see why, in the log of job {attempt.job}",
        )
    return b"".join(text.splitlines(keepends=True)[-lines:])


def _between(text: mmap.mmap, attempt: Attempt) -> Iterator[bytes]:
    """The parts of a rank's log that begin with a start within an attempt."""
    starts = list(_START.finditer(text))
    ended = float("inf") if attempt.ended is None else attempt.ended
    edges = [*(match.start() for match in starts), len(text)]
    for number, match in enumerate(starts):
        begun = _unix(match[1])
        if begun is not None and int(attempt.begun) <= begun <= ended:
            yield text[edges[number] : edges[number + 1]]


def _unix(text: bytes) -> float | None:
    try:
        return datetime.strptime(text.decode(errors="replace"), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def _show_error(run: Path) -> None:
    """Tell the newest start's first failure: in the logs, the others' noise buries it."""
    (state,) = run_state.read([run])
    error = state.error
    if error is None:
        return
    place = f"rank {error.get('rank')} on {error.get('host')}, {error.get('time')}"
    told = [f"{key}: {error[key]}" for key in ("where", "fix") if error.get(key)]
    calls = "".join(map(str, error.get("traceback") or ())).splitlines()[-TRACEBACK_LINES:]
    lines = [f"the first error of the last start, {place}:", f"error: {error.get('what')}"]
    _put("\n".join([*lines, *told, *calls, "", ""]).encode())


@dataclass
class _Tail:
    """What is added to a file that may be replaced, cut or taken away.

    Attributes:
        path: the file.
        at: bytes of it that were read.
    """

    path: Path
    at: int
    _file: BinaryIO | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError):
            self._file = open(self.path, "rb")  # noqa: SIM115 - open until it is replaced

    def read(self) -> Iterator[bytes]:
        """What came since the last look; the rest of a replaced file before the new one."""
        yield from self._rest()
        if self._is_other():
            if self._file:
                self._file.close()
            self._file, self.at = None, 0
            self.__post_init__()
            yield from self._rest()

    def _rest(self) -> Iterator[bytes]:
        if self._file is None:
            return
        self._file.seek(self.at)
        while block := self._file.read(BLOCK_BYTES):
            self.at += len(block)
            yield block

    def _is_other(self) -> bool:
        """Whether the path leads to another file than the open one, or that was cut."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        if self._file is None:
            return True
        return not os.path.samestat(os.fstat(self._file.fileno()), found) or found.st_size < self.at


def _sizes(directory: RunDirectory) -> dict[Path, int]:
    """Bytes of each job's log."""
    sizes = {}
    for path in _job_logs(directory):
        with contextlib.suppress(OSError):
            sizes[path] = path.stat().st_size
    return sizes


def _follow(
    directory: RunDirectory, rank: int | None, first: _Tail, sizes: Mapping[Path, int]
) -> None:
    """Print what is added to a log, and to each that becomes the newest.

    Args:
        directory: the run's.
        rank: whose log alone it is; None for those of jobs.
        first: the log whose end was printed.
        sizes: what other logs held then, which is not printed.
    """
    tails, shown = {first.path: first}, first.path
    asked, over = time.monotonic(), False
    while True:
        for path, tail in tails.items():
            for block in tail.read():
                if path != shown:
                    _put(f"\n==> {path} <==\n".encode())
                    shown = path
                _put(block)
        newest = first.path if rank is not None else _newest(directory)
        if newest is not None and newest not in tails:
            tails[newest] = _Tail(newest, sizes.get(newest, 0))
            continue
        if over:
            return
        if time.monotonic() - asked >= OVER_SECONDS:
            (state,) = run_state.read([directory.path])
            over, asked = state.is_over, time.monotonic()
            if over:
                continue  # what was written until now
        time.sleep(POLL_SECONDS)


def _put(text: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
