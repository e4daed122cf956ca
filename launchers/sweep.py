"""A sweep: a grid of overrides, one run each, as the elements of one array job. No torch here.

``sweep.json`` freezes which element is which run. Values added later come behind: an element keeps
its number, its directory and its run for good.
"""

import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers import checks, pipeline, slurm_utils, submitted
from launchers import job as jobs
from launchers import submit as single
from launchers.submitted import Stage
from titans_pretrain import config as run_config
from titans_pretrain import errors
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import UserError
from titans_pretrain.files import write_json
from titans_pretrain.train.directory import RunDirectory

FORMAT = "titans-sweep/1"
NAME = "sweep.json"
ONE_FOR_ALL = ("job", "pipeline")  # sections that all runs of an array share
OPEN, CLOSE, QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        overrides: what makes it differ, ``section.key=value``, sorted.
        directory: of the run, below the sweep's.
    """

    overrides: tuple[str, ...]
    directory: str


def submit(
    config_path: str,
    overrides: Sequence[str],
    axes: Sequence[str],
    *,
    directory: Path | None = None,
    at_once: int = 0,
    dry_run: bool = False,
    chain: bool = False,
    after: Sequence[str] = (),
) -> int:
    """Queue the runs of a grid that are not finished; the exit code.

    The same command again goes on with the runs that ended before their last step.

    Args:
        config_path: the YAML that all runs share.
        overrides: what all runs change in it.
        axes: ``section.key=value,value``; all combinations are run.
        directory: of the sweep; None takes the run's directory with ``.sweep``.
        at_once: runs at the same time; 0 sets no bound.
        dry_run: stop after the file is printed; needs no SLURM.
        chain: refused: a sweep has no stages after the training.
        after: jobs that must have ended well before.

    Raises:
        UserError: a bad axis, a run that cannot be, or one that began otherwise.
    """
    if chain:
        raise UserError(
            "a sweep has no pipeline", where="--pipeline", fix="prepare the data before, alone"
        )
    base = single.frozen(run_config.load(config_path, overrides))
    place = (directory or Path(f"{base.run.directory}.sweep")).absolute()
    members = grown(read(place), grid(axes, overrides))
    configs = [_config(base, config_path, overrides, place, member) for member in members]
    for config in configs:
        checks.of_config(config)
    if dry_run:
        single.show(place, [_stage(base, place, range(len(members)), at_once)])
        return errors.DONE
    single.require_slurm()
    after = single.waited_for(after)
    with submitted.alone(place):
        chosen = _to_do(place, members, configs, jobs.job_name(base, place, jobs.SWEEP))
        if not chosen:
            print(f"finished already, or running: all {len(members)} runs of {place}")
            return errors.DONE
        stage = _stage(base, place, chosen, at_once)
        single.show(place, [stage])
        for config in (configs[index] for index in chosen):
            checks.of_run(config, Path(config.run.directory))
            checks.of_data(config)
        single.check(configs[chosen[0]], place, [stage])
        _write(place, members, configs, chosen)
        submitted.write(place, [stage])
        done = submitted.queue(place, [stage], after)
        _tell(place, members, chosen, *done["sweep"])
    return errors.DONE


def member(path: Path, index: int) -> Path:
    """The configuration of one run of a sweep.

    Args:
        path: ``sweep.json``.
        index: which.

    Raises:
        UserError: it has no such run.
    """
    members = read(path.parent)
    if not 0 <= index < len(members):
        raise UserError(
            f"run {index} of {len(members)}", where=str(path), fix=f"use 0 to {len(members) - 1}"
        )
    return submitted.config_of(path.parent / members[index].directory)


def read(place: Path) -> list[Member]:
    """The runs of the sweep in a directory, in the order of their numbers; none if there is none.

    Raises:
        UserError: ``sweep.json`` is damaged.
    """
    path = place / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}")
        return [Member(tuple(one["overrides"]), str(one["directory"])) for one in content["runs"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the sweep cannot be read: {type(error).__name__}: {error}",
            where=str(path),
            fix="bring it back, or give another --sweep-directory",
        ) from None


def grid(axes: Sequence[str], overrides: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """All combinations of the axes, each sorted by key.

    Args:
        axes: ``section.key=value,value``; commas in brackets and quotes belong to a value.
        overrides: what all runs change.

    Raises:
        UserError: no value, a value or key twice, or a key that the runs cannot differ in.
    """
    taken = {text.partition("=")[0] for text in overrides}
    columns: list[list[str]] = []
    for text in axes:
        key, equals, listed = text.partition("=")
        values = _values(listed)
        if not equals or not key or not all(values):
            raise UserError(f"{text!r} is no axis", where="--sweep", fix="write section.key=V1,V2")
        if key in taken:
            raise UserError(f"{key} is given twice", where="--sweep", fix="give it once")
        if len(set(values)) != len(values):
            raise UserError(f"{text!r} has a value twice", where="--sweep", fix="give it once")
        if key.partition(".")[0] in ONE_FOR_ALL or key in ("run.directory", "run.name"):
            raise UserError(
                f"{key} is one for all runs of a sweep",
                where="--sweep",
                fix="sweep over keys of model, data, mesh, train, checkpoint and guard",
            )
        taken.add(key)
        columns.append([f"{key}={value}" for value in values])
    return [tuple(sorted(combination)) for combination in itertools.product(*columns)]


def grown(members: Sequence[Member], wanted: Sequence[tuple[str, ...]]) -> list[Member]:
    """A sweep's runs with those wanted behind them that it lacks."""
    known = {one.overrides for one in members}
    new = [overrides for overrides in wanted if overrides not in known]
    start = len(members)
    return [*members, *(Member(one, f"{start + place:04d}") for place, one in enumerate(new))]


def _values(text: str) -> list[str]:
    """The parts between commas that stand in no bracket and no quotes."""
    values, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in QUOTES:
            quote = sign
        elif sign in OPEN:
            depth += 1
        elif sign in CLOSE:
            depth -= 1
        elif sign == "," and depth == 0:
            values.append("")
            continue
        values[-1] += sign
    return [value.strip() for value in values]


def _config(
    base: RunConfig, path: str, overrides: Sequence[str], place: Path, one: Member
) -> RunConfig:
    """The whole configuration of one run; every override is checked by loading it."""
    config = single.frozen(run_config.load(path, [*overrides, *one.overrides]))
    name = f"{base.run.name or Path(base.run.directory).name}-{one.directory}"
    change = {"directory": str(place / one.directory), "name": name}
    return config.model_copy(update={"run": config.run.model_copy(update=change)})


def _stage(base: RunConfig, place: Path, chosen: Sequence[int], at_once: int) -> Stage:
    spec = jobs.sweep_spec(
        base, directory=place, sweep_path=place / NAME, members=list(chosen), at_once=at_once
    )
    return Stage("sweep", spec)


def _to_do(
    place: Path, members: Sequence[Member], configs: Sequence[RunConfig], name: str
) -> list[int]:
    """Numbers of the runs that are neither finished nor in a job; says which are left out.

    Args:
        place: of the sweep.
        members: its runs.
        configs: theirs.
        name: of its arrays.

    Raises:
        UserError: a run has begun with another configuration.
    """
    mine = slurm_utils.jobs()
    arrays = submitted.living(place, [name], among=mine)
    chosen = []
    for index, (one, config) in enumerate(zip(members, configs, strict=True)):
        run = place / one.directory
        _same(run, config)
        RunDirectory(run).check(config, resume=True)
        names = [pipeline.training(config, run).spec.name]
        if pipeline.finished(config, run) is not None:
            print(f"{one.directory}: finished already")
        elif living := [
            *submitted.running_on(run, names, among=mine),
            *(job for job in arrays if _element(job) == index),
        ]:
            told = ", ".join(dict.fromkeys(job.id for job in living))
            print(f"{one.directory}: in job {told} already")
        else:
            chosen.append(index)
    return chosen


def _element(job: slurm_utils.Job) -> int | None:
    """Which element of its array a job is; also of one that no run has noted.

    ``titans submit`` may be killed between the array and the notes of its runs.
    """
    element = job.id.partition("_")[2]
    return int(element) if element.isdigit() else None


def _same(run: Path, config: RunConfig) -> None:
    """Refuse to change what a run of the sweep began with; its job may change."""
    path = submitted.config_of(run)
    if not path.exists():
        return
    was, now = run_config.load(path).model_dump(), config.model_dump()
    for section, values in now.items():
        if section in ONE_FOR_ALL:
            continue
        for key, value in values.items():
            if was[section].get(key) != value:
                raise UserError(
                    f"{section}.{key}: {value!r} differs from {was[section].get(key)!r}, which "
                    f"run {run.name} of this sweep has",
                    where=str(path),
                    fix="repeat the first command's options, or give another --sweep-directory",
                )


def _write(
    place: Path, members: Sequence[Member], configs: Sequence[RunConfig], chosen: Sequence[int]
) -> None:
    """Freeze the runs, each with the file of a job of its own, then the list of them."""
    for index in chosen:
        run = Path(configs[index].run.directory)
        with submitted.alone(run):
            single.forget_stop(run)
            submitted.freeze(run, configs[index])
            submitted.write(run, [pipeline.training(configs[index], run)])
    runs = [{"overrides": list(one.overrides), "directory": one.directory} for one in members]
    write_json(place / NAME, {"format": FORMAT, "runs": runs})


def _tell(
    place: Path, members: Sequence[Member], chosen: Sequence[int], job: str, waits: Sequence[str]
) -> None:
    """Record the array's elements with their runs, and print them."""
    script = submitted.script_of(place, "sweep")
    for index in chosen:
        one = members[index]
        submitted.record(place / one.directory, "train", f"{job}_{index}", waits, script)
        print(f"{job}_{index}: {one.directory} {' '.join(one.overrides)}")
    print(f"sweep: job {job}" + (f", after {' and '.join(waits)}" if waits else ""))
    print(f"titans status {shlex.quote(str(place))}")
