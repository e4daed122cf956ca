"""``titans train`` as a user runs it: processes, files, signals, exit codes."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from run_command import end

from titans_pretrain import config
from titans_pretrain.checkpoint.load import read_tensors
from titans_pretrain.plan import flops


def state(run, step):
    """Every tensor of a checkpoint."""
    return dict(read_tensors(run.directory / "checkpoints" / f"step-{step}", ""))


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_killed_on_the_way_and_resumed_is_the_run_never_stopped(make_run):
    straight, broken = make_run("straight"), make_run("broken")
    code, out, complaints = straight.train("--ranks", "2")
    assert (code, complaints) == (0, "")
    assert "2 ranks = tensor 1 x data 2 x sequence 1" in out
    assert "step 6/6  loss " in out
    assert [row["step"] for row in straight.rows()] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert straight.steps_saved() == [2, 4, 6]
    row, each = straight.rows()[0], flops.step(config.load(str(straight.file))) / 2
    assert row["flops_per_second"] == pytest.approx(each / row["seconds"])
    assert "mfu" not in row

    process = broken.start("checkpoint.asynchronous=false", "--ranks", "2")
    broken.wait_for_step(3, process)
    process.kill()
    process.wait()
    wait_until(lambda: all(is_gone(pid) for pid in broken.processes()))
    reached = broken.steps_saved()[-1]
    assert reached < 6
    with open(broken.directory / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 5, "los')
    code, out, complaints = broken.train("--ranks", "2", "--resume")
    assert (code, complaints) == (0, "")
    assert f"resuming from {broken.directory}/checkpoints/step-{reached}" in out
    assert broken.timeless() == straight.timeless()
    expected = state(straight, 6)
    found = state(broken, 6)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_moves_to_other_ranks_is_finished_once_and_never_started_twice(make_run):
    one = make_run("one")
    code, _, _ = one.train("train.steps=2", "--ranks", "1")
    assert code == 0
    assert sorted(path.name for path in one.directory.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "data.json", "heartbeat", "last_save.json", "logs",
        "metrics.jsonl", "outcome.json", "ranks.json",
    ]  # fmt: skip
    code, _, complaints = one.train("train.steps=4", "--ranks", "1")
    assert code == 2
    assert complaints.startswith("error: a run is here already")
    code, out, _ = one.train("train.steps=4", "--ranks", "2", "--resume")
    assert code == 0
    assert "train.steps is now 4, was 2" in out
    assert [row["step"] for row in one.rows()] == [1, 2, 2, 3, 3, 4, 4]
    code, out, _ = one.train("train.steps=4", "--ranks", "1", "--resume")
    assert code == 0
    assert "finished already: step-4 of 4 steps" in out
    code, _, complaints = one.train("data.seed=1", "--ranks", "1", "--resume")
    assert code == 2
    assert "data.seed: 1 differs from 0, which the run began with" in complaints
    assert [row["step"] for row in one.rows()] == [1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGHUP, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
)
def test_a_signal_to_stop_saves_after_the_step_and_exits_75(make_run, number):
    run = make_run(train={"steps": 10_000}, checkpoint={"every": 0})
    process = run.start("--ranks", "2")
    run.wait_for_step(2, process)
    process.send_signal(number)
    code, _, complaints = end(process)
    assert code == 75
    last = run.rows()[-1]["step"]
    assert run.steps_saved() == [last]
    assert complaints.splitlines() == [
        f"error: stopped by {number.name} on rank 0 after step {last} of 10000",
        f"where: {run.directory}/checkpoints/step-{last}",
        "fix:   continue with --resume",
    ]
    assert not (run.directory / "error.json").exists()


def children(pid):
    """Processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def awaits_sigterm(pid):
    """Whether a process has a handler for it."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("who", ["launcher", "ranks"])
def test_sigterm_during_the_start_exits_75_too(make_run, who):
    run = make_run(train={"steps": 10_000}, checkpoint={"every": 0})
    process = run.start("--ranks", "2")
    wait_until(lambda: awaits_sigterm(process.pid), timeout=60)
    if who == "ranks":
        wait_until(lambda: all(map(awaits_sigterm, children(process.pid))), timeout=60)
    process.send_signal(signal.SIGTERM)
    code, _, complaints = end(process)
    assert code == 75
    assert complaints.startswith("error: stopped by SIGTERM ")


def test_a_reader_that_goes_away_does_not_end_the_training(make_run):
    run = make_run(train={"steps": 3})
    process = run.start("--ranks", "1")
    process.stdout.readline()
    process.stdout.close()
    complaints = process.stderr.read()
    assert (process.wait(timeout=120), complaints) == (0, "")
    assert run.steps_saved() == [2, 3]
    assert f"done: 3 steps in {run.directory}" in (run.directory / "logs/rank-0.log").read_text()


def test_a_dead_rank_ends_the_others_within_seconds(make_run):
    run = make_run(train={"steps": 10_000})
    process = run.start("--ranks", "2")
    run.wait_for_step(3, process)
    pids = run.processes()
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    code, _, complaints = end(process)
    assert time.monotonic() - began < 10
    assert code == 1
    assert complaints.startswith("error: rank 1 was killed by SIGKILL\n")
    assert all(is_gone(pid) for pid in pids)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(make_run):
    run = make_run(train={"learning_rate": 1e36, "warmup_steps": 0}, checkpoint={"every": 1})
    code, _, complaints = run.train("--ranks", "2")
    assert code == 1
    error = json.loads((run.directory / "error.json").read_text())
    *steps, stop = run.rows()
    last = steps[-1]["step"] if steps else 0
    assert (stop["step"], stop["event"]) == (last + 1, "stop")
    assert error["what"] == f"{stop['reason']} at step {last + 1}"
    assert f"data position {last * 4 * 32}" in error["where"]
    assert complaints.startswith(f"error: {error['what']}\nwhere: {error['where']}\nfix:   ")
    assert run.steps_saved() == list(range(1, last + 1))
    assert all(torch.isfinite(tensor).all() for tensor in state(run, last).values())


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["train.setps=3"], "train.setps: no such key", "did you mean 'steps'?"),
        (["--ranks", "3"], "4 is no multiple of data ranks", "use 3 or 6, or start 2 ranks"),
        (["data.manifest=/nowhere/manifest.json"], "", ""),
        (["model.vocab_size=200"], "model.vocab_size: 200 is less", "model.vocab_size=300"),
    ],
)
def test_the_user_s_mistakes_exit_2_in_three_lines_and_leave_nothing(
    make_run, arguments, what, fix
):
    run = make_run()
    code, _, complaints = run.train(*arguments)
    assert code == 2
    first, where, last = complaints.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert where.startswith("where: ")
    assert fix in last
    assert not run.directory.exists()


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(make_run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs: {mounted.stderr.decode().strip()}")
    try:
        run = make_run("disk/run", model={"hidden_size": 64}, train={"validation_every": 0})
        code, _, complaints = run.train("--ranks", "2")
        assert code == 1
        assert "No space left on device" in complaints
        saved = run.steps_saved()
        assert saved
        assert all(torch.isfinite(tensor).all() for tensor in state(run, saved[-1]).values())
        assert not list((run.directory / "checkpoints").glob(".*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
