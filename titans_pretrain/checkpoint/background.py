"""Work in a thread of its own, which runs no collective."""

import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Progress(IntEnum):
    """How far a rank's part is."""

    BUSY = 0
    FINISHED = 1
    FAILED = 2


class Task(Generic[T]):
    """A function that runs at once in a daemon thread: a process that ends does not wait for it.

    Args:
        action: what to do.
        name: the thread's name, for stack dumps.

    Attributes:
        seconds: that it took; 0 until it has ended.
    """

    def __init__(self, action: Callable[[], T], name: str) -> None:
        self._action = action
        self._outcome: T | None = None
        self._failure: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def progress(self) -> Progress:
        """Whether it has ended, and how; does not wait."""
        if self._thread.is_alive():
            return Progress.BUSY
        return Progress.FAILED if self._failure else Progress.FINISHED

    def result(self) -> T:
        """Wait for it; what the action returned, or its exception."""
        self._thread.join()
        if self._failure:
            raise self._failure
        return cast(T, self._outcome)

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self._outcome = self._action()
        except BaseException as error:
            self._failure = error
        self.seconds = time.perf_counter() - began
