import json

import pytest
from made_up import rows

from titans_pretrain import cli


@pytest.fixture
def titans(tmp_path, monkeypatch):
    """Runs `titans data …` in a directory with raw text; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda line: cli.main(["data", *line.split()])


def test_the_road_from_text_to_shards(titans, corpus, capsys):
    assert titans("tokenizer --input raw/*.jsonl --vocab-size 350 --output t.model") == 0
    assert titans("prepare --input raw/*.jsonl --tokenizer t.model --output out --tasks 2") == 0
    assert titans("merge --output out") == 2
    assert "--task 1 --tasks 2" in capsys.readouterr().err
    assert (
        titans("prepare --input raw/*.jsonl --tokenizer t.model --output out --task 1 --tasks 2")
        == 0
    )
    assert titans("merge --output out") == 0
    assert "2,540 documents" in capsys.readouterr().out
    assert titans("verify out") == 0
    assert titans("inspect out --documents 1") == 0


def test_the_named_command_redoes_what_is_damaged(titans, corpus, capsys, tmp_path):
    import shlex

    titans("tokenizer --input raw/*.jsonl --vocab-size 350 --output t.model")
    titans("prepare --input raw/*.jsonl --tokenizer t.model --output out --language en --seed 3")
    before = (tmp_path / "out/00000-00000.tar").read_bytes()
    (tmp_path / "out/00000-00000.tar").unlink()
    assert titans("verify out") == 2
    fix = capsys.readouterr().err.splitlines()[-1]
    command = shlex.split(fix.split("`")[1])
    assert command[:3] == ["titans", "data", "prepare"]
    assert cli.main(command[1:]) == 0
    assert (tmp_path / "out/00000-00000.tar").read_bytes() == before
    assert titans("verify out") == 0


def test_a_dataset_and_its_files_give_the_same_shards(titans, model, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows(50)), tmp_path / "set/train.parquet")
    assert titans(f"prepare --dataset {tmp_path}/set --tokenizer {model.path} --output a") == 0
    assert titans(f"prepare --input set/*.parquet --tokenizer {model.path} --output b") == 0
    one, other = (json.loads((tmp_path / d / "manifest.json").read_text()) for d in "ab")
    assert one == other


def test_bad_options_end_with_exit_code_2(titans, corpus, model):
    assert titans(f"prepare --input none/* --tokenizer {model.path} --output out") == 2
    assert titans("prepare --input raw/* --tokenizer none.model --output out") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prepare --tasks 0", "argument --tasks: 0 is less than 1"),
        ("prepare --tasks abc", "argument --tasks: 'abc' is no whole number"),
        ("prepare --task 1.5", "argument --task: '1.5' is no whole number"),
        ("prepare --task -1", "argument --task: -1 is negative"),
        ("prepare --seed -1", "argument --seed: -1 is negative"),
        ("prepare --shard-bytes 0", "argument --shard-bytes: 0 is less than 1"),
        ("prepare --min-score nan", "argument --min-score: 'nan' is no finite number"),
        ("prepare --min-score inf", "argument --min-score: 'inf' is no finite number"),
        ("prepare --min-score high", "argument --min-score: 'high' is no finite number"),
        ("inspect out --documents -3", "argument --documents: -3 is negative"),
        ("inspect out --documents x", "argument --documents: 'x' is no whole number"),
        ("tokenizer --vocab-size x", "argument --vocab-size: 'x' is no whole number"),
        ("tokenizer --sample-bytes 0", "argument --sample-bytes: 0 is less than 1"),
    ],
)
def test_a_bad_option_is_told_in_words(titans, capsys, line, message):
    with pytest.raises(SystemExit) as caught:
        titans(line)
    assert caught.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(message)
