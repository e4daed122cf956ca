"""Rows that are good, odd or bad, from lines of JSON and from Arrow columns."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import write_jsonl
from read_sources import documents, texts, write, write_arrow

from data_prep import rows
from data_prep.sources import Columns
from titans_pretrain.errors import UserError

SKIP = Columns(bad_rows="skip")
LINES = [
    (b'{"text": "\xff"}', "no UTF-8"),
    (b'{"text": "\xed\xa0\x80"}', "no UTF-8"),
    (b'{"text": "cut', "invalid JSON"),
    (b"[1]", "no JSON object"),
    (b'{"body": "x"}', "no column 'text'"),
    (b'{"text": 5}', "holds int"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "invalid JSON: a number of thousands of digits"),
    (b"[" * 200_000, "invalid JSON: nested too deeply"),
    (b'{"text": "a", "id": ' + b"[" * 200_000, "invalid JSON: nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), LINES)
def test_a_bad_line_is_named_or_skipped(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(UserError, match=message) as caught:
        texts(path)
    assert caught.value.where == f"{path}:3"
    found = documents(path, SKIP)
    assert [row.text for row in found] == ["a", "b", "", "c"]
    assert [row.problem for row in found] == ["", "", "bad", ""]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("column", ["text", "id"])
def test_a_row_of_a_column_that_is_no_utf8_is_named_or_skipped(tmp_path, name, column):
    good = {"text": pa.array(["a", "b", "c"]), "id": pa.array(["1", "2", "3"])}
    broken = pa.array([b"fine", b"b\xe4d", b"too"], pa.binary()).view(pa.string())
    path, table = tmp_path / name, pa.table(good | {column: broken})
    if name == "a.parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(UserError, match="no UTF-8") as caught:
        texts(path)
    assert caught.value.where == f"{path}, row 1 of row group 0"
    found = documents(path, SKIP)
    assert [row.problem for row in found] == ["", "bad", ""]
    assert found[1] == rows.BAD
    assert found[2].text == ("too" if column == "text" else "c")


def test_a_txt_file_that_is_no_utf8_is_named_with_its_line_or_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nb\xe4d")
    with pytest.raises(UserError, match="no UTF-8") as caught:
        texts(tmp_path / "a.txt")
    assert caught.value.where == f"{tmp_path}/a.txt:2"
    assert documents(tmp_path / "a.txt", SKIP) == [rows.BAD]


@pytest.mark.parametrize(
    ("given", "repaired"),
    [
        (r"\ud800", "\ufffd"),
        (r"a\udfffb", "a\ufffdb"),
        (r"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (r"\uDE00\uD83D", "\ufffd\ufffd"),
        (r"é\ud800", "é\ufffd"),
    ],
)
def test_lone_surrogates_become_replacement_characters(tmp_path, given, repaired):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{given}", "id": "x{given}"}}\n')
    (row,) = documents(tmp_path / "a.jsonl")
    assert (row.text, row.id, row.repaired, row.problem) == (repaired, "x" + repaired, True, "")


@pytest.mark.parametrize("text", [r"\ud83d\ude00", "😀", r"\\ud800", "d800", r"\u00e9"])
def test_text_without_lone_surrogates_is_not_repaired(tmp_path, text):
    line = f'{{"text": "{text}"}}'
    (tmp_path / "a.jsonl").write_text(line + "\n")
    (row,) = documents(tmp_path / "a.jsonl")
    assert (row.text, row.repaired) == (json.loads(line)["text"], False)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None, categories=None, exclude_categories=())))
def test_any_text_is_read_as_it_is_but_for_its_lone_surrogates(text):
    line = json.dumps({"text": text}).encode()
    row = rows.from_line(line, Columns(), str, 0)
    whole = json.loads(line)["text"]
    assert len(row.text) == len(whole)
    for read, held in zip(row.text, whole, strict=True):
        assert read == ("\ufffd" if "\ud800" <= held <= "\udfff" else held)
    assert row.repaired == (row.text != whole)
    row.text.encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_null_text_is_an_empty_document(tmp_path, name):
    path = write(tmp_path / name, [{"text": "a"}, {"text": None}])
    assert [(row.text, row.problem) for row in documents(path)] == [("a", ""), ("", "")]


def test_a_blank_line_is_an_empty_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n \r\n\n{"text": "b"}\n')
    assert documents(tmp_path / "a.jsonl")[1:3] == [rows.BLANK, rows.BLANK]


@pytest.mark.parametrize(
    ("given", "kept"), [(0, "0"), (False, "False"), (0.0, "0.0"), ("", ""), (None, ""), (17, "17")]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_an_identifier_of_any_type_is_kept_as_text(tmp_path, name, given, kept):
    (row,) = documents(write(tmp_path / name, [{"text": "a", "id": given}]))
    assert row.id == kept


def test_an_identifier_nested_to_any_depth_is_text_or_bad():
    for depth in (3, 800, *range(900, 1000)):
        nested = "[" * depth + "]" * depth
        row = rows.from_line(f'{{"text": "a", "id": {nested}}}'.encode(), SKIP, str, 0)
        assert row.id == nested or row.problem == "bad"


@pytest.mark.parametrize("score", ['"high"', "true", "[4]"])
def test_a_score_that_is_no_number_is_named_or_skipped(tmp_path, score):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "score": {score}}}\n')
    assert texts(tmp_path / "a.jsonl") == ["a"]
    with pytest.raises(UserError, match="no number"):
        texts(tmp_path / "a.jsonl", Columns(needed=("score",)))
    columns = Columns(needed=("score",), bad_rows="skip")
    assert documents(tmp_path / "a.jsonl", columns) == [rows.BAD]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(text="n"), "column 'n' holds int64, not text"),
        (Columns(needed=("language",), language="n"), "no column 'language'"),
        (Columns(needed=("n",), language="n"), "column 'n' holds int64, not text"),
        (Columns(needed=("text",), score="text"), "column 'text' holds string, not numbers"),
    ],
)
def test_a_column_of_another_type_is_an_error_whatever_bad_rows_do(
    tmp_path, name, columns, message
):
    path = write(tmp_path / name, [{"text": "a", "n": 1}])
    for bad_rows in ("stop", "skip"):
        given = Columns(**{**vars(columns), "bad_rows": bad_rows})
        with pytest.raises(UserError, match=message) as caught:
            texts(path, given)
        assert caught.value.where == str(path)


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_text_of_every_arrow_type_is_read(tmp_path, kind):
    column = pa.array(["a", None, "ü"]).cast(kind)
    batch = pa.record_batch({"text": column, "score": pa.array([1, 2, 3], pa.float32())})
    found = rows.from_batch(batch, Columns(needed=("score",)), "here", str)
    assert [(row.text, row.score) for row in found] == [("a", 1), ("", 2), ("ü", 3)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_columns_go_by_their_given_names(tmp_path, name):
    values = [{"body": "t", "ask": "p", "key": 5, "at": "u", "crawl": "d", "q": 4.5, "in": "en"}]
    columns = Columns(
        text="body", prompt="ask", id="key", url="at", dump="crawl", score="q", language="in",
        needed=("q", "in"),
    )  # fmt: skip
    (row,) = documents(write(tmp_path / name, values), columns)
    assert row == rows.Row("t", "p", "5", "u", "d", 4.5, "en")


def test_what_is_not_filtered_on_is_not_read(tmp_path):
    (row,) = documents(write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "score": 4}]))
    assert (row.score, row.language) == (None, None)


def test_a_sliced_batch_gives_its_own_rows(tmp_path):
    values = [{"text": str(n), "deep": {"id": n}} for n in range(2100)]
    path = write_arrow(tmp_path / "a.arrow", values, 2100)
    found = documents(path, Columns(id="deep.id"))
    assert [(row.text, row.id) for row in found] == [(str(n), str(n)) for n in range(2100)]


def test_a_score_that_is_not_a_number_but_nan_is_read(tmp_path):
    table = pa.table({"text": ["a"], "score": [np.nan]})
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = documents(tmp_path / "a.parquet", Columns(needed=("score",)))
    assert row.score != row.score
