"""The tasks that a model is evaluated on: what each must offer, and their names. No torch here."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from titans_pretrain.errors import Misfit, nearest
from titans_pretrain.evaluate.loaded import Loaded

Tell = Callable[[str], None]


class Task(Protocol):
    """Something a model is scored on, in parts whose results are kept one by one."""

    @property
    def name(self) -> str:
        """As given to ``--tasks`` and in the reports."""

    def identity(self) -> dict[str, Any]:
        """Everything but the model that decides the result, JSON values."""

    def cells(self) -> list[str]:
        """The parts, such as lengths; ``[""]`` for one."""

    def check(self, longest: int | None) -> None:
        """Refuse what a model of so many positions cannot do; None where nothing bounds them.

        Raises:
            Misfit: an option asks for more.
        """

    def run(self, model: Loaded, cell: str, tell: Tell) -> dict[str, Any]:
        """Metrics of a part, JSON values.

        Args:
            model: what is scored.
            cell: one of ``cells()``.
            tell: takes a line about the progress within the part.
        """


@runtime_checkable
class Fitted(Protocol):
    """A task some of whose lengths may not fit, which only a tokenizer tells."""

    def fit(self, model: Loaded, cell: str) -> None:
        """Refuse a part that cannot be run, before any is.

        Raises:
            Misfit: prompts or answers need other lengths.
        """


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line tells the tasks; None takes a task's own default.

    Attributes:
        max_length: tokens the model is given at most.
        trained_length: what takes the place of ``max_length``, as the model tells.
        batch: rows at once.
        samples: scored at most, of each cell.
        shots: solved examples in the prompt.
        lengths: of contexts, as written: ``2048``, ``4k``, ``1M``.
        task_data: directory of the benchmarks' JSON lines files.
        essays: text files that hide the needles.
        facts: directory of the bAbI files.
        background: text files between the bAbI facts.
        text: text files with long documents.
        data: manifest.json of prepared data; path or URL.
        seed: of what is drawn.
    """

    max_length: int | None = None
    trained_length: int | None = None
    batch: int = 1
    samples: int | None = None
    shots: int | None = None
    lengths: tuple[str, ...] | None = None
    task_data: Path | None = None
    essays: tuple[Path, ...] = ()
    facts: Path | None = None
    background: tuple[Path, ...] = ()
    text: tuple[Path, ...] = ()
    data: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Family:
    """Tasks that are opened together.

    Attributes:
        names: of its tasks.
        reads: the options that decide what it does, of those that not every task takes.
        open: gives the tasks of some of the names, their data at hand.
    """

    names: tuple[str, ...]
    reads: frozenset[str]
    open: Callable[[Sequence[str], Options], Sequence[Task]]


def _of(module: str) -> Callable[[Sequence[str], Options], Sequence[Task]]:
    """``open_tasks`` of a module beside this one, imported when it is needed."""

    def open_tasks(names: Sequence[str], options: Options) -> Sequence[Task]:
        tasks: Sequence[Task] = import_module(f"{__package__}.{module}").open_tasks(names, options)
        return tasks

    return open_tasks


COMMONSENSE = (
    "lambada_openai",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "social_iqa",
    "boolq",
)
PAPER = ("wikitext", *COMMONSENSE)
NIAH = ("niah_pk", "niah_number", "niah_uuid", "niah_words")
BABILONG = tuple(f"babilong_qa{number}" for number in range(1, 21))
FAMILIES = (
    Family(PAPER, frozenset({"task_data", "samples", "max_length", "batch"}), _of("harness")),
    Family(NIAH, frozenset({"essays", "lengths", "samples", "seed", "batch"}), _of("needle")),
    Family(
        BABILONG,
        frozenset({"facts", "background", "lengths", "samples", "shots", "seed", "batch"}),
        _of("babilong"),
    ),
    Family(("position",), frozenset({"text", "data", "lengths", "samples"}), _of("position")),
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "paper": PAPER,
    "commonsense": COMMONSENSE,
    "niah": NIAH[:3],
    "babilong": BABILONG[:5],
}
_EVERY_TASKS = {"trained_length"}
_NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = {  # one option of each inner tuple
    **dict.fromkeys(NIAH[1:], (("essays",),)),
    **dict.fromkeys(BABILONG, (("facts",), ("background",))),
    "position": (("text", "data"),),
}


def parse(text: str, options: Options) -> list[Task]:
    """The tasks of a list of names, in its order, with their data at hand.

    Args:
        text: names of tasks and groups, with commas between.
        options: what the command line tells them.

    Raises:
        UserError: an unknown name, an option that none of the tasks takes, one that a task needs,
            or data that cannot be reached or read; all but the last is a ``Misfit``.
    """
    names, chosen = _chosen(text, options)
    opened = {
        task.name: task for family, own in chosen.items() for task in family.open(own, options)
    }
    return [opened[name] for name in names]


def check(text: str, options: Options) -> None:
    """Refuse names and options as ``parse`` does, without a look at any data.

    Raises:
        Misfit: an unknown name, an option that none of the tasks takes, or one that a task needs.
    """
    _chosen(text, options)


def _chosen(text: str, options: Options) -> tuple[list[str], dict[Family, list[str]]]:
    """Names of tasks, and those of each family that has some."""
    names = _names(text)
    chosen = {family: [name for name in names if name in family.names] for family in FAMILIES}
    chosen = {family: own for family, own in chosen.items() if own}
    given = [one.name for one in fields(options) if getattr(options, one.name) != one.default]
    _check_options(given, chosen)
    _check_needs(set(given), names)
    return names, chosen


def known() -> list[str]:
    """Names of all tasks and groups."""
    return [*GROUPS, *(name for family in FAMILIES for name in family.names)]


def _names(text: str) -> list[str]:
    """Names of tasks, each once."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name not in known():
            told = f"{name!r} is no task" if name else "a task without a name"
            raise Misfit(told, where="--tasks", fix=nearest(name, known()))
        names += [one for one in GROUPS.get(name, (name,)) if one not in names]
    return names


def _check_options(given: Iterable[str], chosen: Iterable[Family]) -> None:
    read = set().union(*(family.reads for family in chosen)) | _EVERY_TASKS
    for one in given:
        if one not in read:
            option = _option(one)
            readers = (family for family in FAMILIES if one in family.reads)
            names = [name for family in readers for name in family.names]
            raise Misfit(
                f"none of the tasks reads {option}",
                where=option,
                fix=f"leave it out, or add one of {', '.join(names)}" if names else "leave it out",
            )


def _check_needs(given: Set[str], names: Iterable[str]) -> None:
    for name in names:
        missing = [several for several in _NEEDS.get(name, ()) if given.isdisjoint(several)]
        if missing:
            told = " and ".join(" or ".join(map(_option, several)) for several in missing)
            raise Misfit(
                f"{name} needs {told}",
                where=f"--tasks {name}",
                fix=f"add {told} (titans eval --help), or leave {name} out",
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
