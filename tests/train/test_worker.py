"""What a rank reports when it fails."""

import contextlib
import io
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from launchers import judge
from launchers.steps import StepEnd
from titans_pretrain import config
from titans_pretrain.errors import StoppedEarly, TitansError, UserError
from titans_pretrain.parallel.devices import OtherRankFailed
from titans_pretrain.parallel.rendezvous import MissingRanks
from titans_pretrain.train import worker
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import StopRequest


@pytest.fixture
def make_worker(tmp_path, monkeypatch):
    settings = config.resolve(
        {
            "model": {},
            "data": {"manifest": "m", "sequence_length": 8},
            "train": {"steps": 4, "global_batch_size": 1, "learning_rate": 1.0},
            "run": {"directory": str(tmp_path)},
        },
        source="test",
    )

    def make(rank, *, prepared=True):
        monkeypatch.setenv("RANK", str(rank))
        made = worker.Worker(settings, StopRequest())
        made._log = tmp_path / "logs" / f"rank-{rank}.log" if prepared else None
        return made

    return make


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


def test_the_first_failure_is_printed_and_kept_and_later_ones_are_only_logged(
    make_worker, tmp_path, capsys
):
    error = raised(TitansError("the loss is nan", where="rank 1", fix="look"))
    assert make_worker(1).report(error) == 1
    assert make_worker(0).report(raised(ConnectionError("peer closed"))) == 1
    kept = json.loads((tmp_path / "error.json").read_text())
    assert (kept["rank"], kept["what"], kept["exit_code"]) == (1, "the loss is nan", 1)
    assert any("raise error" in line for line in kept["traceback"])
    complaints = capsys.readouterr().err
    assert "error: the loss is nan" in complaints
    assert "error: ConnectionError: peer closed" not in complaints


def test_an_unexpected_failure_tells_its_rank_and_where_the_traceback_is(make_worker, capsys):
    assert make_worker(3).report(raised(RuntimeError("bad\nthing"))) == 1
    lines = capsys.readouterr().err.splitlines()
    first = lines.index("error: RuntimeError: bad")
    assert lines[first + 1].startswith("where: rank 3 on ")
    assert lines[first + 2].endswith("logs/rank-3.log")


def test_an_unexpected_failure_without_a_log_tells_its_traceback_after_its_error(
    make_worker, capsys
):
    assert make_worker(0, prepared=False).report(raised(RuntimeError("bad"))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: RuntimeError: bad"
    assert lines[2].startswith("Traceback")


def test_running_out_of_gpu_memory_says_what_helps(make_worker, capsys):
    assert make_worker(0).report(raised(torch.OutOfMemoryError("CUDA"))) == 1
    assert "lower train.micro_batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:9"),
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
    ],
)
def test_the_death_of_another_rank_is_told_as_such_with_the_place(make_worker, capsys, error):
    made = make_worker(2)
    made._whereabouts.enter("backward", step=7, micro_batch=1)
    assert made.report(raised(error)) == 1
    lines = capsys.readouterr().err.splitlines()
    first = lines.index(f"error: the connection to another rank is lost: {error}")
    assert lines[first + 1].endswith(": backward, step 7, micro-batch 1")
    assert "--resume" in lines[first + 2]


def test_the_user_s_mistake_has_no_traceback_and_exits_2(make_worker, capsys):
    assert make_worker(0, prepared=False).report(raised(UserError("no file"))) == 2
    assert capsys.readouterr().err == "error: no file\n"


def test_a_failure_told_by_another_rank_is_not_told_again(make_worker, tmp_path, capsys):
    error = OtherRankFailed(UserError("no file"), 0)
    assert make_worker(1, prepared=False).report(raised(error)) == 2
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "error.json").exists()


def test_an_early_stop_is_told_by_rank_0_and_is_no_failure(make_worker, tmp_path, capsys):
    for rank in (0, 1):
        assert make_worker(rank).report(raised(StoppedEarly("stopped"))) == 75
    assert capsys.readouterr().err == "error: stopped\n"
    assert not (tmp_path / "error.json").exists()


def missing(rank):
    error = MissingRanks("rank 5 on n2 did not come")
    error.rank, error.host = rank, "n2"
    return raised(error)


def test_missing_ranks_are_kept_with_their_host_for_the_job_s_attempt(
    make_worker, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TITANS_ATTEMPT", "3")
    assert make_worker(1, prepared=False).report(missing(None)) == 75
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "error.json").exists()
    assert make_worker(0, prepared=False).report(missing(5)) == 75
    assert capsys.readouterr().err == "error: rank 5 on n2 did not come\n"
    assert judge.failure(RunDirectory(tmp_path), 3).items() >= {"rank": 5, "host": "n2"}.items()
    situation = judge.Situation(3, 0, 10, "", ["n1", "n2"])
    outcome = judge.outcome(RunDirectory(tmp_path), situation, StepEnd(75))
    assert outcome.suspects == ("n2",)


@pytest.mark.parametrize("attempt", ["", "2"])
def test_missing_ranks_of_a_start_that_does_not_hold_the_run_are_only_told(
    make_worker, tmp_path, capsys, monkeypatch, attempt
):
    if attempt:
        monkeypatch.setenv("TITANS_ATTEMPT", attempt)
    (tmp_path / ".lock").write_text('{"start": "one", "attempt": 3}')
    assert make_worker(0, prepared=False).report(missing(5)) == 75
    assert capsys.readouterr().err == "error: rank 5 on n2 did not come\n"
    assert not (tmp_path / "error.json").exists()


def test_a_job_gives_late_ranks_less_than_its_start_takes_and_others_the_default(
    make_worker, monkeypatch
):
    assert make_worker(0).patience is None
    monkeypatch.setenv("TITANS_ATTEMPT", "3")
    made = make_worker(0)
    assert 600 < made.patience.total_seconds() < made._config.job.start_seconds == 1800


def test_ranks_with_other_configurations_are_refused():
    worker._check_equal(["a", "a"])
    with pytest.raises(UserError, match="rank 1 has another configuration"):
        worker._check_equal(["a", "b"])


def test_a_closed_terminal_is_dropped_and_the_log_goes_on(make_worker, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    made = make_worker(0)
    with os.fdopen(writer, "w") as made._terminal:
        made._tell("step 1")
        made._tell("step 2")
    assert capsys.readouterr().out == "step 1\nstep 2\n"


def test_a_failure_is_reported_by_its_code_though_the_terminal_is_closed(make_worker, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    made = make_worker(0)
    with os.fdopen(writer, "w") as made._complaints:
        assert made.report(raised(UserError("no file"))) == 2
    assert (tmp_path / "error.json").exists()


@pytest.fixture
def fill(monkeypatch):
    """``fill()``: the log is on a full disk from now on."""
    with contextlib.ExitStack() as stack:

        def fill():
            for name in ("stdout", "stderr"):
                stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - the stack closes it
                stack.enter_context(contextlib.suppress(OSError))
                stack.callback(stream.close)
                monkeypatch.setattr(sys, name, stream)

        yield fill
        monkeypatch.undo()


def test_a_full_disk_does_not_hide_a_failure(make_worker, fill):
    made = make_worker(0)
    fill()
    made._terminal = made._complaints = io.StringIO()
    made._tell("step 1")
    assert made.report(raised(RuntimeError("bad"))) == 1
    assert made._complaints.getvalue().startswith("step 1\nerror: RuntimeError: bad\n")


class Left(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(("report", "code"), [(lambda error: 2, 2), (lambda error: 1 // 0, 1)])
def test_a_rank_that_failed_ends_whatever_becomes_of_its_report(
    make_worker, fill, monkeypatch, report, code
):
    def leave(code):
        raise Left(code)

    def fail():
        raise ValueError

    made = make_worker(0)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(made, "report", report)
    monkeypatch.setattr(worker, "Worker", lambda config, stop: made)
    monkeypatch.setattr(worker.devices, "local_device", fail)
    fill()
    sys.stdout.write("does not fit")
    with pytest.raises(Left) as caught:
        worker.work(made._config, resume=False, stop=made._stop)
    assert caught.value.args == (code,)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(make_worker, tmp_path):
    made = make_worker(0)
    made._directory.create()
    made._directory.begin(made._config, "f")
    damaged = tmp_path / "checkpoints" / "step-3"
    damaged.mkdir()
    with pytest.raises(TitansError, match=r"no good checkpoint: .*step-3 is damaged") as caught:
        made._open(resume=True)
    assert caught.value.exit_code == 1
    assert caught.value.where == str(damaged.parent)
    damaged.rmdir()
    made._lease.release()
    notes, checkpoint = made._open(resume=True)
    assert checkpoint is None
    assert notes[-1] == "starting at step 0"


class Unwatched:
    def begin(self, work):
        pass

    def end(self):
        pass


@pytest.fixture
def resumed(make_worker, tmp_path, monkeypatch):
    """``resumed(step, trainer)``: runs a rank that goes on from ``step`` with that trainer."""

    def run(step, trainer):
        made = make_worker(0)
        made._directory.create()
        made._directory.config.write_text("before")
        data = SimpleNamespace(corpus=SimpleNamespace(fingerprint="f"))
        monkeypatch.setattr(worker, "open_data", lambda config: data)
        monkeypatch.setattr(worker, "Parallel", lambda *arguments, **more: None)
        monkeypatch.setattr(worker, "check_mesh", lambda *arguments: None)
        monkeypatch.setattr(worker, "Trainer", lambda *arguments: trainer)
        monkeypatch.setattr(made, "_open", lambda resume: ([], tmp_path / f"step-{step}"))
        monkeypatch.setattr(made, "_redirect", lambda: None)
        monkeypatch.setattr(made, "_start_watch", lambda: Unwatched())
        monkeypatch.setattr(made, "_start_heartbeat", lambda: Unwatched())
        made.run(torch.device("cpu"), resume=True)

    return run


class RefusingTrainer:
    def restore(self, path):
        raise UserError("other data")


class WillingTrainer:
    def restore(self, path):
        pass

    def run(self):
        pass


def test_a_resume_that_is_refused_leaves_the_run_s_configuration(resumed, tmp_path):
    with pytest.raises(UserError, match="other data"):
        resumed(3, RefusingTrainer())
    assert (tmp_path / "config.yaml").read_text() == "before"


def test_a_finished_run_keeps_its_configuration(resumed, tmp_path):
    resumed(4, WillingTrainer())
    assert (tmp_path / "config.yaml").read_text() == "before"


def test_a_resumed_run_writes_its_configuration(resumed, tmp_path):
    resumed(3, WillingTrainer())
    assert config.load(tmp_path / "config.yaml").train.steps == 4
    assert json.loads((tmp_path / "data.json").read_text()) == {"fingerprint": "f"}
