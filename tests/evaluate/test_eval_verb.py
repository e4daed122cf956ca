"""``titans eval`` with tasks, and what its options refuse."""

import json

import pytest
from benchmark_rows import write

from titans_pretrain import cli
from titans_pretrain.evaluate import report_figure


def run(capsys, *words):
    code = cli.main(["eval", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_local_benchmarks_are_scored_and_taken_up_again(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report_figure, "draw", lambda _, path: path.touch())
    data = write(tmp_path / "data")
    words = [tiny_model, tmp_path / "out", "--tasks", "piqa", "--task-data", data, "--batch", 4]
    code, page, told = run(capsys, *words, "--max-length", 32)
    assert code == 0
    assert "| piqa | acc " in page
    assert "warning: piqa: " in told
    (first,) = (tmp_path / "out/cells").iterdir()
    row = json.loads(first.read_text())
    assert row["identity"]["max_length"] == 32
    assert row["result"]["truncated"] > 0
    code, page, told = run(capsys, *words)
    assert "there already" not in told
    (other,) = {*(tmp_path / "out/cells").iterdir()} - {first}
    row = json.loads(other.read_text())
    assert row["identity"]["max_length"] == 64  # of its training
    code, again, told = run(capsys, *words)
    assert (again, "piqa: there already" in told) == (page, True)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--tasks", "pica"], "did you mean 'piqa'?"),
        (["--tasks", "piqa", "--lengths", "4k"], "none of the tasks reads --lengths"),
        (["--tasks", "piqa", "--data", "m.json"], "none of the tasks reads --data"),
        (["--tasks", "piqa", "--sequences", "3"], "--sequences is for held-out data"),
        (["--tasks", "piqa", "--sequences", "0"], "--sequences is for held-out data"),
        (
            ["--tasks", "piqa", "--validation-fraction", "0"],
            "--validation-fraction is for held-out data",
        ),
        (["--tasks", "position", "--batch", "2"], "none of the tasks reads --batch"),
        (["--tasks", "position", "--text", "a", "--data", "m.json"], "documents are given twice"),
        (["--tasks", "niah_pk", "--essays", "a"], "niah_pk reads no essays"),
        (["--data", "m.json", "--samples", "3"], "--samples says nothing without --tasks"),
        (["--data", "m.json", "--few-shot", "3"], "--shots says nothing without --tasks"),
        (["--tasks", "piqa", "--paper-size", "1B"], "the paper has no models of 1B"),
        (["--tasks", "piqa", "--task-data", "."], "piqa.jsonl is missing"),
        ([], "nothing to score the model on"),
        (["--tasks", "niah_number"], "essays"),
        (["--tasks", "babilong_qa1"], "--background"),
        (["--tasks", "position"], "--text"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(words, what, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    code, printed, told = run(capsys, tiny_model, out, *words)
    assert (code, printed) == (2, "")
    assert what in told
    assert not out.exists()
