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
