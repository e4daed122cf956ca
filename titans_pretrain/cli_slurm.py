"""The verbs of SLURM jobs: one function a verb, each a thin call into ``launchers``. No torch."""

import argparse
from pathlib import Path
from typing import Any

from titans_pretrain.cli_types import natural, positive
from titans_pretrain.errors import UserError


def submit(options: argparse.Namespace) -> int:
    """Check a run, write its job files and queue them; or print them only."""
    from launchers import submit, sweep

    if options.sweep:
        return sweep.submit(
            options.config,
            options.override,
            options.sweep,
            directory=options.sweep_directory,
            at_once=options.at_once,
            dry_run=options.dry_run,
            chain=options.pipeline,
            after=options.after,
        )
    stray = [name for name in ("sweep_directory", "at_once") if getattr(options, name)]
    if stray:
        option = f"--{stray[0].replace('_', '-')}"
        fix = f"add --sweep KEY=V1,V2, or leave out {option}"
        raise UserError(f"{option} without a sweep", where=option, fix=fix)
    return submit.submit(
        options.config,
        options.override,
        dry_run=options.dry_run,
        chain=options.pipeline,
        resume=options.resume,
        after=options.after,
    )


def attempt(options: argparse.Namespace) -> int:
    """Be the batch job of a run: start its ranks, watch them, decide what comes after."""
    from launchers.asked import AskedToStop

    asked = AskedToStop()  # before what takes time to import
    from launchers import attempt, sweep

    config = options.config
    if options.member is not None:
        config = sweep.member(config, options.member)
    return attempt.run(config, asked)


def doctor(options: argparse.Namespace) -> int:
    """Print what of this login node and its cluster is fit for a run."""
    from launchers import doctor

    return doctor.doctor(options.config, options.override)


def status(options: argparse.Namespace) -> int | None:
    """Print jobs, step, loss, speed, remaining time and last error of runs."""
    from launchers import status

    return status.status(options.run, as_json=options.json)


def logs(options: argparse.Namespace) -> int | None:
    """Print what a run's job or one of its ranks wrote."""
    from launchers import logs

    return logs.logs(
        options.run,
        rank=options.rank,
        attempt=options.attempt,
        lines=options.lines,
        follow=options.follow,
    )


def stop(options: argparse.Namespace) -> int | None:
    """Have a run save and end."""
    from launchers import stop

    return stop.stop(options.run, now=options.now, wait=options.wait)


def add(verbs: Any) -> None:
    """Register the verbs of SLURM jobs."""
    _add_submit(verbs)
    _add_attempt(verbs)
    _add_doctor(verbs)
    _add_status(verbs)
    _add_logs(verbs)
    _add_stop(verbs)


def _add_submit(verbs: Any) -> None:
    verb = verbs.add_parser("submit", help="queue a run on SLURM, after checks of all it needs")
    verb.set_defaults(verb=submit)
    _add_config(verb)
    verb.add_argument("--dry-run", action="store_true", help="print the job files and stop there")
    verb.add_argument(
        "--pipeline", action="store_true", help="with the stages before and after the training"
    )
    verb.add_argument("--resume", action="store_true", help="go on with the run that is there")
    verb.add_argument(
        "--after", nargs="+", default=[], metavar="JOB", help="begin once these jobs ended well"
    )
    verb.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="KEY=V1,V2",
        help="one run for each combination of these values, as one array job",
    )
    verb.add_argument(
        "--sweep-directory", type=Path, metavar="DIR", help="of the sweep (RUN.sweep)"
    )
    verb.add_argument(
        "--at-once", type=natural, default=0, help="runs of the sweep at the same time; 0: all"
    )


def _add_attempt(verbs: Any) -> None:
    verb = verbs.add_parser("attempt", help="what a batch job of a run runs; not for terminals")
    verb.set_defaults(verb=attempt)
    verb.add_argument("config", type=Path, metavar="CONFIG", help="RUN/jobs/config.yaml")
    verb.add_argument(
        "--member", type=natural, metavar="I", help="CONFIG is a sweep.json: which of its runs"
    )


def _add_doctor(verbs: Any) -> None:
    verb = verbs.add_parser("doctor", help="whether a login node and its cluster are fit for a run")
    verb.set_defaults(verb=doctor)
    verb.add_argument("config", nargs="?", metavar="CONFIG", help="the run's YAML file")
    verb.add_argument("override", nargs="*", metavar="KEY=VALUE", help=_OVERRIDE_HELP)


def _add_status(verbs: Any) -> None:
    verb = verbs.add_parser("status", help="jobs, step, loss, speed, time left, restarts, error")
    verb.set_defaults(verb=status)
    verb.add_argument(
        "run", nargs="*", type=Path, metavar="PATH", help="runs, or directories that hold some (.)"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object a line")


def _add_logs(verbs: Any) -> None:
    verb = verbs.add_parser("logs", help="what a run's job or one of its ranks wrote")
    verb.set_defaults(verb=logs)
    verb.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    verb.add_argument("--rank", type=natural, help="of this rank instead of the job")
    verb.add_argument("--attempt", type=positive, metavar="N", help="of this attempt (the newest)")
    verb.add_argument("--lines", type=positive, default=50, help="the last (%(default)s)")
    verb.add_argument("--follow", action="store_true", help="print what comes, until the run ends")


def _add_stop(verbs: Any) -> None:
    verb = verbs.add_parser("stop", help="have a run save and end; titans submit goes on with it")
    verb.set_defaults(verb=stop)
    verb.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    verb.add_argument("--now", action="store_true", help="cancel its jobs without a save")
    verb.add_argument("--wait", action="store_true", help="return when it has ended")


def _add_config(verb: Any) -> None:
    verb.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    verb.add_argument("override", nargs="*", metavar="KEY=VALUE", help=_OVERRIDE_HELP)


_OVERRIDE_HELP = "changes of the configuration, e.g. job.nodes=4; before the options"
