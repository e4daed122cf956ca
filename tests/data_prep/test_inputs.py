"""Which files are found, by path, URL or dataset, and by what they are known."""

import os
import random

import fsspec
import pytest
from made_up import rows, write_jsonl
from read_sources import write

from data_prep import inputs, retry, sources
from data_prep.sources import Columns, Reader
from titans_pretrain.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw/0.jsonl", rows(20))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_under_several_spellings_is_one_input(here):
    spellings = ["raw/0.jsonl", "./raw/0.jsonl", "raw/../raw/*.jsonl", f"{here}/raw/0.jsonl"]
    found = inputs.find([*spellings, f"file://{here}/raw/0.jsonl"])
    assert [item.name for item in found] == ["0.jsonl"]


def test_the_order_does_not_depend_on_the_spelling(here):
    write_jsonl(here / "raw/1.jsonl", rows(3))
    for patterns in (["raw/0.jsonl", f"{here}/raw/1.jsonl"], ["raw/1.jsonl", "./raw/0.jsonl"]):
        assert [item.name for item in inputs.find(patterns)] == ["0.jsonl", "1.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.arrow", "a.parquet"])
def test_an_edited_input_of_equal_size_has_another_checksum(here, name):
    path, found = here / name, []
    for text in ("mend", "bend", "mend"):
        # Of parquet neither sizes nor extremes of the column tell the texts apart.
        write(path, [{"text": "aaaa"}, {"text": text}, {"text": "zzzz"}])
        (item,) = inputs.find([name])
        found.append((item, inputs.sha256(item)))
    assert found[0] == found[2]
    assert found[0][0].size == found[1][0].size
    assert found[0][1] != found[1][1]


def test_of_a_large_parquet_file_the_footer_is_what_the_checksum_covers(here, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 0)
    found = []
    for text in ("zebra", "yacht"):
        write(here / "a.parquet", [{"text": "a memory"}, {"text": text}])
        (item,) = inputs.find(["a.parquet"])
        found.append(inputs.sha256(item))
    assert found[0] != found[1]
    held = bytearray((here / "a.parquet").read_bytes())
    held[5] ^= 1
    (here / "a.parquet").write_bytes(held)
    assert inputs.sha256(item) == found[1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.arrow", "a.jsonl.gz"])
def test_of_another_large_file_a_sample_of_blocks_is_what_the_checksum_covers(
    here, monkeypatch, name
):
    for constant, value in (("WHOLE_BYTES", 0), ("SAMPLE_BLOCKS", 8), ("SAMPLE_BYTES", 100)):
        monkeypatch.setattr(inputs, constant, value)
    path = here / name
    path.write_bytes(random.Random(0).randbytes(20_000))
    (item,) = inputs.find([name])
    held, first = path.read_bytes(), inputs.sha256(item)
    covered = []
    for place in range(0, 20_000, 10):
        path.write_bytes(held[:place] + bytes([held[place] ^ 1]) + held[place + 1 :])
        if inputs.sha256(item) != first:
            covered.append(place)
    assert 60 < len(covered) <= 80
    assert covered[0] == 0
    assert covered[-1] == 19_990
    assert covered[30] - covered[20] > 100  # not only its ends
    path.write_bytes(held)
    assert inputs.sha256(item) == first


def test_files_of_other_sizes_are_told_apart_whatever_they_hold(here, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 0)
    found = set()
    for size in (2**18, 2**18 + 1):
        (here / "a.jsonl").write_bytes(bytes(size))
        found.add(inputs.sha256(inputs.find(["a.jsonl"])[0]))
    assert len(found) == 2


def test_a_remote_file_has_no_checksum():
    with fsspec.open("memory://sums/a.jsonl", "w") as handle:
        handle.write("{}")
    (item,) = inputs.find(["memory://sums/a.jsonl"])
    assert inputs.sha256(item) is None


def test_an_unreadable_input_is_named(here, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (item,) = inputs.find(["raw/0.jsonl"])
    monkeypatch.setattr(inputs, "sha256_file", refuse)
    with pytest.raises(UserError, match=r"raw/0.jsonl.*Permission denied") as caught:
        inputs.sha256(item)
    assert caught.value.where == f"{here}/raw/0.jsonl"
    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match="Permission denied") as caught:
        inputs.find(["raw/0.jsonl"])
    monkeypatch.undo()
    assert caught.value.where == "--input"


class Far:
    """A file system behind a network; ``fail`` is what any use of it raises."""

    def __init__(self, fail=None, size=5):
        self.fail, self._size = fail, size

    def unstrip_protocol(self, path):
        return f"far://{path}"

    def invalidate_cache(self):
        pass

    def info(self, path):
        if self.fail:
            raise self.fail
        return {"name": path, "size": self._size, "type": "file"}

    def size(self, path):
        return self.info(path)["size"]

    def open(self, path, mode, **kwargs):
        raise self.fail


class NoCredentials(Exception):
    """As botocore's: no OSError."""


@pytest.fixture
def far(monkeypatch):
    system = Far()
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(
        inputs.fsspec.core, "url_to_fs", lambda url: (system, url.removeprefix("far://"))
    )
    return system


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (ImportError("Install s3fs to access S3"), "Install s3fs"),
        (NoCredentials("Unable to locate credentials\nmore"), "locate credentials\nwhere"),
        (ConnectionError(111, "Connection refused"), "Connection refused"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_url_that_cannot_be_listed_is_refused_with_the_cause(far, fail, message):
    far.fail = fail
    with pytest.raises(UserError, match=message) as caught:
        inputs.find(["far://bucket/a.jsonl"])
    assert caught.value.where == "--input"
    assert "far://bucket/a.jsonl" in caught.value.what


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
@pytest.mark.parametrize("fail", [NoCredentials("gone"), ConnectionError(104, "gone")])
def test_a_url_that_cannot_be_read_is_named_with_the_cause(far, kind, fail):
    (item,) = inputs.find([f"far://bucket/a.{kind}"])
    far.fail = fail
    with pytest.raises(UserError, match="gone") as caught, Reader(Columns()) as reader:
        shape = sources.layout(item)
        list(reader.rows(item, shape, 0))
    assert caught.value.where == item.url
    assert "network" in caught.value.fix


def test_a_server_that_tells_no_size_is_refused(far):
    far._size = None
    with pytest.raises(UserError, match="does not tell the size"):
        inputs.find(["far://bucket/a.jsonl"])


@pytest.mark.parametrize("pattern", ["foo://x/a.jsonl", "foo://x/*.jsonl"])
def test_an_unknown_kind_of_url_is_refused(pattern):
    with pytest.raises(UserError, match="Protocol not known: foo") as caught:
        inputs.find([pattern])
    assert caught.value.where == "--input"


def test_a_url_that_names_nothing_is_refused():
    for pattern in ("memory://none/a.jsonl", "memory://none/*.jsonl"):
        with pytest.raises(UserError, match="no file matches"):
            inputs.find([pattern])


def test_a_size_that_a_listing_tells_is_not_asked_for(monkeypatch):
    with fsspec.open("memory://sizes/a.jsonl", "w") as handle:
        handle.write("x" * 70)
    monkeypatch.setattr(inputs, "_size", None)
    assert [item.size for item in inputs.find(["memory://sizes/*.jsonl"])] == [70]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("none/*.jsonl", "no file matches"), ("", "is a directory"), ("a.csv", "unknown kind")],
)
def test_bad_patterns_are_refused(tmp_path, pattern, message):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=message):
        inputs.find([str(tmp_path / pattern)])


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


def test_a_place_means_the_same_from_any_directory(here, monkeypatch):
    (item,) = inputs.find(["raw/0.jsonl"])
    monkeypatch.chdir("/")
    assert sources.layout(item).units == 1


def test_a_files_name_that_is_no_utf8_is_refused(tmp_path):
    with open(os.fsencode(tmp_path) + b"/b\xe4d.txt", "w") as handle:
        handle.write("text")
    with pytest.raises(UserError, match="file's name is no UTF-8"):
        inputs.find([f"{tmp_path}/*.txt"])
