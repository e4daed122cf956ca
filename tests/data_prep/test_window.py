"""A window's documents, shuffled, in members, with the checksums that tell them whole."""

import hashlib
import io
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import window
from data_prep.batch import COUNTS, DOCUMENT_BYTES, ORIGIN, Batch
from data_prep.settings import Settings
from data_prep.tar import BLOCK_TOKENS, BlockSums, TarStream
from data_prep.window import KINDS, Window, WindowWriter, npy, regroup
from titans_pretrain.errors import UserError

EOS = 2


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=20), size=st.integers(1, 25))
def test_regrouping_keeps_every_value_in_its_place(lengths, size):
    arrays = [np.arange(length) + 100 * i for i, length in enumerate(lengths)]
    found = list(regroup(arrays, size))
    assert np.array_equal(np.concatenate([*found, []]), np.concatenate([*arrays, []]))
    assert all(len(part) == size for part in found[:-1])
    assert all(0 < len(part) <= size for part in found)


def batch(lengths, *, first=0, held_out=(), masked=False):
    """Documents of one repeated id each, from ``first`` on."""
    documents = [np.append(np.full(n - 1, first + i), EOS) for i, n in enumerate(lengths)]
    ids = np.concatenate([np.zeros(0, int), *documents]).astype(np.uint16)
    names = pa.array([str(first + i) for i in range(len(lengths))])
    return Batch(
        ids=ids,
        mask=(ids % 2).astype(np.uint8) if masked else None,
        lengths=np.array(lengths, np.int64),
        held_out=np.isin(np.arange(len(lengths)), held_out),
        origin=pa.RecordBatch.from_arrays([names, names, names], schema=ORIGIN),
        counts=dict.fromkeys(COUNTS, 0) | {"read": 2 + len(lengths), "kept": len(lengths)},
    )


def filled(*batches):
    window = Window([3, 1])
    for index, one in enumerate(batches):
        window.add(3, 1 + index, one)
    return window


def writer(tmp_path, member_tokens=64, seed=0):
    return WindowWriter(tmp_path, 7, Settings(member_tokens=member_tokens, seed=seed), 200)


def open_stream(tmp_path, entry, member_tokens=64):
    return TarStream.open(tmp_path / entry["name"], dtype="uint16", member_tokens=member_tokens)


def test_a_window_counts_what_it_was_given_and_where():
    window = filled(batch([3, 4]), batch([]), batch([5]))
    assert (window.first, window.last) == ([3, 1], [3, 4])
    assert (window.counts["read"], window.counts["kept"]) == (9, 3)


def test_a_window_weighs_what_it_holds_in_memory():
    names = 3 * 3  # of one letter
    assert filled(batch([3, 4]), batch([5])).bytes == 2 * 12 + names + 3 * DOCUMENT_BYTES
    assert filled(batch([3, 4], masked=True)).bytes == 3 * 7 + 2 * 3 + 2 * DOCUMENT_BYTES
    assert filled(batch([])).bytes == 0


def test_the_weight_does_not_change_on_the_way_between_processes():
    one = batch([3, 4, 5])
    assert pickle.loads(pickle.dumps(one)).bytes == one.bytes
    rebuilt = pa.RecordBatch.from_pylist(one.origin.to_pylist())
    assert replace(one, origin=rebuilt).bytes == one.bytes


def test_writing_many_short_documents_takes_little_more_memory_than_they_do(tmp_path, monkeypatch):
    monkeypatch.setattr(window, "PART", 1000)
    held = filled(*(batch([3] * 1000) for _ in range(100)))
    pool, default = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        WindowWriter(tmp_path, 7, Settings(member_tokens=4096), 2000).write(0, held)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)
    assert peak + pool.max_memory() < held.bytes


@pytest.mark.parametrize("part", [1, 7, 100])
def test_documents_do_not_depend_on_how_many_are_gathered_at_a_time(tmp_path, monkeypatch, part):
    lengths = list(range(1, 40))
    found = []
    for size in (2**16, part):
        monkeypatch.setattr(window, "PART", size)
        held = filled(batch(lengths[:9]), batch(lengths[9:], first=9, held_out=[3, 5]))
        entry = writer(tmp_path).write(0, held).entry
        tables = [pq.read_table(tmp_path / entry[kind]["provenance"]["name"]) for kind in KINDS]
        found.append([entry[kind]["sha256"] for kind in KINDS] + tables)
    assert found[0] == found[1]


def test_each_document_stands_where_its_provenance_says(tmp_path):
    window = filled(batch([30, 1, 200], first=10), batch([9, 64], first=20))
    written = writer(tmp_path).write(4, window)
    entry = written.entry["shard"]
    stream = open_stream(tmp_path, entry)
    assert (entry["name"], entry["tokens"], entry["documents"]) == ("00007-00004.tar", 304, 5)
    table = pq.read_table(tmp_path / entry["provenance"]["name"]).to_pylist()
    assert sorted(row["id"] for row in table) == ["10", "11", "12", "20", "21"]
    assert [row["id"] for row in table] != ["10", "11", "12", "20", "21"]
    for row in table:
        ids = stream.read(row["offset"], row["tokens"]).tolist()
        assert ids == [int(row["id"])] * (row["tokens"] - 1) + [EOS]
    assert written.unigrams.tolist() == np.bincount(stream.read(0, 304), minlength=200).tolist()


def test_members_are_full_and_named_by_window_and_number(tmp_path):
    entry = writer(tmp_path).write(4, filled(batch([100, 100]))).entry["shard"]
    found = [(name, len(ids)) for name, ids, _ in open_stream(tmp_path, entry).chunks()]
    assert found == [(f"00007-00004-{i:06d}.npy", n) for i, n in enumerate((64, 64, 64, 8))]


def test_every_file_has_the_size_and_checksum_that_are_told(tmp_path):
    entry = writer(tmp_path).write(0, filled(batch([50, 60], held_out=[1]))).entry
    for shard in (entry["shard"], entry["held_out"]):
        for file in (shard, shard["provenance"], shard["index"]):
            content = (tmp_path / file["name"]).read_bytes()
            assert len(content) == file["bytes"]
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


@pytest.mark.parametrize("masked", [False, True])
def test_the_index_holds_a_checksum_of_every_block_of_the_stream(tmp_path, masked):
    lengths = [BLOCK_TOKENS, 5000, 1, 77]
    window = filled(batch(lengths, first=10, masked=masked))
    entry = writer(tmp_path, 3000).write(0, window).entry["shard"]
    stream = open_stream(tmp_path, entry, 3000)
    index = np.load(tmp_path / entry["index"]["name"])
    expected = []
    for array in (
        stream.read(0, stream.tokens).astype(np.uint16),
        stream.read_mask(0, stream.tokens).astype(np.uint8),
    )[: 1 + masked]:
        sums = BlockSums()
        sums.add(array)
        expected.append(sums.finish())
    assert index.dtype == np.uint64
    assert np.array_equal(index, np.stack(expected) if masked else expected[0])


def test_masks_follow_their_tokens(tmp_path):
    window = filled(batch([30, 70, 50], first=10, masked=True))
    entry = writer(tmp_path).write(0, window).entry["shard"]
    stream = open_stream(tmp_path, entry)
    assert stream.masks
    assert np.array_equal(stream.read_mask(0, 150), stream.read(0, 150) % 2 == 1)


def test_held_out_documents_have_a_shard_of_their_own_and_no_part_in_the_counts(tmp_path):
    window = filled(batch([10, 20, 30], first=10, held_out=[1]), batch([5], first=20))
    written = writer(tmp_path).write(2, window)
    held_out = written.entry["held_out"]
    assert (held_out["name"], held_out["documents"]) == ("held-out-00007-00002.tar", 1)
    assert open_stream(tmp_path, held_out).read(0, 20).tolist() == [11] * 19 + [EOS]
    assert written.entry["shard"]["documents"] == 3
    assert written.unigrams[11] == 0
    assert written.unigrams.sum() == 45


def test_a_split_without_documents_has_no_shard(tmp_path):
    entry = writer(tmp_path).write(0, filled(batch([4, 5]))).entry
    assert entry["held_out"] is None
    assert not list(tmp_path.glob("held-out*"))
    entry = writer(tmp_path).write(1, filled(batch([4, 5], held_out=[0, 1]))).entry
    assert entry["shard"] is None


def test_the_order_is_a_function_of_seed_task_and_window_alone(tmp_path):
    lengths = list(range(2, 40))

    def order(*batches, index=0, seed=0):
        writer(tmp_path, seed=seed).write(index, filled(*batches))
        table = pq.read_table(tmp_path / f"00007-{index:05d}.documents.parquet")
        return table["id"].to_pylist()

    whole = order(batch(lengths))
    assert order(batch(lengths[:7]), batch(lengths[7:], first=7)) == whole
    assert order(batch(lengths), seed=1) != whole
    assert order(batch(lengths), index=1) != whole


def test_a_window_made_again_must_be_as_recorded_or_the_old_files_stay(tmp_path):
    first = writer(tmp_path).write(0, filled(batch([10, 20], held_out=[0]))).entry
    again = writer(tmp_path).write(0, filled(batch([10, 20], held_out=[0])), first)
    assert again.entry == first
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for other in (
        filled(batch([10, 21], held_out=[0])),
        filled(batch([10, 20])),
        filled(batch([10, 20], held_out=[0, 1])),
        filled(),
    ):
        with pytest.raises(UserError, match="made again, is not as recorded"):
            writer(tmp_path).write(0, other, first)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_array_as_a_file_is_what_numpy_reads():
    assert np.load(io.BytesIO(npy(np.arange(5)))).tolist() == [0, 1, 2, 3, 4]
