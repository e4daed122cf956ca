"""How far a task is: a line for the person who watches, and a file for `titans data status`."""

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from titans_pretrain.errors import TitansError
from titans_pretrain.files import write_json

BEAT_SECONDS, LIVE_SECONDS, LINE_SECONDS, FILE_SECONDS = 0.5, 0.5, 10.0, 5.0
PROGRESS = ".progress"


def progress_file(output: Path, task: int) -> Path:
    """Where a running task tells how far it is."""
    return output / PROGRESS / f"{task:05d}.json"


class Progress:
    """Units done, rate and time left of one task.

    As a context manager it tells them while its block runs, whatever the block waits for. The file
    is for people alone: where it cannot be written the work goes on.

    Args:
        output: the directory prepared into.
        task: which task.
        tasks: of how many.
        units: that the task reads.
        done: units that an earlier run has done.
        tokens: that it has written.
    """

    def __init__(
        self, output: Path, task: int, tasks: int, units: int, *, done: int = 0, tokens: int = 0
    ) -> None:
        self._path = progress_file(output, task)
        self._name, self._units = f"task {task} of {tasks}", units
        self._before, self._tokens_before = done, tokens
        self._done, self._tokens, self._documents = done, tokens, 0
        self._begun, self._started = time.monotonic(), time.time()
        self._shown = self._begun
        self._live = sys.stderr.isatty()
        self._told = -FILE_SECONDS
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)
        self._tell("running")

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beat()

    def update(self, done: int, tokens: int, documents: int) -> None:
        """Note where the task is: units, tokens and documents, earlier runs' included."""
        self._done, self._tokens, self._documents = done, tokens, documents

    def beat(self) -> None:
        """Tell that the task lives, now and then."""
        now = time.monotonic()
        if now - self._told >= FILE_SECONDS:
            self._tell("running")
        if now - self._shown >= (LIVE_SECONDS if self._live else LINE_SECONDS):
            self._shown = now
            line = f"{self._name}: {self._done}/{self._units} units, {self._rates()}, {self._eta()}"
            sys.stderr.write(f"\r\x1b[K{line}" if self._live else f"{line}\n")
            sys.stderr.flush()

    def fail(self, error: BaseException) -> None:
        """Leave the reason why the task ended."""
        what = error.what if isinstance(error, TitansError) else f"{type(error).__name__}: {error}"
        self._tell("failed", what)

    def end(self) -> None:
        """The task is finished."""
        sys.stderr.write(f"{os.linesep if self._live else ''}{self._name}: done, {self._rates()}\n")
        sys.stderr.flush()
        forget(self._path)

    def _tell(self, state: str, error: str | None = None) -> None:
        self._told = time.monotonic()
        content: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._started,
            "updated": time.time(),
            "units_done": self._done,
            "units": self._units,
            "tokens": self._tokens,
            "documents": self._documents,
            "rate": self._rate(),
            "state": state,
            "error": error,
        }
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            write_json(self._path, content)

    def _rate(self) -> float:
        """Tokens per second of this run."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        return (self._tokens - self._tokens_before) / seconds

    def _rates(self) -> str:
        return f"{self._tokens / 1e6:,.2f} M tokens, {self._rate() / 1e6:,.2f} M tokens/s"

    def _eta(self) -> str:
        if self._done == self._before:
            return "ETA ?"
        seconds = time.monotonic() - self._begun
        left = seconds / (self._done - self._before) * (self._units - self._done)
        days, rest = divmod(int(left), 86_400)
        clock = time.strftime("%H:%M:%S", time.gmtime(rest))
        return f"ETA {f'{days} d ' if days else ''}{clock}"


def forget(path: Path) -> None:
    """Remove a finished task's file, and the folder with the last one."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def say(line: str) -> None:
    """A line for the person who watches."""
    print(line, file=sys.stderr, flush=True)
