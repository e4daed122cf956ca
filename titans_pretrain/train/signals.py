"""How a rank ends: after the step under way at a signal, or at once."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
    """Remembers the first signal that asked this rank to stop.

    Attributes:
        name: the signal's name, or None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        on_asking(self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
