import json
import os
import time

import pytest
from made_up import rows, write_jsonl

from data_prep import status
from data_prep.progress import Progress, progress_file
from titans_pretrain import cli
from titans_pretrain.errors import UserError


@pytest.fixture
def output(prepare, corpus):
    """A plan of four tasks of one unit, of which task 1 is finished."""
    return prepare(corpus, task=1, tasks=4)[0]


def tell(output, task, *, updated=1000.0, **change):
    """What a running task told of itself, at a time of the file server's clock."""
    path = progress_file(output, task)
    path.parent.mkdir(exist_ok=True)
    own = {
        "host": "node7",
        "pid": 42,
        "started": 900.0,
        "updated": 5e9,
        "units_done": 0,
        "units": 1,
        "tokens": 0,
        "documents": 0,
        "rate": 0.0,
        "state": "running",
        "error": None,
    }
    path.write_text(json.dumps(own | change))
    os.utime(path, (updated, updated))


def states(told):
    return [task["state"] for task in told["tasks"]]


def test_each_task_is_finished_running_silent_failed_or_waiting(output):
    tell(output, 0, updated=990.0)
    tell(output, 2, updated=939.0)
    told = status.facts(output, now=1000.0)
    assert states(told) == ["running", "finished", "silent", "waiting"]
    tell(output, 3, state="failed", error="disk full", updated=1.0)
    told = status.facts(output, now=1000.0)
    assert states(told) == ["running", "finished", "silent", "failed"]
    assert told["states"] == {"finished": 1, "running": 1, "silent": 1, "failed": 1, "waiting": 0}
    lines = status.text(told).splitlines()
    assert lines[1].split()[:3] == ["0", "running", "0/1"]
    assert lines[2].endswith("node7:42, nothing for 61 s")
    assert lines[3].endswith("node7:42: disk full")
    assert lines[4] == "finished: 1"


def test_stopped_tasks_come_with_the_command_that_goes_on(output):
    tell(output, 2, updated=0.0)
    assert status.facts(output, 1000.0)["redo"] == f"titans data prepare --output {output} --task 2"
    tell(output, 3, state="failed", error="disk full")
    redo = status.facts(output, 1000.0)["redo"]
    assert redo == f"sbatch --array=2-3 --wrap 'titans data prepare --output {output}'"
    assert status.text(status.facts(output, 1000.0)).endswith(f"to go on: {redo}")


def test_rates_and_times_left_are_of_each_task_and_of_all(freeze, corpus):
    output = freeze(corpus, tasks=1)
    tell(output, 0, units=4, units_done=1, tokens=1000, rate=10.0)
    told = status.facts(output, 1000.0)
    assert told["tasks"][0]["eta"] == pytest.approx(300.0)
    assert (told["units"], told["units_done"], told["rate"]) == (4, 1, 10.0)
    assert "25.0% of 4 units, 1 K tokens of 167 K expected, 10 tokens/s, ETA 00:05:00" in (
        status.text(told)
    )


def test_the_whole_array_goes_at_the_rate_of_the_tasks_that_run_now(freeze, corpus):
    output = freeze(corpus, tasks=2)
    for task in (0, 1):
        tell(output, task, units=2, units_done=1, tokens=1000, rate=10.0)
    assert status.facts(output, 1000.0)["eta"] == pytest.approx(100.0)
    assert status.facts(output, 2000.0)["eta"] is None


@pytest.mark.parametrize(
    "word", [{"state": "failed", "error": "killed"}, {"updated": 0.0}], ids=["failed", "silent"]
)
def test_a_finished_task_counts_whole_whatever_an_old_word_says(output, word):
    tell(output, 1, **word)
    told = status.facts(output, 1000.0)["tasks"][1]
    assert (told["state"], told["units_done"], told["error"]) == ("finished", 1, None)
    assert told["tokens"] > 0


def test_a_finished_task_that_is_being_mended_runs(output):
    tell(output, 1)
    assert states(status.facts(output, 1000.0))[1] == "running"


def test_a_task_that_a_signal_stopped_keeps_what_its_journal_says(output):
    entry = json.loads((output / "task-00001.json").read_text())
    (output / "task-00001.json").rename(output / "task-00001.partial.json")
    told = status.facts(output, 1000.0)["tasks"][1]
    assert told["state"] == "waiting"
    written = sum(window["shard"]["tokens"] for window in entry["windows"])
    assert told["tokens"] == written
    tell(output, 1, tokens=5)
    assert status.facts(output, 1000.0)["tasks"][1]["tokens"] == written


@pytest.mark.parametrize("content", ["", "{}", '{"updated": "now"}', "[]"])
def test_a_damaged_word_of_a_task_is_no_word(output, content):
    tell(output, 0)
    progress_file(output, 0).write_text(content)
    assert states(status.facts(output, 1000.0))[0] == "waiting"


def test_what_a_real_task_tells_is_understood(output):
    progress = Progress(output, 0, 4, 1)
    progress.update(0, 5, 1)
    told = status.facts(output, time.time())["tasks"][0]
    assert told["state"] == "running"
    progress.fail(UserError("bad line"))
    told = status.facts(output, time.time())["tasks"][0]
    assert (told["state"], told["error"], told["tokens"]) == ("failed", "bad line", 5)


def test_silence_is_measured_by_the_file_servers_clock_alone(output, monkeypatch, capsys):
    Progress(output, 0, 4, 1).update(0, 5, 1)
    for wrong in (0.0, 5e9):
        monkeypatch.setattr(status.time, "time", lambda wrong=wrong: wrong)
        assert abs(status.file_clock(output) - progress_file(output, 0).stat().st_mtime) < 30
        status.show(output)
        assert "1 running, 0 silent" in capsys.readouterr().out


def test_where_nothing_can_be_written_the_clock_is_this_hosts(output, monkeypatch):
    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(status.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(status.time, "time", lambda: 7.0)
    assert status.file_clock(output) == 7.0


def test_looking_leaves_nothing_behind(output):
    before = sorted(output.iterdir())
    status.show(output)
    assert sorted(output.iterdir()) == before


def test_when_only_the_merge_is_missing_its_command_is_told(prepare, corpus):
    output, _ = prepare(corpus, "one")
    assert status.facts(output, 0.0)["redo"] is None
    (output / "manifest.json").unlink()
    told = status.facts(output, 0.0)
    assert (told["merged"], told["redo"]) == (False, f"titans data merge --output {output}")
    assert status.text(told).endswith(f"to go on: titans data merge --output {output}")


def test_duplicates_are_taken_off_what_is_expected(freeze, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(30) * 3)
    dropped = freeze(tmp_path / "a.jsonl", "dropped", drop_duplicates=True)
    kept = freeze(tmp_path / "a.jsonl", "kept")
    expected = [status.facts(output, 0.0)["expected_tokens"] for output in (dropped, kept)]
    assert expected[0] == pytest.approx(expected[1] / 3, rel=0.01)


def test_the_command_prints_a_table_or_json(output, capsys):
    assert cli.main(["data", "status", str(output)]) == 0
    assert "4 tasks: 1 finished, 0 running, 0 silent, 0 failed, 3 waiting" in (
        capsys.readouterr().out
    )
    assert cli.main(["data", "status", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["states"]["waiting"] == 3


def test_watching_ends_when_all_tasks_are_finished(prepare, output, corpus, capsys, monkeypatch):
    left = [0, 2, 3]

    def sleep(seconds):
        assert seconds == 5
        prepare(corpus, task=left.pop(0), tasks=4)

    monkeypatch.setattr(status.time, "sleep", sleep)
    status.show(output, watch=5)
    out = capsys.readouterr().out
    assert out.count("4 tasks:") == 4
    assert out.splitlines()[-1].startswith("100.0% of 4 units")


def test_without_a_plan_there_is_nothing_to_tell(tmp_path):
    with pytest.raises(UserError, match=r"cannot read plan.json"):
        status.facts(tmp_path, 0.0)
