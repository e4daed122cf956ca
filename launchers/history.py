"""The attempts of a run: one file each, claimed by the job that makes it. No torch here.

``attempts/attempt-N.json`` is created exclusively, so that two jobs never make the same attempt,
and replaced as a whole when it ends. One without an end is open: its job runs, or was killed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from titans_pretrain.errors import TitansError
from titans_pretrain.files import write_json
from titans_pretrain.train.directory import write_first

_NAME = re.compile(r"attempt-([1-9][0-9]*)\.json")


@dataclass(frozen=True)
class Attempt:
    """One start of a run by one job.

    Attributes:
        number: from 1, over all jobs of the run.
        job: as scontrol takes it, such as ``"123"`` or ``"120_4"``.
        restart: how often SLURM had requeued the job.
        host: where the batch script ran.
        nodes: of the job.
        begun: unix time, seconds.
        name: of the job; empty where it was not told.
        log: what the batch script writes to; empty where it is no file.
        step_from: optimizer step of the checkpoint it went on from.
        ended: unix time; None while it is open.
        step_to: step of the newest checkpoint at its end.
        lost_steps: steps it had done beyond that one.
        verdict: see ``policy.Verdict``; empty while it is open.
        asked: why it was to stop, see ``policy.Asked``; empty if it was not.
        reason: one sentence.
        suspects: nodes that may be the cause.
        save_seconds: what its last save took; None without one.
        action: what came next, see ``policy.Action``.
        next_job: the job that was to go on; its own if that was requeued.
    """

    number: int
    job: str
    restart: int
    host: str
    nodes: tuple[str, ...]
    begun: float
    name: str = ""
    log: str = ""
    step_from: int = 0
    ended: float | None = None
    step_to: int | None = None
    lost_steps: int = 0
    verdict: str = ""
    asked: str = ""
    reason: str = ""
    suspects: tuple[str, ...] = ()
    save_seconds: float | None = None
    action: str = ""
    next_job: str = ""

    @property
    def progress(self) -> bool:
        """Whether it left a newer checkpoint than it went on from."""
        return self.step_to is not None and self.step_to > self.step_from

    def line(self) -> str:
        """The attempt in one line."""
        again = f", restart {self.restart}" if self.restart else ""
        where = f"attempt {self.number} (job {self.job}{again})"
        if self.ended is None:
            return f"{where}: open, from step {self.step_from}"
        minutes = (self.ended - self.begun) / 60
        done = f"steps {self.step_from} to {self.step_to} in {minutes:.1f} min"
        lost = f", {self.lost_steps} steps lost" if self.lost_steps else ""
        nodes = f"; suspected: {', '.join(self.suspects)}" if self.suspects else ""
        return f"{where}: {self.verdict}, {done}{lost}: {self.reason}{nodes}"


def directory(run: Path) -> Path:
    """Where the records of a run's attempts lie."""
    return run / "attempts"


def evidence(run: Path, number: int) -> Path:
    """Where the evidence of an attempt that was ended from outside lies."""
    return directory(run) / f"attempt-{number}"


def attempts(run: Path) -> list[Attempt]:
    """All attempts of a run, oldest first.

    Raises:
        TitansError: a record cannot be read.
    """
    root = directory(run)
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in root.iterdir())
    return [_read(root, number) for number in sorted(int(match[1]) for match in matches if match)]


def claim(run: Path, attempt: Attempt) -> bool:
    """Create the record of an attempt that begins; False if another job was faster.

    Raises:
        OSError: the run's directory cannot be written.
    """
    directory(run).mkdir(parents=True, exist_ok=True)
    return write_first(_path(directory(run), attempt.number), asdict(attempt))


def write(run: Path, attempt: Attempt) -> None:
    """Replace an attempt's record, by the one job that made it or closes it."""
    write_json(_path(directory(run), attempt.number), asdict(attempt))


def _path(root: Path, number: int) -> Path:
    return root / f"attempt-{number}.json"


def _read(root: Path, number: int) -> Attempt:
    path = _path(root, number)
    try:
        text = path.read_text(encoding="utf-8")
        return _attempt(json.loads(text), number) if text.strip("\0\n ") else _lost(path, number)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TitansError(
            f"the record of attempt {number} cannot be read: {error}",
            where=str(path),
            fix="if it is damaged, move it away; the next attempt takes its number",
        ) from None


def _lost(path: Path, number: int) -> Attempt:
    """An attempt whose record a power cut emptied, and so its host."""
    at = path.stat().st_mtime
    why = "its record is empty, as after a power cut"
    lost = Attempt(number, job="", restart=0, host="", nodes=(), begun=at)
    return replace(lost, ended=at, verdict="killed", reason=why)


def _attempt(record: Mapping[str, Any], number: int) -> Attempt:
    values = {**record, "nodes": tuple(record["nodes"]), "suspects": tuple(record["suspects"])}
    if values["number"] != number:
        raise ValueError(f"it is that of attempt {values['number']}")
    return Attempt(**values)
