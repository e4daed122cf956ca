"""The records of a run's attempts."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from launchers import history, opening
from launchers.history import Attempt
from launchers.slurm_utils import Allocation
from titans_pretrain.errors import TitansError
from titans_pretrain.train.directory import RunDirectory


def attempt(number, job="7"):
    return Attempt(number, job, 0, "a1", ("a1", "a2"), begun=100.0, step_from=5)


def test_a_run_without_attempts_has_none(tmp_path):
    assert history.attempts(tmp_path) == []
    assert history.attempts(tmp_path / "nowhere") == []


def test_an_attempt_is_read_as_it_was_claimed_and_as_it_ended(tmp_path):
    one = attempt(1)
    assert history.claim(tmp_path, one)
    assert history.attempts(tmp_path) == [one]
    ended = replace(one, ended=160.0, step_to=9, verdict="hang", suspects=("a2",), next_job="8")
    history.write(tmp_path, ended)
    assert history.attempts(tmp_path) == [ended]


def test_a_claimed_attempt_tells_its_jobs_name_and_the_file_it_writes_to(tmp_path):
    allocation = Allocation("7", "anything", ["a1"], [1], 0, "main")
    log, terminal = tmp_path / "job.log", os.dup(1)
    try:
        for place in (log, "/dev/null"):
            with open(place, "w") as handle:
                os.dup2(handle.fileno(), 1)
            opening.claim(RunDirectory(tmp_path), allocation, history.attempts(tmp_path))
    finally:
        os.dup2(terminal, 1)
        os.close(terminal)
    first, second = history.attempts(tmp_path)
    assert (first.name, first.log) == ("anything", str(log))
    assert (second.name, second.log) == ("anything", "")


def test_of_jobs_that_claim_the_same_attempt_one_gets_it(tmp_path):
    history.directory(tmp_path).mkdir()
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda job: history.claim(tmp_path, attempt(1, str(job))), range(8)))
    assert got.count(True) == 1
    assert history.attempts(tmp_path)[0].job == str(got.index(True))


def test_attempts_come_by_number_and_other_files_are_no_attempts(tmp_path):
    for number in (10, 9, 1):
        history.claim(tmp_path, attempt(number))
    (history.directory(tmp_path) / "attempt-2.json.bak").write_text("x")
    history.evidence(tmp_path, 9).mkdir()
    assert [one.number for one in history.attempts(tmp_path)] == [1, 9, 10]


@pytest.mark.parametrize("text", ["{", "[]", '{"number": 1}', '{"number": 2}'])
def test_a_record_that_is_none_is_named(tmp_path, text):
    history.claim(tmp_path, attempt(1))
    path = history.directory(tmp_path) / "attempt-1.json"
    path.write_text(text)
    with pytest.raises(TitansError, match="attempt 1 cannot be read") as error:
        history.attempts(tmp_path)
    assert error.value.where == str(path)


@pytest.mark.parametrize("text", ["", "\0\0\0\0"])
def test_an_attempt_whose_record_a_power_cut_emptied_was_killed(tmp_path, text):
    history.claim(tmp_path, attempt(1))
    (history.directory(tmp_path) / "attempt-1.json").write_text(text)
    (lost,) = history.attempts(tmp_path)
    assert (lost.verdict, lost.progress) == ("killed", False)
    assert lost.ended is not None


def test_a_claim_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append("file") or fsync(handle))
    monkeypatch.setattr(os, "link", lambda *names: synced.append("link") or link(*names))
    assert history.claim(tmp_path, attempt(1))
    assert synced == ["file", "link", "file"]


def test_a_claim_whose_answer_was_lost_is_ones_own(tmp_path, monkeypatch):
    link = os.link

    def repeated(*names):
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", repeated)
    assert history.claim(tmp_path, attempt(1))
    assert not history.claim(tmp_path, attempt(1, "8"))
    assert history.attempts(tmp_path)[0].job == "7"


def test_an_attempt_in_one_line(tmp_path):
    one = replace(attempt(3), restart=2)
    assert one.line() == "attempt 3 (job 7, restart 2): open, from step 5"
    ended = replace(one, ended=160.0, step_to=9, lost_steps=2, verdict="hang", reason="rank 1")
    assert ended.line() == (
        "attempt 3 (job 7, restart 2): hang, steps 5 to 9 in 1.0 min, 2 steps lost: rank 1"
    )
    assert replace(ended, suspects=("a2",)).line().endswith("; suspected: a2")
