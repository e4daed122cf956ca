"""``titans submit`` on a real SLURM: what is queued, in which order it runs, what is refused."""

import json

import pytest
import yaml
from submitted_python import Interpreter
from tiny import MODEL

from titans_pretrain import cli

CHAIN = ["plan", "prepare", "merge", "attempt", "export", "eval"]
SECONDS = 120


@pytest.fixture
def interpreter(tmp_path):
    return Interpreter(tmp_path / "bin")


@pytest.fixture
def file(tmp_path, interpreter):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    text, tokenizer = tmp_path / "a.jsonl", tmp_path / "t.model"
    text.touch()
    tokenizer.touch()
    content = {
        "model": MODEL,
        "data": {"manifest": str(tmp_path / "data" / "manifest.json"), "sequence_length": 32},
        "train": {"steps": 6, "global_batch_size": 4, "learning_rate": 0.01},
        "checkpoint": {"every": 2},
        "run": {"directory": str(tmp_path / "run")},
        "job": {"python": str(interpreter.path), "time": "5", "nodes": 2},
        "pipeline": {
            "data": {"input": [str(text)], "tokenizer": str(tokenizer), "tasks": 3},
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _titans(*words):
    return cli.main(["submit", *map(str, words)])


def _rows(run):
    lines = (run / "jobs" / "jobs.jsonl").read_text().splitlines()
    return {row["stage"]: row for row in map(json.loads, lines)}


def _ends(slurm, run):
    return {stage: slurm.wait(row["job"], SECONDS) for stage, row in _rows(run).items()}


def test_a_chain_runs_in_order_and_every_job_is_recorded(slurm, file, tmp_path, interpreter):
    assert _titans(file, "--pipeline") == 0
    states = _ends(slurm, tmp_path / "run")
    assert list(states) == ["plan", "prepare", "merge", "train", "export", "eval"]
    assert set.union(*states.values()) == {"COMPLETED"}
    begun = [stage for event, stage in interpreter.events() if event == "begin"]
    assert begun == ["plan", "prepare", "prepare", "prepare", "merge", "attempt", "export", "eval"]
    for stage, row in _rows(tmp_path / "run").items():
        jobs = [row["job"]] if stage != "prepare" else [f"{row['job']}_{i}" for i in range(3)]
        told = {one["job"] for one in interpreter.rows() if one["stage"] in (stage, "attempt")}
        assert set(jobs) <= told
    train = _rows(tmp_path / "run")["train"]["job"]
    assert interpreter.words(train) == ["attempt", str(tmp_path / "run" / "jobs" / "config.yaml")]


def test_a_stage_that_fails_ends_what_waits_for_it_and_the_same_command_goes_on(
    slurm, file, tmp_path, interpreter
):
    interpreter.fails_at("merge")
    assert _titans(file, "--pipeline") == 0
    states = _ends(slurm, tmp_path / "run")
    assert states["merge"] == {"FAILED"}
    assert states["train"] == states["export"] == states["eval"] == {"CANCELLED"}
    interpreter.fails_at()
    assert _titans(file, "--pipeline") == 0
    assert set.union(*_ends(slurm, tmp_path / "run").values()) == {"COMPLETED"}
    ended = [stage for event, stage in interpreter.events() if event == "end"]
    assert [stage for stage in ended if stage == "attempt"] == ["attempt"]


def test_a_living_chain_is_refused_with_its_jobs(slurm, file, tmp_path, interpreter, capsys):
    interpreter.takes(60)
    assert _titans(file, "--pipeline") == 0
    job = _rows(tmp_path / "run")["plan"]["job"]
    assert _titans(file, "--pipeline") == 2
    assert f"{job} (" in capsys.readouterr().err
    (tmp_path / "run" / "jobs" / "jobs.jsonl").unlink()  # as if submit had been killed
    assert _titans(file, "--pipeline") == 2
    assert f"{job} (" in capsys.readouterr().err


def test_a_second_job_of_a_run_waits_until_the_first_has_ended(slurm, file, tmp_path, interpreter):
    interpreter.takes(2)
    assert _titans(file) == 0
    assert _titans(file) == 2
    assert _titans(file, "--resume") == 0
    lines = (tmp_path / "run" / "jobs" / "jobs.jsonl").read_text().splitlines()
    for line in lines:
        assert slurm.wait(json.loads(line)["job"], SECONDS) == {"COMPLETED"}
    assert [event for event, _ in interpreter.events()] == ["begin", "end", "begin", "end"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("job.partition=nothing", "job.partition"),
        ("job.nodes=4096", "job.nodes"),
        ("job.cpus_per_rank=4000", "job.cpus_per_rank"),
        ("job.constraint=nothing", "job.constraint"),
        ("job.gpus_per_node=64", "job.gpus_per_node"),
        ("job.reservation=nothing", "job.reservation"),
    ],
)
def test_what_this_cluster_cannot_run_is_refused_before_anything_is_queued(
    override, key, slurm, file, tmp_path, capsys
):
    before = slurm.jobs()
    words = (override, "train.global_batch_size=4096", "--pipeline")
    assert _titans(file, *words) == 2
    told = capsys.readouterr().err
    assert f"where: {key}" in told
    assert "fix:" in told
    assert slurm.jobs() == before
    assert not (tmp_path / "run" / "jobs" / "jobs.jsonl").exists()
    assert not (tmp_path / "run" / "jobs" / "config.yaml").exists()


def test_a_sweep_runs_each_member_and_never_more_at_once_than_allowed(
    slurm, file, tmp_path, interpreter
):
    interpreter.takes(1)
    words = ("--sweep", "train.seed=1,2,3,4,5", "--at-once", "2")
    assert _titans(file, *words) == 0
    (row,) = _rows(tmp_path / "run.sweep").values()
    assert slurm.wait(row["job"], SECONDS) == {"COMPLETED"}
    running, most = 0, 0
    for event, _ in interpreter.events():
        running += 1 if event == "begin" else -1
        most = max(most, running)
    assert len(interpreter.events()) == 10
    assert most <= 2
    for index in range(5):
        words = interpreter.words(f"{row['job']}_{index}")
        place = str(tmp_path / "run.sweep" / "sweep.json")
        assert words == ["attempt", place, "--member", str(index)]


def test_the_runs_of_a_living_sweep_are_not_queued_twice(
    slurm, file, tmp_path, interpreter, capsys
):
    interpreter.takes(60)
    assert _titans(file, "--sweep", "train.seed=1,2") == 0
    before = slurm.jobs()
    assert _titans(file, "--sweep", "train.seed=1,2") == 0
    assert "0001: in job" in capsys.readouterr().out
    assert slurm.jobs() == before
    assert _titans(file, "--sweep", "train.seed=1,2,3") == 0
    lines = (tmp_path / "run.sweep" / "jobs" / "jobs.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["job"] for line in lines)
    assert (tmp_path / "run.sweep" / "0002" / "jobs" / "config.yaml").exists()
    queued = slurm.run("squeue", "-h", "-r", "-j", second, "-o", "%i").stdout.split()
    assert queued == [f"{second}_2"]
    assert first != second


def test_a_secret_reaches_the_job_by_its_environment_and_no_file(
    slurm, file, tmp_path, interpreter, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    assert _titans(file) == 0
    assert _ends(slurm, tmp_path / "run") == {"train": {"COMPLETED"}}
    assert {row["secret"] for row in interpreter.rows()} == {"set"}
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes()


def test_a_job_may_wait_for_others(slurm, file, tmp_path, interpreter):
    first = slurm.submit("-o", tmp_path / "log", "--wrap", "sleep 3; exit 1")
    assert _titans(file, "--after", first) == 0
    assert _ends(slurm, tmp_path / "run") == {"train": {"CANCELLED"}}
    assert interpreter.events() == []
    assert slurm.wait(first, SECONDS) == {"FAILED"}


def test_the_doctor_finds_this_cluster_fit(slurm, file, tmp_path, capsys):
    python = tmp_path / "python3"
    python.write_text("""#!/bin/sh\necho '{"python": "3.11.7", "torch": "2.9"}'\n""")
    python.chmod(0o755)
    assert cli.main(["doctor", str(file), f"job.python={python}"]) == 0
    told = capsys.readouterr().out
    assert "ok    job: SLURM would run it" in told
    assert "partition low: 4 nodes" in told
    assert "preempted jobs: requeue" in told
    assert "ok    torch: 2.9" in told
    assert cli.main(["doctor", str(file), "job.partition=hgih", f"job.python={python}"]) == 1
    assert "did you mean 'high'?" in capsys.readouterr().out
