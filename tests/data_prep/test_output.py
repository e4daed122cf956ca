import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import output, stdlib_text
from titans_pretrain import cli
from titans_pretrain.errors import UserError


@pytest.fixture
def file(tmp_path):
    (tmp_path / "afile").write_text("held")
    return tmp_path / "afile"


def test_the_folder_of_what_is_written_is_made(tmp_path):
    with output.writing(tmp_path / "a/b/c.txt") as handle:
        handle.write(b"held")
    assert (tmp_path / "a/b/c.txt").read_bytes() == b"held"


def test_a_file_written_once_keeps_the_first_content(tmp_path):
    path = tmp_path / "plan.json"
    output.write_json_once(path, {"b": 1, "a": 2})
    first = path.read_bytes()
    output.write_json_once(path, {"b": 3})
    assert path.read_bytes() == first
    output.write_json(tmp_path / "other.json", {"b": 1, "a": 2})
    assert (tmp_path / "other.json").read_bytes() == first
    assert sorted(found.name for found in tmp_path.iterdir()) == ["other.json", "plan.json"]


def test_a_file_is_written_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuses(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(output.os, "link", refuses)
    output.write_json_once(tmp_path / "plan.json", {"a": 1})
    assert (tmp_path / "plan.json").read_text() == '{\n  "a": 1\n}\n'


def test_the_lock_is_a_file_opened_for_writing_and_leaves_with_its_holder(tmp_path):
    with output.alone(tmp_path / "out"):
        lock = tmp_path / "out/.plan.lock"
        with open(lock, "r+b") as handle, pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
        (handle,) = [path.name for path in held if path.samefile(lock)]
        told = Path(f"/proc/self/fdinfo/{handle}").read_text()
        flags = int(told.split("flags:")[1].split()[0], 8)
        assert flags & os.O_ACCMODE == os.O_RDWR
    assert not list((tmp_path / "out").iterdir())


def test_one_process_at_a_time_holds_the_lock(tmp_path):
    (tmp_path / "count").write_text("0")
    code = (
        "import sys, time; from pathlib import Path; from data_prep.output import alone\n"
        "count = Path(sys.argv[1]) / 'count'\n"
        "for _ in range(20):\n"
        "    with alone(Path(sys.argv[1])):\n"
        "        held = int(count.read_text()); time.sleep(0.002)\n"
        "        count.write_text(str(held + 1))\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, tmp_path]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"


@pytest.mark.parametrize("below", ["x.model", "deep/x.model"])
def test_a_place_under_a_file_is_refused_with_both_named(file, below):
    refused = pytest.raises(UserError, match=r"cannot write x.model: .*afile.* is no directory")
    with refused, output.writing(file / below):
        pass


def test_every_command_that_writes_says_so_in_three_lines(file, corpus, model, monkeypatch, capsys):
    run = file.parent / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    monkeypatch.setattr(stdlib_text, "corpus", list)
    for line in (
        f"data tokenizer --import {model.path} --output {file}/t.model",
        f"data prepare --input {corpus} --tokenizer {model.path} --output {file}",
        f"data prepare --input {corpus} --tokenizer {model.path} --output {file}/out",
        f"report {run} --output {file}/loss.png",
    ):
        capsys.readouterr()
        assert cli.main(line.split()) == 2
        told = [row for row in capsys.readouterr().err.splitlines() if "is shown" not in row]
        assert [row[:6] for row in told] == ["error:", "where:", "fix:  "]
        assert "afile" in told[0] or "afile" in told[1]
    with pytest.raises(UserError, match="is no directory"):
        stdlib_text.main([f"{file}/out.jsonl"])
    assert file.read_text() == "held"
