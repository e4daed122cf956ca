"""Compressed files are unpacked once for all readers, and nothing of it stays behind."""

import errno
import io
import os
import random
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
import zstandard
from made_up import rows
from read_sources import texts, write

from data_prep import inputs, sources, spool
from data_prep.sources import Columns, Reader
from titans_pretrain.errors import TitansError, UserError


@pytest.fixture(autouse=True)
def tmpdir(tmp_path, monkeypatch):
    place = tmp_path / "tmpdir"
    place.mkdir()
    monkeypatch.setattr(spool.tempfile, "gettempdir", lambda: str(place))
    monkeypatch.setattr(spool.tempfile, "tempdir", str(place))
    return place


def packed(folder, count, suffix=".gz"):
    paths = [write(folder / f"{n}.jsonl{suffix}", rows(3, n)) for n in range(count)]
    return inputs.find(list(map(str, paths)))


def unpacked(folder):
    return [path for path in Path(folder).iterdir() if not path.suffix]


@pytest.fixture
def counted(monkeypatch):
    made, real = [], spool._unpack
    monkeypatch.setattr(spool, "_unpack", lambda item, part: made.append(item) or real(item, part))
    return made


def test_readers_of_one_spool_unpack_a_file_once(tmp_path, counted):
    (item,) = packed(tmp_path, 1)
    shape = sources.layout(item)
    with spool.shared() as folder:
        for _ in range(3):
            with Reader(Columns(), folder) as reader:
                ((*found,),) = reader.rows(item, shape, 0)
                assert [row.text for row in found] == [row["text"] for row in rows(3, 0)]
    assert len(counted) == 1


def _read(given):
    folder, item = given
    with spool.unpacked(folder, item) as handle:
        return handle.read(), os.stat(handle.fileno()).st_ino


def test_processes_that_want_a_file_at_once_get_the_same_one(tmp_path):
    (item,) = packed(tmp_path, 1)
    with spool.shared() as folder, get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(_read, [(folder, item)] * 6, chunksize=1))) == 1


def test_a_spool_goes_with_its_block(tmp_path, tmpdir):
    (item,) = packed(tmp_path, 1)
    with pytest.raises(KeyError), spool.shared() as folder:
        spool.unpacked(folder, item).close()
        assert len(unpacked(folder)) == 1
        raise KeyError
    assert not folder.exists()
    texts(item.url)
    (base,) = tmpdir.iterdir()
    assert [path.name for path in base.iterdir()] == ["new.lock"]


KILLED = """
import os, signal, sys, tempfile
from data_prep import spool
tempfile.tempdir = sys.argv[1]
with spool.shared() as folder:
    print(folder, flush=True)
    (folder / "large").write_bytes(b"x")
    sys.stdin.read() if sys.argv[2:] else os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_spool_of_a_killed_task_is_removed_by_the_next_and_one_in_use_is_not(tmpdir):
    command = [sys.executable, "-c", KILLED, str(tmpdir)]
    dead = subprocess.run(command, capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL
    left = Path(dead.stdout.strip())
    assert (left / "large").exists()
    living = subprocess.Popen(
        [*command, "stay"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    used = Path(living.stdout.readline().strip())
    with spool.shared():
        assert not left.exists()
        assert used.exists()
    living.communicate()
    assert not used.exists()


def test_few_unpacked_files_are_kept_and_more_are_told_once(tmp_path, monkeypatch, capsys, counted):
    monkeypatch.setattr(spool, "KEPT", 3)
    items = packed(tmp_path, 5, ".zst")
    with spool.shared(3) as folder:
        for index in (0, 1, 2, 0, 3, 0):
            spool.unpacked(folder, items[index]).close()
        assert [item.name for item in counted] == [items[index].name for index in range(4)]
        assert len(unpacked(folder)) == 3
        for index in (4, 1, 2):
            with spool.unpacked(folder, items[index]) as handle:
                assert handle.read().count(b"\n") == 3
        assert len(unpacked(folder)) == 3
    assert capsys.readouterr().err.count("over 3 compressed inputs") == 1


def test_a_file_that_goes_while_it_is_read_is_read_to_its_end(tmp_path):
    items = packed(tmp_path, 2)
    with spool.shared(1) as folder:
        first = spool.unpacked(folder, items[0])
        spool.unpacked(folder, items[1]).close()
        with first:
            assert first.read().count(b"\n") == 3


def test_a_reader_keeps_one_unpacked_file_open_so_that_removed_ones_take_no_room(tmp_path):
    items = packed(tmp_path, 6)
    with spool.shared(2) as folder, Reader(Columns(), folder) as reader:
        for item in items:
            list(reader.rows(item, sources.layout(item), 0))
        handles = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        places = [os.readlink(handle) for handle in handles if handle.is_symlink()]
        assert len([place for place in places if place.startswith(str(folder))]) == 1 + 1


class Full(io.BytesIO):
    def write(self, block):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_tmpdir_is_named_and_nothing_half_unpacked_stays(tmp_path, tmpdir, monkeypatch):
    def opened(path, mode):
        handle = open(path, mode)  # noqa: SIM115
        return handle if mode == "rb" else Full(handle.close())

    (item,) = packed(tmp_path, 1)
    with spool.shared() as folder:
        monkeypatch.setattr(spool, "open", opened, raising=False)
        with pytest.raises(TitansError, match=r"cannot unpack .*No space left") as caught:
            spool.unpacked(folder, item)
        assert "TMPDIR" in caught.value.fix
        assert caught.value.where == str(tmpdir)
        assert not [path for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_tmpdir_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(spool.tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    with pytest.raises(TitansError, match=r"cannot use \$TMPDIR"), spool.shared():
        pass


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_empty_compressed_file_is_cut_and_not_an_empty_source(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"")
    (item,) = inputs.find([str(path)])
    with pytest.raises(UserError, match="the file is empty") as caught:
        sources.layout(item)
    assert caught.value.where == str(path)


def test_a_compressed_empty_text_is_an_empty_source(tmp_path):
    for path in (tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.zst"):
        (item,) = inputs.find([str(write(path, []))])
        assert sources.layout(item).units == 0


def zst(tmp_path, content):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(content)
    (item,) = inputs.find([str(path)])
    return item


def test_memory_does_not_grow_with_the_ratio_of_compression(tmp_path):
    packed = zstandard.compress(bytes(2**26))
    assert len(packed) < 10_000
    sizes = list(map(len, spool.blocks(zst(tmp_path, packed))))
    assert sum(sizes) == 2**26
    assert max(sizes) <= 2**20


def frames(content):
    """Frames of every kind: with and without size and checksum, skippable, empty, of raw blocks."""
    for options in ({}, {"write_checksum": True}, {"write_content_size": False}, {"level": 19}):
        yield zstandard.ZstdCompressor(**options).compress(content), content
    yield b"\x5a\x2a\x4d\x18\x05\x00\x00\x00notes", b""
    yield zstandard.compress(b""), b""
    noise = random.Random(0).randbytes(300_000)
    yield zstandard.ZstdCompressor(write_checksum=True).compress(noise), noise
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    flushed = stream.compress(b"a") + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    yield flushed + stream.flush(), b"a"


def test_frames_of_every_kind_are_read_one_after_the_other(tmp_path):
    packed, content = zip(*frames(b"memory learns\n" * 50_000), strict=True)
    found = b"".join(spool.blocks(zst(tmp_path, b"".join(packed))))
    assert found == b"".join(content)


def test_a_zst_file_cut_anywhere_is_refused(tmp_path):
    packed, _ = zip(*frames(b"memory learns\n" * 3), strict=True)
    whole, ends = b"".join(packed[:5]), {sum(map(len, packed[:n])) for n in range(6)}
    for length in set(range(1, len(whole))) - ends:
        with pytest.raises((EOFError, zstandard.ZstdError)):
            list(spool.blocks(zst(tmp_path, whole[:length])))


def test_a_damaged_zst_file_is_refused(tmp_path):
    packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(b"memory\n" * 99))
    packed[-1] ^= 1
    with pytest.raises(zstandard.ZstdError):
        list(spool.blocks(zst(tmp_path, bytes(packed))))
    with pytest.raises(zstandard.ZstdError):
        list(spool.blocks(zst(tmp_path, b"no zstd at all")))


def test_a_folder_of_another_user_in_tmpdir_is_refused(tmpdir, monkeypatch):
    with spool.shared():
        pass
    uid = os.getuid()
    answers = iter([uid, uid + 1])
    monkeypatch.setattr(spool.os, "getuid", lambda: next(answers))
    with pytest.raises(TitansError, match=r"cannot use \$TMPDIR"), spool.shared():
        pass


def test_the_folder_is_nobody_elses_to_read(tmpdir):
    with spool.shared() as folder:
        assert folder.parent.stat().st_mode & 0o077 == 0
        assert folder.stat().st_mode & 0o077 == 0
