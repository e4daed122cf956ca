"""Units of every kind of file: where they begin, and what reading them gives."""

import gc
import random
import tracemalloc
from itertools import chain

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from made_up import rows, write_jsonl
from read_sources import documents, texts, write, write_arrow

from data_prep import inputs, sources, spool
from data_prep.remote import RemoteFile
from data_prep.sources import Columns, Reader
from titans_pretrain.errors import UserError

KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_every_format_gives_the_same_rows_in_units(tmp_path, name):
    values = rows(2100)
    path = write(tmp_path / name, values)
    assert texts(path) == [row["text"] for row in values]
    (item,) = inputs.find([str(path)])
    assert sources.layout(item).units == 3


@pytest.mark.parametrize("block", [1, 100, 10**6])
@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2000])
def test_jsonl_is_cut_every_1000_lines(tmp_path, monkeypatch, count, block):
    monkeypatch.setattr(spool, "BLOCK", block)
    path = write_jsonl(tmp_path / "a.jsonl", ({"text": str(index)} for index in range(count)))
    (item,) = inputs.find([str(path)])
    shape = sources.layout(item)
    assert shape.units == -(-count // 1000)
    ends = [index for index, byte in enumerate(path.read_bytes(), 1) if byte == 10]
    assert list(shape.starts) == [0, *ends[999::1000]][: shape.units]
    assert len(texts(path)) == count


def test_the_last_line_may_lack_its_end(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(1001))
    path.write_bytes(path.read_bytes()[:-1])
    assert texts(path) == [row["text"] for row in rows(1001)]


@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_or_stream_is_read_by_record_batch(tmp_path, writer):
    path = write_arrow(tmp_path / "a.arrow", rows(2500), 1200, writer)
    (item,) = inputs.find([str(path)])
    shape = sources.layout(item)
    assert shape.units == 3
    with Reader(Columns()) as reader:
        lengths = [[len(batch) for batch in reader.rows(item, shape, unit)] for unit in range(3)]
        last = [row.id for batch in reader.rows(item, shape, 2) for row in batch]
    assert lengths == [[1000, 200], [1000, 200], [100]]
    assert last == [row["id"] for row in rows(2500)[2400:]]


def test_what_the_datasets_library_saves_is_read(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(rows(30))
    made.save_to_disk(str(tmp_path / "set"), num_shards=2)
    assert texts(tmp_path / "set/*.arrow") == [row["text"] for row in rows(30)]


@pytest.mark.parametrize("cut", ["end", "batch", "inside"])
def test_a_cut_arrow_stream_is_named(tmp_path, cut):
    path = write_arrow(tmp_path / "a.arrow", rows(900), 300)
    (item,) = inputs.find([str(path)])
    starts = sources.layout(item).starts
    content = path.read_bytes()
    ends = {"end": len(content) - 8, "batch": starts[2], "inside": starts[2] + 500}
    path.write_bytes(content[: ends[cut]])
    with pytest.raises(UserError, match="it was cut") as caught:
        texts(path)
    assert caught.value.where == str(path)


def test_an_arrow_stream_whose_batches_need_dictionaries_is_refused(tmp_path):
    column = pa.array(["a", "b"]).dictionary_encode()
    path, table = tmp_path / "a.arrow", pa.table({"text": column})
    with pa.OSFile(str(path), "wb") as handle, pa.ipc.new_stream(handle, table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(UserError, match="dictionary") as caught:
        texts(path)
    assert "parquet" in caught.value.fix


def test_an_empty_record_batch_is_a_unit_without_rows(tmp_path):
    path = tmp_path / "a.arrow"
    schema = pa.schema({"text": pa.string()})
    with pa.OSFile(str(path), "wb") as handle, pa.ipc.new_stream(handle, schema) as stream:
        for values in ([], ["a"]):
            stream.write_batch(pa.record_batch({"text": pa.array(values, pa.string())}))
    assert texts(path) == ["a"]
    assert sources.layout(inputs.find([str(path)])[0]).units == 2


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
def test_dotted_names_reach_into_structs(tmp_path, name):
    nested = [{"doc": {"body": "text", "meta": {"key": 7, "from": "web"}}}, {"doc": {"body": "b"}}]
    columns = Columns(text="doc.body", id="doc.meta.key", url="doc.meta.none", dump="doc.meta.from")
    first, second = documents(write(tmp_path / name, nested), columns)
    assert (first.text, first.id, first.url, first.dump) == ("text", "7", "", "web")
    assert (second.text, second.id, second.dump) == ("b", "", "")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
def test_a_column_whose_own_name_has_a_dot_goes_first(tmp_path, name):
    path = write(tmp_path / name, [{"a.b": "own", "a": {"b": "within"}}])
    assert texts(path, Columns(text="a.b")) == ["own"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
@pytest.mark.parametrize("column", ["doc.boody", "doc.body.x", "dok.body"])
def test_a_missing_dotted_column_is_answered_with_the_nearest(tmp_path, name, column):
    path = write(tmp_path / name, [{"doc": {"body": "text"}}])
    with pytest.raises(UserError, match=rf"no column '{column}'") as caught:
        texts(path, Columns(text=column))
    assert caught.value.fix == "did you mean 'doc.body'?"


def test_a_txt_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (row,) = documents(tmp_path / "a.txt")
    assert (row.text, row.id) == ("one\n\ntwo", "a.txt")


def test_a_file_behind_a_url_is_read():
    with fsspec.open("memory://bucket/a.jsonl", "w") as handle:
        handle.write('{"text": "far"}\n')
    assert texts("memory://bucket/*.jsonl") == ["far"]


def test_a_bad_line_is_counted_over_units(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(1200))
    with open(path, "ab") as handle:
        handle.write(b"{")
    with pytest.raises(UserError) as caught:
        texts(path)
    assert caught.value.where == f"{path}:1201"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_cut_file_is_named(tmp_path, name):
    path = write(tmp_path / name, rows(2100))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read the input") as caught:
        texts(path)
    assert caught.value.where == str(path)


def test_a_sample_of_texts_looks_at_few_files_and_the_whole_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "READERS", 2)
    for index in range(9):
        write_jsonl(tmp_path / f"{index}.jsonl", rows(1500, index))
    items = inputs.find([f"{tmp_path}/*.jsonl"])
    seen, real = [], sources.layout
    monkeypatch.setattr(sources, "layout", lambda item: seen.append(item.name) or real(item))
    stream = sources.documents(items, Columns())
    sample = [next(stream) for _ in range(3500)]
    assert len(seen) == 4
    assert sorted(seen) != sorted(item.name for item in items)[:4]
    everything = sample + list(stream)
    assert len(seen) == 9
    assert everything != sorted(everything)
    expected = [row["text"] for index in range(9) for row in rows(1500, index)]
    assert sorted(everything) == sorted(expected)
    assert list(sources.documents(items, Columns())) == everything


def test_few_files_stay_open(tmp_path):
    for index in range(sources.OPEN_FILES + 4):
        write_jsonl(tmp_path / f"{index:02}.jsonl", rows(2, index))
    items = inputs.find([f"{tmp_path}/*.jsonl"])
    with Reader(Columns()) as reader:
        for item in items + items:
            assert sum(len(batch) for batch in reader.rows(item, sources.layout(item), 0)) == 2
        assert len(reader._open) == sources.OPEN_FILES


def test_zst_files_with_long_windows_are_read(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    content = b'{"text": "a"}\n'
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(content) + packer.flush())
    assert texts(tmp_path / "a.jsonl.zst") == ["a"]


def batches(path):
    (item,) = inputs.find([str(path)])
    shape = sources.layout(item)
    with Reader(Columns()) as reader:
        return [
            [row.text for row in batch]
            for unit in range(shape.units)
            for batch in reader.rows(item, shape, unit)
        ]


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_ends_with_the_row_that_reaches_so_many_characters(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 1000)
    values = [{"text": str(index) * 300} for index in range(10)]
    found = batches(write(tmp_path / name, values))
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert list(chain(*found)) == [row["text"] for row in values]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1, 100, 5000])
def test_batches_do_not_depend_on_how_much_is_read_at_a_time(tmp_path, monkeypatch, name, size):
    values = [{"text": "é\n" * (index % 50)} for index in range(1100)]
    path = write(tmp_path / name, values)
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 20_000)
    expected = batches(path)
    assert list(chain(*expected)) == [row["text"] for row in values]
    monkeypatch.setattr(sources, "COLUMN_BYTES", size)
    monkeypatch.setattr(sources, "LINE_BYTES", size)
    assert batches(path) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_memory_does_not_grow_with_the_documents(tmp_path, monkeypatch, name):
    for size in ("BATCH_CHARACTERS", "COLUMN_BYTES", "LINE_BYTES", "PARQUET_BUFFER"):
        monkeypatch.setattr(sources, size, 2**20)
    values = [{"text": f"{index:07} " * 12_500} for index in range(300)]  # 30 MB
    path = tmp_path / name
    if name == "a.parquet":  # with pages of a MB, which are read whole
        pq.write_table(pa.Table.from_pylist(values), path, write_batch_size=10)
    else:
        write_jsonl(path, values)
    del values
    (item,) = inputs.find([str(path)])
    shape, held = sources.layout(item), 0
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    with Reader(Columns()) as reader:
        for _ in reader.rows(item, shape, 0):
            held = max(held, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + held < 12 * 2**20


def test_a_file_that_was_cut_since_it_was_planned_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(1100))
    (item,) = inputs.find([str(path)])
    shape = sources.layout(item)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:500]))
    with Reader(Columns()) as reader, pytest.raises(UserError, match="ends before byte") as caught:
        list(reader.rows(item, shape, 0))
    assert caught.value.where == str(path)


@pytest.fixture
def remote_groups():
    """Three remote files of two row groups, of 4 MB each that cannot be compressed."""
    folder = fsspec.filesystem("memory")
    draw = random.Random(0)
    for name in "abc":
        values = [draw.randbytes(5000).hex() for _ in range(800)]
        sink = pa.BufferOutputStream()
        options = {"row_group_size": 400, "write_batch_size": 10, "compression": "none"}
        pq.write_table(pa.table({"text": values}), sink, **options)
        folder.pipe_file(f"/groups/{name}.parquet", sink.getvalue().to_pybytes())
    yield inputs.find(["memory://groups/*.parquet"])
    folder.rm("/groups", recursive=True)


def test_a_remote_row_group_is_kept_no_longer_than_it_is_read(remote_groups):
    tracemalloc.start()
    with Reader(Columns()) as reader:
        for item in remote_groups:
            for unit in range(2):
                assert sum(map(len, reader.rows(item, sources.layout(item), unit))) == 400
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 2 * 10**6
    tracemalloc.stop()


def test_a_large_remote_row_group_is_fetched_in_pieces(remote_groups, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE_GROUP", 0)
    monkeypatch.setattr(sources, "REMOTE_BUFFER", 2**19)
    fetched, real = [], RemoteFile.read

    def read(self, size=-1):
        fetched.append(size)
        return real(self, size)

    monkeypatch.setattr(RemoteFile, "read", read)
    item = remote_groups[0]
    with Reader(Columns()) as reader:
        found = [row.text for batch in reader.rows(item, sources.layout(item), 1) for row in batch]
    assert len(found) == 400
    assert sum(fetched) > 4 * 10**6
    assert max(fetched) < 2 * 2**20
