"""Who may write into a run's directory: one start at a time, and no longer once it is superseded.

``.lock`` names the start that holds the run and is locked by its rank 0. A later attempt puts its
own file in the place of an earlier one's; whoever then finds another start's name there is fenced.
An earlier attempt that came second fences nobody: the later one puts its own file back. No torch
here.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import read_json
from titans_pretrain.train import heartbeat
from titans_pretrain.train.directory import RunDirectory

ATTEMPT = "TITANS_ATTEMPT"
TRIES = 20
FRESH_SECONDS = 60.0
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP)


class Fenced(TitansError):
    """Another start has taken the run over: this one may write nothing any more."""


def attempt_number(environment: Mapping[str, str]) -> int:
    """Which attempt of the run a start belongs to; 0 where none supervises it.

    Raises:
        UserError: the variable is no such number.
    """
    text = environment.get(ATTEMPT, "0")
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{ATTEMPT}={text!r} is no whole number of 0 or more",
            where="environment of the rank",
            fix="unset it, or start the run with `titans submit`",
        )
    return int(text)


@dataclass
class Lease:
    """A start's right to write.

    Attributes:
        path: the lock's file.
        start: the start's name, which is random; empty for one that nobody can fence.
        attempt: its attempt's number.
    """

    path: Path
    start: str = ""
    attempt: int = 0
    _held: IO[str] | None = None
    _putting: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> None:
        """Hold the run for this start, until the process ends; on rank 0.

        Raises:
            UserError: a start holds it that is no earlier attempt, or a later attempt did; or
                the file is someone else's.
            TitansError: the file system fails to lock.
        """
        for _ in range(TRIES):
            with contextlib.closing(_opened(self.path)) as found:
                locked, holder = _lock(found), _record(found)
                if self.attempt and _number(holder) > self.attempt:
                    self._refuse_outdated(holder)
                # Without locks, signs of life tell whether the holder lives.
                free = not _lives(self.path.parent, holder) if locked is None else locked
                if not free:
                    self._refuse_unless_earlier(holder)
                if _is_at(found, self.path):
                    self._put_own()
                    return
            time.sleep(0.05)  # another start has just put its own file there
        raise TitansError(
            f"the run changed hands {TRIES} times while this start tried to take it",
            where=str(self.path),
            fix="start it once",
        )

    def release(self) -> None:
        """Give the run back while the process goes on."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def successor(self) -> str:
        """Who has taken the run over; empty while nobody is known to have."""
        if not self.start:
            return ""
        with self._putting:
            record = self._found()
            if record.get("start") in (self.start, None):
                return ""
            if not 0 < _number(record) < self.attempt:
                return _told(record)
            if self._held is not None:
                self._put_own()
            return ""

    def holder_is_later(self, attempt: int) -> bool:
        """Whether the run is or was held by a later attempt than this one."""
        return _number(self._found()) > attempt

    def check(self) -> None:
        """Go on only while this start holds the run.

        Raises:
            Fenced: it does not.
        """
        if taken := self.successor():
            raise Fenced(
                f"this start is over: {taken} has taken the run over",
                where=f"attempt {self.attempt}, process {os.getpid()} on {socket.gethostname()}",
                fix="nothing: the other start goes on from the newest checkpoint",
            )

    def _found(self) -> dict[str, Any]:
        """What the holder wrote; empty where that cannot be told."""
        try:
            with open(self.path, encoding="utf-8") as handle:
                return _record(handle)
        except OSError:
            return {}

    def _refuse_outdated(self, holder: Mapping[str, Any]) -> None:
        raise UserError(
            f"attempt {self.attempt} comes after a later one: {_told(holder)}",
            where=str(self.path),
            fix="let the later one go on; if you removed `attempts`, remove this file too",
        )

    def _refuse_unless_earlier(self, holder: Mapping[str, Any]) -> None:
        if 0 < _number(holder) < self.attempt:
            return
        raise UserError(
            "another process is training this run" + (f": {_told(holder)}" if holder else ""),
            where=str(self.path.parent),
            fix="wait until it has ended, or end it: `touch stop` in that directory",
        )

    def _put_own(self) -> None:
        """Replace the lock's file by this start's, locked."""
        record = {
            "start": self.start,
            "attempt": self.attempt,
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        own = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        try:
            held = open(own, "x", encoding="utf-8")  # noqa: SIM115 - held as long as the process
        except PermissionError:
            raise _not_ours(self.path) from None
        try:
            held.write(json.dumps(record) + "\n")
            held.flush()
            os.fsync(held.fileno())
            _lock(held)
            os.replace(own, self.path)
        except BaseException as error:
            own.unlink(missing_ok=True)
            if isinstance(error, PermissionError):  # a directory with the sticky bit
                raise _not_ours(self.path) from None
            raise
        before, self._held = self._held, held
        if before is not None:
            before.close()


def _opened(path: Path) -> IO[str]:
    """The lock's file, made if there is none; for reading only if it is someone else's.

    Raises:
        UserError: it may not be read either.
    """
    try:
        return open(path, "a+", encoding="utf-8")
    except PermissionError:
        try:
            return open(path, encoding="utf-8")
        except OSError:
            raise _not_ours(path) from None


def _not_ours(path: Path) -> UserError:
    try:
        owner = f"{path.owner()}'s"
    except (OSError, KeyError):
        owner = "someone else's"
    return UserError(
        f"the run's lock is {owner}, and you may not replace it",
        where=str(path),
        fix="ask for write access to the run's directory and this file, or choose another "
        "run.directory",
    )


def _lock(handle: IO[str]) -> bool | None:
    """Lock a file; whether nobody else holds it, None on a file system without locks.

    Raises:
        TitansError: the file system fails otherwise.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise TitansError(
            f"cannot lock the run: {error.strerror}",
            where=str(handle.name),
            fix="see whether the file system's lock service runs, and whether the file is yours",
        ) from None
    return True


def _lives(directory: Path, holder: Mapping[str, Any]) -> bool:
    """Whether a start has told of itself within a minute, and not of its end."""
    run, start = RunDirectory(directory), holder.get("start")
    ends = [read_json(path) or {} for path in (run.outcome, run.error)]
    if start and any(end.get("start") == start for end in ends):
        return False
    beats = [beat for beat in heartbeat.read(run).values() if beat.get("start") == start]
    return any(time.time() - float(beat.get("time", 0.0)) < FRESH_SECONDS for beat in beats)


def _is_at(handle: IO[str], path: Path) -> bool:
    """Whether a path still leads to an open file."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    return False


def _record(handle: IO[str]) -> dict[str, Any]:
    """What a holder wrote; empty where it is none."""
    try:
        handle.seek(0)
        record = json.loads(handle.read())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _number(holder: Mapping[str, Any]) -> int:
    number = holder.get("attempt")
    return number if isinstance(number, int) else 0


def _told(holder: Mapping[str, Any]) -> str:
    number, job = holder.get("attempt"), holder.get("job")
    name = f"attempt {number}" if number else "a start"
    of_job = f" (job {job})" if job else ""
    return f"{name}{of_job}, process {holder.get('pid')} on {holder.get('host')}"
