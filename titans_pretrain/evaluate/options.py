"""The options of tasks, as the command line and ``pipeline.eval.options`` give them. No torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from titans_pretrain.cli_types import natural, positive
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import Misfit, UserError
from titans_pretrain.evaluate import tasks
from titans_pretrain.evaluate.tasks import Options

NAMES = (
    "samples",
    "max_length",
    "lengths",
    "shots",
    "task_data",
    "essays",
    "facts",
    "background",
    "text",
    "seed",
)
_PATHS = ("task_data", "essays", "facts", "background", "text", "data")
_KEY = "pipeline.eval.options"


def add(group: Any) -> None:
    """Add the options to a parser or a group of one."""
    group.add_argument("--samples", type=positive, metavar="N", help="of each task and length")
    group.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens read at most (as in training)"
    )
    group.add_argument(
        "--lengths", type=_names, metavar="A,B", help="of the contexts: 2048,4096 or 1k,128k,1M"
    )
    group.add_argument(
        "--shots", "--few-shot", type=natural, metavar="N", help="solved examples in a prompt"
    )
    group.add_argument(
        "--task-data", type=Path, metavar="DIR", help="TASK.jsonl of the benchmarks (the Hub)"
    )
    group.add_argument(
        "--essays", type=_paths, metavar="A,B", help="text files that hide the needles"
    )
    group.add_argument("--facts", type=Path, metavar="DIR", help="the bAbI files")
    group.add_argument(
        "--background", type=_paths, metavar="A,B", help="text files between the bAbI facts"
    )
    group.add_argument("--text", type=_paths, metavar="A,B", help="text files, long documents")
    group.add_argument("--seed", type=natural, metavar="N", help="of what is drawn (0)")


def told(options: argparse.Namespace, trained_length: int | None) -> Options:
    """What parsed options tell the tasks of a model.

    Args:
        options: ``data``, ``batch`` and those of ``NAMES``.
        trained_length: tokens of the sequences the model was trained on.
    """
    given = {name: value for name in NAMES if (value := getattr(options, name)) is not None}
    return Options(data=options.data, batch=options.batch, trained_length=trained_length, **given)


def of_run(config: RunConfig) -> Options:
    """What ``pipeline.eval`` tells the tasks; no data is looked at.

    Raises:
        Misfit: an unknown option, one that none of the tasks reads, or a bad value.
    """
    chosen = config.pipeline.eval
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data")
    parser.add_argument("--batch", type=positive, default=1)
    add(parser)
    found = told(parser.parse_args(list(chosen.options)), config.data.sequence_length)
    try:
        if chosen.tasks:
            tasks.check(",".join(chosen.tasks), found)
    except UserError as error:
        raise Misfit(f"{_KEY}: {error.what}", where=_KEY, fix=error.fix) from None
    return found


def paths(options: Options) -> list[Path]:
    """The files and directories on this machine that options name."""
    found: list[Path] = []
    for name in _PATHS:
        value = getattr(options, name)
        found += [Path(one) for one in ([value] if isinstance(value, str | Path) else value or ())]
    return [path for path in found if "://" not in str(path) and ":/" not in str(path)]


def absolute(given: Sequence[str]) -> list[str]:
    """Options, each ``--name=value``, with paths that mean the same in another directory."""
    return [_absolute(option) for option in given]


def _absolute(option: str) -> str:
    name, equals, value = option.partition("=")
    if not value or name.removeprefix("--").replace("-", "_") not in _PATHS or "://" in value:
        return option
    several = name.removeprefix("--") in ("essays", "background", "text")
    parts = _names(value) if several else (value,)
    return f"{name}{equals}{','.join(str(Path(part).absolute()) for part in parts)}"


class _Parser(argparse.ArgumentParser):
    """The options that a configuration gives."""

    def error(self, message: str) -> NoReturn:
        raise Misfit(
            f"{_KEY}: {message}", where=_KEY, fix="titans eval --help lists the options of tasks"
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(map(Path, _names(text)))
