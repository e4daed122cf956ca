"""Files in a run's directory that ask it for something: ``stop`` and ``save``. No torch here."""

import contextlib
import time
from pathlib import Path

from titans_pretrain.train.directory import RunDirectory

SECONDS = 1.0
Mark = tuple[int, int]


class Triggers:
    """Looks for the files, on rank 0; at most once a second. What cannot be read is not there.

    Args:
        directory: the run's.

    Attributes:
        stop: whether ``stop`` was there at the last look.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._looked = float("-inf")
        self.stop = False
        self._save: Mark | None = None
        self._served: tuple[Mark, int] | None = None

    @property
    def save(self) -> bool:
        """Whether ``save`` was there at the last look, and no save that is under way answers it."""
        return self._save is not None and (self._served is None or self._save != self._served[0])

    def look(self) -> None:
        """Look, unless that was done within the last second."""
        now = time.monotonic()
        if now - self._looked >= SECONDS:
            self._looked = now
            self.stop = _mark(self._directory.stop) is not None
            self._save = _mark(self._directory.save)

    def consume_stop(self) -> None:
        """Forget ``stop``, as the run stops."""
        self.stop = False
        with contextlib.suppress(OSError):
            self._directory.stop.unlink(missing_ok=True)

    def serve_save(self, step: int, whole: int | None) -> None:
        """The checkpoint of ``step`` answers ``save`` once it is whole; ``whole`` is the newest."""
        if self._save is not None:
            self._served = self._save, step
            self.saved(whole)

    def saved(self, step: int | None) -> None:
        """Forget ``save`` if the checkpoint that answers it is whole, unless it was made anew.

        Args:
            step: of the newest checkpoint that is whole; None if there is none.
        """
        if self._served is None or step is None or step < self._served[1]:
            return
        if _mark(self._directory.save) == self._served[0]:
            self.consume_save()
        self._served = None

    def consume_save(self) -> None:
        """Forget ``save``, as the state at the run's end is saved."""
        self._save = None
        with contextlib.suppress(OSError):
            self._directory.save.unlink(missing_ok=True)


def _mark(path: Path) -> Mark | None:
    """Which file is there, and since when; None where there is none or that cannot be told."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None
