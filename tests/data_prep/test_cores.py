"""Jobs in other processes: all are done, failures come back, nobody stays behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from data_prep import cores
from data_prep.cores import on_cores
from titans_pretrain.errors import TitansError, UserError


class Write:
    def __init__(self, path):
        self.path = path

    def __call__(self):
        with open(self.path, "x") as handle:
            handle.write("done")


class Broken:
    def __init__(self, how):
        self.how = how

    def __call__(self):
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "bad":
            raise UserError("a bad row", where="a.jsonl:3", fix="mend it")


def test_what_a_job_raises_in_a_worker_is_raised_here():
    with pytest.raises(UserError, match="a bad row") as caught:
        on_cores([Broken(""), Broken("bad"), Broken("")], 2, "testing")
    assert caught.value.where == "a.jsonl:3"


def test_a_killed_worker_is_told():
    with pytest.raises(TitansError, match="a worker process was killed while testing"):
        on_cores([Broken(""), Broken("killed"), Broken("")], 2, "testing")


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "waiting.py").write_text(
        "import os, sys, time\nfrom data_prep.cores import on_cores\n\n\n"
        "def job():\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n\n\n"
        "if __name__ == '__main__':\n    import waiting\n"
        "    on_cores([waiting.job] * 2, 2, 'waiting')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "waiting.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(lives, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_job_is_done_once_with_or_without_processes(tmp_path):
    for workers in (0, 1, 2, None):
        on_cores([Write(tmp_path / f"{workers}-{n}") for n in range(5)], workers, "testing")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"done"}
    assert len(list(tmp_path.iterdir())) == 20


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(cores, "PROGRESS_SECONDS", 0)
    on_cores([Broken("")] * 3, 0, "hashing texts")
    assert "hashing texts: 2/3, ETA 00:00:0" in capsys.readouterr().err
