"""Stopping in order: a signal ends the run after the step under way."""

import signal
from collections.abc import Callable
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def on_asking(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call ``handler`` at a signal that asks for the end; ``nohup`` keeps SIGHUP ignored."""
    for number in ASKING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


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
