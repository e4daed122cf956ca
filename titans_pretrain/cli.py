"""The ``titans`` command: one function a verb, each a thin call into the library."""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_pretrain import cli_bench, cli_data, cli_model, cli_slurm, errors, terminal
from titans_pretrain.cli_types import natural, positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the process's exit code (0, 1, 2 or 75)."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.verb(options) or errors.DONE
        sys.stdout.flush()
        return code
    except errors.TitansError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and terminal.nobody_reads():
            terminal.discard_output()
        elif error.errno is None:
            traceback.print_exc()
        else:
            print(terminal.refusal(error), file=sys.stderr)
        return errors.FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return errors.FAILED
    except Exception:
        traceback.print_exc()
        return errors.FAILED


def train(options: argparse.Namespace) -> int:
    """Train, with local ranks of its own or those that torchrun or srun started."""
    from titans_pretrain.train.signals import StopRequest

    stop = StopRequest()  # from here on, before the long imports, a signal kills nothing
    from titans_pretrain import config
    from titans_pretrain.train import launch

    override = [*options.override]
    if options.init_from is not None:  # quoted: a path may look like any YAML
        override.append(f"train.init_from={json.dumps(str(options.init_from.absolute()))}")
    arguments = ["train", options.config, *override, *["--resume"] * options.resume]
    return launch.train(
        config.load(options.config, override),
        ranks=options.ranks,
        resume=options.resume,
        arguments=arguments,
        stop=stop,
    )


def plan(options: argparse.Namespace) -> None:
    """Print what a run is and what its ranks do, without starting it."""
    from titans_pretrain import config
    from titans_pretrain.parallel import mesh
    from titans_pretrain.plan import report

    run = config.load(options.config, options.override)
    ranks = options.ranks or run.mesh.tensor * run.mesh.sequence
    grid = mesh.plan(ranks, run.mesh, run.train)
    if options.json:
        print(json.dumps(report.facts(run, grid), indent=2))
    else:
        print(report.text(run, grid))


def checkpoint_list(options: argparse.Namespace) -> None:
    """Print a run's checkpoints."""
    from titans_pretrain.checkpoint import format as layout

    root = layout.checkpoints_of(options.run)
    keep_every = _keep_every(options.run)
    for entry in layout.summaries(root):
        remarks = [entry.problem] if entry.problem else [f"{entry.tensors} tensors"]
        remarks += ["latest"] if entry.latest else []
        if keep_every and entry.step % keep_every == 0 and not entry.problem:
            remarks += ["kept"]
        print(f"{entry.path}  {entry.bytes / 1e6:.1f} MB  {', '.join(remarks)}")
    if not layout.steps(root):
        raise errors.UserError(
            f"{options.run} holds no checkpoint", where=str(root), fix="give a run's directory"
        )


def checkpoint_verify(options: argparse.Namespace) -> None:
    """Compare every byte of a run's checkpoints with their checksums."""
    from titans_pretrain.checkpoint import format as layout
    from titans_pretrain.checkpoint import manifest

    root = layout.checkpoints_of(options.run)
    steps = layout.steps(root)
    wanted = steps if options.step is None else [options.step]
    if not steps or not set(wanted) <= set(steps):
        known = ", ".join(map(str, steps)) or "none"
        raise errors.UserError(
            f"no such checkpoint; there are: {known}", where=str(root), fix="give RUN and --step"
        )
    damaged, unreadable = 0, 0
    for step in wanted:
        try:
            problems = layout.verify(root / layout.step_name(step))
            damaged += bool(problems)
        except manifest.Unreadable as error:
            problems = [f"{error.what} (it may be good)"]
            unreadable += 1
        print(f"{layout.step_name(step)}: {'; '.join(problems) or 'good'}")
    if unreadable:
        raise errors.TitansError(
            f"{unreadable} of {len(wanted)} checkpoints cannot be read, {damaged} are damaged",
            where=str(root),
            fix="mend that (permissions, file system) and verify again; delete none unread",
        )
    if damaged:
        raise errors.TitansError(
            f"{damaged} of {len(wanted)} checkpoints are damaged",
            where=str(root),
            fix="titans train --resume takes the newest good one; delete the damaged",
        )


def report(options: argparse.Namespace) -> None:
    """Draw loss curves and print a table of runs."""
    from titans_pretrain.report import report

    report(options.run, options.output)


def _keep_every(run: Path) -> int:
    """checkpoint.keep_every of a run's directory, 0 if it cannot be told."""
    from titans_pretrain import config

    try:
        return config.load(run / "config.yaml").checkpoint.keep_every
    except errors.UserError:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="titans", description="Pretrain Titans on clusters.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    cli_data.add(verbs)
    _add_train(verbs)
    _add_plan(verbs)
    _add_checkpoint(verbs)
    cli_model.add(verbs)
    _add_report(verbs)
    cli_slurm.add(verbs)
    cli_bench.add(verbs)
    return parser


def _add_train(verbs: Any) -> None:
    verb = verbs.add_parser("train", help="train a run, or continue one")
    verb.set_defaults(verb=train)
    verb.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    verb.add_argument(
        "override",
        nargs="*",
        metavar="KEY=VALUE",
        help="changes of the configuration, e.g. train.steps=1000; before the options",
    )
    verb.add_argument(
        "--ranks",
        type=positive,
        help="processes to start here (one a GPU, or 1); not under torchrun or srun",
    )
    verb.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint")
    verb.add_argument(
        "--init-from",
        type=Path,
        metavar="DIR",
        help="initial weights: what titans export wrote; no effect once a checkpoint is there",
    )


def _add_plan(verbs: Any) -> None:
    verb = verbs.add_parser("plan", help="size, grid of ranks and hand-over volumes of a run")
    verb.set_defaults(verb=plan)
    verb.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    verb.add_argument(
        "override",
        nargs="*",
        metavar="KEY=VALUE",
        help="changes of the configuration, e.g. mesh.sequence=4; before the options",
    )
    verb.add_argument(
        "--ranks", type=positive, help="processes (mesh.tensor * mesh.sequence, the fewest)"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _add_checkpoint(verbs: Any) -> None:
    checkpoint = verbs.add_parser("checkpoint", help="list and verify checkpoints")
    jobs = checkpoint.add_subparsers(required=True, metavar="JOB")
    job = jobs.add_parser("list", help="print steps, sizes, what is wrong and what stays")
    job.set_defaults(verb=checkpoint_list)
    job.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    job = jobs.add_parser("verify", help="compare every byte with its checksum")
    job.set_defaults(verb=checkpoint_verify)
    job.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    job.add_argument("--step", type=natural, help="only this one")


def _add_report(verbs: Any) -> None:
    verb = verbs.add_parser("report", help="loss curves (PNG) and a table of runs")
    verb.set_defaults(verb=report)
    verb.add_argument("run", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    verb.add_argument(
        "--output", type=Path, metavar="FILE.png", help="the picture (loss.png in the first run)"
    )


if __name__ == "__main__":
    sys.exit(main())
