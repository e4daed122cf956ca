import pytest

from data_prep.array_task import choose
from titans_pretrain.errors import UserError


def array(task, *, first, last, count=None, step=1):
    """The variables that SLURM sets in a job of an array."""
    numbers = {"ID": task, "MIN": first, "MAX": last, "STEP": step}
    numbers["COUNT"] = count or (last - first) // step + 1
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in numbers.items()}


def pick(environment=None, *, task=None, tasks=None, frozen=None):
    return choose(environment or {}, task=task, tasks=tasks, frozen=frozen)


def test_what_is_given_goes_first():
    environment = array(5, first=0, last=7)
    assert pick(environment, task=2, tasks=3) == (2, 3)
    assert pick(environment, task=2, frozen=8) == (2, 8)


def test_without_an_array_a_plan_of_one_task_is_done():
    assert pick(frozen=1) == (0, 1)
    assert pick() == (0, 1)


@pytest.mark.parametrize("given", [{"frozen": 3}, {"tasks": 3}])
def test_without_an_array_a_plan_of_more_tasks_needs_to_know_which(given):
    with pytest.raises(UserError, match=r"the plan has 3 tasks; which one\?") as caught:
        pick(**given)
    assert "sbatch --array=0-2" in caught.value.fix


def test_of_a_frozen_plan_the_id_is_the_task():
    assert pick(array(7, first=0, last=7), frozen=8) == (7, 8)
    assert pick(array(7, first=3, last=7, count=2), frozen=8) == (7, 8)
    assert pick(array(3, first=3, last=3), frozen=8) == (3, 8)


def test_the_ids_of_a_frozen_plan_begin_at_0():
    for task in (1, 8):
        with pytest.raises(UserError, match="ids go to 8, the plan's tasks from 0 to 7") as caught:
            pick(array(task, first=1, last=8), frozen=8)
        assert caught.value.fix == "use --array=0-7"


def test_the_jobs_of_an_array_without_a_plan_are_its_tasks():
    assert pick(array(0, first=0, last=7)) == (0, 8)
    assert pick(array(7, first=0, last=7)) == (7, 8)
    assert pick(array(4, first=0, last=7), tasks=8) == (4, 8)


def test_a_part_of_an_array_submitted_again_is_the_same_tasks():
    assert pick(array(7, first=3, last=7, count=2), frozen=8) == (7, 8)
    assert pick(array(7, first=3, last=7, count=2), tasks=8) == (7, 8)


@pytest.mark.parametrize(
    "ids",
    [
        {"first": 1, "last": 8},
        {"first": 0, "last": 8, "step": 2},
        {"first": 0, "last": 7, "count": 2},
    ],
)
def test_an_array_without_a_plan_has_every_id_from_0(ids):
    with pytest.raises(UserError, match="ids are not every number from 0") as caught:
        pick(array(ids["last"], **ids))
    count = array(0, **ids)["SLURM_ARRAY_TASK_COUNT"]
    assert caught.value.fix == f"use --array=0-{int(count) - 1}, or run `titans data plan` first"


def test_an_array_of_another_size_than_the_tasks_is_refused():
    with pytest.raises(UserError, match="ids go to 9, the plan's tasks from 0 to 7"):
        pick(array(3, first=0, last=9), tasks=8)


@pytest.mark.parametrize("missing", ["COUNT", "MIN", "MAX"])
def test_variables_that_are_missing_or_no_numbers_are_refused(missing):
    environment = array(3, first=0, last=7)
    environment[f"SLURM_ARRAY_TASK_{missing}"] = "many"
    with pytest.raises(UserError, match=f"SLURM_ARRAY_TASK_{missing} is 'many'"):
        pick(environment, frozen=8)
    del environment[f"SLURM_ARRAY_TASK_{missing}"]
    with pytest.raises(UserError, match=f"SLURM_ARRAY_TASK_{missing} is ''"):
        pick(environment, frozen=8)


@pytest.mark.parametrize("given", [{"frozen": 3}, {"tasks": 3}])
def test_a_task_beyond_the_last_is_refused(given):
    with pytest.raises(UserError, match="task 3 of 3"):
        pick(task=3, **given)
