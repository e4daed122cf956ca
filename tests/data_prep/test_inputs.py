import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import rows, write_jsonl

from data_prep import inputs, sources
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


def test_a_dataset_that_lists_a_file_twice_is_refused(here):
    (here / "raw/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: [0.jsonl, '*.jsonl']\n---\n"
    )
    with pytest.raises(UserError, match=r"two inputs have the name '0.jsonl'"):
        inputs.find_dataset(str(here / "raw"), config=None, split="train", revision=None)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_an_edited_input_of_equal_size_is_another_plan_and_named(prepare, here, name):
    path = here / name

    def write(text):
        if path.suffix == ".parquet":
            # Neither sizes nor extremes of the column tell the two texts apart.
            table = pa.table({"text": ["aaaa", text, "zzzz"]})
            pq.write_table(table, path, compression="none", use_dictionary=False)
        else:
            path.write_text(f'{{"text": "{text}"}}\n')

    write("mend")
    size = path.stat().st_size
    prepare(path)
    write("bend")
    assert path.stat().st_size == size
    with pytest.raises(UserError, match=rf"its input {name} has other content now"):
        prepare(path)


def test_of_a_large_parquet_file_the_footer_is_compared(prepare, here, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 0)
    for text, other in (("zebra", False), ("yacht", True)):
        pq.write_table(pa.table({"text": ["a memory", text]}), here / "a.parquet")
        if other:
            with pytest.raises(UserError, match=r"its input a.parquet has other content now"):
                prepare(here / "a.parquet")
        else:
            prepare(here / "a.parquet")
    held = bytearray((here / "a.parquet").read_bytes())
    (item,) = inputs.find(["a.parquet"])
    before = inputs.sha256(item)
    held[5] ^= 1
    (here / "a.parquet").write_bytes(held)
    assert inputs.sha256(item) == before


def test_an_unreadable_input_is_named(here, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (item,) = inputs.find(["raw/0.jsonl"])
    monkeypatch.setattr(inputs, "sha256_file", refuse)
    with pytest.raises(UserError, match=r"raw/0.jsonl.*Permission denied") as caught:
        inputs.sha256(item)
    assert caught.value.where == "raw/0.jsonl"
    monkeypatch.setattr(inputs.os.path, "getsize", refuse)
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

    def glob(self, path):
        return [path]

    def size(self, path):
        if self.fail:
            raise self.fail
        return self._size

    def open(self, path, mode):
        raise self.fail


class NoCredentials(Exception):
    """As botocore's: no OSError."""


@pytest.fixture
def far(monkeypatch):
    system = Far()
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
