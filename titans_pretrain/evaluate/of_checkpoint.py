"""A run's checkpoint, evaluated as the run's configuration asks: exported, scored, put down.

What an interrupted call has finished is taken by the next one. No torch until the export.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from titans_pretrain import config as run_config
from titans_pretrain.baselines import foreign
from titans_pretrain.checkpoint import evaluations
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import Misfit, TitansError, UserError, nearest
from titans_pretrain.evaluate import loaded, options
from titans_pretrain.evaluate import tasks as task_names
from titans_pretrain.evaluate.tasks import Options, Task
from titans_pretrain.files import held, read_json

HELD_OUT = "heldout"


class UnderWay(UserError):
    """Another process evaluates the checkpoint; its result will count."""


def evaluate(
    checkpoint: Path, config: RunConfig, *, device: str = "auto"
) -> evaluations.Evaluation:
    """Evaluate a checkpoint of a run; ``RUN/evaluations/step-N.json`` holds the result.

    Where the same evaluation of the same checkpoint, on the same data, is there already, nothing
    is done. Where the configuration is the run's own, why there is no result is put down, too, and
    that there will be none if another try would end alike.

    Args:
        checkpoint: ``RUN/checkpoints/step-N``.
        config: the run; ``pipeline.eval`` and ``pipeline.export.dtype`` count.
        device: ``cpu``, ``cuda``, …; ``auto`` takes a GPU if there is one.

    Raises:
        UnderWay: another process evaluates it.
        Misfit: the configuration does not fit, or names nothing to score the checkpoint on.
        UserError: no such checkpoint, or data does not fit or cannot be reached.
        TitansError: the checkpoint is damaged, gave way meanwhile, or a task failed.
    """
    checkpoint = checkpoint.absolute()
    run, step = _place(checkpoint)
    identity = evaluations.identity(checkpoint)
    try:
        return _evaluation(checkpoint, identity, config, device)
    except Exception as error:
        if _is_the_runs(config, checkpoint) and _is_there(checkpoint, identity):
            with contextlib.suppress(OSError):
                _put_down(run, step, identity, error)
        raise


def _evaluation(
    checkpoint: Path, identity: str, config: RunConfig, device: str
) -> evaluations.Evaluation:
    """The evaluation that is there already, or a new one."""
    run, step = _place(checkpoint)
    tasks = _opened(config, check(config))
    settings = {**asked(config), **_contents(config, tasks)}
    if done := _done(run, step, identity, settings):
        return done
    place = evaluations.workplace(run, step, identity, settings)
    with _alone(place):
        done = _done(run, step, identity, settings)  # by another one, in the meantime
        if done is None:
            results = _scored(checkpoint, place, identity, config, tasks, device, settings)
            metrics = dict(flat(results))
            told = {"metrics": metrics, "settings": settings, "results": results}
            evaluations.write(run, step, identity, **told)
            done = evaluations.of_step(run, step)
        shutil.rmtree(place, ignore_errors=True)
    evaluations.tidy(run)
    assert done is not None
    return done


def _is_the_runs(config: RunConfig, checkpoint: Path) -> bool:
    """Whether the run's own jobs would evaluate a checkpoint on the same."""
    with contextlib.suppress(TitansError, OSError):
        return asked(load(configuration(checkpoint))) == asked(config)
    return False


def _put_down(run: Path, step: int, identity: str, error: Exception) -> None:
    """Keep why an evaluation, asked for by the run's own configuration, has no result."""
    if _has_result(evaluations.of_step(run, step), identity):
        return
    if isinstance(error, UnderWay):
        evaluations.gave_way(run, step, identity)
    elif isinstance(error, Misfit):
        evaluations.fail(run, step, identity, _line(error))
    else:
        evaluations.stopped(run, step, identity, _line(error))


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
    """A run's configuration.

    Raises:
        UserError: it is none.
    """
    return run_config.load(path)


def check(config: RunConfig) -> Options:
    """The options of a run's tasks, its tasks known; no data is looked at.

    Raises:
        Misfit: there is nothing to score, a task is not known, or an option is none, or missing.
    """
    if config.data.manifest is None and not config.pipeline.eval.tasks:
        raise Misfit(
            "there is nothing to score a checkpoint on: one data set is scored, and the run "
            "trains on a mixture",
            where="pipeline.eval.tasks",
            fix="give pipeline.eval.tasks",
        )
    for name in config.pipeline.eval.tasks:
        if name not in task_names.known():
            raise Misfit(
                f"pipeline.eval.tasks: {name!r} is no task",
                where="pipeline.eval.tasks",
                fix=nearest(name, task_names.known()),
            )
    return options.of_run(config)


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


def _opened(config: RunConfig, chosen: Options) -> list[Task]:
    names = config.pipeline.eval.tasks
    return task_names.parse(",".join(names), chosen) if names else []


def _contents(config: RunConfig, tasks: Sequence[Task]) -> dict[str, Any]:
    """Tells the data at the places the configuration names, and the model's code, from others."""
    fingerprint = None if config.data.manifest is None else _fingerprint(config.data.manifest)
    return {
        "fingerprint": fingerprint,
        "code": loaded.code_of(str(config.model.get(foreign.KEY, "titans"))),
        "identities": {task.name: _digest(task.identity()) for task in tasks},
    }


def _fingerprint(manifest: str) -> str:
    from titans_pretrain.data.shards import TokenShards

    return TokenShards.open(manifest, sizes=False).fingerprint


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _done(
    run: Path, step: int, identity: str, settings: Mapping[str, Any]
) -> evaluations.Evaluation | None:
    """The evaluation that is there, if it is this one."""
    found = evaluations.of_step(run, step)
    return found if _has_result(found, identity) and found.settings == settings else None


def _has_result(
    found: evaluations.Evaluation | None, identity: str
) -> TypeGuard[evaluations.Evaluation]:
    return (
        found is not None
        and bool(found.metrics)
        and not found.failure
        and found.checkpoint == identity
    )


def _is_there(checkpoint: Path, identity: str) -> bool:
    with contextlib.suppress(UserError):
        return evaluations.identity(checkpoint) == identity
    return False


def _line(error: Exception) -> str:
    if not isinstance(error, TitansError):
        return f"{type(error).__name__}: {error}"
    return "; ".join(part for part in (error.what, error.where, error.fix) if part)


def _scored(
    checkpoint: Path,
    place: Path,
    identity: str,
    config: RunConfig,
    tasks: Sequence[Task],
    device: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What held-out data and tasks tell, by name; what is found is kept as it comes."""
    earlier = read_json(place / evaluations.PARTS) or {}  # of a try of the same
    results: dict[str, Any] = {**(earlier.get("results") or {})}

    def keep() -> None:
        metrics = dict(flat(results))
        evaluations.keep(place, metrics=metrics, settings=settings, results=results)

    try:
        _score(checkpoint, place, config, tasks, device, results, keep)
    except TitansError:
        if _is_there(checkpoint, identity):
            keep()
            raise
    if not _is_there(checkpoint, identity):
        shutil.rmtree(place, ignore_errors=True)
        raise TitansError(
            "the checkpoint gave way while it was evaluated; the result does not count",
            where=str(checkpoint),
            fix="evaluate the one that is there now",
        )
    return results


def _score(
    checkpoint: Path,
    place: Path,
    config: RunConfig,
    tasks: Sequence[Task],
    device: str,
    results: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Put what held-out data and tasks tell into ``results``, and keep it, part by part."""
    model = place / evaluations.MODEL
    _export(checkpoint, model, config.pipeline.export.dtype)
    if config.data.manifest is not None:
        results[HELD_OUT] = _held_out(model, place / HELD_OUT, config, device)
        keep()
    if not tasks:
        return
    from titans_pretrain.evaluate import suite

    asked_cells = {suite.label(task.name, cell) for task in tasks for cell in task.cells()}

    fingerprint = loaded.fingerprint(model)

    def collect() -> None:
        for path in sorted((place / "tasks" / suite.CELLS).glob("*.json")):
            row = read_json(path) or {}
            name = suite.label(str(row.get("task")), str(row.get("cell")))
            told = (row.get("format"), row.get("model"), name in asked_cells)
            if told == (suite.FORMAT, fingerprint, True):
                results[name] = row["result"]
        keep()

    collect()
    suite.evaluate(model, place / "tasks", tasks, device=device, finished=collect)


def _export(checkpoint: Path, model: Path, dtype: str) -> None:
    """Export into the workplace; what lies there of another version, or is damaged, gives way."""
    from titans_pretrain.export import huggingface

    try:
        huggingface.export(checkpoint, model, dtype=dtype)
    except TitansError:
        if not model.exists():
            raise
        shutil.rmtree(model)
        huggingface.export(checkpoint, model, dtype=dtype)


def _held_out(model: Path, out: Path, config: RunConfig, device: str) -> dict[str, Any]:
    """The held-out result: of an earlier call, whose workplace is that of the same data, or new."""
    from titans_pretrain.evaluate import heldout

    found = read_json(out / f"{heldout.NAME}.json") or {}
    if found.get("format") == heldout.FORMAT:
        return found
    choice = heldout.Choice(sequences=config.pipeline.eval.sequences)
    return heldout.evaluate(model, out, str(config.data.manifest), choice, device=device)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Let one process at a time evaluate a checkpoint.

    Raises:
        UnderWay: another one does.
    """
    place.mkdir(parents=True, exist_ok=True)
    with held(place / evaluations.LOCK) as free:
        if not free:
            raise UnderWay(
                "another process evaluates this checkpoint",
                where=str(place),
                fix="wait until it has ended",
            )
        yield
