"""``titans status``, ``logs`` and ``stop`` on a real SLURM."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attempt_cases import HERE, ROOT, StubRun
from slurm_cluster import Cluster
from slurm_commands import until

from launchers import run_state, slurm_utils, submitted

NAME = "titans-follow-01234567"
SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --output={run}/logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --time=9
cd {run}
echo "begin ${{SLURM_RESTART_COUNT:-0}}"
until [ -e stop ]; do sleep 0.1; done
rm stop
echo "end"
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of a run whose job waits for the file ``stop`` and takes it away."""
    for name in ("jobs", "logs", "checkpoints"):
        (tmp_path / "run" / name).mkdir(parents=True)
    submitted.config_of(tmp_path / "run").write_text("train: {steps: 9}\n")
    return tmp_path / "run"


def queue(slurm: Cluster, run: Path, stage: str = "train", *options: str, name: str = NAME) -> str:
    script = submitted.script_of(run, stage)
    script.write_text(SCRIPT.format(name=name, run=run))
    job = slurm.submit(*options, script)
    submitted.record(run, stage, job, [], script)
    return job


def titans(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "titans_pretrain.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(*words: object) -> str:
    process = titans(*words)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def stages(run: Path) -> dict[str, str]:
    told = json.loads(said("status", "--json", run))
    return {entry["stage"]: entry["state"] for entry in told["jobs"]}


def test_a_log_is_followed_over_a_requeue_until_the_run_is_stopped(slurm, run, tmp_path):
    job = queue(slurm, run)
    slurm.wait_running(job)
    until(lambda: "begin 0" in slurm.log(job))
    seen = tmp_path / "seen"
    command = [sys.executable, "-m", "titans_pretrain.cli", "logs", str(run), "--follow"]
    with open(seen, "w") as out:
        following = subprocess.Popen(command, stdout=out)
    until(lambda: "begin 0" in seen.read_text(), 60)
    slurm.run("scontrol", "requeue", job)
    until(lambda: "begin 1" in seen.read_text(), 180)
    assert following.poll() is None
    out = said("stop", run, "--wait")
    assert f"asked job {job} to stop" in out
    assert "ended: " in out
    assert following.wait(60) == 0
    assert seen.read_text().endswith("end\n")
    assert stages(run) == {"train": "COMPLETED"}


def test_the_status_tells_what_runs_and_what_waits_and_stop_ends_both(slurm, run):
    job = queue(slurm, run)
    slurm.wait_running(job)
    after = queue(slurm, run, "export", f"--dependency=afterok:{job}", name=f"{NAME}-export")
    foreign = slurm.submit("--job-name=foreign", "--hold", "--wrap", "true")
    told = json.loads(said("status", "--json", run))
    assert told["state"] == "starting"
    assert 0 < told["seconds_to_limit"] <= 540
    assert stages(run) == {"train": "RUNNING", "export": "PENDING (Dependency)"}
    out = said("stop", run, "--now", "--wait")
    assert f"cancelled job {after} (export), which waited" in out
    assert slurm.states(after) == {"CANCELLED"}
    assert slurm.states(job) in ({"CANCELLED"}, {"COMPLETED"})  # it may see the file first
    assert slurm.states(foreign) == {"PENDING"}
    assert said("stop", run).startswith(f"nobody runs {run}")


def test_a_number_that_is_another_jobs_now_is_left_alone(slurm, run):
    other = slurm.submit("--job-name=foreign", "--hold", "--wrap", "true")
    script = submitted.script_of(run, "train")
    script.write_text(SCRIPT.format(name=NAME, run=run))
    submitted.record(run, "train", other, [], script)
    assert said("stop", run, "--now").startswith(f"nobody runs {run}")
    assert slurm.states(other) == {"PENDING"}


def by_hand(slurm: Cluster, run: StubRun, *options: str) -> str:
    """Queues a run with the ready file, as its head shows."""
    python = run.path.parent / "python"
    attempt = (
        f'exec {sys.executable} -P {HERE}/quick_attempt.py "$5"'  # -P -m titans… attempt CONFIG
    )
    python.write_text(f"#!/bin/sh\n{attempt}\n")
    python.chmod(0o755)
    given = {"CONFIG": run.config, "TITANS_PYTHON": python, "PYTHONPATH": ROOT}
    variables = ",".join(f"{name}={value}" for name, value in given.items())
    shape = ["--nodes=2", "--ntasks-per-node=2", "--time=5", f"--chdir={run.path.parent}"]
    ready = ROOT / "launchers" / "pretrain.sbatch"
    return slurm.submit(*shape, f"--export=ALL,{variables}", *options, ready)


@pytest.mark.parametrize("name", ["titans-pretrain", "anything"])
def test_a_job_that_was_queued_by_hand_is_shown_and_stopped(slurm, tmp_path, name):
    run = StubRun(tmp_path / "run", plays=["slow"], steps=10_000, every=0)
    job = by_hand(slurm, run, f"--job-name={name}")
    until(lambda: (run.path / "metrics.jsonl").exists(), 60, "a step")
    assert stages(run.path) == {"train": "RUNNING"}
    printed = said("logs", run.path)
    assert printed.startswith(f"==> {tmp_path}/slurm-{name}-{job}.log <==\n")
    assert "attempt 1: " in printed
    assert f"asked job {job} to stop" in said("stop", run.path, "--wait")
    assert run.verdicts == ["stopped"]
    assert run.attempts[0].asked == "user"
    slurm.wait(job)


@pytest.mark.slow
def test_a_job_that_has_begun_is_not_cancelled_as_one_that_waits(slurm):
    running = slurm.submit("-o", "/dev/null", "--wrap", "sleep 300")
    slurm.wait_running(running)
    waiting = slurm.submit("--hold", "--wrap", "true")
    for job in (running, waiting, waiting):
        slurm_utils.cancel(job, waiting=True)
    assert (slurm.states(running), slurm.states(waiting)) == ({"RUNNING"}, {"CANCELLED"})


@pytest.mark.slow
def test_a_controller_that_is_down_is_told_and_nothing_waits_for_it(slurm, run):
    job = queue(slurm, run)
    slurm.wait_running(job)
    slurm.controller_crash()
    try:
        begun = time.monotonic()
        assert stages(run) == {"train": "-"}
        assert time.monotonic() - begun < 60
        process = titans("stop", run)
        assert "SLURM does not answer" in process.communicate(timeout=120)[0]
        assert process.returncode == 1
    finally:
        slurm.controller_boot()
    assert run_state.read([run])[0].word == "starting"
