"""A run's checkpoint, evaluated as the run's configuration asks: exported, scored, put down.

What an interrupted call has finished is taken by the next one. No torch until the export.
"""

import contextlib
import fcntl
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from titans_pretrain import config as run_config
from titans_pretrain.checkpoint import evaluations
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import TitansError, UserError, nearest
from titans_pretrain.evaluate import tasks as task_names
from titans_pretrain.evaluate.tasks import Task

HELD_OUT = "heldout"
Choose = Callable[[Path], Sequence[Task]]


def evaluate(
    checkpoint: Path, config: RunConfig, choose: Choose, *, device: str = "auto"
) -> evaluations.Evaluation:
    """Evaluate a checkpoint of a run; ``RUN/evaluations/step-N.json`` holds the result.

    Where the same evaluation of the same checkpoint is there already, nothing is done. A bad
    configuration or unfit data is put down, too: another try would end alike.

    Args:
        checkpoint: ``RUN/checkpoints/step-N``.
        config: the run; ``pipeline.eval`` and ``pipeline.export.dtype`` count.
        choose: opens the tasks of ``pipeline.eval.tasks`` for an exported model.
        device: ``cpu``, ``cuda``, …; ``auto`` takes a GPU if there is one.

    Raises:
        UserError: no such checkpoint; another process evaluates it; or the configuration does not
            fit.
        TitansError: the checkpoint is damaged, gave way meanwhile, or a task failed.
    """
    checkpoint = checkpoint.absolute()
    run, step = _place(checkpoint)
    identity, settings = evaluations.identity(checkpoint), asked(config)
    found = evaluations.of_step(run, step)
    if found and found.metrics and (found.checkpoint, found.settings) == (identity, settings):
        return found
    place = evaluations.workplace(run, step, identity)
    with _alone(place):
        try:
            results = _score(checkpoint, place, config, choose, device)
        except UserError as error:
            if _is_there(checkpoint, identity):
                evaluations.fail(run, step, identity, f"{error.what}; {error.where}; {error.fix}")
            raise
        if not _is_there(checkpoint, identity):
            raise TitansError(
                "the checkpoint gave way while it was evaluated; the result does not count",
                where=str(checkpoint),
                fix="evaluate the one that is there now",
            )
        metrics = dict(flat(results))
        evaluations.write(run, step, identity, metrics=metrics, settings=settings, results=results)
        shutil.rmtree(place, ignore_errors=True)
    done = evaluations.of_step(run, step)
    assert done is not None
    return done


def asked(config: RunConfig) -> dict[str, Any]:
    """What a run's configuration asks its checkpoints to be evaluated on."""
    told = config.pipeline.eval
    return {
        "data": config.data.manifest,
        "sequences": told.sequences,
        "tasks": list(told.tasks),
        "options": list(told.options),
        "dtype": config.pipeline.export.dtype,
    }


def configuration(checkpoint: Path) -> Path:
    """The configuration of a checkpoint's run: that of its jobs, else that it trains with.

    Raises:
        UserError: there is none.
    """
    run, _ = _place(checkpoint.absolute())
    for path in (run / "jobs" / "config.yaml", run / "config.yaml"):
        if path.is_file():
            return path
    raise UserError(
        "the run has no configuration", where=str(run), fix="give it with --config FILE"
    )


def load(path: Path) -> RunConfig:
    """A run's configuration whose tasks are known.

    Raises:
        UserError: it is not, or they are not.
    """
    config = run_config.load(path)
    check(config)
    return config


def check(config: RunConfig) -> None:
    """Refuse names of tasks that are none.

    Raises:
        UserError: one is not.
    """
    for name in config.pipeline.eval.tasks:
        if name not in task_names.known():
            raise UserError(
                f"pipeline.eval.tasks: {name!r} is no task",
                where="pipeline.eval.tasks",
                fix=nearest(name, task_names.known()),
            )


def flat(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics of results by name, such as ``heldout/loss`` and ``piqa/accuracy``; no counts."""
    for name, found in results.items():
        for key, value in found.items():
            if isinstance(value, float):
                yield f"{name}/{key}", value


def _place(checkpoint: Path) -> tuple[Path, int]:
    """The run's directory and the step of a checkpoint."""
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    if match is None or checkpoint.parent.name != "checkpoints":
        raise UserError(
            f"{checkpoint} is no checkpoint of a run",
            where="CHECKPOINT",
            fix="give RUN/checkpoints/step-N",
        )
    return checkpoint.parent.parent, int(match[1])


def _is_there(checkpoint: Path, identity: str) -> bool:
    with contextlib.suppress(UserError):
        return evaluations.identity(checkpoint) == identity
    return False


def _score(
    checkpoint: Path, place: Path, config: RunConfig, choose: Choose, device: str
) -> dict[str, Any]:
    """What held-out data and tasks tell, by name."""
    from titans_pretrain.export import huggingface

    model, told = place / "model", config.pipeline.eval
    huggingface.export(checkpoint, model, dtype=config.pipeline.export.dtype)
    results: dict[str, Any] = {}
    if config.data.manifest is not None:
        from titans_pretrain.evaluate import heldout

        choice = heldout.Choice(sequences=told.sequences)
        out = place / HELD_OUT
        results[HELD_OUT] = heldout.evaluate(
            model, out, config.data.manifest, choice, device=device
        )
    if told.tasks:
        from titans_pretrain.evaluate import suite

        report = suite.evaluate(model, place / "tasks", choose(model), device=device)
        for row in report["results"]:
            results[suite.label(row["task"], row["cell"])] = row["result"]
    return results


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Let one process at a time evaluate a checkpoint.

    Raises:
        UserError: another one does.
    """
    place.mkdir(parents=True, exist_ok=True)
    with open(place / ".lock", "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another process evaluates this checkpoint",
                where=str(place),
                fix="wait until it has ended",
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
