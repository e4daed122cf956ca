"""What is deleted, and when: old checkpoints and the remains of dead saves. No torch here."""

import errno
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest
from titans_pretrain.files import TEMPORARY_SUFFIX

DYING = f".removed{TEMPORARY_SUFFIX}"
REPLACED = f".replaced{TEMPORARY_SUFFIX}"
log = logging.getLogger(__name__)
Spared = Callable[[Sequence[int]], Collection[int]]


def remove_leftovers(root: Path) -> list[str]:
    """Remove what interrupted saves and prunings left in ``root``; log and return their names.

    A checkpoint that was to be replaced and has no successor gets its name back. Only who holds
    the run may do so, while it saves nothing. Another start's process that still writes there
    finds its directory gone, and can give it no name any more.
    """
    _give_back(root)
    patterns = (f".step-*{TEMPORARY_SUFFIX}", f".{layout.LATEST}.*{TEMPORARY_SUFFIX}")
    leftovers = sorted(path for pattern in patterns for path in root.glob(pattern))
    for path in leftovers:
        if path.is_dir():
            _remove(path)
        else:
            path.unlink(missing_ok=True)
        log.warning("removed the remains of an interrupted save: %s", path)
    return [path.name for path in leftovers]


def spare_none(steps: Sequence[int]) -> Collection[int]:
    """No checkpoint is wanted beside the newest."""
    return ()


def prune(
    root: Path, step: int, keep: int, keep_every: int = 0, *, spared: Spared = spare_none
) -> list[int]:
    """Delete checkpoints older than the newest ``keep`` whole ones up to ``step``.

    Checkpoints that lack files, are cut or cannot be read do not count as kept. One that cannot be
    read or deleted is logged and stays. Of the older ones that stay for good no file is looked at,
    unless ``spared`` does so.

    Args:
        root: directory of the run's checkpoints.
        step: the checkpoint just written; it stays, and so do newer ones.
        keep: how many stay, at least 1.
        keep_every: those whose step is a multiple of it stay for good; 0 none.
        spared: of the steps of the checkpoints, those that stay for now.

    Returns:
        The steps deleted.
    """
    earlier = {n: root / layout.step_name(n) for n in layout.steps(root) if n <= step}
    whole = (number for number, path in reversed(earlier.items()) if _problems(path) == [])
    oldest_kept = min([step, *itertools.islice(whole, keep)])
    wanted = spared(list(earlier))
    return [
        number
        for number, path in earlier.items()
        if number < oldest_kept
        and not (keep_every and number % keep_every == 0)
        and number not in wanted
        and _problems(path) is not None
        and _delete(path)
    ]


def _give_back(root: Path) -> None:
    """Undo replacements that ended between taking the old name away and giving the new one."""
    for path in sorted(root.glob(f".step-*{REPLACED}")):
        name = path.name.removeprefix(".").split(".")[0]
        if not (root / name).exists():
            os.rename(path, root / name)
            log.warning("%s was to be replaced, but had no successor: it is back", root / name)


def _remove(path: Path) -> None:
    """Remove a temporary directory; what a writer's open files keep alive stays for later."""
    dying = path
    if not path.name.endswith(DYING):
        dying = path.with_name(f"{path.name.removesuffix(TEMPORARY_SUFFIX)}{DYING}")
        shutil.rmtree(dying, ignore_errors=True)
        os.rename(path, dying)
    try:
        shutil.rmtree(dying)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY):
            raise
        log.warning("a process still writes to %s, which stays: %s", dying, error)


def _problems(path: Path) -> list[str] | None:
    """What is plainly wrong; None, and a warning, if that cannot be told."""
    try:
        return layout.verify(path, contents=False)
    except manifest.Unreadable as error:
        log.warning("the checkpoint %s stays, it cannot be judged: %s", path, error.what)
        return None


def _delete(path: Path) -> bool:
    """Take the name away first: a checkpoint is never seen half deleted."""
    dying = path.with_name(f".{path.name}.pruned{TEMPORARY_SUFFIX}")
    try:
        os.rename(path, dying)
        shutil.rmtree(dying)
    except OSError as error:
        log.warning("could not delete the old checkpoint %s: %s", path, error)
        return False
    return True
