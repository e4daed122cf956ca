"""SLURM signals every process of a step, wandb's service among them; the run outlives it."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from run_command import end

pytest.importorskip("wandb")


def descendants(pid):
    """A process's children and theirs: number -> program."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                found[child] = Path(f"/proc/{child}/exe").readlink().name
                found |= descendants(child)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_end_of_wandb_s_service_is_told_once_and_harms_no_run(make_run, number):
    run = make_run(
        train={"steps": 10_000, "validation_every": 0},
        checkpoint={"every": 0},
        run={"wandb_project": "p"},
    )
    process = run.start("--ranks", "2", WANDB_MODE="offline")
    run.wait_for_step(2, process)
    services = [pid for pid, name in descendants(process.pid).items() if "wandb" in name]
    assert services
    for pid in services:
        os.kill(pid, number)
    run.wait_for_step(run.rows()[-1]["step"] + 5, process)
    began = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    code, out, complaints = end(process)
    assert time.monotonic() - began < 60
    assert code == 75
    assert complaints.startswith("error: stopped by SIGUSR1 on rank 0 after step ")
    assert run.steps_saved() == [run.rows()[-1]["step"]]
    assert out.count("wandb could not") <= 1
