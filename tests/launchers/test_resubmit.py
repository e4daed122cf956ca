"""Whose a run is, and what waits for a job that another follows."""

import pytest
from attempt_parts import allocation, attempt, slurm_job

from launchers import history, resubmit


def test_a_process_whose_job_was_given_away_is_not_current(run, known):
    history.claim(run.path, attempt())
    assert resubmit.is_current(run.path, 1, allocation()) is None
    known["7"] = slurm_job(state="RUNNING")
    assert resubmit.is_current(run.path, 1, allocation()) == known["7"]
    known["7"] = slurm_job(state="RUNNING", restarts=1)
    assert resubmit.is_current(run.path, 1, allocation()) is None
    known["7"] = slurm_job(state="PENDING")
    assert resubmit.is_current(run.path, 1, allocation()) is None
    known["7"] = slurm_job(state="RUNNING")
    history.claim(run.path, attempt(2, job="8"))
    assert resubmit.is_current(run.path, 1, allocation()) is None
    assert resubmit.is_newest(run.path, 2)
    assert not resubmit.is_newest(run.path, 1)


@pytest.mark.parametrize(
    ("dependency", "after"),
    [
        ("afterok:7(unfulfilled)", "afterok:9"),
        ("afterok:7(unfulfilled),singleton(unfulfilled)", "afterok:9,singleton"),
        ("afterok:6:7:8", "afterok:6:9:8"),
        ("afterany:7+5?afterok:17", "afterany:9+5?afterok:17"),
        ("afterok:17(unfulfilled),afterok:70(unfulfilled)", None),
        ("afterok:7_3(unfulfilled)", None),
        ("", None),
    ],
)
def test_a_dependency_names_the_new_job_instead_of_the_old(dependency, after):
    assert resubmit.moved(dependency, "7", "9") == after
