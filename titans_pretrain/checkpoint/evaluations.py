"""The evaluations of a run's checkpoints: one file a step, beside the metrics. No torch here.

``RUN/evaluations/step-N.json`` tells the metrics of the checkpoint of that step, or why it cannot
be evaluated. Each has one writer, the evaluation; whoever shows a run joins them by step.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import UserError
from titans_pretrain.files import (
    held,
    read_json,
    remove_abandoned,
    sha256_cached,
    sha256_file,
    write_json,
)

FORMAT = "titans-evaluation/1"
DIRECTORY = "evaluations"
PARTS = "parts.json"
MODEL = "model"
LOCK = ".lock"
_RESULT = re.compile(r"step-(\d+)\.json")
_OF_STEP = re.compile(r"\.?step-(\d+)[.-].*")


@dataclass(frozen=True)
class Evaluation:
    """What is known of one checkpoint.

    Attributes:
        step: of the checkpoint.
        checkpoint: its identity.
        metrics: by name, such as ``heldout/loss``; of one that failed, of its finished parts.
        failure: why it cannot be evaluated; empty if it was.
        settings: what it was evaluated on.
    """

    step: int
    checkpoint: str
    metrics: Mapping[str, float]
    failure: str
    settings: Mapping[str, Any]


def identity(checkpoint: Path) -> str:
    """Tells a checkpoint from another of the same step: sha256 of its manifest.

    Raises:
        UserError: there is no such checkpoint.
    """
    try:
        return sha256_file(checkpoint / manifest.NAME)
    except OSError as error:
        raise UserError(
            f"there is no checkpoint to evaluate: {error.strerror}",
            where=str(checkpoint),
            fix="give RUN/checkpoints/step-N; one that was evaluated, or gave way, may be deleted",
        ) from None


def read(run: Path) -> list[Evaluation]:
    """A run's evaluations, those that failed included, by step; damaged files are left out."""
    try:
        names = [path.name for path in (run / DIRECTORY).iterdir()]
    except OSError:
        return []
    steps = sorted(int(match[1]) for match in map(_RESULT.fullmatch, names) if match)
    return [found for step in steps if (found := of_step(run, step)) is not None]


def of_step(run: Path, step: int) -> Evaluation | None:
    """The evaluation of a step, None where there is none that can be read."""
    told = read_json(_result(run, step)) or {}
    if told.get("format") != FORMAT or told.get("step") != step:
        return None
    metrics, failure, settings = (told.get(key) for key in ("metrics", "failure", "settings"))
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        return None
    return Evaluation(
        step,
        str(told.get("checkpoint")),
        metrics,
        str(failure or ""),
        settings if isinstance(settings, dict) else {},
    )


def is_settled(run: Path, step: int) -> bool:
    """Whether the checkpoint that is there now was evaluated, or cannot be."""
    found = of_step(run, step)
    if found is None:
        return False
    with contextlib.suppress(OSError):
        return found.checkpoint == sha256_cached(_checkpoint(run, step) / manifest.NAME)
    return True


def differing(one: Evaluation, newest: Evaluation) -> list[str]:
    """The settings in which an evaluation differs from the newest of its run, by name."""
    names = {**newest.settings, **one.settings}
    return [name for name in names if one.settings.get(name) != newest.settings.get(name)]


def awaited(
    run: Path, every: int, at_most: int | None, steps: Sequence[int] | None = None
) -> list[int]:
    """The checkpoints that are to be evaluated and are kept until then, oldest first.

    Args:
        run: its directory.
        every: those whose step is a multiple of it are evaluated.
        at_most: the oldest so many of them; None takes all.
        steps: of the checkpoints that are there; None looks.
    """
    found: list[int] = []
    for step in layout.steps(run / "checkpoints") if steps is None else steps:
        if len(found) == at_most:
            break
        if step and step % every == 0 and not is_settled(run, step):
            found.append(step)
    return found


def write(
    run: Path,
    step: int,
    checkpoint: str,
    *,
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Path:
    """Put an evaluation's end down, for good when this returns; its file.

    Args:
        run: its directory.
        step: of the checkpoint.
        checkpoint: its identity.
        metrics: finite, by name.
        settings: what it was evaluated on.
        results: all that was found.
    """
    told = {"metrics": dict(metrics), "failure": "", "settings": dict(settings)}
    return _write(run, step, checkpoint, {**told, "results": dict(results)})


def keep(
    place: Path,
    *,
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
) -> None:
    """Put down what an evaluation has finished so far, in its workplace.

    Args:
        place: its workplace.
        metrics: finite, by name.
        settings: what it evaluates on.
        results: all that was found.
    """
    told = {"metrics": dict(metrics), "settings": dict(settings), "results": dict(results)}
    write_json(place / PARTS, told)


def stopped(run: Path, step: int, checkpoint: str, why: str) -> None:
    """Put down why an evaluation ended without a result; another try may have one.

    Args:
        run: its directory.
        step: of the checkpoint.
        checkpoint: its identity.
        why: in one line.
    """
    (run / DIRECTORY).mkdir(exist_ok=True)
    write_json(_error(run, step), {"checkpoint": checkpoint, "why": why})


def gave_way(run: Path, step: int, checkpoint: str) -> None:
    """Put down that this process's job did nothing, as another process evaluates the checkpoint."""
    job = os.environ.get("SLURM_JOB_ID", "")
    told = {"checkpoint": checkpoint, "why": _why(run, step, checkpoint), "gave_way": job}
    write_json(_error(run, step), told)


def fail(run: Path, step: int, checkpoint: str, why: str) -> Path:
    """Put down that a checkpoint cannot be evaluated, with the parts that were finished; the file.

    The reason of the last try that told one is added. The parts stay in their workplaces, too, for
    another try; the exported models go, but for those of evaluations that are under way.
    """
    places = _places(run, step, checkpoint)
    kept = [(_changed(place / PARTS), read_json(place / PARTS) or {}) for place in places]
    parts = max(kept, key=lambda one: one[0])[1] if kept else {}
    told = {key: parts.get(key) or {} for key in ("metrics", "settings", "results")}
    reason = "; ".join(dict.fromkeys(filter(None, (why, _why(run, step, checkpoint)))))
    path = _write(run, step, checkpoint, {**told, "failure": reason})
    for place in places:
        _release(place)
    return path


def tidy(run: Path) -> None:
    """Remove the exports with which no evaluation goes on: its checkpoint is settled, or gone.

    What was finished stays: the same evaluation takes it. Those under way are left alone.
    """
    for place in (run / DIRECTORY).glob(".step-*"):
        match = _OF_STEP.fullmatch(place.name)
        if match is None or not place.is_dir():
            continue
        step = int(match[1])
        if is_settled(run, step) or not _checkpoint(run, step).exists():
            _release(place)


def is_under_way(run: Path, step: int) -> bool:
    """Whether a process evaluates the checkpoint of a step; False where no lock tells."""
    with contextlib.suppress(UserError):
        places = _places(run, step, identity(_checkpoint(run, step)))
        return any(map(_is_held, places))
    return False


def undo(run: Path, step: int) -> None:
    """Remove what was found of the states after ``step``: the run makes those states again."""
    place = run / DIRECTORY
    for path in list(place.iterdir()) if place.is_dir() else []:
        match = _OF_STEP.fullmatch(path.name)
        if match and int(match[1]) > step:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def jobs(run: Path, step: int) -> list[str]:
    """The jobs that were submitted to evaluate the checkpoint of a step, oldest first."""
    return [str(job) for job in _submitted(run, step).get("jobs", [])]


def add_job(run: Path, step: int, job: str, fruitless: int = 0) -> None:
    """Put down that a job evaluates the checkpoint of a step.

    Args:
        run: its directory.
        step: of the checkpoint.
        job: its number.
        fruitless: jobs before it that ended, one after the other, with nothing new finished.

    Raises:
        UserError: the checkpoint is gone.
    """
    checkpoint = identity(_checkpoint(run, step))
    (run / DIRECTORY).mkdir(exist_ok=True)
    told = {"checkpoint": checkpoint, "jobs": [*jobs(run, step), job], "fruitless": fruitless}
    write_json(_jobs(run, step), {**told, "finished": _finished(run, step, checkpoint)})


def fruitless(run: Path, step: int) -> int:
    """How many jobs ended, one after the other up to the last, with nothing new finished.

    One that gave way to another process's evaluation is not counted.
    """
    told = _submitted(run, step)
    if not told.get("jobs"):
        return 0
    checkpoint, before = told["checkpoint"], int(told.get("fruitless", 0))
    if _finished(run, step, checkpoint) > told.get("finished", 0):
        return 0
    found = read_json(_error(run, step)) or {}
    gave_way = [found.get("checkpoint"), found.get("gave_way")] == [checkpoint, told["jobs"][-1]]
    return before if gave_way else before + 1


def workplace(run: Path, step: int, checkpoint: str, settings: Mapping[str, Any]) -> Path:
    """Where an evaluation keeps its export and what it has finished, until it is done.

    Args:
        run: its directory.
        step: of the checkpoint.
        checkpoint: its identity.
        settings: what it is evaluated on; another evaluation has another place.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return run / DIRECTORY / f"{_workplaces(step, checkpoint)}{digest[:8]}"


def _workplaces(step: int, checkpoint: str) -> str:
    """How the names of a checkpoint's workplaces begin."""
    return f".{layout.step_name(step)}-{checkpoint[:8]}-"


def _places(run: Path, step: int, checkpoint: str) -> list[Path]:
    return list((run / DIRECTORY).glob(f"{_workplaces(step, checkpoint)}*"))


def _is_held(place: Path) -> bool:
    with contextlib.suppress(OSError), held(place / LOCK) as free:
        return not free
    return False  # it is gone


def _release(place: Path) -> None:
    """Remove the export of a workplace, also one half made, unless someone is at work there."""
    with contextlib.suppress(OSError), held(place / LOCK) as free:
        if free:
            shutil.rmtree(place / MODEL, ignore_errors=True)
            remove_abandoned(place, MODEL)


def _submitted(run: Path, step: int) -> dict[str, Any]:
    """What is put down of the jobs of the checkpoint that is there now."""
    told = read_json(_jobs(run, step)) or {}
    with contextlib.suppress(UserError):
        if told.get("checkpoint") == identity(_checkpoint(run, step)):
            return told if isinstance(told.get("jobs"), list) else {}
    return {}


def _finished(run: Path, step: int, checkpoint: str) -> int:
    """How many parts the evaluations of a checkpoint have finished."""
    parts = [read_json(place / PARTS) or {} for place in _places(run, step, checkpoint)]
    return sum(len(one.get("results") or {}) for one in parts)


def _why(run: Path, step: int, checkpoint: str) -> str:
    """Why the last try that told it ended."""
    told = read_json(_error(run, step)) or {}
    return str(told.get("why") or "") if told.get("checkpoint") == checkpoint else ""


def _changed(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return -math.inf


def _write(run: Path, step: int, checkpoint: str, told: Mapping[str, Any]) -> Path:
    path = _result(run, step)
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"format": FORMAT, "step": step, "checkpoint": checkpoint, **told})
    _error(run, step).unlink(missing_ok=True)
    return path


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / layout.step_name(step)


def _result(run: Path, step: int) -> Path:
    return run / DIRECTORY / f"{layout.step_name(step)}.json"


def _jobs(run: Path, step: int) -> Path:
    return run / DIRECTORY / f"{layout.step_name(step)}.jobs.json"


def _error(run: Path, step: int) -> Path:
    return run / DIRECTORY / f"{layout.step_name(step)}.error.json"
