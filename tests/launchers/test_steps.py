"""One step: when it is asked, told and ended, and what its ranks are given."""

import os
import signal
import sys
import threading

import pytest

from launchers import steps
from launchers.steps import Limits, Silence, Step


def step_of(
    code, asked, *, beats=dict, told=lambda: False, limits=None, kept=None, forward=None, ours=True
):
    return Step(
        [sys.executable, "-c", code],
        os.environ,
        beats=beats,
        ended=told,
        asked=asked,
        is_ours=lambda: ours,
        forward=forward or (lambda process, name: process.terminate()),
        limits=limits or Limits(60),
        save_evidence=(kept if kept is not None else []).append,
    ).run()


def test_a_step_that_ends_by_itself_has_its_exit_code(asked):
    end = step_of("import sys; sys.exit(7)", asked)
    assert (end.code, end.why, end.suspects) == (7, "", ())


def test_ranks_are_asked_once_where_the_signal_before_the_limit_is_late_or_lost(asked):
    told = []
    limits = Limits(60, is_due=lambda: True)

    def forward(process, name):
        told.append(name)
        if len(told) == 1:
            threading.Timer(2.0, process.terminate).start()

    step_of("import time; time.sleep(60)", asked, limits=limits, forward=forward)
    assert len(told) == 1


def test_ranks_records_are_read_no_more_often_than_they_are_written(asked):
    looks = []
    beats = lambda: looks.append(1) or {}  # noqa: E731
    step_of("import time; time.sleep(2.5)", asked, beats=beats)
    assert len(looks) == 1


def test_a_look_that_takes_long_counts_as_silence(asked, monkeypatch):
    step = Step(
        [], {}, beats=dict, ended=lambda: False, asked=asked, is_ours=lambda: True,
        forward=lambda process, name: None, limits=Limits(25.0), save_evidence=print,
    )  # fmt: skip
    clock = iter([0.0, 0.0, 20.0, 40.0, 60.0])
    monkeypatch.setattr(steps.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(steps.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(steps, "_kill", lambda process: None)
    monkeypatch.setattr(step, "_keeps", lambda process: True)
    running = type("Running", (), {"poll": lambda self: None})()
    assert "within 25 s" in step._watch(running)
    assert next(clock) == 60.0


def test_a_signal_is_forwarded_once(asked):
    told = []

    def forward(process, name):
        told.append(name)
        process.terminate()

    os.kill(os.getpid(), signal.SIGUSR1)
    assert step_of("import time; time.sleep(60)", asked, forward=forward).code == -15
    assert told == ["SIGUSR1"]


@pytest.mark.parametrize(
    ("limits", "told", "beats", "why"),
    [
        (Limits(0.5), False, {}, "within 0.5 s of the start"),
        (Limits(60), True, {}, "after its ranks told their end"),
        (Limits(60), False, {0: {"time": 1, "host": "a1"}}, "no rank gave a sign of life for"),
        (Limits(60, is_over=lambda: True), False, {}, "before the time limit"),
    ],
)
def test_a_step_is_ended_from_outside(asked, monkeypatch, limits, told, beats, why):
    monkeypatch.setattr(steps, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(steps, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(steps, "ENDING_SECONDS", 1.0)
    kept = []
    code = "import time; time.sleep(60)"
    end = step_of(code, asked, beats=lambda: beats, told=lambda: told, limits=limits, kept=kept)
    assert why in end.why
    assert kept == ([] if limits.is_over() else [end.why])
    assert end.code == -15
    assert end.late == limits.is_over()


@pytest.mark.parametrize("cause", ["signal", "end", "frozen"])
def test_the_step_of_a_later_start_is_neither_told_nor_ended(asked, monkeypatch, tmp_path, cause):
    """srun tells a helper of its end, which then ends the step by its number."""
    srun = "import os, sys, time; out, into = os.pipe(); child = os.fork() == 0\n"
    srun += "if child: os.close(into); os.read(out, 1); open(sys.argv[1], 'w')\n"
    path = tmp_path / "the successor's step is ended"
    srun = srun.replace("sys.argv[1]", repr(str(path))) + "else: time.sleep(60)\n"
    if cause == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    if cause == "frozen":
        monkeypatch.setattr(steps, "FROZEN_SECONDS", 0.1)
    told, kept = [], []
    limits = Limits(1.0 if cause == "end" else 60)
    forward = lambda process, name: told.append(name)  # noqa: E731
    end = step_of(srun, asked, limits=limits, kept=kept, forward=forward, ours=False)
    assert (end.code, told, kept) == (-signal.SIGKILL, [], [])
    assert "another start" in end.why
    assert not path.exists()


def test_the_first_task_that_died_is_told_and_its_node_suspected_if_it_was_killed(asked):
    lines = [
        "srun: error: a2: task 3: Killed",
        "srun: launch/slurm: _step_signal: Terminating StepId=2.0",
        "srun: error: a1: tasks 0-1: Killed",
    ]
    code = "import sys; sys.stderr.write({!r}); sys.exit(137)"
    end = step_of(code.format("\n".join([*lines, ""])), asked)
    assert (end.told, end.suspects) == (lines[0], ("a2",))
    told = step_of("import sys; sys.stderr.write('x\\nerror: no data\\nwhere: here\\n')", asked)
    assert told.error == "no data"
    lines[0] = "srun: error: a2: task 3: Exited with exit code 1"
    assert step_of(code.format("\n".join([*lines, ""])), asked).suspects == ()


def test_silence_is_measured_by_the_longest_so_far():
    silence = Silence()
    silence.add({0: {"time": 1.0, "host": "a1"}, 1: {"time": 1.0, "host": "a2"}}, 1.0)
    assert (silence.begun, silence.seconds, silence.limit) == (True, 0.0, steps.SILENT_SECONDS)
    silence.add({0: {"time": 1.0, "host": "a1"}}, 20.0)
    assert silence.seconds == 20.0
    silence.add({0: {"time": 2.0, "host": "a1"}}, 1.0)
    assert (silence.seconds, silence.limit) == (0.0, 210.0)
    silence.add({0: {"time": 3.0, "host": "a1"}}, 100.0)
    assert silence.nodes() == ["a2"]


def test_ranks_do_not_meet_where_the_shell_that_submits_was_told():
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    others = dict.fromkeys((*names, "MASTER_ADDR", "MASTER_PORT"), "7")
    rest = {"attempt": 1, "end": None, "preempt_seconds": None, "cpus_per_rank": 1}
    assert not others.keys() & steps.rank_environment(others, {}, **rest).keys()
    given = steps.rank_environment(others, {"MASTER_ADDR": "ib0.a1"}, **rest)
    assert given["MASTER_ADDR"] == "ib0.a1"


def test_ranks_are_told_of_their_attempt_and_their_end():
    given = steps.rank_environment(
        {"OMP_NUM_THREADS": "3", "HOME": "/h"},
        {"NCCL_DEBUG": "WARN"},
        attempt=4,
        end=1234.5,
        preempt_seconds=None,
        cpus_per_rank=8,
    )
    assert given["TITANS_ATTEMPT"] == "4"
    assert given["TITANS_JOB_END"] in ("1234", "1235")
    assert (given["OMP_NUM_THREADS"], given["NCCL_DEBUG"], given["HOME"]) == ("3", "WARN", "/h")
    assert "TITANS_PREEMPT_SECONDS" not in given
    rest = {"attempt": 4, "end": None, "preempt_seconds": 30.0, "cpus_per_rank": 8}
    given = steps.rank_environment({}, {}, **rest)
    assert (given["OMP_NUM_THREADS"], given["TITANS_PREEMPT_SECONDS"]) == ("8", "30")
    assert "TITANS_JOB_END" not in given
