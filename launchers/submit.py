"""``titans submit``: check a run, print its job files, queue them. No torch here."""

import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launchers import checks, pipeline, slurm_utils, stage_checks, submitted
from launchers import job as jobs
from launchers.submitted import Stage
from titans_pretrain import config as run_config
from titans_pretrain import errors
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import UserError
from titans_pretrain.evaluate import options
from titans_pretrain.train.directory import RunDirectory

SHOWN = 8
JOB = re.compile(r"[0-9]+(?:_[0-9]+)?")
WELL = "COMPLETED"


def submit(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    chain: bool = False,
    resume: bool = False,
    after: Sequence[str] = (),
) -> int:
    """Print a run's job files and queue them; the exit code.

    Args:
        config_path: the run's YAML.
        overrides: ``section.key=value``.
        dry_run: stop after the files are printed; needs no SLURM.
        chain: with the stages before and after the training.
        resume: go on with a run that has steps; a job of it that is queued goes first.
        after: jobs that must have ended well before.

    Raises:
        UserError: something the run needs is not there; nothing was queued.
        TitansError: SLURM does not answer, or refused a job of the chain.
    """
    config = frozen(run_config.load(config_path, overrides))
    run = Path(config.run.directory)
    checks.of_config(config)
    stages = pipeline.stages(config, run) if chain else [pipeline.training(config, run)]
    if dry_run:
        show(run, stages)
        return errors.DONE
    require_slurm()
    after = waited_for(after)
    with submitted.alone(run):
        stages = _to_do(config, run, stages, chain=chain, resume=resume)
        if not stages:
            return errors.DONE
        show(run, stages)
        check(config, run, stages)
        forget_stop(run)
        submitted.freeze(run, config)
        submitted.write(run, stages)
        done = submitted.queue(run, stages, after)
    tell(run, done)
    return errors.DONE


def frozen(config: RunConfig) -> RunConfig:
    """The configuration with paths that mean the same on a node in another working directory."""
    told = config.pipeline
    prepare, export, evaluation = told.data, told.export, told.eval
    if prepare is not None:
        places = [place if "://" in place else _absolute(place) for place in prepare.input]
        change = {"input": places, "tokenizer": _absolute(prepare.tokenizer)}
        prepare = prepare.model_copy(update=change)
    export = export.model_copy(update={"directory": _absolute(export.directory)})
    change = {
        "output": _absolute(evaluation.output),
        "options": options.absolute(evaluation.options),
    }
    evaluation = evaluation.model_copy(update=change)
    sections = {"data": prepare, "export": export, "eval": evaluation}
    place = {"directory": _absolute(config.run.directory)}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update=place),
            "pipeline": told.model_copy(update=sections),
        }
    )


def show(run: Path, stages: Sequence[Stage]) -> None:
    """Print the job files; of several, which is which."""
    for stage in stages:
        if len(stages) > 1:
            waits = f", after {' and '.join(stage.after)}" if stage.after else ""
            print(f"# {submitted.script_of(run, stage.name)}{waits}")
        print(jobs.text(stage.spec))


def check(config: RunConfig, run: Path, stages: Sequence[Stage]) -> None:
    """Refuse what cannot run here; warn of what may end badly.

    Raises:
        UserError: what, and how to mend it.
    """
    checks.of_run(config, run)
    names = {stage.name for stage in stages}
    if names.isdisjoint(pipeline.DATA):
        checks.of_data(config)
    stage_checks.of_stages(config, run, names)
    stage_checks.of_evaluations(config, names)
    stage_checks.of_initial_weights(config, run)
    checks.of_host(config.job)
    waits = ask([*stages, *pipeline.evaluation(config, run)] if "train" in names else stages)
    for sentence in (*waits, *checks.warnings(config, run)):
        print(f"warning: {sentence}", file=sys.stderr)


def ask(stages: Sequence[Stage]) -> list[str]:
    """Have SLURM look at the very files that will be submitted.

    Training goes first: what the other stages take from its section is told as its own.

    Returns:
        Sentences about why one may wait long.

    Raises:
        UserError: it would not run one.
    """
    waits = []
    with tempfile.TemporaryDirectory(prefix="titans-submit-") as place:
        for stage in sorted(stages, key=lambda one: one.name != "train"):
            script = Path(place) / f"{stage.name}.sbatch"
            script.write_text(jobs.text(stage.spec), encoding="utf-8")
            told = slurm_utils.test_only(script, section=stage.spec.section)
            waits += [f"{stage.name}: {sentence}" for sentence in told]
    return waits


def tell(run: Path, done: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    """Print the jobs, what waits for what, and how to follow them."""
    names = {job: stage for stage, (job, _) in done.items()}
    for stage, (job, waits) in done.items():
        named = [f"{one} ({names[one]})" if one in names else one for one in waits]
        print(f"{stage}: job {job}" + (f", after {' and '.join(named)}" if named else ""))
    for verb in ("status", "logs", "stop"):
        print(f"titans {verb} {shlex.quote(str(run))}")


def require_slurm() -> None:
    """Refuse a host without SLURM's commands.

    Raises:
        UserError: there is no sbatch.
    """
    if not slurm_utils.available():
        raise UserError(
            "there is no sbatch on this host",
            where="PATH",
            fix="submit from a login node of the cluster; --dry-run only prints the job files",
        )


def waited_for(ids: Sequence[str]) -> list[str]:
    """Those of the jobs to wait for that have not ended well yet.

    Raises:
        UserError: a word that is no job id, a job that SLURM does not know, or one that failed:
            what waits for it would never run.
    """
    left = []
    for one in ids:
        if not JOB.fullmatch(one):
            raise UserError(f"{one!r} is no job id", where="--after", fix="give numbers of jobs")
        found = slurm_utils.jobs([one])  # of an array all elements
        if not found:
            raise UserError(
                f"SLURM knows no job {one}", where="--after", fix="squeue --me lists your jobs"
            )
        for job in found:
            if job.finished and job.state != WELL:
                raise UserError(
                    f"job {job.id} has ended as {job.state}: what waits for its good end never "
                    "runs",
                    where="--after",
                    fix="queue it again and give its new id, or leave it out",
                )
        if all(job.finished for job in found):
            print(f"job {one} has ended well already")
        else:
            left.append(one)
    return left


def refuse_living(
    run: Path, stages: Sequence[Stage], config: RunConfig, *, resume: bool
) -> list[slurm_utils.Job]:
    """The jobs of a run that are queued or running and that a new one may queue behind.

    Raises:
        UserError: there are some and it may not.
    """
    names = {stage.spec.name: stage.name for stage in stages}
    rows = {row.job: row.stage for row in submitted.read(run)}
    living = submitted.running_on(run, list(names))
    if not living:
        return []
    kinds = {names.get(job.name) or rows.get(job.id) or rows.get(job.array) for job in living}
    told = _few([f"{job.id} ({job.state.lower()})" for job in living])
    where = f"run.directory: {run}"
    if not resume or kinds != {"train"} or len(stages) > 1:
        fix = f"titans status {run} shows it, titans stop {run} ends it"
        if kinds == {"train"} and len(stages) == 1:
            fix += "; with --resume another job queues behind it"
        raise UserError(f"a job of this run is there already: {told}", where=where, fix=fix)
    if not same_configuration(run, config):
        raise UserError(
            f"job {told} reads another configuration, which this one would replace",
            where=str(submitted.config_of(run)),
            fix=f"titans stop {run} first, or submit with the configuration it has",
        )
    return living


def same_configuration(run: Path, config: RunConfig) -> bool:
    """Whether the run's jobs have been given exactly this configuration."""
    try:
        return submitted.config_of(run).read_text(encoding="utf-8") == run_config.dump(config)
    except (OSError, UnicodeDecodeError):
        return False


def _to_do(
    config: RunConfig, run: Path, stages: Sequence[Stage], *, chain: bool, resume: bool
) -> list[Stage]:
    """The stages to queue; none if all is done. Says what is left out, and why.

    Raises:
        UserError: jobs of the run are there, or the run is and may not go on.
    """
    before = refuse_living(run, stages, config, resume=resume)
    directory, last = RunDirectory(run), pipeline.finished(config, run)
    if last is not None and not chain:
        directory.check(config, resume=True)
        print(f"finished already: {last.name} of {config.train.steps} steps in {run}")
        return []
    again = chain and same_configuration(run, config)  # the same chain again goes on by itself
    for sentence in directory.check(config, resume=resume or again):
        print(sentence)
    for job in before:
        print(f"job {job.id} of this run goes first")
    to_do, notes = pipeline.left(config, run, list(stages)) if chain else (list(stages), [])
    for note in notes:
        print(note)
    return to_do


def forget_stop(run: Path) -> None:
    """Remove the request to stop that an earlier job has left; that of a living one stays."""
    stop = run / "stop"
    if stop.exists() and not submitted.running_on(run):
        stop.unlink()
        print(f"{stop} is removed: it would stop the run again")


def _few(words: Sequence[str]) -> str:
    """The first words, and how many more there are."""
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _absolute(place: str) -> str:
    return str(Path(place).absolute()) if place else ""
