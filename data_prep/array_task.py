"""Which task an array job of SLURM does."""

import re
from collections.abc import Mapping

from titans_pretrain.errors import UserError

VARIABLES = ("ID", "COUNT", "MIN", "MAX")


def choose(
    environment: Mapping[str, str],
    *,
    task: int | None,
    tasks: int | None,
    frozen: int | None,
) -> tuple[int, int]:
    """The task to do and the number of tasks.

    ``--task`` and ``--tasks`` go first. Without them an array job's id is the task. While the plan
    is still to be made by the array's own jobs, the array's size is the number of tasks, and its
    ids are all of them: so a part of it, submitted again, is the same tasks.

    Args:
        environment: where the SLURM_ARRAY_TASK variables are, if there are any.
        task: as given with ``--task``.
        tasks: as given with ``--tasks``.
        frozen: tasks of the plan, None without one.

    Raises:
        UserError: an array that cannot be what is meant, or no way to tell which task.
    """
    given = tasks or frozen
    if task is None and "SLURM_ARRAY_TASK_ID" in environment:
        task, given = _of_array(_numbers(environment), given)
    if task is None:
        if (given or 1) > 1:
            raise UserError(
                f"the plan has {given} tasks; which one?",
                where="--task",
                fix=f"give --task, or submit an array job: sbatch --array=0-{(given or 1) - 1}",
            )
        task = 0
    given = given or 1
    if task >= given:
        raise UserError(
            f"task {task} of {given}",
            where="--task",
            fix=f"use 0 to {given - 1}" + ("" if frozen else ", or more --tasks"),
        )
    return task, given


def _numbers(environment: Mapping[str, str]) -> dict[str, int]:
    """The array's variables; SLURM sets all of them."""
    found = {}
    for name in VARIABLES:
        value = environment.get(f"SLURM_ARRAY_TASK_{name}", "")
        if not re.fullmatch(r"\d+", value):
            raise UserError(
                f"SLURM_ARRAY_TASK_{name} is {value!r}, no number",
                where="environment",
                fix="give --task and --tasks",
            )
        found[name] = int(value)
    return found


def _of_array(array: Mapping[str, int], tasks: int | None) -> tuple[int, int]:
    count = array["COUNT"]
    if tasks is None and (array["MIN"], array["MAX"]) != (0, count - 1):
        raise UserError(
            "the array's ids are not every number from 0, so they cannot be a new plan's tasks",
            where="--array",
            fix=f"use --array=0-{count - 1}, or run `titans data plan` first",
        )
    tasks = tasks or count
    if array["MAX"] >= tasks:
        raise UserError(
            f"the array's ids go to {array['MAX']}, the plan's tasks from 0 to {tasks - 1}",
            where="--array",
            fix=f"use --array=0-{tasks - 1}",
        )
    return array["ID"], tasks
