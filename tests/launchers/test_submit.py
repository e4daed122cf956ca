"""``titans submit`` of one run: what it prints, refuses, writes and queues."""

import hashlib
import os
import subprocess
import sys

import pytest
import yaml
from submit_cases import job_of, rows, write_checkpoint, write_config

from launchers import submit, submitted
from titans_pretrain import cli
from titans_pretrain.errors import UserError
from titans_pretrain.files import write_json


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def _titans(*words):
    return cli.main(["submit", *map(str, words)])


def test_a_dry_run_prints_the_job_file_and_does_nothing(tmp_path, run):
    code = "import sys; from titans_pretrain import cli; sys.exit(cli.main(sys.argv[1:]))"
    bare = os.environ | {"PATH": str(tmp_path)}
    command = [sys.executable, "-c", code, "submit", str(write_config(tmp_path)), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=bare, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --job-name=titans-run-" in done.stdout
    assert not run.exists()


def test_without_slurm_a_submission_is_refused(tmp_path, run, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _titans(write_config(tmp_path)) == 2
    assert "there is no sbatch on this host" in capsys.readouterr().err
    assert not run.exists()


def test_a_submission_queues_the_file_it_prints_and_tells_how_to_follow_it(
    tmp_path, run, slurm, capsys
):
    assert _titans(write_config(tmp_path), "job.nodes=2") == 0
    script = run / "jobs" / "train.sbatch"
    told = capsys.readouterr().out
    assert told.startswith(script.read_text())
    assert "train: job 11\n" in told
    for verb in ("status", "logs", "stop"):
        assert f"titans {verb} {run}\n" in told
    assert slurm.tested == ["train"]
    assert slurm.submitted == [("train", [])]
    assert "#SBATCH --dependency=singleton" in script.read_text()
    (row,) = rows(run)
    assert (row["stage"], row["job"], row["depends"], row["script"]) == (
        "train",
        "11",
        [],
        str(script),
    )
    frozen = yaml.safe_load((run / "jobs" / "config.yaml").read_text())
    assert frozen["job"]["nodes"] == 2
    assert not list(run.rglob("*.tmp"))


def test_the_frozen_configuration_means_the_same_from_any_directory(tmp_path, monkeypatch, slurm):
    file = write_config(tmp_path, run={"directory": "there/run"})
    monkeypatch.chdir(tmp_path)
    assert _titans(file) == 0
    frozen = yaml.safe_load((tmp_path / "there/run/jobs/config.yaml").read_text())
    assert frozen["run"]["directory"] == str(tmp_path / "there/run")


def test_it_waits_for_the_jobs_named(tmp_path, run, slurm):
    slurm.known.append(job_of("7", "other", "RUNNING"))
    assert _titans(write_config(tmp_path), "--after", "7") == 0
    (asked,) = slurm.submitted
    assert asked == ("train", ["--dependency=afterok:7,singleton"])
    assert rows(run)[0]["depends"] == ["7"]


@pytest.mark.parametrize("states", [["FAILED"], ["COMPLETED", "TIMEOUT"], ["RUNNING", "CANCELLED"]])
def test_it_does_not_wait_for_a_job_that_ended_badly(states, tmp_path, slurm, run):
    slurm.known = [job_of(f"7_{element}", "other", state) for element, state in enumerate(states)]
    with pytest.raises(UserError, match=f"has ended as {states[-1]}"):
        submit.submit(str(write_config(tmp_path)), after=["7"])
    assert not slurm.submitted
    assert not run.exists()


def test_it_does_not_wait_for_a_job_that_ended_well(tmp_path, slurm, run, capsys):
    slurm.known = [job_of("7", "other", "COMPLETED"), job_of("8", "other", "RUNNING")]
    assert _titans(write_config(tmp_path), "--after", "7", "8") == 0
    assert slurm.submitted == [("train", ["--dependency=afterok:8,singleton"])]
    assert "job 7 has ended well already" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["999", "abc", "1;2", "--help="])
def test_it_does_not_wait_for_a_job_that_is_none(word, tmp_path, slurm, run):
    with pytest.raises(UserError, match="job"):
        submit.submit(str(write_config(tmp_path)), after=[word])
    assert not slurm.submitted
    assert not run.exists()


def test_a_run_that_has_steps_is_refused_without_resume(tmp_path, run, slurm, capsys):
    file = write_config(tmp_path)
    write_checkpoint(file, run, 2)
    assert _titans(file) == 2
    assert "a run is here already" in capsys.readouterr().err
    assert not slurm.submitted
    assert _titans(file, "--resume") == 0
    assert slurm.submitted == [("train", [])]


def test_a_finished_run_says_so(tmp_path, run, slurm, capsys):
    file = write_config(tmp_path)
    write_checkpoint(file, run, 6)
    for more in ([], ["--resume"]):
        assert _titans(file, *more) == 0
        assert "finished already: step-6 of 6 steps" in capsys.readouterr().out
    assert not slurm.submitted


def test_another_model_in_the_directory_is_refused(tmp_path, run, slurm, capsys):
    file = write_config(tmp_path)
    write_checkpoint(file, run, 2)
    assert _titans(file, "model.hidden_size=32", "--resume") == 2
    assert "model.hidden_size" in capsys.readouterr().err
    assert not slurm.submitted


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED"])
def test_a_run_whose_job_lives_is_refused_with_its_id(state, tmp_path, run, slurm, capsys):
    file = write_config(tmp_path)
    assert _titans(file) == 0
    slurm.known = [job_of(job.id, job.name, state) for job in slurm.known]
    assert _titans(file) == 2
    told = capsys.readouterr().err
    assert f"11 ({state.lower()})" in told
    assert "--resume" in told
    assert len(slurm.submitted) == 1


def test_a_job_that_was_queued_but_not_recorded_is_found_by_its_name(tmp_path, run, slurm):
    file = write_config(tmp_path)
    assert _titans(file) == 0
    (run / "jobs" / "jobs.jsonl").unlink()
    with pytest.raises(UserError, match="11"):
        submit.submit(str(file))


def test_another_job_that_has_a_recorded_id_is_in_nobodys_way(tmp_path, run, slurm):
    file = write_config(tmp_path)
    assert _titans(file) == 0
    slurm.known = [job_of("11", "titans-another-01234567", "RUNNING")]
    assert _titans(file) == 0
    assert [row["job"] for row in rows(run)] == ["11", "12"]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("titans-run-{run}", True),
        ("titans-renamed-since-{run}", True),
        ("titans-run-{run}-export", True),
        ("titans-run.sweep-{above}-sweep", True),
        ("titans-run-{above}", False),
        ("titans-run-{run}x", False),
        ("titans-moved-01234567", True),
        ("titans-pretrain", True),
        ("titans-run-76543210", False),
        ("bash", False),
        ("", False),
    ],
)
def test_a_noted_job_is_the_runs_by_its_name(name, own, tmp_path, run):
    digests = {
        key: hashlib.sha256(str(place).encode()).hexdigest()[:8]
        for key, place in (("run", run), ("above", tmp_path))
    }
    (run / "jobs").mkdir(parents=True)
    (run / "jobs" / "train.sbatch").write_text("#SBATCH --job-name=titans-moved-01234567\n")
    assert submitted.is_own(run, job_of("11", name.format(**digests))) == own


def test_a_run_reached_by_a_link_has_the_name_that_it_has_without(tmp_path, run, slurm):
    run.mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    for directory in (run, tmp_path / "link" / "run"):
        assert _titans(write_config(tmp_path), f"run.directory={directory}", "--resume") in (0, 2)
    assert len({job.name for job in slurm.known}) == 1


def test_why_a_job_may_wait_is_told_and_keeps_nothing_back(tmp_path, slurm, capsys):
    slurm.waits = ["2 nodes are down"]
    assert _titans(write_config(tmp_path)) == 0
    assert "warning: train: 2 nodes are down\n" in capsys.readouterr().err
    assert len(slurm.submitted) == 1


def test_with_resume_a_second_job_queues_behind_the_first(tmp_path, run, slurm, capsys):
    file = write_config(tmp_path)
    assert _titans(file) == 0
    assert _titans(file, "--resume") == 0
    assert "job 11 of this run goes first" in capsys.readouterr().out
    assert [row["job"] for row in rows(run)] == ["11", "12"]
    assert "--dependency=singleton" in (run / "jobs" / "train.sbatch").read_text()


def test_a_second_job_does_not_replace_the_configuration_of_the_first(tmp_path, run, slurm):
    file = write_config(tmp_path)
    assert _titans(file) == 0
    before = (run / "jobs" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="reads another configuration"):
        submit.submit(str(file), ["train.steps=9"], resume=True)
    assert (run / "jobs" / "config.yaml").read_bytes() == before


def test_a_job_that_has_ended_is_in_nobodys_way(tmp_path, run, slurm):
    file = write_config(tmp_path)
    assert _titans(file) == 0
    slurm.end_all()
    assert _titans(file) == 0
    assert len(slurm.submitted) == 2


def test_two_submissions_at_once_are_one(tmp_path, run, slurm):
    with submitted.alone(run), pytest.raises(UserError, match="another titans submit"):
        submit.submit(str(write_config(tmp_path)))
    assert not slurm.submitted


def test_a_request_to_stop_that_was_left_is_removed(tmp_path, run, slurm, capsys):
    run.mkdir()
    (run / "stop").touch()
    assert _titans(write_config(tmp_path)) == 0
    assert f"{run / 'stop'} is removed" in capsys.readouterr().out
    assert not (run / "stop").exists()


def test_a_request_to_stop_of_a_living_job_stays(tmp_path, run, slurm):
    file = write_config(tmp_path)
    assert _titans(file) == 0
    (run / "stop").touch()
    assert _titans(file, "--resume") == 0
    assert (run / "stop").exists()


def test_what_slurm_refuses_leaves_the_files_of_the_run_as_they_were(tmp_path, run, slurm):
    file = write_config(tmp_path)
    assert _titans(file) == 0
    slurm.end_all()
    before = (run / "jobs" / "train.sbatch").read_bytes()

    def refuse(script, options=(), **more):
        raise UserError("no such account", where="job.account", fix="x")

    slurm.test_only = refuse
    submit.slurm_utils.test_only = refuse
    with pytest.raises(UserError, match="no such account"):
        submit.submit(str(file), ["job.account=nobody"])
    assert (run / "jobs" / "train.sbatch").read_bytes() == before
    assert len(slurm.submitted) == 1


def test_a_row_torn_by_a_crash_costs_only_itself(tmp_path):
    (tmp_path / "jobs").mkdir()
    submitted.record(tmp_path, "train", "1", [], tmp_path / "a")
    with open(tmp_path / "jobs" / "jobs.jsonl", "a") as handle:
        handle.write('{"time": "x", "sta')
    row = submitted.record(tmp_path, "train", "2", ["1"], tmp_path / "b")
    assert [one.job for one in submitted.read(tmp_path)] == ["1", "2"]
    assert submitted.read(tmp_path)[-1] == row


@pytest.mark.parametrize("words", [["--dry-run"], [], ["--pipeline"]])
def test_no_secret_of_the_environment_gets_into_a_job_file(
    words, tmp_path, run, slurm, monkeypatch, capsys
):
    secrets = {"WANDB_API_KEY": "s3cret-one", "HF_TOKEN": "s3cret-two", "HOME": "/s3cret-three"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert _titans(write_config(tmp_path), *words) == 0
    told = capsys.readouterr()
    written = [path.read_text() for path in run.rglob("*") if path.is_file()]
    assert "s3cret" not in "".join([told.out, told.err, *written])


def test_options_of_a_sweep_need_one(tmp_path, slurm, capsys):
    assert _titans(write_config(tmp_path), "--at-once", "2") == 2
    assert "--at-once without a sweep" in capsys.readouterr().err


def test_what_the_last_save_took_decides_over_the_grace(tmp_path, run, slurm):
    file = write_config(tmp_path)
    run.mkdir()
    write_json(run / "last_save.json", {"step": 2, "seconds": 300.0, "bytes": 1})
    with pytest.raises(UserError, match="120 is too short") as refused:
        submit.submit(str(file))
    assert refused.value.fix == "use job.signal_seconds=450"
    assert not slurm.submitted
    assert _titans(file, "job.signal_seconds=450") == 0
