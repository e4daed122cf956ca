"""What a rank reports when it fails."""

import json

import pytest
import torch

from titans_pretrain import config
from titans_pretrain.errors import StoppedEarly, TitansError, UserError
from titans_pretrain.parallel.devices import OtherRankFailed
from titans_pretrain.train import worker


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
        made = worker.Worker(settings)
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


def test_running_out_of_gpu_memory_says_what_helps(make_worker, capsys):
    assert make_worker(0).report(raised(torch.OutOfMemoryError("CUDA"))) == 1
    assert "lower train.micro_batch_size" in capsys.readouterr().err


def test_the_user_s_mistake_has_no_traceback_and_exits_2(make_worker, capsys):
    assert make_worker(0, prepared=False).report(raised(UserError("no file"))) == 2
    assert capsys.readouterr().err == "error: no file\n"


def test_a_failure_told_by_another_rank_is_not_told_again(make_worker, tmp_path, capsys):
    error = OtherRankFailed(UserError("no file"), 0)
    assert make_worker(1, prepared=False).report(raised(error)) == 2
    assert "error: no file\n" not in capsys.readouterr().err.partition("Traceback")[0]
    assert not (tmp_path / "error.json").exists()


def test_an_early_stop_is_told_by_rank_0_and_is_no_failure(make_worker, tmp_path, capsys):
    for rank in (0, 1):
        assert make_worker(rank).report(raised(StoppedEarly("stopped"))) == 75
    assert capsys.readouterr().err == "error: stopped\n"
    assert not (tmp_path / "error.json").exists()


def test_ranks_with_other_configurations_are_refused():
    worker._check_equal(["a", "a"])
    with pytest.raises(UserError, match="rank 1 has another configuration"):
        worker._check_equal(["a", "b"])
