"""Stopping in order: SIGTERM and SIGINT end the run after the step under way."""

import signal
from types import FrameType


class StopRequest:
    """Remembers the first signal that asked this rank to stop.

    Attributes:
        name: the signal's name, or None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
