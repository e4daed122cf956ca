"""Files are whole or absent."""

import errno
import json
import os
import socket

import pytest

from titans_pretrain import files


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "x.bin"
    with files.atomic_file(path) as handle:
        handle.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as handle:
        handle.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_equal_values_give_equal_json_bytes(tmp_path):
    files.write_json(tmp_path / "a", {"x": 1, "y": [2]})
    files.write_json(tmp_path / "b", {"y": [2], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text()) == {"x": 1, "y": [2]}


def test_a_directory_appears_only_when_it_is_whole(tmp_path):
    with files.atomic_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "x").read_text() == "1"


def test_a_failed_directory_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("1")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_directory_do_not_meet_and_the_first_gets_the_name(tmp_path):
    path = tmp_path / "d"
    with (
        pytest.raises(FileExistsError, match="another writer"),
        files.atomic_directory(path) as one,
    ):
        (one / "x").write_text("1")
        with files.atomic_directory(path) as other:
            assert os.listdir(other) == []
            (other / "x").write_text("2")
        assert (one / "x").read_text() == "1"
    assert (path / "x").read_text() == "2"
    assert os.listdir(tmp_path) == ["d"]


def gone_directory(folder, name="d", host=None):
    """What a killed writer leaves of a directory: its locked file and the directory."""
    guard = folder / f".{name}.{host or socket.gethostname()}-1-aa.tmp"
    guard.write_bytes(b"")
    directory = guard.with_suffix(".dir")
    directory.mkdir()
    (directory / "x").write_text("1")
    return guard, directory


def test_what_a_killed_writer_left_of_a_directory_goes_at_the_next(tmp_path):
    gone_directory(tmp_path)
    with files.atomic_directory(tmp_path / "d"):
        pass
    assert os.listdir(tmp_path) == ["d"]


def test_only_the_same_names_leftovers_go(tmp_path):
    kept = gone_directory(tmp_path, "e")
    with files.atomic_directory(tmp_path / "?"):
        pass
    assert all(path.exists() for path in kept)


def test_another_hosts_directory_goes_when_nothing_in_it_was_written_for_long(tmp_path):
    guard, directory = gone_directory(tmp_path, host="elsewhere")
    os.utime(guard, (0, 0))
    files.remove_abandoned(tmp_path, "d")
    assert (directory / "x").exists()
    os.utime(directory / "x", (0, 0))
    files.remove_abandoned(tmp_path, "d")
    assert os.listdir(tmp_path) == []


def test_the_checksum_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_a_living_writers_file_is_not_taken_for_abandoned(tmp_path):
    path = tmp_path / "x.bin"
    with files.atomic_file(path) as handle:
        handle.write(b"abc")
        files.remove_abandoned(tmp_path, "*")
    assert path.read_bytes() == b"abc"


def left_behind(folder, host=None):
    """The temporary file of a writer that is gone."""
    path = folder / f".x.bin.{host or socket.gethostname()}-1-aa.tmp"
    path.write_bytes(b"ab")
    return path


def test_a_gone_writers_file_is_removed_where_its_name_matches(tmp_path):
    path = left_behind(tmp_path)
    files.remove_abandoned(tmp_path, "y*")
    assert path.exists()
    files.remove_abandoned(tmp_path, "x*")
    assert not path.exists()


def test_another_hosts_file_must_also_be_old(tmp_path):
    path = left_behind(tmp_path, "elsewhere")
    files.remove_abandoned(tmp_path, "*")
    assert path.exists()
    os.utime(path, (0, 0))
    files.remove_abandoned(tmp_path, "*")
    assert not path.exists()


def test_without_locks_files_are_written_and_none_is_removed(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    files.write_json(tmp_path / "a", [1])
    path = left_behind(tmp_path)
    files.remove_abandoned(tmp_path, "*")
    assert path.exists()
    assert (tmp_path / "a").exists()


def test_a_writer_whose_file_was_removed_before_it_was_locked_begins_again(tmp_path, monkeypatch):
    real, taken = files.fcntl.flock, []

    def too_late(handle, kind):
        if not taken:
            taken.append(handle.name)
            os.unlink(handle.name)
        real(handle, kind)

    monkeypatch.setattr(files.fcntl, "flock", too_late)
    files.write_json(tmp_path / "a", [1])
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff", b"[" * 100_000])
def test_what_is_no_whole_json_object_is_none(tmp_path, content):
    path = tmp_path / "x.json"
    assert files.read_json(path) is None
    path.write_bytes(content)
    assert files.read_json(path) is None


def test_the_last_lines_are_read_without_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FIRST_TAIL_BYTES", 4)
    path = tmp_path / "x.log"
    path.write_bytes(b"one\r\ntwo\n\nthree")
    assert files.last_lines(path, 2) == b"\nthree"
    assert files.last_lines(path, 9) == path.read_bytes()
    assert files.last_lines(path, 1, end=9) == b"two\n"
    monkeypatch.setattr(files, "LARGEST_TAIL_BYTES", 4)
    assert files.last_lines(path, 9) == b"hree"


def test_the_last_rows_are_whole_json_objects(tmp_path):
    path = tmp_path / "x.jsonl"
    assert files.last_rows(path, 9) == []
    path.write_bytes(b'{"a": 1}\n[2]\nnull\n{"a": 3}\n{"a": ')
    assert files.last_rows(path, 9) == [{"a": 1}, {"a": 3}]
    assert files.last_rows(path, 2) == [{"a": 3}]


def test_a_lock_is_held_by_one_and_free_again_behind_the_block(tmp_path):
    with files.held(tmp_path / "lock") as ours, files.held(tmp_path / "lock") as others:
        assert (ours, others) == (True, False)
    with files.held(tmp_path / "lock") as ours:
        assert ours


def test_without_locks_everyone_gets_one(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with files.held(tmp_path / "lock") as ours:
        assert ours


def test_an_error_behind_a_lock_is_not_taken_for_the_locks(tmp_path):
    with pytest.raises(BlockingIOError), files.held(tmp_path / "lock"):
        raise BlockingIOError


def test_the_hash_of_a_file_that_changed_is_another(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert files.sha256_cached(path) == files.sha256_file(path)
    path.write_bytes(b"other")
    assert files.sha256_cached(path) == files.sha256_file(path)
