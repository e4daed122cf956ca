"""Going back to an earlier checkpoint of the same run. No torch here."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.errors import TitansError
from titans_pretrain.files import TEMPORARY_SUFFIX, atomic_file, sync_directory


def choose(root: Path, done: int, back: int) -> Path:
    """The newest good checkpoint at least ``back`` steps before the state after ``done`` steps.

    Raises:
        TitansError: there is none.
    """
    for step in reversed(layout.steps(root)):
        path = root / layout.step_name(step)
        if step <= done - back and not layout.verify(path):
            return path
    raise TitansError(
        f"no good checkpoint at least {back} steps before step {done} to roll back to",
        where=str(root),
        fix="lower guard.rollback_steps, or keep more: checkpoint.keep, checkpoint.every; the "
        "checkpoints that are there are good to resume from",
    )


def remove_later(path: Path, fence: Callable[[], None]) -> list[str]:
    """Remove the checkpoints after ``path``, newest first, so that no resume takes one up again.

    Args:
        path: the checkpoint that is gone back to.
        fence: raises where the run is another start's; asked before each change.

    Returns:
        Their names.
    """
    root, step = path.parent, int(path.name.removeprefix("step-"))
    later = [number for number in reversed(layout.steps(root)) if number > step]
    if not later:
        return []
    fence()
    with atomic_file(root / layout.LATEST, "w") as handle:
        handle.write(f"{path.name}\n")
    for number in later:
        name = layout.step_name(number)
        dying = root / f".{name}.undone{TEMPORARY_SUFFIX}"
        fence()
        os.rename(root / name, dying)
        sync_directory(root)
        fence()
        shutil.rmtree(dying)
    return [layout.step_name(number) for number in later]
