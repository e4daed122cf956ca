"""``titans train`` as a rank that torchrun or srun started."""

import os
import subprocess
import sys

from run_command import end


def test_torchrun_s_ranks_are_taken(make_run):
    run = make_run(train={"steps": 2, "validation_every": 0})
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["-m", "titans_pretrain.cli", "train", str(run.file)]
    done = subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks = tensor 1 x data 2 x sequence 1" in done.stdout
    assert run.steps_saved() == [2]


def test_srun_s_ranks_are_taken_and_ranks_that_differ_are_refused(make_run, tmp_path):
    run = make_run(train={"steps": 2, "validation_every": 0})
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    (tmp_path / "scontrol").chmod(0o755)
    step = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        run.start(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)
    ]
    outcomes = [end(task) for task in tasks]
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "2 ranks" in outcomes[0][1]
    assert run.steps_saved() == [2]
    code, _, complaints = run.train("--ranks", "4", **step, SLURM_PROCID="0", SLURM_LOCALID="0")
    assert code == 2
    assert complaints.startswith("error: --ranks 4 given, but torchrun or srun started 2")
