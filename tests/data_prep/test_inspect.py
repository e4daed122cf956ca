import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up import rows, sentences, write_jsonl

from data_prep import inspect, manifest, tokenizer
from titans_pretrain import cli
from titans_pretrain.errors import UserError


def test_counts_and_the_first_documents_are_printed(prepare, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [*rows(300), {"text": ""}])
    output, _ = prepare(tmp_path / "a.jsonl", held_out=0.1)
    inspect.inspect(output, 2)
    out = capsys.readouterr().out
    assert "documents         300 of 301 (dropped: 1 empty)" in out
    assert out.count("--- 00000-00000.tar") == 2
    texts = {row["text"] for row in rows(300)}
    assert sum(text in out for text in texts) == 2


def test_lengths_are_those_of_all_documents_held_out_ones_too(prepare, corpus):
    output, done = prepare(corpus, held_out=0.2)
    shards = [*done["shards"], *done["held_out"]]
    lengths, counts = inspect.lengths_of(output, shards)
    names = [output / shard["provenance"]["name"] for shard in shards]
    told = np.concatenate([pq.read_table(name)["tokens"].to_numpy() for name in names])
    expected = np.unique(told, return_counts=True)
    assert np.array_equal(lengths, expected[0])
    assert np.array_equal(counts, expected[1])
    assert counts.sum() == 2540
    assert lengths @ counts == done["tokens"] + done["held_out_tokens"]


def test_the_histogram_has_a_bar_for_each_power_of_two():
    lengths, counts = np.array([3, 4, 7, 20]), np.array([1, 40, 40, 20])
    lines = inspect.histogram_text(lengths, counts).splitlines()
    assert lines[0] == ("tokens a document: mean 8, median 7, 99 % up to 20, longest 20")
    assert [line.split()[:4] for line in lines[1:]] == [
        ["2", "-", "3", "1"],
        ["4", "-", "7", "80"],
        ["8", "-", "15", "0"],
        ["16", "-", "31", "20"],
    ]
    assert [line.count("#") for line in lines[1:]] == [1, 40, 0, 10]


def test_the_histogram_is_drawn_to_a_png(prepare, corpus, tmp_path, capsys):
    output, _ = prepare(corpus)
    picture = tmp_path / "new/lengths.png"
    line = ["data", "inspect", str(output), "--documents", "0", "--histogram", str(picture)]
    assert cli.main(line) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert "tokens a document: mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content: content[:4], "has 4 bytes instead of"),
        (lambda content: content[:40] + b"\0" + content[41:], "does not have its checksum"),
    ],
)
def test_damaged_provenance_is_named(prepare, corpus, damage, told):
    output, _ = prepare(corpus)
    path = output / "00000-00001.documents.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path.name} {told}") as caught:
        inspect.inspect(output, 0)
    assert "--task 0" in caught.value.fix


def test_another_tokenizer_is_refused(prepare, corpus):
    output, _ = prepare(corpus)
    tokenizer.train(sentences(100), 320, output / "tokenizer.model")
    with pytest.raises(UserError, match="not the one that the data was prepared with"):
        inspect.inspect(output, 1)


def test_a_manifest_is_needed(prepare, corpus):
    output, _ = prepare(corpus)
    content = json.loads((output / manifest.MANIFEST).read_text())
    (output / manifest.MANIFEST).write_text(json.dumps(content | {"tokens": 5}))
    with pytest.raises(UserError, match="does not match its fingerprint"):
        inspect.inspect(output, 1)
