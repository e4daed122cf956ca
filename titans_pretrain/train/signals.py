"""How a rank ends: after the step under way at a signal, or at once. No torch here."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def on_asking(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call ``handler`` at a signal that asks for the end; ``nohup`` keeps SIGHUP ignored."""
    for number in ASKING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """End this process at once, without waiting for other ranks, even if its log takes no more."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class StopRequest:
    """Remembers the first signal that asked this process to stop; made before torch is imported.

    Attributes:
        name: the signal's name, or None.
        terminated: when the first SIGTERM came, in seconds since 1970; None if none did. Another
            signal may have come before. It may come in the middle of a long call, which Python's
            own handlers wait for.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.terminated: float | None = None
        arrivals, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(arrivals,), name="signals", daemon=True).start()
        on_asking(lambda number, frame: self._remember(number))

    def _listen(self, arrivals: int) -> None:
        with contextlib.suppress(OSError):
            while numbers := os.read(arrivals, 64):
                for number in numbers:
                    if number in ASKING:
                        self._remember(number)

    def _remember(self, number: int) -> None:
        if number == signal.SIGTERM and self.terminated is None:
            self.terminated = time.time()
        if self.name is None:
            self.name = signal.Signals(number).name
