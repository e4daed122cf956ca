"""The hash pass: what repeats, in input order, whatever the cores, kills and sizes of its parts."""

import fcntl
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as few
from hypothesis import strategies as st
from made_up import rows, write_jsonl
from read_sources import write

from data_prep import duplicates, inputs, sources
from data_prep.duplicates import Duplicates
from data_prep.settings import Settings
from titans_pretrain.errors import UserError


def units(*paths):
    items = inputs.find(list(map(str, paths)))
    return [
        (item, shape, unit)
        for item, shape in zip(items, sources.layouts(items), strict=True)
        for unit in range(shape.units)
    ]


def find(given, output, workers=0, **settings):
    """The entry, and for each unit which rows are dropped."""
    output.mkdir(exist_ok=True)
    entry = duplicates.find(given, Settings(**settings), output, workers)
    opened = Duplicates.open(output / entry["name"])
    return entry, [opened.dropped(ordinal, 0, 1000).tolist() for ordinal in range(len(given))]


def expected(given, keep=lambda row: True, key=lambda row: row.text):
    """By a set in memory."""
    seen, found = set(), []
    with sources.Reader(Settings(score_column="score", min_score=0).columns()) as reader:
        for unit in given:
            batch = [row for batch in reader.rows(*unit) for row in batch]
            dropped = []
            for row in batch:
                dropped.append(keep(row) and key(row) in seen)
                if keep(row):
                    seen.add(key(row))
            found.append(dropped + [False] * (1000 - len(batch)))
    return found


@pytest.fixture
def repeating(tmp_path):
    """Four units in three files, a third of the documents repeats."""
    draw = random.Random(0)
    values = rows(2400)
    for row in values:
        if draw.random() < 0.4:
            row["text"] = values[draw.randrange(2400)]["text"]
    write(tmp_path / "a.parquet", values[:1000], 600)
    write(tmp_path / "b.jsonl.gz", values[1000:2200])
    write(tmp_path / "c.arrow", values[2200:], 150)
    return units(tmp_path / "*.parquet", tmp_path / "*.gz", tmp_path / "*.arrow")


def small(monkeypatch, group=2, run=100, part=300):
    monkeypatch.setattr(duplicates, "GROUP_UNITS", group)
    monkeypatch.setattr(duplicates, "RUN_DOCUMENTS", run)
    monkeypatch.setattr(duplicates, "PART_DOCUMENTS", part)


def test_all_but_the_first_of_equal_texts_are_dropped(repeating, tmp_path):
    entry, dropped = find(repeating, tmp_path / "out")
    assert dropped == expected(repeating)
    assert entry["documents"] == sum(map(sum, dropped)) > 400
    path = tmp_path / "out" / entry["name"]
    assert entry["bytes"] == path.stat().st_size
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["duplicates.npy"]


@pytest.mark.parametrize("sizes", [(1, 100, 50), (2, 99, 300), (3, 700, 10**6), (64, 10**6, 70)])
def test_the_file_does_not_depend_on_groups_runs_and_parts(repeating, tmp_path, monkeypatch, sizes):
    entry, _ = find(repeating, tmp_path / "one")
    small(monkeypatch, *sizes)
    assert find(repeating, tmp_path / "many")[0] == entry


def test_the_file_does_not_depend_on_the_number_of_processes(repeating, tmp_path):
    alone = find(repeating * 20, tmp_path / "alone")
    assert len(repeating * 20) > duplicates.GROUP_UNITS
    assert find(repeating * 20, tmp_path / "two", workers=2) == alone


def test_a_pass_has_few_files_open_whatever_the_number_of_groups_and_parts(
    repeating, tmp_path, monkeypatch
):
    entry, _ = find(repeating * 8, tmp_path / "freely")
    small(monkeypatch, group=1, run=100, part=200)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        assert find(repeating * 8, tmp_path / "few")[0] == entry
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_number_of_groups_is_bounded(repeating, tmp_path, monkeypatch):
    entry, _ = find(repeating * 5, tmp_path / "one")
    real, counts = duplicates._write, []

    def counted(path, groups, parts):
        counts.append(len(groups))
        return real(path, groups, parts)

    monkeypatch.setattr(duplicates, "_write", counted)
    monkeypatch.setattr(duplicates, "GROUP_UNITS", 1)
    monkeypatch.setattr(duplicates, "GROUPS", 3)
    assert find(repeating * 5, tmp_path / "few")[0] == entry
    assert counts == [3]


def test_a_document_that_a_filter_drops_is_nobodys_first(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"text": "same", "score": score} for score in (1, 5, None, 4, 5)]
        + [{"text": "", "score": 5}] * 2,
    )
    _, (dropped,) = find(units(path), tmp_path / "out", min_score=4)
    assert dropped[:7] == [False, False, False, True, True, False, False]


def test_with_prompts_documents_are_equal_when_prompt_and_text_are(tmp_path):
    pairs = [("a", "b"), ("", "ab"), ("ab", ""), ("a", "b"), ("x", "b"), ("", "ab")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"ask": ask, "text": text} for ask, text in pairs])
    _, (dropped,) = find(units(path), tmp_path / "out", prompt_column="ask")
    assert dropped[:6] == [False, False, False, True, False, True]
    _, (dropped,) = find(units(path), tmp_path / "out")
    assert dropped[:6] == [False, False, False, True, True, True]


def test_bad_rows_are_skipped_or_stop_the_pass(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{broken\n{"text": "a"}\n')
    _, (dropped,) = find(units(path), tmp_path / "out", bad_rows="skip")
    assert dropped[:3] == [False, False, True]
    with pytest.raises(UserError, match="invalid JSON"):
        find(units(path), tmp_path / "out")


def test_hashes_that_share_a_half_are_told_apart(repeating, tmp_path, monkeypatch):
    small(monkeypatch)
    plain = find(repeating, tmp_path / "plain")

    def half(row):
        whole = hashlib.blake2b(row.text.encode(), digest_size=8).digest()
        return bytes([whole[0] % 3] * 8) + whole

    monkeypatch.setattr(duplicates, "_hash", half)
    assert find(repeating, tmp_path / "half") == plain


def test_inputs_without_documents_have_no_duplicates(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    assert find(units(path), tmp_path / "out")[0]["documents"] == 0


@few(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 4000)), st.integers(0, 1200), st.integers(0, 1200))
def test_dropped_is_the_rows_of_the_unit_asked_for(rows, first, count):
    places = np.array(sorted((row // 1000) << 32 | row % 1000 for row in rows), np.uint64)
    for unit in range(4):
        found = Duplicates(places).dropped(unit, first, count)
        wanted = [row < 1000 and unit * 1000 + row in rows for row in range(first, first + count)]
        assert found.tolist() == wanted


def test_the_last_unit_that_can_be_told_is(tmp_path):
    place = (2**32 - 1) << 32 | 2**32 - 1
    found = Duplicates(np.array([place], np.uint64)).dropped(2**32 - 1, 2**32 - 2, 2)
    assert found.tolist() == [False, True]


PASS = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import test_duplicates as test
from data_prep import duplicates
if __name__ == "__main__":
    duplicates.GROUP_UNITS = 1
    given = test.units(*(f"{sys.argv[2]}/*.{kind}" for kind in ("parquet", "gz", "arrow")))
    test.find(given, Path(sys.argv[3]), workers=int(sys.argv[4]))
"""


def test_a_pass_killed_at_any_moment_goes_on_and_ends_with_the_same_file(
    repeating, tmp_path, monkeypatch
):
    monkeypatch.setattr(duplicates, "GROUP_UNITS", 1)
    entry, _ = find(repeating, tmp_path / "undisturbed")
    output = tmp_path / "killed"
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", PASS, here, str(tmp_path), str(output), "0"]
    for left in (1, 3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while len(list(output.glob(".duplicates/*/group-*.hashes"))) < left:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in output.glob(".duplicates/*/*.hashes")}
    made, real = [], duplicates._hash
    monkeypatch.setattr(duplicates, "_hash", lambda row: made.append(row) or real(row))
    assert find(repeating, output)[0] == entry
    assert len(kept) >= 3
    assert len(made) < 2400 - 1000
    assert sorted(path.name for path in output.iterdir()) == ["duplicates.npy"]


@pytest.mark.parametrize("gone", ["group-*.hashes", "group-*.npy", "part-*.npy"])
def test_a_pass_killed_while_it_removes_its_scratch_can_be_repeated(
    repeating, tmp_path, monkeypatch, gone
):
    small(monkeypatch)
    entry, _ = find(repeating, tmp_path / "undisturbed")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(duplicates, "_write", killed)
        find(repeating, tmp_path / "out")
    next((tmp_path / "out").glob(f".duplicates/*/{gone}")).unlink()
    assert find(repeating, tmp_path / "out")[0] == entry


def test_a_pass_under_way_is_left_alone_by_another_of_the_same_work(
    repeating, tmp_path, monkeypatch
):
    monkeypatch.setattr(duplicates, "GROUP_UNITS", 1)
    output, real, inner = tmp_path / "out", duplicates._write, []

    def meanwhile(path, groups, parts):
        if not inner:
            inner.append(None)
            inner[0] = find(repeating, output)
        return real(path, groups, parts)

    monkeypatch.setattr(duplicates, "_write", meanwhile)
    outer = find(repeating, output)
    assert outer == inner[0]
    assert sorted(path.name for path in output.iterdir()) == ["duplicates.npy"]


def test_what_a_killed_pass_of_other_work_left_is_removed_unless_it_is_in_use(repeating, tmp_path):
    left, used = (tmp_path / "out/.duplicates" / name for name in ("left", "used"))
    for folder in (left, used):
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
    with open(used / ".lock", "r+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        find(repeating, tmp_path / "out")
        assert [path.name for path in used.parent.iterdir()] == ["used"]
    find(repeating, tmp_path / "out")
    assert not used.parent.exists()


def test_where_there_are_no_locks_every_pass_has_a_folder_of_its_own(
    repeating, tmp_path, monkeypatch
):
    def refuses(*_):
        raise OSError(38, "Function not implemented")

    expected = find(repeating, tmp_path / "locked")
    without = SimpleNamespace(flock=refuses, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setattr(duplicates, "fcntl", without)
    other = tmp_path / "out/.duplicates/other"
    other.mkdir(parents=True)
    (other / "group-000000000.hashes").touch()
    assert find(repeating, tmp_path / "out") == expected
    assert [path.name for path in other.parent.iterdir()] == ["other"]


@pytest.mark.parametrize("other", ["filters", "content"])
def test_what_a_killed_pass_left_is_not_used_for_other_inputs_or_filters(
    tmp_path, monkeypatch, other
):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "score": s} for s in (1, 2, 3)])

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(duplicates, "_write", killed)
        find(units(path), tmp_path / "out")
    assert list((tmp_path / "out").glob(".duplicates/*/*.hashes"))
    if other == "filters":
        assert find(units(path), tmp_path / "out", min_score=2)[0]["documents"] == 1
    else:
        path.write_text(path.read_text().replace('"a", "score": 3', '"b", "score": 3'))
        assert find(units(path), tmp_path / "out")[0]["documents"] == 1
