"""``titans logs``: the right log, the first error first, and what comes, over requeues."""

import os
import threading
import time
from datetime import UTC, datetime

import pytest
from run_files import RunFiles, ToldSlurm, job, write

from launchers import logs, slurm_command
from titans_pretrain import cli
from titans_pretrain.errors import UserError


@pytest.fixture
def run(tmp_path):
    return RunFiles(tmp_path / "demo")


@pytest.fixture(autouse=True)
def slurm(monkeypatch):
    return ToldSlurm(monkeypatch)


def put(run, name, text, *, age=0.0):
    path = run.path / "logs" / name
    path.write_text(text)
    os.utime(path, (time.time() - age,) * 2)
    return path


def numbered(first, last):
    return "".join(f"line {number}\n" for number in range(first, last + 1))


def test_the_newest_jobs_log_is_printed_from_its_end(run, capfd):
    put(run, "slurm-8.log", numbered(1, 99), age=1)
    put(run, "slurm-9.log", "old\n", age=100)
    assert cli.main(["logs", str(run.path), "--lines", "3"]) == 0
    path = run.path / "logs/slurm-8.log"
    assert capfd.readouterr().out == f"==> {path} <==\n{numbered(97, 99)}"


def test_the_logs_of_other_stages_are_not_the_runs(run, capfd):
    run.job("6", "prepare")
    put(run, "slurm-7.log", "training\n", age=9)
    put(run, "slurm-6_3.log", "preparing\n")
    logs.logs(run.path)
    assert capfd.readouterr().out.endswith("training\n")


def test_a_run_of_a_sweep_shows_its_elements_log(tmp_path, capfd):
    sweep = RunFiles(tmp_path / "sweep")
    sweep.job("9", "sweep")
    run = RunFiles(sweep.path / "one")
    members = [{"overrides": [], "directory": "one"}]
    write(sweep.path / "sweep.json", {"format": "titans-sweep/1", "runs": members})
    put(sweep, "slurm-9_0.log", "one of many\n")
    put(run, "rank-0.log", "rank\n")
    run.attempt(1, job="9_0")
    for attempt in (None, 1):
        logs.logs(run.path, attempt=attempt)
        assert capfd.readouterr().out.endswith("one of many\n")


def test_the_log_of_a_job_queued_by_hand_is_where_its_attempt_tells(run, tmp_path, capfd):
    put(run, "slurm-5.log", "submitted\n", age=9)
    log = tmp_path / "slurm-titans-pretrain-7.log"
    log.write_text("by hand\n")
    run.attempt(1, job="7", log=str(log))
    run.attempt(2, job="8", log=str(tmp_path / "gone.log"))
    for attempt in (None, 1):
        logs.logs(run.path, attempt=attempt)
        assert capfd.readouterr().out == f"==> {log} <==\nby hand\n"


def test_a_run_without_jobs_shows_its_first_rank(run, capfd):
    put(run, "rank-0.log", "hello")
    logs.logs(run.path)
    assert capfd.readouterr().out.endswith("rank-0.log <==\nhello")


def test_a_ranks_log_is_printed_on_demand(run, capfd):
    put(run, "slurm-8.log", "job\n")
    put(run, "rank-3.log", "three\n")
    logs.logs(run.path, rank=3)
    assert capfd.readouterr().out.endswith("rank-3.log <==\nthree\n")


def test_a_log_that_is_not_there_is_refused_with_those_that_are(run):
    put(run, "rank-10.log", "")
    put(run, "rank-2.log", "")
    with pytest.raises(UserError, match=r"no rank-3\.log") as error:
        logs.logs(run.path, rank=3)
    assert "ranks that left one: 2, 10" in error.value.fix


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run's directory"):
        logs.logs(tmp_path)


def test_bytes_that_are_no_text_are_printed_as_they_are(run, capfdbinary):
    (run.path / "logs/rank-0.log").write_bytes(b"\xff\x00\n")
    logs.logs(run.path)
    assert capfdbinary.readouterr().out.endswith(b"<==\n\xff\x00\n")


def test_the_first_error_of_the_last_start_comes_before_the_noise(run, capfd):
    run.start("b")
    run.error("b")
    put(run, "slurm-8.log", "connection lost\n")
    logs.logs(run.path)
    out = capfd.readouterr().out
    assert out.startswith("the first error of the last start, rank 3 on node1, 2026-01-01T00:00:00")
    assert out.index("error: out of GPU memory") < out.index("connection lost")
    assert "fix: use more ranks\nin forward\n" in out


def test_the_error_of_an_earlier_start_is_not_told(run, capfd):
    run.start("b")
    run.error("a")
    put(run, "slurm-8.log", "all well\n")
    logs.logs(run.path)
    assert capfd.readouterr().out.startswith("==> ")


def started(unix):
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%dT%H:%M:%S%z start of rank 0\n")


def test_an_attempt_shows_what_the_rank_wrote_between_its_starts(run, capfd):
    run.attempt(1, begun=100.5, ended=200.0, verdict="killed")
    run.attempt(2, begun=300.5)
    put(run, "rank-0.log", started(100) + "one\n" + started(310) + "two\n" + numbered(1, 3))
    logs.logs(run.path, rank=0, attempt=1)
    assert capfd.readouterr().out.endswith(started(100) + "one\n")
    logs.logs(run.path, rank=0, attempt=2, lines=4)
    assert capfd.readouterr().out.endswith("<==\ntwo\n" + numbered(1, 3))


def test_an_attempt_in_which_the_rank_did_nothing_is_told(run):
    run.attempt(1, begun=100.5, ended=200.0, verdict="bad node")
    for text in ("", started(310)):
        put(run, "rank-0.log", text)
        with pytest.raises(UserError, match="began no work in attempt 1"):
            logs.logs(run.path, rank=0, attempt=1)


def test_an_attempt_without_a_rank_shows_its_jobs_log(run, capfd):
    run.attempt(1, job="7")
    put(run, "slurm-7.log", "seven\n", age=50)
    put(run, "slurm-8.log", "eight\n")
    logs.logs(run.path, attempt=1)
    assert capfd.readouterr().out.endswith("seven\n")


def test_an_unknown_attempt_is_refused(run):
    put(run, "rank-0.log", "")
    with pytest.raises(UserError, match="no attempt 3") as error:
        logs.logs(run.path, attempt=3)
    assert "no job of this run has begun" in error.value.fix
    with pytest.raises(UserError, match="newest attempt"):
        logs.logs(run.path, attempt=1, follow=True)


@pytest.fixture
def following(run, monkeypatch, capfd):
    """``following()`` begins to follow the run; its text so far is ``following.text()``."""
    monkeypatch.setattr(logs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(logs, "OVER_SECONDS", 0.01)

    class Following:
        printed = ""
        thread = threading.Thread(target=lambda: logs.logs(run.path, follow=True), daemon=True)

        def text(self):
            self.printed += capfd.readouterr().out
            return self.printed

        def wait_for(self, text):
            deadline = time.monotonic() + 120
            while text not in self.text():
                assert time.monotonic() < deadline, self.printed
                time.sleep(0.01)

        def end(self):
            self.thread.join(120)
            assert not self.thread.is_alive()
            return self.text()

    return Following()


def test_following_goes_over_requeues_and_new_jobs_and_ends_with_the_run(run, slurm, following):
    run.job("7")
    slurm.jobs = [job("7", "RUNNING")]
    path = put(run, "slurm-7.log", "one\n", age=5)
    following.thread.start()
    following.wait_for("one\n")
    with open(path, "a") as handle:
        handle.write("two\n")
    following.wait_for("two\n")
    slurm.jobs = [job("7", "PENDING")]
    path.rename(path.with_name("put-away"))
    put(run, "slurm-7.log", "requeued\n", age=4)
    following.wait_for("requeued\n")
    run.job("8")
    slurm.jobs = [job("8", "RUNNING")]
    put(run, "slurm-8.log", "another job\n")
    following.wait_for("slurm-8.log <==\nanother job\n")
    with open(run.path / "logs/slurm-8.log", "a") as handle:
        handle.write("last words\n")
    slurm.jobs = [job("8", "COMPLETED")]
    assert following.end().endswith("last words\n")


def test_logs_that_are_written_in_turns_are_followed_without_repetition(run, slurm, following):
    run.job("7")
    slurm.jobs = [job("7", "RUNNING")]
    old = put(run, "slurm-6.log", "before\n", age=100)
    new = put(run, "slurm-7.log", "first\n", age=50)
    following.thread.start()
    following.wait_for("first\n")
    for path, text in ((old, "a\n"), (new, "b\n"), (old, "c\n"), (new, "d\n")):
        with open(path, "a") as handle:
            handle.write(text)
        following.wait_for(f"{path.name} <==\n{text}")
    slurm.jobs = []
    printed = following.end()
    assert "before" not in printed
    words = [line for line in printed.splitlines() if line and not line.startswith("==>")]
    assert words == ["first", "a", "b", "c", "d"]


def test_where_slurm_does_not_answer_a_queued_run_is_not_over(run, slurm, following):
    slurm.answers = False
    run.job("7")
    following.thread.start()
    following.wait_for("rank-0.log <==\n")
    time.sleep(0.2)
    assert following.thread.is_alive()
    run.attempt(1, job="7", ended=200.0, verdict="done", action="finish")
    following.end()


def test_following_waits_for_the_log_of_a_queued_job(run, slurm, following):
    run.job("7")
    slurm.jobs = [job("7", "PENDING")]
    following.thread.start()
    following.wait_for("rank-0.log <==\n")
    put(run, "slurm-7.log", "begun\n")
    following.wait_for("slurm-7.log <==\nbegun\n")
    slurm.jobs = []
    following.end()


def test_following_a_run_that_is_over_and_left_no_log_is_refused(run):
    with pytest.raises(UserError, match=r"no rank-0\.log"):
        logs.logs(run.path, follow=True)


def test_a_log_that_was_cut_is_followed_from_its_beginning(run, slurm, following):
    run.job("7")
    slurm.jobs = [job("7", "RUNNING")]
    put(run, "slurm-7.log", numbered(1, 9))
    following.thread.start()
    following.wait_for("line 9\n")
    put(run, "slurm-7.log", "new\n")
    following.wait_for("new\n")
    slurm.jobs = []
    following.end()


def test_following_a_run_without_slurm_ends_when_its_ranks_have_ended(run, following, monkeypatch):
    monkeypatch.setattr(slurm_command, "available", lambda: False)
    run.start("b")
    put(run, "rank-0.log", "step 1\n")
    following.thread.start()
    following.wait_for("step 1\n")
    assert following.thread.is_alive()
    run.outcome("b", "done")
    following.end()


def test_where_slurm_does_not_answer_a_requeued_run_is_not_over(run, slurm, following):
    slurm.answers = False
    run.attempt(1, ended=200.0, verdict="killed", action="requeue")
    put(run, "slurm-7.log", "killed\n")
    following.thread.start()
    following.wait_for("killed\n")
    time.sleep(0.2)
    assert following.thread.is_alive()
    run.attempt(2, ended=200.0, verdict="done", action="finish")
    following.end()
