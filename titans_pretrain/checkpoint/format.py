"""Names, verification and listing of checkpoints on disk. No torch here.

A checkpoint is a directory ``step-N``: ``rank-R.safetensors`` (what rank R held), ``tensors.json``
(which box of which tensor lies where), ``state.json``, plain files, and ``manifest.json``.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import TitansError, UserError

FORMAT = "titans-checkpoint/1"
STATE = "state.json"
TENSORS = "tensors.json"
LATEST = "latest"
CHOOSE = "titans checkpoint verify RUN tells which checkpoints are good"
RESERVED = frozenset({STATE, TENSORS, manifest.NAME})
log = logging.getLogger(__name__)
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")


def step_name(step: int) -> str:
    """The directory name of the state after ``step`` optimizer steps."""
    return f"step-{step}"


def steps(root: Path) -> list[int]:
    """Steps that have a directory in ``root``, whatever its condition, ascending."""
    if not root.is_dir():
        return []
    matches = (_STEP.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def verify(path: Path, *, contents: bool = True) -> list[str]:
    """What is wrong with the checkpoint ``path``; empty if it is good.

    Args:
        path: a ``step-N`` directory.
        contents: compare every file's sha256 and look into the index; else only presence and sizes.

    Raises:
        Unreadable: it cannot be told, as a file cannot be read now.
    """
    try:
        facts = manifest.read(path)
    except manifest.Unreadable:
        raise
    except TitansError as error:
        return [error.what]
    if facts.get("format") != FORMAT:
        return [f"format is {facts.get('format')!r} instead of {FORMAT!r}"]
    match = _STEP.fullmatch(path.name)
    if match and int(match[1]) != facts.get("step"):
        return [f"{manifest.NAME} is that of step {facts.get('step')}"]
    problems = manifest.problems(path, contents=contents)
    if contents and not problems:
        try:
            read_index(path)
        except manifest.Unreadable:
            raise
        except TitansError as error:
            return [error.what]
    return problems


def read_index(path: Path) -> dict[str, Any]:
    """The JSON index of a checkpoint's boxes; it names only files that the manifest covers.

    Raises:
        TitansError: it is missing, damaged, of another format, or leads out of the checkpoint.
        Unreadable: it cannot be read now.
    """
    covered = {entry["name"] for entry in manifest.read(path)["files"]}
    place = path / TENSORS
    try:
        index: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        problem = _index_problem(index, covered)
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        raise manifest.unreadable(place, error) from None
    except (ValueError, RecursionError) as error:
        problem = f"cannot be read: {error}"
    except (AttributeError, KeyError, TypeError):
        problem = "is no index"
    if problem:
        raise TitansError(
            f"{TENSORS} {problem}",
            where=str(place),
            fix=CHOOSE,
        )
    return index


def _index_problem(index: dict[str, Any], covered: set[str]) -> str:
    """What is wrong with the index; KeyError and the like if it is none."""
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        return f"is not of format {FORMAT!r}"
    files = index["files"]
    if outside := [name for name in files if not manifest.is_plain(name) or name not in covered]:
        return f"names a file that {manifest.NAME} does not cover: {outside[0]!r}"
    for name, entry in index["tensors"].items():
        numbers = [number for box in entry["boxes"] for number in box] + entry["shape"]
        if any(type(number) is not int or number < 0 for number in numbers):
            return f"has a number that is none in {name}"
        for file, *numbers in entry["boxes"]:
            if file >= len(files) or len(numbers) != 2 * len(entry["shape"]):
                return f"has a box that is none in {name}"
    return ""


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of ``root`` that verifies, whatever ``latest`` says.

    Reads every byte of it; in a distributed run one rank asks and tells the others.

    Returns:
        The checkpoint, or None if there is none; and a sentence about each newer one skipped.

    Raises:
        Unreadable: a newer one cannot be read now; going back might lose a good one's work.
    """
    skipped: list[str] = []
    for step in reversed(steps(root)):
        path = root / step_name(step)
        try:
            problems = verify(path)
        except manifest.Unreadable as error:
            raise _newer_unreadable(path, error) from None
        if not problems:
            return path, skipped
        skipped.append(f"{path} is damaged and was skipped: {'; '.join(problems)}")
    return None, skipped


def _newer_unreadable(path: Path, error: manifest.Unreadable) -> manifest.Unreadable:
    return manifest.Unreadable(
        f"the newest checkpoint cannot be judged: {error.what}",
        where=error.where,
        fix=f"mend that (permissions, file system); or move {path} away to go on from an older one",
    )


@dataclass(frozen=True)
class Summary:
    """One line of a listing.

    Attributes:
        step: optimizer steps done.
        path: its directory.
        bytes: size of all its files.
        tensors: number of logical tensors.
        problem: what is plainly wrong (files missing, cut or unreadable); empty if nothing.
        latest: whether ``latest`` names it.
    """

    step: int
    path: Path
    bytes: int
    tensors: int
    problem: str
    latest: bool


def summaries(root: Path) -> list[Summary]:
    """All checkpoints of ``root``, oldest first; sizes are checked, contents are not read."""
    try:
        latest = (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        latest = ""
    return [_summary(root, step, latest) for step in steps(root)]


def resolve(path: Path) -> Path:
    """The good checkpoint that ``path`` means: itself, or the newest of a run's directory.

    Damaged newer ones that are passed over are warned about.

    Raises:
        UserError: there is no such directory or no checkpoint in it.
        TitansError: what is there is damaged.
        Unreadable: what is there, or a newer one, cannot be read now.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is no directory", where=str(path), fix="give RUN or RUN/checkpoints/step-N"
        )
    if _STEP.fullmatch(path.resolve().name):
        problems = verify(path)
        if problems:
            raise TitansError(
                f"the checkpoint is damaged: {'; '.join(problems)}",
                where=str(path),
                fix="take another step: titans checkpoint verify RUN tells which are good",
            )
        return path
    root = checkpoints_of(path)
    found, skipped = newest_good(root)
    if found is None and skipped:
        raise TitansError(
            f"no good checkpoint: {'; '.join(skipped)}", where=str(root), fix="train again"
        )
    if found is None:
        raise UserError(
            f"{path} holds no checkpoint", where=str(root), fix="give RUN or RUN/checkpoints/step-N"
        )
    for sentence in skipped:
        log.warning("%s", sentence)
    return found


def checkpoints_of(run: Path) -> Path:
    """Where a run's checkpoints lie; ``run`` itself if it holds them directly."""
    return run if steps(run) else run / "checkpoints"


def read_state(path: Path) -> dict[str, Any]:
    """What ``save`` was given as ``state``.

    Raises:
        TitansError: it is missing or damaged.
        Unreadable: it cannot be read now.
    """
    place = path / STATE
    try:
        state: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TitansError(f"{STATE} is missing", where=str(place), fix=CHOOSE) from None
    except OSError as error:
        raise manifest.unreadable(place, error) from None
    except (ValueError, RecursionError) as error:
        raise TitansError(
            f"{STATE} cannot be read: {error}", where=str(place), fix=CHOOSE
        ) from None
    return state


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """``state`` as JSON that reads back equal.

    Raises:
        TypeError: a value that JSON would change, such as a tuple or a key that is no string.
    """
    _check_json(state, "state")
    return (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: key {key!r} is no string")
            _check_json(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_json(inner, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{where}: a {type(value).__name__} does not read back from JSON unchanged")


def _summary(root: Path, step: int, latest: str) -> Summary:
    path = root / step_name(step)
    facts: dict[str, Any] = {"files": [], "tensors": {}}
    try:
        problems = verify(path, contents=False)
        facts = manifest.read(path)
    except manifest.Unreadable as error:
        problems = [error.what]
    except TitansError:
        pass
    return Summary(
        step=step,
        path=path,
        bytes=sum(entry["bytes"] for entry in facts["files"]),
        tensors=len(facts.get("tensors", {})),
        problem="; ".join(problems),
        latest=latest == path.name,
    )
