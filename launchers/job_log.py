"""What an attempt tells its user: lines of the job's log."""

import contextlib
import time


def say(text: str) -> None:
    """Print to the job's log, at once."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}", flush=True)
