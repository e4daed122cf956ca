"""The time limit of a job, moved or forgotten, and its preemption."""

from dataclasses import replace

import pytest
from attempt_parts import slurm_job

from launchers import job_end, slurm_command, slurm_utils
from launchers.job_end import JobEnd
from launchers.slurm_utils import SlurmError


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(job_end.time, "time", lambda: now[0])
    return now


def test_a_time_limit_that_is_moved_is_seen(known, clock):
    known["7"] = slurm_job(state="RUNNING", seconds_left=100, end_time=1.0)
    end = JobEnd("7")
    assert (end.limit(), end.is_within(99)) == (1100.0, False)
    clock[0] += 90
    known["7"] = replace(known["7"], seconds_left=3610)
    assert not end.is_within(15)
    assert end.limit() == 4700.0
    known["7"] = replace(known["7"], seconds_left=5)
    assert end.limit() == 1095.0
    assert end.is_within(15)
    known["7"] = replace(known["7"], seconds_left=None)
    assert end.limit() is None
    assert not end.is_within(15)


def test_a_time_limit_is_not_moved_by_an_end_nor_forgotten_in_silence(known, clock, monkeypatch):
    known["7"] = slurm_job(state="RUNNING", seconds_left=100)
    end = JobEnd("7")
    known["7"] = slurm_job(state="COMPLETING", seconds_left=0, end_time=1000.0)
    assert end.limit() == 1100.0
    known["7"] = slurm_job(state="RUNNING", seconds_left=None)  # what squeue says past the limit
    clock[0] += 101
    assert end.limit() == 1100.0
    assert end.is_within(0)

    def silent(job):
        raise SlurmError("no answer")

    monkeypatch.setattr(slurm_utils, "job", silent)
    assert end.limit() == 1100.0
    with pytest.raises(SlurmError):
        JobEnd("7")


@pytest.mark.parametrize(
    ("told", "preempted"),
    [("1000 1200", True), ("1000 N/A", False), ("1000 900", False), ("N/A N/A", False)],
)
def test_slurm_says_whether_this_start_is_preempted(known, monkeypatch, told, preempted):
    monkeypatch.setattr(slurm_command, "call", lambda query: told)
    assert JobEnd("7").is_preempted() is preempted
