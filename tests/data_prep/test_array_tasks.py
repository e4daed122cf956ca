"""Tasks of an array: each does its part, together they do everything once."""

import json
import threading
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import rows, write_jsonl
from outputs import content, documents

from data_prep import batch, manifest, plan, progress, task, verify
from titans_pretrain.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    """Twelve units of 50 documents."""
    pq.write_table(pa.Table.from_pylist(rows(600)), tmp_path / "a.parquet", row_group_size=50)
    return tmp_path / "a.parquet"


@pytest.fixture
def array(freeze, corpus):
    """Prepares into so many tasks, in a given order."""

    def run(tasks, order=None, name="out", **settings):
        settings = {"shard_bytes": 4000, "member_tokens": 256, "held_out": 0.1} | settings
        output = freeze(corpus, name, tasks=tasks, **settings)
        for number in order or range(tasks):
            done = task.prepare(output, number)
        return output, done

    return run


def test_tasks_in_any_order_leave_what_their_number_determines(array):
    one, first = array(3, (2, 0, 1), "scattered")
    other, second = array(3, name="ordered")
    assert first == second
    assert content(one) == content(other)


def test_documents_and_tokens_are_the_same_for_every_number_of_tasks(array):
    found = {}
    for tasks in (1, 3, 8):
        output, done = array(tasks, name=f"of-{tasks}")
        verify.verify(output)
        found[tasks] = (
            *(Counter(map(tuple, documents(output, kind))) for kind in ("shards", "held_out")),
            *(done[key] for key in ("tokens", "held_out_tokens", "documents", "unigram_entropy")),
        )
        assert sum(found[tasks][0].values()) + sum(found[tasks][1].values()) == 600
    assert found[1] == found[3] == found[8]


def test_the_last_task_to_finish_merges(array, freeze, corpus):
    output = freeze(corpus, tasks=3)
    assert [task.prepare(output, number) is None for number in (2, 0, 1)] == [True, True, False]
    assert manifest.load(output / "manifest.json")["tasks"] == 3


def test_a_task_without_units_is_finished_too(array, freeze, tmp_path):
    pq.write_table(pa.Table.from_pylist(rows(20)), tmp_path / "small.parquet")
    output = freeze(tmp_path / "small.parquet", "small", tasks=3)
    for number in range(3):
        done = task.prepare(output, number)
    assert done["documents"]["kept"] == 20
    verify.verify(output)


def test_a_task_beyond_the_plan_is_refused(array):
    output, _ = array(3)
    with pytest.raises(UserError, match="task 3 of 3") as caught:
        task.prepare(output, 3)
    assert caught.value.fix == "use 0 to 2"


def test_a_task_looks_at_the_inputs_that_it_reads_and_at_no_others(freeze, tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", rows(30, ord(name)))
    output = freeze(tmp_path / "[ab].jsonl", tasks=2)
    frozen, _ = plan.load(output)
    own = [frozen.task_units(number)[0][1] for number in range(2)]
    (tmp_path / own[1].name).write_text("{}")
    task.prepare(output, 0)
    with pytest.raises(UserError, match=f"the planned input {own[1].name} has other content now"):
        task.prepare(output, 1)


def test_a_running_task_tells_how_far_it_is(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.0)
    told = progress.Progress(tmp_path, 3, 8, 100, done=10, tokens=1000)
    path = progress.progress_file(tmp_path, 3)
    told.update(10, 1000, 5)
    told.beat()
    assert "task 3 of 8: 10/100 units" in capfd.readouterr().err
    told.update(40, 5000, 50)
    told.beat()
    line = capfd.readouterr().err
    assert "task 3 of 8: 40/100 units, 0.01 M tokens" in line
    assert "ETA 00:00:0" in line
    state = json.loads(path.read_text())
    assert (state["units_done"], state["units"], state["tokens"]) == (40, 100, 5000)
    assert (state["state"], state["error"]) == ("running", None)
    assert state["updated"] >= state["started"]
    told.fail(UserError("the file x is damaged"))
    state = json.loads(path.read_text())
    assert (state["state"], state["error"]) == ("failed", "the file x is damaged")
    told.end()
    assert not path.parent.exists()


def test_a_task_that_waits_for_a_long_unit_still_tells_that_it_lives(freeze, corpus, monkeypatch):
    monkeypatch.setattr(progress, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.0)
    output, real = freeze(corpus), batch.Encoding._batch
    path, times = progress.progress_file(output, 0), []

    def slow(self, *rest):
        if len(times) < 3:
            path.unlink(missing_ok=True)
            deadline = time.monotonic() + 20
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            times.append(json.loads(path.read_text())["updated"])
        return real(self, *rest)

    monkeypatch.setattr(batch.Encoding, "_batch", slow)
    task.prepare(output, 0, workers=0)
    assert times == sorted(times)
    assert not path.parent.exists()


def test_the_last_word_of_a_failed_task_is_its_error(freeze, corpus, monkeypatch):
    monkeypatch.setattr(progress, "BEAT_SECONDS", 0.0001)
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.0)

    def fails(*_):
        time.sleep(0.01)
        raise UserError("the file x is damaged")

    output = freeze(corpus)
    monkeypatch.setattr(batch.Encoding, "_batch", fails)
    with pytest.raises(UserError):
        task.prepare(output, 0, workers=0)
    word = json.loads(progress.progress_file(output, 0).read_text())
    assert (word["state"], word["error"]) == ("failed", "the file x is damaged")
    assert not [one for one in threading.enumerate() if "_beat_on" in one.name]


def test_the_rate_counts_this_run_alone(tmp_path, monkeypatch):
    clock = iter([100.0] * 3 + [110.0] * 9)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    told = progress.Progress(tmp_path, 0, 1, 10, tokens=1_000_000)
    told.update(5, 3_000_000, 0)
    assert told._rate() == 200_000


def test_a_progress_file_that_cannot_be_written_does_not_stop_the_work(array, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.progress").write_text("in the way")
    _, done = array(1)
    assert done["documents"]["kept"] == 600
