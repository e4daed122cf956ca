import json

import pytest

from data_prep import stdlib_text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("stdlib") / "raw/out.jsonl"
    assert stdlib_text.main([str(path)]) == 0
    return path


def test_it_is_over_1_2_million_characters_of_prose_in_documents_of_a_page(written):
    documents = [json.loads(line) for line in written.read_text().splitlines()]
    texts = [row["text"] for row in documents]
    assert sum(map(len, texts)) > 1_200_000
    assert sorted(map(len, texts))[len(texts) // 2] > 400
    assert len(set(texts)) == len(texts)
    assert not [text for text in texts if ">>>" in text]


def test_rows_follow_fineweb_edus_schema(written):
    row = json.loads(written.read_text().splitlines()[0])
    assert list(row) == [
        "text", "id", "dump", "url", "file_path", "language",
        "language_score", "token_count", "score", "int_score",
    ]  # fmt: skip


def test_one_python_always_writes_the_same(written, tmp_path):
    stdlib_text.main([str(tmp_path / "again.jsonl")])
    assert (tmp_path / "again.jsonl").read_bytes() == written.read_bytes()


def test_it_wants_one_file_name(capsys):
    assert stdlib_text.main([]) == 2
    assert "usage" in capsys.readouterr().err
