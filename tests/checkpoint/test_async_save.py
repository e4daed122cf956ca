"""Saving while training goes on: what is copied when, who waits, who is told of failures."""

import logging
import os
import resource
import signal
import threading
import time

import pytest
import torch
from checkpoint_cases import cut, make_tensors
from forked_ranks import RankDiedError, on_ranks

from titans_pretrain.checkpoint import agreement, tensor_file
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint.background import Progress
from titans_pretrain.checkpoint.load import load
from titans_pretrain.checkpoint.save import AsyncSaver, save
from titans_pretrain.checkpoint.snapshot import HostBuffer
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.shards import FlatShard

BUSY, FINISHED, FAILED = Progress


def _begin(saver, step, rank=0, world=1, shards=None):
    shards = shards or cut(make_tensors(), rank, world)
    saver.begin(step, shards, state={"step": step}, files={"config.yaml": b"a: 1\n"})
    return shards


def _train_until_whole(saver, *, deadline=20.0):
    """Steps of training, each of which exchanges the ranks' states, until a checkpoint is whole."""
    ends = time.monotonic() + deadline
    while time.monotonic() < ends:
        if path := saver.advance(devices.gather_objects(saver.poll())):
            return path
        time.sleep(0.001)
    raise AssertionError("no checkpoint in time")


def _is_whole(path, tensors=None):
    shards = cut(tensors or make_tensors(), 0, 1, blank=True)
    load(path, shards)
    wanted = cut(tensors or make_tensors(), 0, 1)
    return layout.verify(path) == [] and all(
        torch.equal(shard.tensor, want.tensor) for shard, want in zip(shards, wanted, strict=True)
    )


@pytest.fixture
def disk(monkeypatch):
    """A disk that syncs nothing until ``disk.set()``."""
    released, fsync = threading.Event(), os.fsync

    def slow_fsync(descriptor):
        assert released.wait(20)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    yield released
    released.set()


def test_a_checkpoint_becomes_whole_while_steps_go_on(tmp_path):
    saver = AsyncSaver(tmp_path, keep=1)
    assert saver.advance([saver.poll()]) is None
    _begin(saver, 1)
    path = _train_until_whole(saver)
    assert path == tmp_path / "step-1"
    assert _is_whole(path)
    assert saver.advance([saver.poll()]) is None
    assert saver.wait() is None


def test_what_changes_after_begin_does_not_reach_the_file(tmp_path, disk):
    saver = AsyncSaver(tmp_path, keep=1)
    shards = cut(make_tensors(), 0, 1)
    state, files = {"step": 1, "nested": {"list": [1]}}, {"config.yaml": b"a: 1\n"}
    saver.begin(1, shards, state=state, files=files)
    for shard in shards:
        shard.tensor.fill_(-1)
    state["nested"]["list"].append(2)
    files["other"] = b""
    disk.set()
    path = saver.wait()
    assert _is_whole(path)
    assert layout.read_state(path) == {"step": 1, "nested": {"list": [1]}}
    assert not (path / "other").exists()


def test_no_step_waits_for_a_disk_that_hangs(tmp_path, disk):
    saver = AsyncSaver(tmp_path, keep=1)
    _begin(saver, 1)
    for _ in range(3):
        assert saver.poll() == BUSY
        assert saver.advance([saver.poll()]) is None
    assert layout.steps(tmp_path) == []
    disk.set()
    assert _is_whole(_train_until_whole(saver))


def test_publishing_does_not_wait_for_the_disk_either(tmp_path, monkeypatch):
    saver = AsyncSaver(tmp_path, keep=1)
    _begin(saver, 1)
    while saver.poll() == BUSY:
        time.sleep(0.001)
    released, rename = threading.Event(), os.rename

    def slow_rename(*arguments):
        assert released.wait(20)
        rename(*arguments)

    monkeypatch.setattr(os, "rename", slow_rename)
    assert saver.advance([FINISHED]) is None
    assert saver.poll() == BUSY
    assert saver.advance([saver.poll()]) is None
    assert layout.steps(tmp_path) == []
    released.set()
    assert _is_whole(_train_until_whole(saver))


def test_nothing_has_the_checkpoints_name_before_every_rank_has_written(tmp_path):
    saver = AsyncSaver(tmp_path, keep=1)
    _begin(saver, 1)
    while saver.poll() == BUSY:
        time.sleep(0.001)
    assert saver.advance([FINISHED, BUSY]) is None
    time.sleep(0.05)
    assert layout.steps(tmp_path) == []
    assert not (tmp_path / ".step-1.tmp" / "manifest.json").exists()
    assert saver.wait() == tmp_path / "step-1"


def test_a_save_waits_for_the_one_before_and_says_so(tmp_path, disk, caplog):
    saver = AsyncSaver(tmp_path, keep=2)
    _begin(saver, 1)
    threading.Timer(1.2, disk.set).start()
    changed = {name: tensor + 1 for name, tensor in make_tensors().items()}
    _begin(saver, 2, shards=cut(changed, 0, 1))
    assert layout.steps(tmp_path) == [1]
    assert "the save of step 2 waited 1 s for" in caplog.text
    saver.wait()
    assert _is_whole(tmp_path / "step-1")
    assert _is_whole(tmp_path / "step-2", changed)
    assert (tmp_path / "latest").read_text() == "step-2\n"


def test_host_memory_and_plan_serve_the_next_save_too(tmp_path, monkeypatch):
    saver, plans = AsyncSaver(tmp_path, keep=9), []
    through_first = agreement.through_first
    monkeypatch.setattr(
        agreement, "through_first", lambda *a, **k: plans.append(a) or through_first(*a, **k)
    )
    places = set()
    for step in (1, 2, 3):
        _begin(saver, step)
        places.add(saver._buffer.boxes[0].data_ptr())
        saver.wait()
    assert len(places) == len(plans) == 1
    more = {**make_tensors(), "parameters/more": torch.ones(4, 4)}
    _begin(saver, 4, shards=cut(more, 0, 1))
    saver.wait()
    assert len(plans) == 2
    assert _is_whole(tmp_path / "step-4", more)


def test_a_plan_is_made_anew_if_any_rank_cuts_differently(tmp_path):
    def two_saves(rank):
        saver = AsyncSaver(tmp_path, keep=2)
        for step, middle in ((1, 20), (2, 13)):
            start, stop = ((0, middle), (middle, 35))[rank]
            shard = FlatShard("a", (7, 5), start, stop, torch.arange(35.0)[start:stop])
            _begin(saver, step, shards=[shard])
            saver.wait()

    assert on_ranks(2, two_saves) == [None, None]
    for step in (1, 2):
        whole = FlatShard("a", (7, 5), 0, 35, torch.zeros(35))
        load(tmp_path / f"step-{step}", [whole])
        assert torch.equal(whole.tensor, torch.arange(35.0))


def test_a_plan_is_made_anew_if_only_the_windows_move(tmp_path):
    saver, whole = AsyncSaver(tmp_path, keep=2), torch.arange(8.0).reshape(2, 4)
    rows = [FlatShard("a", (2, 4), 0, 4, whole[r], (r, 0), (1, 4)) for r in (0, 1)]
    columns = [
        FlatShard("a", (2, 4), 0, 4, whole[:, c : c + 2].reshape(-1), (0, c), (2, 2))
        for c in (0, 2)
    ]
    for step, shards in ((1, rows), (2, columns)):
        _begin(saver, step, shards=shards)
        assert _is_whole(saver.wait(), {"a": whole})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_lies_on_a_gpu_is_copied_through_pinned_memory(tmp_path):
    saver = AsyncSaver(tmp_path, keep=1)
    shards = cut({name: tensor.cuda() for name, tensor in make_tensors().items()}, 0, 1)
    _begin(saver, 1, shards=shards)
    assert all(box.is_pinned() for box in saver._buffer.boxes)
    for shard in shards:
        shard.tensor.fill_(-1)
    assert _is_whole(saver.wait())


def test_dtypes_of_any_order_lie_in_one_file(tmp_path):
    tensors = {
        "a": torch.randn(3).bfloat16(),
        "b": torch.randn(5),
        "c": torch.randn(1, 7).bfloat16(),
        "d": torch.randn(()),
    }
    path = save(tmp_path, 1, cut(tensors, 0, 1), state={}, files={}, keep=1)
    assert _is_whole(path, tensors)


def _small_files_only(rank):
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def _big(rank, world, value=1.0):
    size = 1 << 16
    part = torch.full((size,), value)
    return [FlatShard("big", (size * world,), rank * size, (rank + 1) * size, part)]


def test_a_thread_that_fails_on_one_rank_is_the_same_error_on_all_at_the_next_step(tmp_path):
    save(tmp_path, 1, cut(make_tensors(), 0, 1), state={}, files={}, keep=1)

    def train(rank):
        saver = AsyncSaver(tmp_path, keep=1)
        _small_files_only(rank)
        _begin(saver, 2, shards=_big(rank, 3))
        try:
            _train_until_whole(saver)
        except TitansError as error:
            failure = error
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        devices.gather_objects(None)
        left = sorted(path.name for path in tmp_path.iterdir())
        devices.gather_objects(None)
        _begin(saver, 2, shards=_big(rank, 3))
        saver.wait()
        return str(failure), left

    told = on_ranks(3, train)
    assert told == [told[0]] * 3
    message, left = told[0]
    assert "saving step-2 failed: File too large" in message
    assert "rank-00001.safetensors" in message
    assert "where: rank 1" in message
    assert left == ["latest", "step-1"]
    assert layout.verify(tmp_path / "step-2") == []


@pytest.mark.parametrize("boundary", ["wait", "begin"])
def test_waiting_and_the_next_save_tell_the_failure_too(tmp_path, boundary):
    def train(rank):
        saver = AsyncSaver(tmp_path, keep=1)
        _small_files_only(rank)
        _begin(saver, 1, shards=_big(rank, 2))
        if boundary == "wait":
            saver.wait()
        _begin(saver, 2, shards=_big(rank, 2))

    for error in on_ranks(2, train):
        assert isinstance(error, TitansError)
        assert "saving step-1 failed: File too large" in error.what
    assert list(tmp_path.iterdir()) == []


def test_a_failure_ends_the_others_writing(tmp_path):
    def train(rank):
        saver, pieces = AsyncSaver(tmp_path, keep=1), []
        if rank == 0:
            real = tensor_file._pieces

            def slow_pieces(*arguments):
                for piece in real(*arguments):
                    time.sleep(0.1)
                    pieces.append(piece)
                    yield piece

            tensor_file._pieces = slow_pieces
        many = [FlatShard(str(n), (8,), 4 * rank, 4 * rank + 4, torch.ones(4)) for n in range(300)]
        _small_files_only(rank)
        _begin(saver, 1, shards=[*many, *_big(rank, 2)])
        try:
            _train_until_whole(saver)
        except TitansError as error:
            return error.what, len(pieces)

    (message, written), (same, _) = on_ranks(2, train)
    assert "File too large" in message
    assert message == same
    assert written < 150


def test_a_rank_whose_directory_is_its_own_is_named(tmp_path):
    def train(rank):
        (tmp_path / str(rank)).mkdir()
        save(tmp_path / str(rank), 1, _big(rank, 2), state={}, files={}, keep=1)

    for error in on_ranks(2, train):
        assert "No such file or directory" in error.what
        assert error.where == "rank 1"
        assert "not all hosts share" in error.fix


def test_a_failure_while_publishing_is_everyones(tmp_path):
    def train(rank):
        saver = AsyncSaver(tmp_path, keep=1)
        _begin(saver, 1, rank, 2)
        if rank == 0:
            os.rename = None
        _train_until_whole(saver)

    first, second = on_ranks(2, train)
    assert isinstance(first, TitansError)
    assert str(first) == str(second)
    assert "saving step-1 failed: TypeError" in first.what
    assert list(tmp_path.iterdir()) == []


def test_the_next_start_removes_what_a_killed_one_left_and_says_so(tmp_path, caplog):
    def train(rank):
        saver = AsyncSaver(tmp_path, keep=2)
        _begin(saver, 1, rank, 2)
        saver.wait()
        if rank == 1:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        _begin(saver, 2, rank, 2)
        _train_until_whole(saver)

    with pytest.raises(RankDiedError):
        on_ranks(2, train)
    assert layout.newest_good(tmp_path) == (tmp_path / "step-1", [])
    assert (tmp_path / ".step-2.tmp").exists()
    with caplog.at_level(logging.WARNING):
        AsyncSaver(tmp_path, keep=2)
    assert f"removed the remains of an interrupted save: {tmp_path / '.step-2.tmp'}" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1"]
    assert _is_whole(tmp_path / "step-1")


@pytest.mark.parametrize(("keep", "keep_every"), [(0, 0), (1, -1)])
def test_retention_that_makes_no_sense_is_refused(tmp_path, keep, keep_every):
    with pytest.raises(ValueError, match="at least"):
        AsyncSaver(tmp_path, keep=keep, keep_every=keep_every)


@pytest.mark.parametrize(("pinned", "bytes_told"), [(True, "no 4,096 bytes"), (False, "no 3,000 ")])
def test_a_copy_that_finds_no_host_memory_says_how_much_it_needed(monkeypatch, pinned, bytes_told):
    def empty(size, **options):
        if size:
            raise RuntimeError("out of memory\nstack")
        return torch.zeros(0, dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(TitansError, match="for a copy of the 3,000 that this rank") as caught:
        HostBuffer()._reserve(3000, pinned=pinned)
    assert caught.value.what.startswith(bytes_told)
    assert caught.value.what.endswith(": out of memory")
