"""Files in a run's directory that ask it for something: ``stop`` and ``save``. No torch here."""

import contextlib
import time
from pathlib import Path

from titans_pretrain.train.directory import RunDirectory

SECONDS = 1.0


class Triggers:
    """Looks for the files, on rank 0; at most once a second. What cannot be read is not there.

    Args:
        directory: the run's.

    Attributes:
        stop: whether ``stop`` was there at the last look.
        save: whether ``save`` was.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._looked = float("-inf")
        self.stop = self.save = False

    def look(self) -> None:
        """Look, unless that was done within the last second."""
        now = time.monotonic()
        if now - self._looked >= SECONDS:
            self._looked = now
            self.stop, self.save = map(_exists, (self._directory.stop, self._directory.save))

    def consume_stop(self) -> None:
        """Forget ``stop``, as the run stops."""
        self.stop = False
        with contextlib.suppress(OSError):
            self._directory.stop.unlink(missing_ok=True)

    def consume_save(self) -> None:
        """Forget ``save``, as the checkpoint is begun."""
        self.save = False
        with contextlib.suppress(OSError):
            self._directory.save.unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    """Whether a file is there; False where that cannot be told."""
    with contextlib.suppress(OSError):
        return path.exists()
    return False
