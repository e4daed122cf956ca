"""Numbers of steps that no earlier start of the job has used."""

import subprocess

import pytest

from launchers import step_number


@pytest.mark.parametrize(("restarts", "used"), [(0, [2, 3]), (1, [2, 3, 4]), (3, [2]), (7, [2])])
def test_starts_in_a_row_use_different_step_numbers(monkeypatch, restarts, used):
    numbers, asked_for = iter(range(2, 20)), []

    def srun(command, **more):
        asked_for.append(next(numbers))
        return subprocess.CompletedProcess(command, 0, f"{asked_for[-1]}\n", "")

    monkeypatch.setattr(step_number.subprocess, "run", srun)
    step_number.set_apart("7", restarts)
    assert asked_for == used


def test_a_step_that_slurm_does_not_run_keeps_no_attempt_from_training(monkeypatch):
    def srun(command, **more):
        return subprocess.CompletedProcess(command, 1, "", "busy")

    monkeypatch.setattr(step_number.subprocess, "run", srun)
    step_number.set_apart("7", 1)
