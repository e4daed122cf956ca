"""What breaks a run on a mesh: each time the cause is told within a minute, and the run goes on."""

import json
import shutil
import time
from pathlib import Path

import pytest

FAULTS = str(Path(__file__).parent / "faults")
SEQUENCE = ("mesh.sequence=2", "--ranks", "2")


@pytest.fixture
def failing(make_run):
    """``failing("kill:1:2", …)``: trains with a fault; exit code, error and error.json."""
    run = make_run(
        train={"steps": 8, "validation_every": 0},
        checkpoint={"every": 1, "asynchronous": False},
    )

    def train(fault, *arguments):
        process = run.start(*arguments, PYTHONPATH=FAULTS, TITANS_FAULT=fault)
        first = run.rows()[-1]["step"] + 1 if run.rows() else 1
        run.wait_for_step(first, process, timeout=200)
        reached = time.monotonic()
        _, complaints = process.communicate(timeout=120)
        assert time.monotonic() - reached < 60
        kept = run.directory / "error.json"
        return process.returncode, complaints, json.loads(kept.read_text()) if kept.exists() else {}

    train.run = run
    return train


def test_ranks_that_die_hang_or_compute_no_number_are_named_and_the_run_goes_on_each_time(failing):
    run = failing.run
    code, told, _ = failing("kill:1:2", *SEQUENCE)
    assert code == 1
    assert told.startswith("error: rank 1 was killed by SIGKILL\nwhere: process ")
    assert run.steps_saved() == [1]

    code, told, kept = failing("sleep:0:2", "run.hang_seconds=8", *SEQUENCE, "--resume")
    assert code == 75
    first, where, fix = told.splitlines()[:3]
    assert first.startswith("error: step 3 hangs: rank 0 on ")
    assert first.endswith(" waits for no other rank")
    assert ", step 3, micro-batch " in where
    assert "--resume" in fix
    assert "\nrank 1 on " in told
    assert ", waits for rank 0 at " in told or "inside a communication call" in told
    assert "failing_backward" in told
    assert (kept["rank"], kept["exit_code"], len(kept["ranks"])) == (0, 75, 2)
    assert run.steps_saved()[-1] == 2

    code, told, kept = failing("nan:1:2", "--ranks", "2", "--resume")
    assert code == 1
    assert told.startswith("error: the gradient norm is not finite at step 4\nwhere: rank 1; ")
    assert f"data position {3 * 4 * 32}" in kept["where"]
    assert [row.get("event") for row in run.rows()] == [None, None, None, "stop"]
    assert run.steps_saved()[-1] == 3

    newest = run.directory / "checkpoints" / "step-3"
    with open(next(newest.glob("rank-*.safetensors")), "r+b") as handle:
        handle.truncate(100)
    code, out, told = run.train(*SEQUENCE, "--resume")
    assert (code, told) == (0, "")
    assert f"{newest} is damaged and was skipped: " in out
    assert "resuming from " in out
    assert [row["step"] for row in run.rows() if "event" not in row] == [*range(1, 9), 8]
    (stop,) = (row for row in run.rows() if "event" in row)
    assert (stop["event"], stop["from_step"], stop["undone"]) == ("stop", 4, True)


@pytest.mark.slow
def test_a_frozen_process_is_named_and_does_not_hold_up_the_end(failing):
    code, told, kept = failing("freeze:1:2", "run.hang_seconds=8", *SEQUENCE)
    assert code == 75
    assert told.startswith("error: step 2 hangs: rank 1 on ")
    assert " is silent: its process is dead, stopped or cut off\n" in told
    assert f", process {failing.run.processes()[1]}: silent\n" in told
    assert kept["rank"] == 1


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (
            ["mesh.sequence=3", "--ranks", "3"],
            "data.sequence_length: 32",
            "use 48, or mesh.sequence 2",
        ),
        (["mesh.sequence=2", "--ranks", "3"], "3 ranks are no multiple of", "start 2 or 4 ranks"),
        (["mesh.tensor=2", "--ranks", "2"], "memory_heads", "mesh.tensor"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_nearest(make_run, arguments, what, fix):
    run = make_run()
    code, _, told = run.train(*arguments)
    assert code == 2
    first, _, last = told.splitlines()
    assert what in first
    assert fix in last
    assert not run.directory.exists()


def test_a_checkpoint_of_another_configuration_is_refused_and_its_own_is_taken(make_run):
    brief = {"train": {"steps": 1, "warmup_steps": 0, "validation_every": 0}}
    small, large = make_run("small", **brief), make_run("large", model={"hidden_size": 32}, **brief)
    for run in (small, large):
        assert run.train("--ranks", "1")[0] == 0
    code, _, told = small.train("model.hidden_size=32", "--ranks", "1", "--resume")
    assert code == 2
    assert told.startswith("error: model.hidden_size: 32 differs from 16, which the run began with")

    own = small.directory / "checkpoints"
    own.rename(small.directory / "own")
    shutil.copytree(large.directory / "checkpoints", own)
    code, _, told = small.train("train.steps=2", "--ranks", "1", "--resume")
    assert code == 2
    assert told.startswith("error: the checkpoint is of another model or optimizer: ")

    shutil.rmtree(own)
    (small.directory / "own").rename(own)
    code, _, told = small.train("train.steps=2", "--ranks", "1", "--resume")
    assert (code, told) == (0, "")
