"""``titans status``: where runs stand, from their directories and SLURM."""

import json
import os
import time

import pytest
import yaml
from run_files import RunFiles, ToldSlurm, job, write

from launchers import run_state, slurm_command, status
from titans_pretrain import cli
from titans_pretrain.checkpoint import evaluations
from titans_pretrain.errors import UserError


@pytest.fixture
def run(tmp_path):
    return RunFiles(tmp_path / "demo")


@pytest.fixture
def slurm(monkeypatch):
    return ToldSlurm(monkeypatch)


@pytest.fixture
def no_slurm(monkeypatch):
    monkeypatch.setattr(slurm_command, "available", lambda: False)


def state_of(run):
    return run_state.read([run.path])[0]


def cells(run):
    return dict(zip(status.COLUMNS, status.row(state_of(run)), strict=True))


def old(path, seconds=3600):
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_running_job_is_told_with_step_pace_and_limit(run, slurm):
    run.metrics(60)
    run.start("b")
    run.job("7")
    slurm.jobs = [job("7", "RUNNING", left=3700)]
    assert cells(run) | {"heartbeat": "3s ago"} == {
        "run": "demo",
        "state": "running",
        "job": "7 RUNNING",
        "step": "60/100",
        "loss": "4.4000",
        "tokens/s": "1,500",
        "to the end": "1m20s",
        "to the limit": "1h01m",
        "heartbeat": "3s ago",
        "restarts": "0",
        "last error": "-",
    }


def test_a_run_started_by_hand_needs_no_slurm(run, no_slurm):
    run.metrics(60)
    run.start("b")
    assert (cells(run)["state"], cells(run)["job"]) == ("running", "-")


def test_slurm_that_does_not_answer_is_a_dash_and_no_error(run, slurm):
    run.metrics(60)
    run.start("b")
    run.job("7")
    slurm.answers = False
    assert (cells(run)["state"], cells(run)["job"]) == ("running", "7 -")


def test_slurm_that_stops_answering_in_between_is_no_error(run, slurm, monkeypatch):
    def silent(ids):
        raise slurm_command.SlurmError("SLURM does not answer")

    monkeypatch.setattr(run_state.slurm_jobs, "jobs", silent)
    run.job("7")
    assert cells(run)["job"] == "7 -"


def test_a_queued_job_is_told_with_its_reason(run, slurm):
    run.job("7")
    slurm.jobs = [job("7", "PENDING", reason="Priority")]
    assert (cells(run)["state"], cells(run)["job"]) == ("queued", "7 PENDING (Priority)")


def test_a_job_of_the_same_number_and_another_name_is_not_the_runs(run, slurm):
    run.job("7")
    slurm.jobs = [job("7", "RUNNING", name="somebody-elses")]
    assert (cells(run)["state"], cells(run)["job"]) == ("not started", "7 -")


def test_a_requeued_attempts_job_needs_no_row_in_the_list_of_jobs(run, slurm):
    run.attempt(1, job="8")
    slurm.jobs = [job("8", "RUNNING", name="titans-pretrain"), job("9", "RUNNING")]
    assert cells(run)["job"] == "8 RUNNING"
    slurm.jobs = [job("8", "RUNNING", name="somebody-elses")]
    assert cells(run)["job"] == "8 -"


def test_silent_ranks_are_named_and_a_run_of_silent_ranks_is_silent(run, no_slurm):
    run.metrics(60)
    run.start("b", ranks=3)
    run.beat("b", 1, age=100)
    assert cells(run)["heartbeat"].endswith("ago; silent: rank 1")
    run.start("b", ranks=3, age=100)
    assert cells(run)["state"] == "silent"


def test_a_rank_that_never_gave_a_sign_of_life_is_silent_after_a_minute(run, no_slurm):
    run.start("b", ranks=3)
    (run.path / "heartbeat" / "rank-2.json").unlink()
    assert state_of(run).silent == []
    old(run.path / "ranks.json")
    assert state_of(run).silent == [2]


def test_signs_of_life_and_errors_of_an_earlier_start_do_not_count(run, no_slurm):
    run.start("a")
    run.error("a")
    run.outcome("a", "stopped")
    assert cells(run)["state"] == "failed"
    write(run.path / ".lock", {"start": "b"})
    state = state_of(run)
    assert (state.beats, state.error, state.outcome) == ({}, None, None)


@pytest.mark.parametrize(("outcome", "word"), [("done", "done"), ("stopped", "stopped")])
def test_an_orderly_end_is_told_at_once_though_its_last_sign_of_life_is_new(
    run, no_slurm, outcome, word
):
    run.metrics(60)
    run.start("b")
    run.outcome("b", outcome)
    assert (cells(run)["state"], cells(run)["heartbeat"]) == (word, "-")
    assert cells(run)["to the end"] == ("-" if word == "done" else "1m20s")


def test_restarts_lost_steps_and_the_reason_of_the_last_end_are_told(run, no_slurm):
    run.attempt(1, ended=200.0, step_to=20, lost_steps=5, verdict="hang", reason="rank 1 hangs")
    run.attempt(2, ended=300.0, step_to=40, lost_steps=2, verdict="killed", reason="node1 is down")
    assert cells(run)["restarts"] == "1, 7 steps lost"
    assert cells(run)["last error"] == "killed: node1 is down"
    assert cells(run)["state"] == "killed"


def test_the_first_error_of_the_newest_start_comes_before_the_attempts_reason(run, no_slurm):
    run.attempt(1, ended=200.0, step_to=20, verdict="failed", reason="exit code 1")
    run.start("b")
    run.error("b")
    assert cells(run)["last error"] == "out of GPU memory"


def test_a_long_error_is_cut_in_the_table(run, no_slurm):
    run.attempt(1, ended=200.0, step_to=20, verdict="failed", reason="x" * 500)
    assert len(cells(run)["last error"]) == status.ERROR_CHARACTERS


def test_only_the_end_of_large_metrics_is_read_and_a_torn_line_is_left_out(run, no_slurm):
    path = run.path / "metrics.jsonl"
    run.metrics(60)
    rows = path.read_bytes()
    with open(path, "wb") as handle:
        handle.seek(2**40)  # a TiB of holes before them, which nobody can read whole
        handle.write(b"\n" + rows + b'{"step": 61, "lo')
    assert cells(run)["step"] == "60/100"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "ranks.json", ".lock", "error.json", "outcome.json", "config.yaml"]
)
def test_torn_files_are_as_good_as_absent(run, no_slurm, name):
    run.metrics(60)
    run.start("b")
    for torn in (b"", b'{"start": ', b"\xff\xfe", b"[1]", b'{"0": 3}', b'{"step": "x"}\n'):
        (run.path / name).write_bytes(torn)
        assert cells(run)["state"] in ("running", "ended", "not started", "failed", "stopped")


def test_a_torn_heartbeat_and_a_torn_attempt_are_no_error(run, no_slurm):
    run.start("b")
    run.attempt(1)
    (run.path / "heartbeat" / "rank-0.json").write_bytes(b'{"sta')
    (run.path / "attempts" / "attempt-1.json").write_bytes(b'{"sta')
    assert cells(run)["state"] == "running"
    assert "attempt 1 cannot be read" in cells(run)["last error"]


def test_a_submitted_run_that_never_began_is_told(tmp_path, slurm):
    directory = tmp_path / "fresh"
    (directory / "jobs").mkdir(parents=True)
    (directory / "jobs/config.yaml").write_text(yaml.safe_dump({"train": {"steps": 9}}))
    (state,) = run_state.read(run_state.find([tmp_path]))
    assert status.row(state)[:4] == ["fresh", "not started", "-", "0/9"]


def test_a_run_of_a_sweep_is_an_element_of_its_array(tmp_path, slurm):
    sweep = RunFiles(tmp_path / "sweep")
    sweep.job("9", "sweep")
    runs = [RunFiles(sweep.path / name) for name in ("one", "two")]
    members = [{"overrides": [], "directory": run.path.name} for run in runs]
    write(sweep.path / "sweep.json", {"format": "titans-sweep/1", "runs": members})
    slurm.jobs = [job("9_0", "RUNNING"), job("9_1", "PENDING")]
    assert [cells(run)["job"] for run in runs] == ["9_0 RUNNING", "9_1 PENDING"]


def test_runs_are_found_a_few_levels_deep_and_not_inside_each_other(tmp_path, no_slurm):
    for name in ("one", "group/two", "group/.hidden/three", "a/b/c/d/e/deep", "one/inner"):
        RunFiles(tmp_path / name)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/config.json").write_text("{}")
    found = [path.relative_to(tmp_path).as_posix() for path in run_state.find([tmp_path])]
    assert found == ["group/two", "one"]


def test_the_table_holds_all_runs_below_here(tmp_path, monkeypatch, no_slurm, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status"]) == 0
    assert capsys.readouterr().out == "no run in or below this directory\n"
    for name in ("one", "two"):
        RunFiles(tmp_path / name).metrics(10)
    assert cli.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "state", "job", "step"]
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["one", "ended", "-", "10/100"],
        ["two", "ended", "-", "10/100"],
    ]
    assert lines[-1].endswith("without validations, saves and restarts")


def test_a_run_alone_is_told_with_its_attempts_and_stages(run, slurm, capsys):
    run.metrics(60)
    run.start("b")
    run.error("b")
    run.job("5", "prepare")
    run.job("7")
    run.job("8", "export")
    run.attempt(1, ended=220.0, step_to=20, verdict="hang", reason="rank 1 hangs")
    run.attempt(2, restart=1, step_from=20)
    slurm.jobs = [
        *(job(f"5_{number}", "COMPLETED") for number in range(3)),
        job("5_3", "FAILED"),
        job("7", "RUNNING"),
        job("8", "PENDING", reason="Dependency"),
    ]
    assert cli.main(["status", str(run.path)]) == 0
    out = capsys.readouterr().out
    for line in (
        "prepare  5    3 COMPLETED, 1 FAILED",
        "train    7    RUNNING",
        "export   8    PENDING (Dependency)",
        "attempt 1 (job 7): hang, steps 0 to 20 in 2.0 min: rank 1 hangs; nodes node0, node1",
        "attempt 2 (job 7, restart 1): open, from step 20; nodes node0, node1",
        "  what: out of GPU memory",
    ):
        assert line in out.splitlines()


def test_the_newest_evaluation_is_told_and_each_that_failed(run, slurm, capsys):
    for step, loss, dtype in ((4, 3.5, "bfloat16"), (6, 3.4, "float32"), (8, 3.25, "float32")):
        told = {"settings": {"dtype": dtype}, "results": {}}
        evaluations.write(run.path, step, "a", metrics={"heldout/loss": loss}, **told)
    evaluations.fail(run.path, 12, "a", "no data")
    run.job("7", "eval-16")
    slurm.jobs = [job("7", "PENDING")]
    assert cli.main(["status", str(run.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("evaluation of step 8:")
    assert lines[at + 1] == "  heldout/loss  3.2500"
    assert lines[at + 2] == "evaluated with other settings than that: step 4"
    assert lines[at + 3] == "evaluation of step 12 failed: no data"
    assert "eval-16  7    PENDING" in lines
    assert state_of(run).word == "not started"  # an evaluation is no sign of training
    assert cli.main(["status", "--json", str(run.path)]) == 0
    first, _, last, failed = json.loads(capsys.readouterr().out)["evaluations"]
    told = {"failure": None, "settings": {"dtype": "bfloat16"}}
    assert first == {"step": 4, "metrics": {"heldout/loss": 3.5}, **told}
    assert last["settings"] == {"dtype": "float32"}
    assert failed == {"step": 12, "metrics": {}, "failure": "no data", "settings": {}}


def test_json_is_one_object_a_run(run, slurm, capsys):
    run.metrics(60)
    run.start("b")
    run.job("7")
    slurm.jobs = [job("7", "RUNNING", left=60)]
    assert cli.main(["status", "--json", str(run.path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["jobs"] == [{"stage": "train", "job": "7", "state": "RUNNING"}]
    assert (told["state"], told["step"], told["steps"]) == ("running", 60, 100)
    assert (told["seconds_to_end"], told["seconds_to_limit"]) == (80.0, 60)
    assert told["error"] is None


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no directory"):
        status.status([tmp_path / "none"])
