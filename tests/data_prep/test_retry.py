import errno
import gzip
import threading
import urllib.error

import fsspec
import pytest
from flaky import CUT, FlakySystem
from made_up import rows
from read_sources import texts, write

from data_prep import inputs, retry, sources
from titans_pretrain.errors import UserError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    waits = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    return waits


class Sometimes:
    """Fails a number of times, then answers with the number of calls."""

    def __init__(self, times, error):
        self.times, self.error, self.calls = times, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.calls


def answered(status):
    error = Exception(f"status {status}")
    error.response = type("Response", (), {"status_code": status})()
    return error


def of_kind(module, name):
    return type(name, (Exception,), {"__module__": module})("no answer")


def caused(error, cause):
    error.__cause__ = cause
    return error


def of_botocore(status):
    error = Exception("An error occurred")
    error.response = {"ResponseMetadata": {"HTTPStatusCode": status}}
    return error


PASSING = [
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError(),
    OSError(errno.EIO, "Input/output error"),
    EOFError(),
    answered(503),
    answered(429),
    of_botocore(500),
    of_kind("aiohttp.client_exceptions", "ClientPayloadError"),
    of_kind("httpx", "TransportError"),
    type("Timeout", (OSError,), {"__module__": "requests.exceptions"})("no answer"),
    urllib.error.URLError("no route to host"),
    caused(RuntimeError("cannot read"), ConnectionError("gone")),
]
LASTING = [
    FileNotFoundError(errno.ENOENT, "no such key"),
    PermissionError(errno.EACCES, "denied"),
    OSError(errno.ENOSPC, "disk full"),
    OSError("Not enough disk space"),
    gzip.BadGzipFile("Not a gzipped file"),
    answered(404),
    answered(401),
    of_botocore(403),
    of_kind("botocore.exceptions", "NoCredentialsError"),
    of_kind("huggingface_hub.errors", "OfflineModeIsEnabled"),
    ValueError("bad URL"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_can_pass_is_tried_again(error, capsys, no_waiting):
    assert retry.retry(Sometimes(2, error), "reading far://a") == 3
    assert no_waiting == [1, 2]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("reading far://a: ")
    assert said[0].endswith("again in 1 s")


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_cannot_pass_is_raised_at_once(error, no_waiting):
    do = Sometimes(1, error)
    with pytest.raises(type(error)):
        retry.retry(do, "reading far://a")
    assert do.calls == 1
    assert not no_waiting


def test_the_fifth_failure_is_raised(no_waiting):
    do = Sometimes(9, TimeoutError("still none"))
    with pytest.raises(TimeoutError):
        retry.retry(do, "reading far://a")
    assert do.calls == 5
    assert no_waiting == [1, 2, 4, 8]


def test_something_may_be_done_before_each_further_try():
    done = []
    retry.retry(Sometimes(2, TimeoutError()), "reading", again=lambda: done.append("dropped"))
    assert done == ["dropped", "dropped"]


@pytest.fixture
def far(tmp_path):
    """Puts a file into the flaky file system, as ``flaky://set/NAME``."""
    fsspec.register_implementation("flaky", FlakySystem, clobber=True)

    def put(name, values):
        FlakySystem.fail(None)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path = write(tmp_path / name, values)
        FlakySystem().pipe_file(f"/set/{name}", path.read_bytes())
        return path

    yield put
    FlakySystem.fail(None)
    FlakySystem().rm("/set", recursive=True)


NAMES = ["a.parquet", "a.arrow", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]
FAILURES = [ConnectionResetError("reset by peer"), answered(503), CUT]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_source_that_fails_twice_and_then_answers_gives_the_same_rows(far, capsys, name, failure):
    values = rows(1200)
    path = far(name, values)
    near = texts(path)
    assert near == [row["text"] for row in values]
    for call in ("list", "info", "open", "read"):
        if failure is CUT and call != "read":
            continue
        FlakySystem.fail(failure, **{call: 2})
        assert texts(f"flaky://set/{name}" if call == "info" else f"flaky://set/*{name}") == near
        assert capsys.readouterr().err.count("again in") == (1 if failure is CUT else 2)


def test_a_read_that_fails_in_the_middle_of_a_file_goes_on_where_it_was(far):
    far("a.parquet", rows(1200))
    (item,) = inputs.find(["flaky://set/a.parquet"])
    shape = sources.layout(item)
    with sources.Reader(sources.Columns()) as reader:
        found = [row.text for batch in reader.rows(item, shape, 0) for row in batch]
        FlakySystem.fail(ConnectionResetError("reset"), read=2, open=1)
        found += [row.text for batch in reader.rows(item, shape, 1) for row in batch]
    assert found == [row["text"] for row in rows(1200)]


def test_a_folder_that_cannot_be_listed_is_not_left_out(far):
    for folder in ("x", "y"):
        far(f"{folder}/a.jsonl", rows(3))
    FlakySystem.fail(TimeoutError(), sound="/x", list=3)
    assert len(inputs.find(["flaky://set/**/*.jsonl"])) == 2
    FlakySystem.fail(TimeoutError("no answer"), sound="/x", list=99)
    with pytest.raises(UserError, match="no answer"):
        inputs.find(["flaky://set/*/*.jsonl"])


def test_sizes_that_no_listing_tells_are_asked_for_again(far):
    far("a.jsonl", rows(3))
    FlakySystem.fail(TimeoutError(), info=2)
    assert inputs._size("flaky://set/a.jsonl") > 0


def test_a_source_that_stays_away_is_an_error_that_names_it(far):
    far("a.jsonl", rows(3))
    (item,) = inputs.find(["flaky://set/a.jsonl"])
    FlakySystem.fail(ConnectionResetError("reset by peer"), read=99)
    with pytest.raises(UserError, match="reset by peer") as caught:
        sources.layout(item)
    assert caught.value.where == item.url


def test_a_file_that_shrank_since_it_was_planned_is_an_error_that_names_it(far):
    far("a.jsonl", rows(3))
    (item,) = inputs.find(["flaky://set/a.jsonl"])
    far("a.jsonl", rows(1))
    with pytest.raises(UserError, match=r"ends \d+ bytes early") as caught:
        sources.layout(item)
    assert caught.value.where == item.url


def test_a_row_group_of_a_remote_file_is_fetched_in_one_request(far):
    far("a.parquet", rows(1200))
    (item,) = inputs.find(["flaky://set/a.parquet"])
    with sources.Reader(sources.Columns()) as reader:
        list(reader.rows(item, sources.layout(item), 0))
        FlakySystem.fail(None)
        list(reader.rows(item, sources.layout(item), 1))
        footer = len(FlakySystem.requests)
        FlakySystem.fail(None)
        sources.layout(item)
        assert footer - len(FlakySystem.requests) == 1


def test_several_files_are_looked_at_at_once(far, monkeypatch):
    for number in range(8):
        far(f"{number}.parquet", rows(2))
    together = threading.Barrier(8, timeout=30)
    real_info, real_open = FlakySystem.info, FlakySystem._open

    def info(self, path, **options):
        together.wait()
        return real_info(self, path, **options)

    def opened(self, path, mode="rb", **options):
        together.wait()
        return real_open(self, path, mode, **options)

    items = inputs.find(["flaky://set/*.parquet"])
    with monkeypatch.context() as patch:
        patch.setattr(FlakySystem, "info", info)
        assert inputs._identify({item.url: None for item in items}) == items
    monkeypatch.setattr(FlakySystem, "_open", opened)
    assert [shape.units for shape in sources.layouts(items)] == [1] * 8
