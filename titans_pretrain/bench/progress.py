"""A benchmark's line of progress, and its notices, on standard error. No torch here."""

import sys
import time

EVERY_SECONDS = 10.0


class Tell:
    """Writes progress over itself on a terminal; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self._shown, self._last = 0, -EVERY_SECONDS

    def progress(self, line: str) -> None:
        """Say what is done now."""
        if sys.stderr.isatty():
            print(f"\r{line:<{self._shown}}", end="", file=sys.stderr, flush=True)
            self._shown = len(line)
        elif time.monotonic() - self._last >= EVERY_SECONDS:
            print(line, file=sys.stderr, flush=True)
            self._last = time.monotonic()

    def notice(self, line: str) -> None:
        """Say what stays true."""
        self.clear()
        print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line of progress away."""
        if self._shown:
            print(f"\r{'':<{self._shown}}\r", end="", file=sys.stderr, flush=True)
            self._shown = 0
