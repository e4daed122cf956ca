import contextlib
import gzip
import io
import json
import os

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from made_up import rows, write_jsonl

from data_prep import inputs, sources
from data_prep.sources import Columns, Reader
from titans_pretrain.errors import TitansError, UserError


def read_all(pattern, columns=None):
    """Texts of all units, in input order."""
    with Reader(columns or Columns()) as reader:
        return [
            row.text
            for item in inputs.find([str(pattern)])
            for shape in [sources.layout(item)]
            for unit in range(shape.units)
            for batch in reader.rows(item, shape, unit)
            for row in batch
        ]


def write(path, values):
    plain = "".join(json.dumps(row) + "\n" for row in values).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), path, row_group_size=700)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    elif path.suffix == ".zst":
        packer = zstandard.ZstdCompressor()
        path.write_bytes(packer.compress(plain[:5000]) + packer.compress(plain[5000:]))
    else:
        path.write_bytes(plain)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_rows_in_units(tmp_path, name):
    values = rows(2100)
    path = write(tmp_path / name, values)
    assert read_all(path) == [row["text"] for row in values]
    (item,) = inputs.find([str(path)])
    assert sources.layout(item).units == 3


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001])
def test_jsonl_is_cut_every_1000_lines(tmp_path, count):
    path = write_jsonl(tmp_path / "a.jsonl", rows(count))
    (item,) = inputs.find([str(path)])
    assert sources.layout(item).units == -(-count // 1000)
    assert len(read_all(path)) == count


def test_a_txt_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert read_all(tmp_path / "a.txt") == ["one\n\ntwo"]


def test_a_file_behind_a_url_is_read():
    with fsspec.open("memory://bucket/a.jsonl", "w") as handle:
        handle.write('{"text": "far"}\n')
    assert read_all("memory://bucket/*.jsonl") == ["far"]


def test_names_do_not_depend_on_where_the_files_lie(tmp_path):
    for place in ("here", "there"):
        for folder in ("x", "y"):
            (tmp_path / place / folder).mkdir(parents=True)
            write_jsonl(tmp_path / place / folder / "a.jsonl", rows(2))
    here, there = (inputs.find([f"{tmp_path}/{place}/**/*.jsonl"]) for place in ("here", "there"))
    assert (
        [item.name for item in here] == [item.name for item in there] == ["x/a.jsonl", "y/a.jsonl"]
    )


def test_a_link_keeps_its_name(tmp_path):
    write_jsonl(tmp_path / "5e3f", rows(2))
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "5e3f")
    assert [item.name for item in inputs.find([f"{tmp_path}/*.jsonl"])] == ["a.jsonl"]


def test_a_hugging_face_dataset_gives_its_files(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    write(tmp_path / "set/data/train-00000.parquet", rows(900))
    write(tmp_path / "set/data/test-00000.parquet", rows(5))
    found = inputs.find_dataset(str(tmp_path / "set"), config=None, split="train", revision=None)
    assert [item.name for item in found] == ["train-00000.parquet"]
    assert sources.layout(found[0]).units == 2
    with pytest.raises(UserError, match="no split 'tran'") as caught:
        inputs.find_dataset(str(tmp_path / "set"), config=None, split="tran", revision=None)
    assert "train" in caught.value.fix
    with pytest.raises(UserError, match="cannot open the dataset"):
        inputs.find_dataset(str(tmp_path / "none"), config=None, split="train", revision=None)


def test_a_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="`datasets` is not installed"):
        inputs.find_dataset("any", config=None, split="train", revision=None)


LINE_THREE = [
    (b'{"text": "\xff"}', "no UTF-8"),
    (b'{"text": "\\ud800"}', "no UTF-8"),
    (b'{"text": "cut', "invalid JSON"),
    (b"[1]", "no JSON object"),
    (b'{"body": "x"}', "no column 'text'"),
    (b'{"text": 5}', "holds int"),
    (b'{"text": "a", "id": "\\ud800"}', "column 'id' is no UTF-8"),
    (b'{"text": "a", "url": ["\\ud800"], "dump": "\\udfff"}', "column 'dump' is no UTF-8"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "invalid JSON: a number of thousands of digits"),
    (b"[" * 200_000, "invalid JSON: nested too deeply"),
    (b'{"text": "a", "id": ' + b"[" * 200_000, "invalid JSON: nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), LINE_THREE)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        read_all(path)
    assert caught.value.where == f"{path}:3"


def test_an_identifier_nested_to_any_depth_is_text_or_an_error(tmp_path):
    for depth in (3, 800, *range(900, 1000)):
        path = tmp_path / "a.jsonl"
        path.write_text(f'{{"text": "a", "id": {"[" * depth}{"]" * depth}}}\n')
        (item,) = inputs.find([str(path)])
        with Reader(Columns()) as reader, contextlib.suppress(UserError):
            ((row,),) = reader.rows(item, sources.layout(item), 0)
            assert row.id == "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("given", "kept"), [(0, "0"), (False, "False"), (0.0, "0.0"), ("", ""), (None, ""), (17, "17")]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_an_identifier_of_any_type_is_kept_as_text(tmp_path, name, given, kept):
    path = write(tmp_path / name, [{"text": "a", "id": given}])
    (item,) = inputs.find([str(path)])
    with Reader(Columns()) as reader:
        ((row,),) = reader.rows(item, sources.layout(item), 0)
    assert row.id == kept


def test_a_txt_files_name_that_is_no_utf8_is_refused(tmp_path):
    path = os.fsencode(tmp_path) + b"/b\xe4d.txt"
    with open(path, "w") as handle:
        handle.write("text")
    with pytest.raises(UserError, match="file's name is no UTF-8"):
        read_all(tmp_path / "*.txt")


def test_a_bad_line_is_counted_over_units(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(1200))
    with open(path, "ab") as handle:
        handle.write(b"{")
    with pytest.raises(UserError) as caught:
        read_all(path)
    assert caught.value.where == f"{path}:1201"


def test_a_txt_file_that_is_no_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nb\xe4d")
    with pytest.raises(UserError, match="no UTF-8") as caught:
        read_all(tmp_path / "a.txt")
    assert caught.value.where == f"{tmp_path}/a.txt:2"


def test_parquet_text_that_is_no_utf8_is_named_with_its_row(tmp_path):
    bad = pa.array([b"fine", b"b\xe4d"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no UTF-8") as caught:
        read_all(tmp_path / "a.parquet")
    assert caught.value.where.endswith("row 1 of row group 0")


def test_a_missing_column_is_answered_with_the_nearest(tmp_path):
    path = write(tmp_path / "a.parquet", rows(3))
    with pytest.raises(UserError, match="no column 'txt'") as caught:
        read_all(path, Columns(text="txt"))
    assert caught.value.fix == "did you mean 'text'?"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_cut_file_is_named(tmp_path, name):
    path = write(tmp_path / name, rows(2100))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read the input") as caught:
        read_all(path)
    assert caught.value.where == str(path)


def test_a_score_that_is_no_number_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "score": "high"}])
    assert read_all(path) == ["a"]
    with pytest.raises(UserError, match="no number"):
        read_all(path, Columns(needed=("score",)))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("none/*.jsonl", "no file matches"), ("", "is a directory"), ("a.csv", "unknown kind")],
)
def test_bad_patterns_are_refused(tmp_path, pattern, message):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=message):
        inputs.find([str(tmp_path / pattern)])


def test_few_files_stay_open(tmp_path):
    for index in range(sources.OPEN_FILES + 4):
        write_jsonl(tmp_path / f"{index:02}.jsonl", rows(2, index))
    items = inputs.find([f"{tmp_path}/*.jsonl"])
    with Reader(Columns()) as reader:
        for item in items + items:
            assert sum(len(batch) for batch in reader.rows(item, sources.layout(item), 0)) == 2
        assert len(reader._open) == sources.OPEN_FILES


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_few_unpacked_files_are_kept_and_more_are_told_once(tmp_path, monkeypatch, capsys, suffix):
    monkeypatch.setattr(sources, "UNPACKED_FILES", 3)
    paths = [write(tmp_path / f"{index}.jsonl{suffix}", rows(2, index)) for index in range(5)]
    items = inputs.find(list(map(str, paths)))
    shapes = [sources.layout(item) for item in items]
    made, real = [], sources._unpack
    monkeypatch.setattr(sources, "_unpack", lambda item: made.append(item) or real(item))
    before = len(os.listdir("/proc/self/fd"))
    with Reader(Columns()) as reader:
        for index in (0, 1, 2, 0, 3, 0):
            list(reader.rows(items[index], shapes[index], 0))
        assert [unpacked.name for unpacked in made] == [items[i].name for i in range(4)]
        for index in (4, 1, 2):
            (batch,) = reader.rows(items[index], shapes[index], 0)
            assert [row.text for row in batch] == [row["text"] for row in rows(2, index)]
            assert len(os.listdir("/proc/self/fd")) - before <= 3
    assert len(os.listdir("/proc/self/fd")) == before
    assert capsys.readouterr().err.count("over 3 compressed inputs") == 1


def test_a_full_tmpdir_is_named(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, block):
            raise OSError(28, "No space left on device")

    path = write(tmp_path / "a.jsonl.gz", rows(10))
    monkeypatch.setattr(sources.tempfile, "TemporaryFile", Full)
    with pytest.raises(TitansError, match=r"cannot unpack .*No space left") as caught:
        read_all(path)
    assert "TMPDIR" in caught.value.fix
