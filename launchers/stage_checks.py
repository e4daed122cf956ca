"""What the stages around training need, looked at before any of them is queued. No torch here."""

import os
from collections.abc import Container, Iterator
from pathlib import Path

from data_prep import local_files
from launchers import pipeline
from launchers.checks import existing
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.config import RunConfig
from titans_pretrain.config_job import PrepareSection
from titans_pretrain.errors import UserError
from titans_pretrain.evaluate import of_checkpoint, options
from titans_pretrain.files import read_json
from titans_pretrain.train import initial_fields

HELD_OUT = "--held-out"


def of_stages(config: RunConfig, run: Path, stages: Container[str]) -> None:
    """Refuse what a later stage would fail on, after the hours of those before it.

    Args:
        config: the run.
        run: its directory.
        stages: that are left to do.

    Raises:
        UserError: no tokenizer or text to prepare, a place that cannot be written, or nothing held
            out to evaluate.
    """
    data = config.pipeline.data
    if data is not None and "plan" in stages:
        _text(data)
    for key, place in _places(config, run, stages):
        _writable(key, place)
    if "eval" in stages and config.data.validation_fraction == 0 and not _held_out(config, stages):
        raise UserError(
            "data.validation_fraction: 0 leaves nothing to evaluate, and the data holds no "
            "documents out",
            where="data.validation_fraction",
            fix=f"give it, or prepare the data with {HELD_OUT}=SHARE (pipeline.data.options), or "
            "submit without --pipeline and export by hand",
        )


def of_evaluations(config: RunConfig, stages: Container[str]) -> None:
    """Refuse what every evaluation of a checkpoint would fail on while the run trains.

    Args:
        config: the run.
        stages: that are left to do.

    Raises:
        UserError: an unknown task or option, a path that does not exist, or nothing held out to
            evaluate.
    """
    if not config.pipeline.eval.every:
        return
    for path in options.paths(of_checkpoint.check(config)):
        if not path.exists():
            raise UserError(
                f"pipeline.eval.options: {path} does not exist",
                where="pipeline.eval.options",
                fix="correct it; it must be on a file system that the nodes see, too",
            )
    scored = config.data.manifest is not None
    if scored and config.data.validation_fraction == 0 and not _held_out(config, stages):
        raise UserError(
            "data.validation_fraction: 0 leaves nothing to evaluate checkpoints on, and the data "
            "holds no documents out",
            where="data.validation_fraction",
            fix=f"give it, or prepare the data with {HELD_OUT}=SHARE, or set pipeline.eval.every=0",
        )


def of_initial_weights(config: RunConfig, run: Path) -> None:
    """Refuse initial weights of another model before the run is queued; reads their config.json.

    Where a checkpoint is there, the run goes on from it and they do not matter.

    Raises:
        UserError: there is no exported model, or it computes something else than the run's.
    """
    if config.train.init_from and not layout.steps(run / "checkpoints"):
        initial_fields.check(config)


def _text(data: PrepareSection) -> None:
    if not Path(data.tokenizer).is_file():
        raise UserError(
            f"pipeline.data.tokenizer: {data.tokenizer} does not exist",
            where="pipeline.data.tokenizer",
            fix="make it with titans data tokenizer, or give its place",
        )
    for pattern in data.input:
        path = pattern.removeprefix("file://")
        if "://" not in path and not _matches(path):
            raise UserError(
                f"pipeline.data.input: nothing matches {path!r}",
                where="pipeline.data.input",
                fix="give files or globs, on a file system that the nodes see, too",
            )


def _matches(pattern: str) -> bool:
    try:
        return next(local_files.matching(pattern), None) is not None
    except OSError as error:
        raise UserError(
            f"pipeline.data.input: {pattern!r} cannot be looked at: {error.strerror}",
            where=f"pipeline.data.input: {error.filename}",
            fix="give files that you can read",
        ) from None


def _places(config: RunConfig, run: Path, stages: Container[str]) -> Iterator[tuple[str, Path]]:
    """The directories that stages write, each with the key that tells it."""
    if "plan" in stages:
        yield "data.manifest", Path(str(config.data.manifest)).parent
    if "export" in stages:
        yield "pipeline.export.directory", pipeline.export_of(config, run)
    if "eval" in stages:
        yield "pipeline.eval.output", pipeline.evaluation_of(config, run)


def _writable(key: str, place: Path) -> None:
    there = existing(place)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written" if there.is_dir() else "is no directory"
        raise UserError(
            f"{key}: {place} cannot be made: {there} {why}",
            where=key,
            fix="choose a place you can write to, on a file system that the nodes see, too",
        )


def _held_out(config: RunConfig, stages: Container[str]) -> bool:
    """Whether documents are held out of the data, as far as can be known now."""
    data, manifest = config.pipeline.data, str(config.data.manifest)
    if data is not None and "plan" in stages:
        asked = [option.partition("=") for option in data.options]
        return any(name == HELD_OUT and share.strip("0.") for name, _, share in asked)
    if "://" in manifest or (content := read_json(Path(manifest))) is None:
        return True
    return bool(content.get("held_out") or content.get("held_out_tokens"))
