"""Evaluations of checkpoints on a real cluster, while stub ranks train and are interrupted."""

import json

from attempt_cases import StubRun
from slurm_cluster import until

from launchers import submitted
from launchers.job import is_name_of
from titans_pretrain.checkpoint import evaluations

EVERY = {"eval": {"every": 5}}


def evaluated(run):
    return {one.step for one in evaluations.read(run.path) if one.metrics}


def test_each_due_checkpoint_is_evaluated_once_over_all_attempts(slurm, tmp_path):
    plays = ["crash once evaluated"]
    run = StubRun(tmp_path / "run", plays=plays, steps=12, nodes=1, pipeline=EVERY)
    (run.path / "evaluation-plays.json").write_text(json.dumps({"5": "crash once"}))
    job = slurm.submit(run.script)
    assert slurm.wait(job) == {"COMPLETED"}
    assert run.verdicts == ["failed", "done"]
    all_steps = [*range(1, 8), *range(6, 13)]  # the stub's rows are not cut at the resume
    assert run.steps == all_steps
    until(lambda: evaluated(run) == {5, 10}, 60, "the evaluation of step 10")
    assert (run.path / "evaluated").read_text() == "5\n5\n10\n"
    rows = submitted.read(run.path)
    assert [row.stage for row in rows] == ["eval-5", "eval-5", "eval-10"]
    assert f"job {rows[0].job} of step 5 ended without a result" in run.log
    names = {evaluations.of_step(run.path, step).settings["job"] for step in (5, 10)}
    assert all(is_name_of(name, run.path) for name in names)
    assert len(names) == 2
