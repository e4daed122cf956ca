"""Signals of SLURM that reach a job's Python, early ones too."""

import os
import subprocess
import sys

import pytest

from launchers import job_text


@pytest.mark.parametrize(("body", "variable"), [("pretrain", "CONFIG"), ("sweep", "SWEEP")])
def test_a_signal_before_python_hears_it_does_not_end_the_job(tmp_path, body, variable):
    python = tmp_path / "python"
    code = (
        "import os, signal; from launchers.asked import AskedToStop; me = os.getpid(); "
        "os.kill(me, signal.SIGUSR1); asked = AskedToStop(); os.kill(me, signal.SIGUSR2); "
        "os.kill(me, signal.SIGHUP); "
        "print(asked.names)"
    )
    python.write_text(
        f"#!/bin/sh\nkill -USR1 $$\nkill -HUP $$\nexec {sys.executable} -c '{code}'\n"
    )
    python.chmod(0o755)
    given = {"TITANS_PYTHON": str(python), variable: "x", "SLURM_ARRAY_TASK_ID": "0"}
    given |= {"MODULES": "slow", "BASH_FUNC_module%%": "() { kill -USR1 $$; kill -USR2 $$; }"}
    done = subprocess.run(
        ["bash", job_text.READY / f"{body}.sbatch"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(job_text.READY.parent)} | given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "['SIGUSR2', 'SIGHUP']\n"), done.stderr
