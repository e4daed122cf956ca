"""A checkpoint gets its name only with exactly the files that its ranks wrote."""

import os

import pytest
from checkpoint_cases import cut, make_tensors

from titans_pretrain.checkpoint.manifest import FileRecord
from titans_pretrain.checkpoint.publish import check_files
from titans_pretrain.checkpoint.save import AsyncSaver
from titans_pretrain.errors import TitansError

FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"


@pytest.fixture
def written(tmp_path):
    records = []
    for name, size in ((FIRST, 5), (SECOND, 7)):
        (tmp_path / name).write_bytes(b"x" * size)
        records.append(FileRecord(name, size, ""))
    check_files(tmp_path, [FIRST, SECOND], records)
    return records


def test_a_file_that_a_rank_did_not_report_is_missed(tmp_path, written):
    with pytest.raises(TitansError, match=f"{SECOND} was to be written, but no rank did"):
        check_files(tmp_path, [FIRST, SECOND], written[:1])


def test_a_file_on_a_disk_that_only_its_rank_has_is_missed(tmp_path, written):
    (tmp_path / SECOND).unlink()
    with pytest.raises(TitansError, match=f"1 of 2 rank files .*{SECOND} .*not shared"):
        check_files(tmp_path, [FIRST, SECOND], written)


def test_a_file_that_is_cut_is_found(tmp_path, written):
    (tmp_path / SECOND).write_bytes(b"xx")
    with pytest.raises(TitansError, match=f"{SECOND} has 2 bytes, its rank wrote 7"):
        check_files(tmp_path, [FIRST, SECOND], written)


def test_a_file_of_no_rank_is_refused(tmp_path, written):
    with pytest.raises(TitansError, match=f"{SECOND} is there, though no rank was to write it"):
        check_files(tmp_path, [FIRST], written)


def test_nothing_gets_a_name_when_a_file_has_vanished(tmp_path):
    saver = AsyncSaver(tmp_path, keep=1)
    saver.begin(1, cut(make_tensors(), 0, 1), state={}, files={})
    saver._task.result()
    os.unlink(tmp_path / ".step-1.tmp" / FIRST)
    with pytest.raises(TitansError, match=f"0 of 1 rank files are there: {FIRST} was written, but"):
        saver.wait()
    assert list(tmp_path.iterdir()) == []
