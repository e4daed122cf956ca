"""Evaluations of checkpoints while a run trains: when a job is submitted, again, or no more."""

import fcntl
import itertools
import json
from pathlib import Path

import pytest
from attempt_parts import checkpoint, made
from submit_cases import job_of, rows

from launchers import evaluation_jobs, job, stage_checks, submitted
from launchers.evaluation_jobs import EvaluationJobs
from launchers.slurm_command import SlurmUnanswered
from titans_pretrain import config as run_config
from titans_pretrain.checkpoint import evaluations
from titans_pretrain.errors import TitansError, UserError


@pytest.fixture
def config(run):
    plain = made(run.path)
    asked = {"eval": plain.pipeline.eval.model_copy(update={"every": 4, "at_once": 2})}
    told = {"pipeline": plain.pipeline.model_copy(update=asked)}
    told["train"] = plain.train.model_copy(update={"steps": 20})
    return plain.model_copy(update=told)


@pytest.fixture
def clock(monkeypatch):
    """The seconds that look over; each test moves them."""
    time = type("Clock", (), {"now": 1000.0})()
    monkeypatch.setattr(evaluation_jobs.time, "monotonic", lambda: time.now)
    return time


@pytest.fixture
def watch(config, run, slurm, clock):
    watcher = EvaluationJobs(config, run.path / "jobs" / "config.yaml", run.path, lambda: True)

    def look():
        clock.now += 61
        watcher.look()

    return look


def finish(run, step):
    identity = evaluations.identity(run.checkpoints / f"step-{step}")
    told = {"metrics": {"heldout/loss": 2.0}, "settings": {}, "results": {}}
    evaluations.write(run.path, step, identity, **told)


def stages(slurm):
    return [stage for stage, _ in slurm.submitted]


def test_each_due_checkpoint_gets_one_job(run, slurm, watch):
    watch()
    assert stages(slurm) == []
    for step in (2, 4):
        checkpoint(run, step)
    for _ in range(3):
        watch()
    assert stages(slurm) == ["eval-4"]
    assert evaluations.jobs(run.path, 4) == ["11"]
    (row,) = rows(run.path)
    assert (row["stage"], row["job"]) == ("eval-4", "11")


def test_the_job_evaluates_that_checkpoint_with_the_runs_configuration(config, run, watch):
    checkpoint(run, 4)
    watch()
    text = (run.jobs / "eval-4.sbatch").read_text()
    assert f"export CHECKPOINT={run.checkpoints}/step-4\n" in text
    assert f"set -- --config {run.jobs}/config.yaml\n" in text
    assert "#SBATCH --dependency=singleton\n" in text
    name = job.job_name(config, run.path, "eval-4")
    assert f"#SBATCH --job-name={name}\n" in text
    assert job.is_name_of(name, run.path)
    assert not job.is_name_of(name, run.path / "other")


def test_no_more_wait_at_once_than_are_kept(run, slurm, watch):
    for step in (4, 8, 12, 16):
        checkpoint(run, step)
    watch()
    assert stages(slurm) == ["eval-4", "eval-8"]
    finish(run, 4)
    watch()
    assert stages(slurm) == ["eval-4", "eval-8", "eval-12"]


def test_the_last_checkpoint_is_submitted_however_many_wait(run, slurm, watch):
    for step in (4, 8, 12, 20):
        checkpoint(run, step)
    watch()
    assert stages(slurm) == ["eval-4", "eval-8", "eval-12", "eval-20"]


def test_what_is_done_is_not_submitted_by_the_next_attempt(run, slurm, watch):
    checkpoint(run, 4)
    finish(run, 4)
    watch()
    assert stages(slurm) == []


def test_a_job_that_was_not_put_down_is_taken_for_its_own(config, run, slurm, watch):
    checkpoint(run, 4)
    slurm.known.append(job_of("7", job.job_name(config, run.path, "eval-4"), "RUNNING"))
    watch()
    assert stages(slurm) == []
    assert evaluations.jobs(run.path, 4) == ["7"]


def test_a_job_of_a_run_that_was_renamed_since_is_its_own(config, run, slurm, watch):
    renamed = config.run.model_copy(update={"name": "before"})
    before = config.model_copy(update={"run": renamed})
    checkpoint(run, 4)
    slurm.known.append(job_of("7", job.job_name(before, run.path, "eval-4"), "RUNNING"))
    slurm.known.append(job_of("8", job.job_name(before, run.path, "eval-14"), "RUNNING"))
    for _ in range(3):
        watch()
    assert evaluations.jobs(run.path, 4) == ["7"]
    assert stages(slurm) == []


def test_jobs_that_end_without_a_result_are_repeated_and_then_given_up(run, slurm, watch, capsys):
    checkpoint(run, 4)
    identity = evaluations.identity(run.checkpoints / "step-4")
    evaluations.stopped(run.path, 4, identity, "no network")
    for _ in range(60):
        watch()
        slurm.end_all()
    assert stages(slurm) == ["eval-4"] * evaluation_jobs.TRIES
    found = evaluations.of_step(run.path, 4)
    assert found.failure == "3 jobs ended without a result, the last: COMPLETED; no network"
    assert f"titans eval-checkpoint {run.checkpoints}/step-4" in capsys.readouterr().out


def test_a_job_is_repeated_after_a_while_that_grows(run, slurm, watch, clock):
    checkpoint(run, 4)
    times = []
    for _ in range(60):
        before = len(stages(slurm))
        watch()
        slurm.end_all()
        times += [clock.now] * (len(stages(slurm)) - before)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert [wait // evaluation_jobs.AGAIN_SECONDS for wait in waits] == [2, 4]


def test_jobs_that_finish_something_new_are_repeated_for_as_long(run, slurm, watch):
    identity = evaluations.identity(checkpoint(run, 4))
    place = evaluations.workplace(run.path, 4, identity, {})
    place.mkdir(parents=True)
    for _ in range(30):
        results = {str(number): {} for number in range(len(stages(slurm)))}
        evaluations.keep(place, metrics={}, settings={}, results=results)
        watch()
        slurm.end_all()
    assert len(stages(slurm)) > evaluation_jobs.TRIES
    assert not evaluations.is_settled(run.path, 4)


def test_while_another_process_evaluates_a_checkpoint_no_job_is_repeated(run, slurm, watch):
    identity = evaluations.identity(checkpoint(run, 4))
    watch()
    slurm.end_all()
    place = evaluations.workplace(run.path, 4, identity, {"asked": "by hand"})
    (place / "model").mkdir(parents=True)
    with open(place / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for _ in range(60):
            watch()
    assert stages(slurm) == ["eval-4"]
    watch()
    assert stages(slurm) == ["eval-4"] * 2
    assert (place / "model").is_dir()


def test_an_attempt_begins_by_removing_exports_nobody_needs(config, run, slurm):
    identity = evaluations.identity(checkpoint(run, 4))
    finish(run, 4)
    place = evaluations.workplace(run.path, 4, identity, {"dtype": "float32"})
    (place / "model").mkdir(parents=True)
    with EvaluationJobs(config, run.jobs / "config.yaml", run.path, lambda: True):
        pass
    assert not (place / "model").exists()


def test_a_job_that_ran_to_its_result_is_not_repeated(run, slurm, watch):
    checkpoint(run, 4)
    watch()
    slurm.end_all()
    watch()  # the result is not seen yet
    finish(run, 4)
    for _ in range(3):
        watch()
    assert stages(slurm) == ["eval-4"]


def test_a_number_that_slurm_gave_to_another_job_is_an_ended_one(run, slurm, watch):
    checkpoint(run, 4)
    watch()
    slurm.known = [job_of("11", "another", "RUNNING")]
    for _ in range(12):
        watch()
    assert stages(slurm) == ["eval-4"] * 2


def test_a_refused_job_is_tried_again_later_and_at_last_given_up(run, slurm, watch, clock, capsys):
    checkpoint(run, 4)
    slurm.refuse_stage = "eval-4"
    watch()
    clock.now -= 30
    watch()
    assert capsys.readouterr().out.count("step 4 is not submitted yet: SLURM refused: no") == 1
    for _ in range(evaluation_jobs.REFUSALS):
        clock.now += 10_000
        watch()
    assert "SLURM refused its job 5 times" in evaluations.of_step(run.path, 4).failure


def test_an_attempt_that_is_not_the_runs_any_more_submits_nothing(config, run, slurm):
    checkpoint(run, 4)
    EvaluationJobs(config, run.jobs / "config.yaml", run.path, lambda: False).look()
    assert stages(slurm) == []


@pytest.mark.parametrize("error", [SlurmUnanswered("no answer"), OSError("full"), KeyError("a")])
def test_whatever_goes_wrong_is_told_and_does_not_reach_the_training(
    config, run, slurm, monkeypatch, capsys, error
):
    def fail(*_):
        raise error

    checkpoint(run, 4)
    monkeypatch.setattr(evaluation_jobs, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(evaluation_jobs.slurm_utils, "submit", fail)
    looks = []
    with EvaluationJobs(config, run.jobs / "config.yaml", run.path, lambda: True) as watcher:
        look = watcher.look
        monkeypatch.setattr(watcher, "look", lambda: (looks.append(1), look()))
        while len(looks) < 3:
            pass
    assert capsys.readouterr().out.count("the training goes on") == 1


def test_the_checkpoint_that_an_attempt_ends_with_is_evaluated(config, run, slurm):
    with EvaluationJobs(config, run.jobs / "config.yaml", run.path, lambda: True):
        checkpoint(run, 8)
    assert stages(slurm) == ["eval-8"]


def test_without_evaluations_nothing_is_looked_at(run, slurm):
    checkpoint(run, 4)
    with EvaluationJobs(made(run.path), run.jobs / "config.yaml", run.path, lambda: True):
        pass
    assert stages(slurm) == []


def test_an_evaluation_stands_in_no_submissions_way(run, slurm, watch):
    checkpoint(run, 4)
    watch()
    assert [job.id for job in submitted.living(run.path)] == ["11"]
    assert submitted.running_on(run.path) == []


def resolved(path: Path, **asked):
    tree = json.loads(made(path).model_dump_json())
    tree["checkpoint"]["every"] = 4
    tree["pipeline"]["eval"] |= {"every": 4} | asked
    return run_config.resolve(tree, source="a test")


def test_unknown_tasks_and_nothing_held_out_are_refused_before_the_run_is_queued(tmp_path):
    with pytest.raises(UserError, match=r"pipeline\.eval\.tasks: 'piqqa' is no task") as caught:
        stage_checks.of_evaluations(resolved(tmp_path, tasks=["piqqa"]), ())
    assert "piqa" in caught.value.fix
    for options, message in (
        (["--sampels=4"], "unrecognized arguments: --sampels=4"),
        (["--paper-size=340M"], "unrecognized arguments: --paper-size=340M"),
        (["--lengths=4k"], "none of the tasks reads --lengths"),
        (["--task-data=/nowhere/data"], "/nowhere/data does not exist"),
    ):
        with pytest.raises(UserError, match=rf"pipeline\.eval\.options: {message}"):
            stage_checks.of_evaluations(resolved(tmp_path, tasks=["piqa"], options=options), ())
    config = resolved(tmp_path, tasks=["piqa"])
    manifest = Path(str(config.data.manifest))
    manifest.parent.mkdir()
    manifest.write_text("{}")
    none = config.model_copy(
        update={"data": config.data.model_copy(update={"validation_fraction": 0.0})}
    )
    stage_checks.of_evaluations(made(tmp_path), ())
    with pytest.raises(UserError, match="leaves nothing to evaluate checkpoints on"):
        stage_checks.of_evaluations(none, ())
    manifest.write_text('{"held_out": {"documents": 3}}')
    stage_checks.of_evaluations(none, ())


def test_paths_of_options_mean_the_same_on_a_node(tmp_path, monkeypatch):
    from launchers import submit

    monkeypatch.chdir(tmp_path)
    given = [
        "--text=a.txt, b.txt",
        "--samples=4",
        "--task-data=data",
        "--data=s3://a/manifest.json",
    ]
    config = submit.frozen(resolved(tmp_path, tasks=["piqa"], options=given))
    assert config.pipeline.eval.options == [
        f"--text={tmp_path}/a.txt,{tmp_path}/b.txt",
        "--samples=4",
        f"--task-data={tmp_path}/data",
        "--data=s3://a/manifest.json",
    ]


def test_initial_weights_are_looked_at_before_the_run_is_queued(tmp_path):
    config = resolved(tmp_path)
    weights = tmp_path / "weights"
    train = config.train.model_copy(update={"init_from": str(weights)})
    config = config.model_copy(update={"train": train})
    with pytest.raises(UserError, match="no such directory"):
        stage_checks.of_initial_weights(config, tmp_path / "run")
    weights.mkdir()
    settings = {**config.model, "model_type": "titans"}
    (weights / "config.json").write_text(json.dumps(settings | {"hidden_size": 8}))
    with pytest.raises(UserError, match=r"model\.hidden_size: .* is not the 8 of the initial"):
        stage_checks.of_initial_weights(config, tmp_path / "run")
    (weights / "config.json").write_text(json.dumps(settings))
    stage_checks.of_initial_weights(config, tmp_path / "run")
    (weights / "config.json").unlink()
    (tmp_path / "run" / "checkpoints" / "step-4").mkdir(parents=True)
    stage_checks.of_initial_weights(config, tmp_path / "run")  # the run goes on from there


def test_slurm_is_asked_about_the_evaluations_before_the_run_is_queued(tmp_path, slurm):
    from submit_cases import write_config

    from launchers import submit

    asked = {"eval": {"every": 2}}
    config = submit.frozen(run_config.load(write_config(tmp_path, pipeline=asked)))
    run = Path(config.run.directory)
    submit.check(config, run, [submit.pipeline.training(config, run)])
    assert slurm.tested == ["train", "eval-2"]


def test_a_bad_job_is_told_like_a_refusal(run, slurm, watch, monkeypatch, capsys):
    def bad(*_):
        raise TitansError("cannot stand in a batch script")

    monkeypatch.setattr(evaluation_jobs.jobs, "text", bad)
    checkpoint(run, 4)
    watch()
    assert "step 4 is not submitted yet: cannot stand" in capsys.readouterr().out


def test_what_no_other_job_can_mend_is_told_once_and_not_repeated(run, slurm, watch, capsys):
    why = "piqa: 64 tokens are more than the model's 63 positions; --max-length; use at most 63"
    for step in (4, 8):
        checkpoint(run, step)
        watch()
        evaluations.fail(
            run.path, step, evaluations.identity(run.checkpoints / f"step-{step}"), why
        )
        for _ in range(4):
            watch()
            slurm.end_all()
    assert stages(slurm) == ["eval-4", "eval-8"]
    assert capsys.readouterr().out.count(why) == 1


def test_what_is_given_up_is_told_once(run, slurm, watch, monkeypatch, capsys):
    checkpoint(run, 4)
    slurm.refuse_stage = "eval-4"
    monkeypatch.setattr(evaluation_jobs, "REFUSALS", 1)
    for _ in range(3):
        watch()
    told = capsys.readouterr().out
    assert told.count("step 4") == told.count("step 4 is given up") == 1
