"""The evaluations of a run's checkpoints: one file a step, beside the metrics. No torch here.

``RUN/evaluations/step-N.json`` tells the metrics of the checkpoint of that step, or why it cannot
be evaluated. Each has one writer, the evaluation; whoever shows a run joins them by step.
"""

import contextlib
import functools
import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import UserError
from titans_pretrain.files import read_json, sha256_file, write_json

FORMAT = "titans-evaluation/1"
DIRECTORY = "evaluations"
PARTS = "parts.json"
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
        path = _checkpoint(run, step) / manifest.NAME
        found_file = path.stat()
        return found.checkpoint == _sha256(path, found_file.st_mtime_ns, found_file.st_size)
    return True


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, changed: int, size: int) -> str:
    """Of a file that is asked about again and again, read once each time it changed."""
    return sha256_file(path)


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
    why: str,
) -> None:
    """Put down what an evaluation has finished so far, in its workplace.

    Args:
        place: its workplace.
        metrics: finite, by name.
        settings: what it evaluates on.
        results: all that was found.
        why: it ends so; empty if it goes on.
    """
    told = {"metrics": dict(metrics), "settings": dict(settings), "results": dict(results)}
    write_json(place / PARTS, {**told, "why": why})


def fail(run: Path, step: int, checkpoint: str, why: str) -> Path:
    """Put down that a checkpoint cannot be evaluated, with the parts that were finished; the file.

    They stay in its workplaces, too, for another try; the exported models go.
    """
    places = list((run / DIRECTORY).glob(f"{_workplaces(step, checkpoint)}*"))
    kept = [(_changed(place / PARTS), read_json(place / PARTS) or {}) for place in places]
    parts = max(kept, key=lambda one: one[0])[1] if kept else {}
    told = {key: parts.get(key) or {} for key in ("metrics", "settings", "results")}
    reason = "; ".join(filter(None, (why, str(parts.get("why") or ""))))
    path = _write(run, step, checkpoint, {**told, "failure": reason})
    for place in places:
        shutil.rmtree(place / "model", ignore_errors=True)
    return path


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
    told = read_json(_jobs(run, step)) or {}
    found = told.get("jobs")
    with contextlib.suppress(UserError):
        if told.get("checkpoint") == identity(_checkpoint(run, step)) and isinstance(found, list):
            return [str(one) for one in found]
    return []


def add_job(run: Path, step: int, job: str) -> None:
    """Put down that a job evaluates the checkpoint of a step.

    Raises:
        UserError: the checkpoint is gone.
    """
    checkpoint = identity(_checkpoint(run, step))
    (run / DIRECTORY).mkdir(exist_ok=True)
    told = {"checkpoint": checkpoint, "jobs": [*jobs(run, step), job]}
    write_json(_jobs(run, step), told)


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


def _changed(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return -math.inf


def _write(run: Path, step: int, checkpoint: str, told: Mapping[str, Any]) -> Path:
    path = _result(run, step)
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"format": FORMAT, "step": step, "checkpoint": checkpoint, **told})
    return path


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / layout.step_name(step)


def _result(run: Path, step: int) -> Path:
    return run / DIRECTORY / f"{layout.step_name(step)}.json"


def _jobs(run: Path, step: int) -> Path:
    return run / DIRECTORY / f"{layout.step_name(step)}.jobs.json"
