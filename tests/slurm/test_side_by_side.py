"""Many jobs on one host at once, and several jobs of one run: none disturbs another."""

import sys
from pathlib import Path

import pytest
from attempt_cases import StubRun
from disturbed_run import Run
from slurm_cluster import Cluster, until
from tiny import prepare

from launchers import submitted
from titans_pretrain import cli

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "launchers" / "pretrain.sbatch"
SECONDS = 240


def beside(slurm: Cluster, run: Run, name: str) -> str:
    """A job of the run by hand, under a name of its own."""
    variables = f"CONFIG={run.path / 'jobs' / 'config.yaml'},TITANS_PYTHON={sys.executable}"
    return slurm.submit(
        f"--job-name={name}", "--nodes=1", "--ntasks-per-node=2", "-o", run.path / f"{name}.log",
        f"--export=ALL,{variables}", TEMPLATE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_several_jobs_of_a_run_one_trains_and_the_others_wait_or_refuse(slurm, tmp_path):
    run = Run(slurm, tmp_path / "run", prepare(tmp_path), steps=12, every=4, ranks_per_node=2)
    run.pace(1)
    run.submit()
    until(lambda: run.attempts, SECONDS, "the first attempt")
    before = slurm.jobs()
    assert cli.main(["submit", str(run.config)]) == 2
    assert slurm.jobs() == before
    twin = beside(slurm, run, "twin")
    assert cli.main(["submit", str(run.config), "--resume"]) == 0
    first, second = (row.job for row in submitted.read(run.path))
    assert slurm.wait(twin) == {"FAILED"}
    told = (run.path / "twin.log").read_text()
    assert f"attempt 1 of this run is at work: job {first}" in told
    assert slurm.states(second) == {"PENDING"}
    run.pace(0)
    run.finish(SECONDS)
    assert slurm.wait(second) == {"COMPLETED"}
    assert [attempt.job for attempt in run.attempts] == [first]
    assert run.steps_done == list(range(1, 13))
    assert run.tensors()


def test_of_two_jobs_of_a_run_that_begin_at_once_one_refuses(slurm, tmp_path):
    run = StubRun(tmp_path / "run")
    twins = [slurm.submit(f"--job-name={name}", run.script) for name in ("left", "right")]
    states = [slurm.wait(job) for job in twins]
    assert sorted(states, key=str) == [{"COMPLETED"}, {"FAILED"}]
    assert run.verdicts == ["done"]
    assert [attempt.job for attempt in run.attempts] == [twins[states.index({"COMPLETED"})]]
    assert run.steps == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_jobs_on_one_host_all_train_and_none_hears_another(new_cluster, tmp_path):
    cluster, manifest = new_cluster(nodes=1), prepare(tmp_path)
    settings = {"steps": 20, "every": 10, "hang_seconds": 0, "ranks_per_node": 2}
    runs = [Run(cluster, tmp_path / f"run-{n}", manifest, **settings) for n in range(8)]
    for run in runs:
        run.pace(3600)  # the first step of each lasts until all have begun it
        run.submit()
    until(lambda: all(run.step for run in runs), 2 * SECONDS, "all to train")
    for run in runs:
        run.pace(0)
    for run in runs:
        run.finish(SECONDS)
        assert len(run.attempts) == 1
        assert run.rows() == runs[0].rows()
    assert runs[0].steps_done == list(range(1, 21))
