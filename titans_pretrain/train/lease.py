"""Who may write into a run's directory: one start at a time, and no longer once it is superseded.

``.lock`` names the start that holds the run and is locked by its rank 0. A later attempt puts its
own file in the place of an earlier one's; whoever then finds another start's name there is fenced.
No torch here.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from titans_pretrain.errors import TitansError, UserError

ATTEMPT = "TITANS_ATTEMPT"
TRIES = 20


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

    def take(self) -> None:
        """Hold the run for this start, until the process ends; on rank 0.

        Raises:
            UserError: a start holds it that is no earlier attempt.
        """
        for _ in range(TRIES):
            with contextlib.ExitStack() as opened:
                found = opened.enter_context(open(self.path, "a+", encoding="utf-8"))
                free = _lock(found)
                if not free:
                    self._refuse_unless_earlier(_record(found))
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
        try:
            with open(self.path, encoding="utf-8") as handle:
                record = _record(handle)
        except OSError:
            return ""
        return "" if record.get("start") in (self.start, None) else _told(record)

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

    def _refuse_unless_earlier(self, holder: Mapping[str, Any]) -> None:
        number = holder.get("attempt")
        if isinstance(number, int) and 0 < number < self.attempt:
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
        held = open(own, "x", encoding="utf-8")  # noqa: SIM115 - held as long as the process
        try:
            held.write(json.dumps(record) + "\n")
            held.flush()
            os.fsync(held.fileno())
            _lock(held)
            os.replace(own, self.path)
        except BaseException:
            own.unlink(missing_ok=True)
            raise
        self._held = held


def _lock(handle: IO[str]) -> bool:
    """Lock a file; whether nobody else holds it, as far as the file system knows locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


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


def _told(holder: Mapping[str, Any]) -> str:
    number, job = holder.get("attempt"), holder.get("job")
    name = f"attempt {number}" if number else "a start"
    of_job = f" (job {job})" if job else ""
    return f"{name}{of_job}, process {holder.get('pid')} on {holder.get('host')}"
