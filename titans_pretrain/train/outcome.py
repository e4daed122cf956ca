"""How a start ended in good order, for who decides what comes next. No torch here."""

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from titans_pretrain.files import write_json
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.lease import Lease


@dataclass(frozen=True)
class Outcome:
    """What ``outcome.json`` holds beside ``start`` and ``attempt``.

    Attributes:
        outcome: all steps are done, or the run was asked to stop.
        reason: in words.
        asked_by: what asked for the stop.
        step: steps done.
        saved_step: of the newest checkpoint this start knows; None if there is none.
        saved: whether the state was saved at the stop, had been saved before, or was not.
        seconds: that the save took; 0 where there was none.
    """

    outcome: Literal["done", "stopped"]
    reason: str
    asked_by: Literal["signal", "file", ""]
    step: int
    saved_step: int | None
    saved: Literal["now", "before", "no"]
    seconds: float


def write(directory: RunDirectory, lease: Lease, outcome: Outcome) -> None:
    """Write ``outcome.json``; on rank 0.

    Raises:
        Fenced: the run is another start's.
        OSError: the file system refuses.
    """
    lease.check()
    names = {"start": lease.start, "attempt": lease.attempt}
    write_json(directory.outcome, names | asdict(outcome))


def read(directory: RunDirectory, *, attempt: int | None = None) -> dict[str, Any] | None:
    """What ``outcome.json`` holds; None if it is not there, or another attempt's."""
    record: object = None
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(directory.outcome.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or attempt not in (None, record.get("attempt")):
        return None
    return record
