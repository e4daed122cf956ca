"""How far a part of the evaluation is, and how long the rest takes. No torch here."""

import time
from collections.abc import Callable

from titans_pretrain.train.metrics import duration

SECONDS = 2.0


class Progress:
    """Tells a line about what is done, at most one every two seconds, and one at the end.

    Args:
        what: what is counted, such as ``requests``.
        total: how many there are.
        tell: takes the line.
    """

    def __init__(self, what: str, total: int, tell: Callable[[str], None]) -> None:
        self._what, self._total, self._tell = what, total, tell
        self._begun = self._told = time.monotonic()

    def show(self, done: int) -> None:
        """Say that so many are done."""
        now = time.monotonic()
        if done < self._total and now - self._told < SECONDS:
            return
        self._told = now
        seconds = now - self._begun
        if done < self._total:
            rest = f"{duration(seconds / done * (self._total - done))} left"
        else:
            rest = f"in {duration(seconds)}"
        self._tell(f"{self._what} {done:,}/{self._total:,}  {rest}")
