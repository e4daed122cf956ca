"""What a run's directory and SLURM tell of it, now; only small parts of large files. No torch here.

Files that are missing, torn or of an earlier start are treated as absent: a run is looked at while
others write it.
"""

import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launchers import history, slurm_command, slurm_jobs, submitted, sweep
from launchers.history import Attempt
from launchers.job import is_evaluation
from launchers.slurm_jobs import Job
from launchers.submitted import Submitted
from titans_pretrain.checkpoint import evaluations
from titans_pretrain.checkpoint.evaluations import Evaluation
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import last_rows, read_json
from titans_pretrain.train import heartbeat
from titans_pretrain.train.directory import RunDirectory

SILENT_SECONDS = 60.0
RECENT_ROWS = 50
DEPTH = 3
TRAIN = "train"
LAST = ("finish", "end")  # after such an attempt none begins by itself


@dataclass(frozen=True)
class Metrics:
    """The newest row of ``metrics.jsonl`` and the recent pace; None where nothing is told.

    Attributes:
        step: optimizer steps done.
        loss: of that step.
        tokens_per_second: mean of the recent steps.
        step_seconds: mean of the recent steps.
    """

    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None


@dataclass(frozen=True)
class RunState:
    """A run as it stands.

    Attributes:
        directory: the run's.
        name: as shown.
        steps: of the whole run; None where no configuration can be read.
        metrics: of the newest steps.
        beats: newest sign of life of each rank of the newest start.
        ranks: of the newest start, once they had time for a sign of life; 0 where it is not known.
        attempts: oldest first.
        unreadable: why the attempts cannot be told; empty if they can.
        submitted: the jobs that were queued, oldest first.
        jobs: those jobs that SLURM knows, by id; None where it does not answer.
        outcome: of the newest start, if it ended in good order.
        error: of the newest start, if it failed.
        evaluations: of its checkpoints, by step.
        now: unix time of the look.
    """

    directory: RunDirectory
    name: str
    steps: int | None
    metrics: Metrics
    beats: Mapping[int, Mapping[str, Any]]
    ranks: int
    attempts: Sequence[Attempt]
    unreadable: str
    submitted: Sequence[Submitted]
    jobs: Mapping[str, Job] | None
    outcome: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    evaluations: Sequence[Evaluation]
    now: float

    @property
    def living(self) -> list[Job]:
        """Jobs of any stage that are queued or running; evaluations while it trains are apart."""
        apart = {job.id for job in self.evaluating}
        return [j for j in (self.jobs or {}).values() if not j.finished and j.id not in apart]

    @property
    def evaluating(self) -> list[Job]:
        """Jobs, queued or running, that evaluate a checkpoint; they do not touch the run."""
        ids = {row.job for row in self.submitted if is_evaluation(row.stage)}
        return [j for j in (self.jobs or {}).values() if not j.finished and j.id in ids]

    @property
    def training(self) -> list[Job]:
        """Those of ``living`` that train."""
        others = {row.job for row in self.submitted if row.stage != TRAIN}
        return [job for job in self.living if base(job.id) not in others]

    @property
    def age(self) -> float | None:
        """Seconds since the newest sign of life."""
        times = [beat["time"] for beat in self.beats.values()]
        return max(0.0, self.now - max(times)) if times else None

    @property
    def silent(self) -> list[int]:
        """Ranks without a sign of life for a minute, unless the run is known to have ended."""
        if not self.beats or self.outcome or self.error:
            return []
        heard = {rank for rank, b in self.beats.items() if self.now - b["time"] <= SILENT_SECONDS}
        return sorted((self.beats.keys() | range(self.ranks)) - heard)

    @property
    def is_alive(self) -> bool:
        """Whether ranks give signs of life, and the run is not known to have ended."""
        age = self.age
        return age is not None and age <= SILENT_SECONDS and not (self.outcome or self.error)

    @property
    def is_over(self) -> bool:
        """Whether nothing goes on with the run by itself."""
        return not (self.training or self.is_alive or (self.jobs is None and self._may_go_on))

    @property
    def _may_go_on(self) -> bool:
        """Whether a job may wait or be at work, as far as that is known without SLURM."""
        trained = [row.job for row in self.submitted if row.stage == TRAIN]
        if trained and trained[-1] not in {attempt.job for attempt in self.attempts}:
            return True
        newest = self.attempts[-1] if self.attempts else None
        return newest is not None and (newest.ended is None or newest.action not in LAST)

    @property
    def word(self) -> str:
        """The state in a word."""
        if self.outcome and self.outcome.get("outcome") == "done":
            return "done"
        if self.is_alive:
            return "running"
        if self.training:
            waiting = not any(job.running for job in self.training)
            return "queued" if waiting else "silent" if self.silent else "starting"
        if self.error:
            return "failed"
        if self.outcome:
            return "stopped"
        if self.attempts and self.attempts[-1].ended is not None:
            return self.attempts[-1].verdict
        if self.beats:
            return "silent"
        return "ended" if self.metrics.step else "not started"

    @property
    def restarts(self) -> int:
        """Attempts after the first."""
        return max(0, len(self.attempts) - 1)

    @property
    def lost_steps(self) -> int:
        """Steps that were done and had to be done again."""
        return sum(attempt.lost_steps for attempt in self.attempts)

    @property
    def seconds_left(self) -> float | None:
        """To the last step at the recent pace, without restarts, validations and saves."""
        if self.metrics.step_seconds is None or self.steps is None:
            return None
        return max(0, self.steps - self.metrics.step) * self.metrics.step_seconds

    @property
    def limit_seconds(self) -> float | None:
        """To the time limit of the job that trains."""
        left = [job.seconds_left for job in self.training if job.running]
        return left[0] if left else None


def find(paths: Sequence[Path], *, depth: int = DEPTH) -> list[Path]:
    """The run directories among and below paths, a few levels deep, in order of their names.

    Raises:
        UserError: a path is no directory.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(
                f"{path} is no directory", where=str(path), fix="give directories of runs"
            )
        found |= dict.fromkeys(_below(path, depth))
    return list(found)


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run: trained in, or submitted."""
    run = RunDirectory(path)
    return any(part.exists() for part in (run.jobs / "config.yaml", run.attempts, run.ranks)) or (
        run.config.exists() and run.checkpoints.is_dir()
    )


def check(path: Path) -> None:
    """Refuse a directory that is no run's.

    Raises:
        UserError: it is none.
    """
    if not is_run(path):
        raise UserError(
            f"{path} is no run's directory",
            where=str(path),
            fix="give the run.directory of a configuration; `titans status` lists runs",
        )


def read(paths: Sequence[Path]) -> list[RunState]:
    """The states of runs; SLURM is asked once for all of them."""
    rows = {path: submitted_jobs(path) for path in paths}
    attempts = {path: _attempts(path) for path in paths}
    ids = {path: _ids(rows[path], attempts[path][0]) for path in paths}
    known = _ask(sorted({base(job) for of_run in ids.values() for job in of_run}))
    own = {path: _own(known, ids[path], attempts[path][0], path) for path in paths}
    return [_state(path, rows[path], *attempts[path], own[path]) for path in paths]


def submitted_jobs(path: Path) -> list[Submitted]:
    """The jobs that were queued for a run, alone or as an element of a sweep's array."""
    try:
        return [*submitted.read(path), *_of_sweep(path.resolve())]
    except (OSError, TitansError):
        return []


def base(job: str) -> str:
    """The id that sbatch told: without the element of an array."""
    return job.partition("_")[0]


def _state(
    path: Path,
    rows: Sequence[Submitted],
    attempts: Sequence[Attempt],
    unreadable: str,
    jobs: Mapping[str, Job] | None,
) -> RunState:
    directory = RunDirectory(path)
    config = _config(directory)
    start, ranks = _newest_start(directory)
    beats = {
        rank: beat
        for rank, beat in heartbeat.read(directory).items()
        if isinstance(beat.get("time"), int | float) and beat.get("start") == start
    }
    return RunState(
        directory=directory,
        name=str(_section(config, "run").get("name") or path.resolve().name),
        steps=_whole(_section(config, "train").get("steps")),
        metrics=_metrics(directory.metrics),
        beats=beats,
        ranks=ranks,
        attempts=attempts,
        unreadable=unreadable,
        submitted=rows,
        jobs=jobs,
        outcome=_of_start(directory.outcome, start),
        error=_of_start(directory.error, start),
        evaluations=evaluations.read(path),
        now=time.time(),
    )


def _newest_start(directory: RunDirectory) -> tuple[str | None, int]:
    """The name of the newest start, None where nobody wrote it, and its number of ranks.

    That is 0 while they may not have written yet.
    """
    ranks = read_json(directory.ranks) or {}
    of_first = ranks.get("0")
    named = of_first.get("start") if isinstance(of_first, dict) else None
    start = (read_json(directory.lock) or {}).get("start") or named
    try:
        seasoned = time.time() - directory.ranks.stat().st_mtime > SILENT_SECONDS
    except OSError:
        seasoned = False
    return start, len(ranks) if seasoned and named == start else 0


def _of_start(path: Path, start: str | None) -> dict[str, Any] | None:
    record = read_json(path)
    return record if record and start in (None, record.get("start")) else None


def _metrics(path: Path) -> Metrics:
    rows = [row for row in last_rows(path, 4 * RECENT_ROWS) if isinstance(row.get("step"), int)]
    rows = [row for row in rows if "learning_rate" in row][-RECENT_ROWS:]
    if not rows:
        return Metrics()
    return Metrics(
        step=rows[-1]["step"],
        loss=rows[-1].get("loss"),
        tokens_per_second=_mean(row.get("tokens_per_second") for row in rows),
        step_seconds=_mean(row.get("seconds") for row in rows),
    )


def _mean(values: Iterable[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


def _config(directory: RunDirectory) -> Mapping[str, Any]:
    """The resolved configuration, or the frozen one of a run that did not start yet."""
    for path in (directory.config, directory.jobs / "config.yaml"):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(config, dict):
            return config
    return {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _of_sweep(path: Path) -> Iterable[Submitted]:
    names = [member.directory for member in sweep.read(path.parent)]
    if path.name in names:
        number = names.index(path.name)
        for row in submitted.read(path.parent):
            yield replace(row, stage=TRAIN, job=f"{row.job}_{number}")


def _attempts(path: Path) -> tuple[list[Attempt], str]:
    try:
        return history.attempts(path), ""
    except (TitansError, OSError) as error:
        return [], str(error).splitlines()[0]


def _ids(rows: Sequence[Submitted], attempts: Sequence[Attempt]) -> set[str]:
    """Ids of the run's jobs."""
    of_attempts = {job for one in attempts for job in (one.job, one.next_job) if job}
    return {row.job for row in rows} | of_attempts


def _ask(ids: Sequence[str]) -> list[Job] | None:
    """What SLURM knows of jobs; None where it is not there or does not answer at once."""
    if not slurm_command.available():
        return None
    try:
        if slurm_command.run(["scontrol", "ping"], patience=0).code:
            return None
        return slurm_jobs.jobs(ids)
    except TitansError:
        return None


def _own(
    known: Sequence[Job] | None, ids: Set[str], attempts: Sequence[Attempt], path: Path
) -> dict[str, Job] | None:
    """Those of the jobs that are the run's; one queued by hand has the name its attempt tells."""
    if known is None:
        return None
    named = {(attempt.job, attempt.name) for attempt in attempts}
    mine = [job for job in known if ids & {job.id, base(job.id)}]
    return {
        job.id: job for job in mine if (job.id, job.name) in named or submitted.is_own(path, job)
    }


def _below(path: Path, depth: int) -> Iterable[Path]:
    if is_run(path):
        yield path
        return
    if depth == 0:
        return
    try:
        children = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return
    for child in children:
        yield from _below(child, depth - 1)
