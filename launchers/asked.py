"""Signals that reach the batch process: kept until the ranks are told. Imports nothing heavy.

Made before anything else is imported, as SLURM may signal a job in its first second.
"""

import signal
from types import FrameType


class AskedToStop:
    """Remembers the signals that ask for an early end.

    Attributes:
        names: of all so far, in order; the handlers add to it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.names: list[str] = []
        for number in self.SIGNALS:
            signal.signal(number, self._remember)

    def __bool__(self) -> bool:
        return bool(self.names)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)
