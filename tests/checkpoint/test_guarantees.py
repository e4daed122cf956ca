"""What survives damage, full disks and death at any moment."""

import builtins
import os
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from checkpoint_cases import cut, make_tensors
from forked_ranks import RankDiedError, on_ranks

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import manifest, retention
from titans_pretrain.checkpoint.load import load
from titans_pretrain.checkpoint.save import AsyncSaver, save
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel import devices
from titans_pretrain.parallel.shards import FlatShard


def _save(root, step, *, keep=3, keep_every=0, rank=0, world=1):
    shards = cut(make_tensors(), rank, world)
    return save(
        root,
        step,
        shards,
        state={"step": step},
        files={"config.yaml": b"a: 1\n"},
        keep=keep,
        keep_every=keep_every,
    )


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ["rank-00000.safetensors", "tensors.json", "state.json", "config.yaml", "manifest.json"]
DAMAGES = {"is missing": os.unlink, "": _flip, "bytes instead of": _truncate}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("message", DAMAGES)
def test_damage_to_any_file_is_found_and_the_previous_checkpoint_taken(tmp_path, file, message):
    good, damaged = _save(tmp_path, 1), _save(tmp_path, 2)
    assert layout.newest_good(tmp_path) == (damaged, [])
    DAMAGES[message](damaged / file)
    (problem,) = layout.verify(damaged)
    assert file in problem
    assert file == "manifest.json" or message in problem
    path, skipped = layout.newest_good(tmp_path)
    assert path == good
    assert len(skipped) == 1
    assert str(damaged) in skipped[0]
    assert (tmp_path / "latest").read_text() == "step-2\n"


def test_a_damaged_checkpoint_that_is_passed_over_is_told(tmp_path, caplog):
    good, damaged = _save(tmp_path, 1), _save(tmp_path, 2)
    assert layout.resolve(tmp_path) == damaged
    assert caplog.text.count("damaged") == 0
    (damaged / "state.json").unlink()
    assert layout.resolve(tmp_path) == good
    assert f"{damaged} is damaged and was skipped: state.json is missing" in caplog.text


def test_without_a_good_checkpoint_there_is_none_and_each_is_named(tmp_path):
    assert layout.newest_good(tmp_path / "nowhere") == (None, [])
    (_save(tmp_path, 1) / "state.json").unlink()
    path, skipped = layout.newest_good(tmp_path)
    assert path is None
    assert "state.json is missing" in skipped[0]


def test_a_checkpoint_under_another_steps_name_is_no_good_one(tmp_path):
    _save(tmp_path, 1).rename(tmp_path / "step-9")
    assert layout.verify(tmp_path / "step-9") == ["manifest.json is that of step 1"]


@pytest.mark.parametrize("content", ["[]", "{}", "null", "\xff", '{"files": [{"path": 1}]}'])
def test_a_manifest_of_another_kind_is_damage(tmp_path, content):
    path = _save(tmp_path, 1)
    (path / "manifest.json").write_text(content, encoding="latin-1")
    assert "manifest.json" in layout.verify(path)[0]
    manifest.write(path, [], {"format": "titans-checkpoint/2"})
    assert "'titans-checkpoint/2' instead of" in layout.verify(path)[0]
    manifest.write(path, [], {"format": layout.FORMAT})
    assert layout.verify(path) == ["manifest.json is that of step None"]
    assert layout.summaries(tmp_path)[0].problem == "manifest.json is that of step None"


def test_steps_are_ordered_as_numbers_and_foreign_names_ignored(tmp_path):
    for step in (9, 10, 100):
        _save(tmp_path, step)
    for name in ("step-007", "step-x", "stepping"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-101").write_text("a file")
    assert layout.steps(tmp_path) == [9, 10, 100]


def test_the_newest_are_kept_and_older_ones_go(tmp_path):
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-3", "step-4"]


def test_multiples_of_keep_every_stay_for_good(tmp_path):
    for step in range(1, 9):
        _save(tmp_path, step, keep=2, keep_every=3)
    assert layout.steps(tmp_path) == [3, 6, 7, 8]
    _save(tmp_path, 9, keep=2, keep_every=3)
    assert layout.steps(tmp_path) == [3, 6, 8, 9]


def test_what_stays_for_good_is_not_looked_at_however_much_it_is(tmp_path, monkeypatch):
    for step in range(1, 11):
        _save(tmp_path, step, keep=99)
    looked_at, verify = [], layout.verify

    def counted(path, **options):
        looked_at.append(path.name)
        return verify(path, **options)

    monkeypatch.setattr(layout, "verify", counted)
    assert retention.prune(tmp_path, 10, keep=2, keep_every=2) == [1, 3, 5, 7]
    assert sorted(looked_at) == sorted(
        ["step-10", "step-9", "step-7", "step-5", "step-3", "step-1"]
    )
    looked_at.clear()
    assert retention.prune(tmp_path, 10, keep=2, keep_every=2) == []
    assert looked_at == ["step-10", "step-9"]


def test_checkpoints_that_are_cut_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=3)
    _truncate(tmp_path / "step-2" / "rank-00000.safetensors")
    _save(tmp_path, 4, keep=3)
    assert layout.steps(tmp_path) == [1, 2, 3, 4]


def test_after_going_back_the_checkpoint_just_written_stays(tmp_path):
    for step in (10, 20, 30):
        _save(tmp_path, step, keep=3)
    _save(tmp_path, 15, keep=1)
    assert layout.steps(tmp_path) == [15, 20, 30]


def test_a_good_checkpoint_is_not_overwritten_but_a_damaged_one_is(tmp_path):
    path = _save(tmp_path, 1)
    with pytest.raises(TitansError, match="a good checkpoint of this step is there already"):
        _save(tmp_path, 1)
    assert layout.verify(path) == []
    _flip(path / "rank-00000.safetensors")
    assert _save(tmp_path, 1) == path
    assert layout.verify(path) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-1"]


OPERATIONS = [
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (os, "unlink"),
    (os, "rmdir"),
    (builtins, "open"),
]


def _save_while_training(root, step, keep):
    """Like ``_save``, with steps that never wait for the disk."""
    saver = AsyncSaver(root, keep=keep)
    shards = cut(make_tensors(), 0, 1)
    saver.begin(step, shards, state={"step": step}, files={"config.yaml": b"a: 1\n"})
    while not saver.advance([saver.poll()]):
        time.sleep(0.0005)


def _child_dies_at(operation, root):
    """Save step 3 in a child that dies before its ``operation``-th file operation; its status."""
    child = os.fork()
    if child == 0:
        left = operation

        def mortal(function):
            def call(*arguments, **options):
                nonlocal left
                if left == 0:
                    os._exit(77)
                left -= 1
                return function(*arguments, **options)

            return call

        for module, name in OPERATIONS:
            setattr(module, name, mortal(getattr(module, name)))
        try:
            _save_while_training(root, 3, keep=1)
        finally:
            os._exit(1 if left < 0 else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_death_at_any_file_operation_leaves_a_good_checkpoint_and_a_clean_next_start(tmp_path):
    _save(tmp_path / "before", 2, keep=1)
    operation, deaths = 0, []
    while True:
        root = tmp_path / str(operation)
        shutil.copytree(tmp_path / "before", root)
        status = _child_dies_at(operation, root)
        path, skipped = layout.newest_good(root)
        assert path is not None, operation
        assert skipped == [], operation
        assert layout.read_state(path)["step"] in (2, 3)
        deaths.append(layout.read_state(path)["step"])
        if path.name == "step-2":
            _save(root, 3, keep=1)
        retention.remove_leftovers(root)
        shards = cut(make_tensors(), 0, 1, blank=True)
        assert load(root / "step-3", shards) == {"step": 3}
        retention.prune(root, 3, keep=1)
        (root / "latest").write_text("step-3\n")
        assert sorted(entry.name for entry in root.iterdir()) == ["latest", "step-3"]
        shutil.rmtree(root)
        if status == 0:
            break
        assert status == 77
        operation += 1
    assert deaths == sorted(deaths)
    assert deaths.count(2) > 15
    assert deaths.count(3) > 5


def test_remains_of_dead_saves_are_removed_and_named(tmp_path, caplog):
    _save(tmp_path, 1)
    (tmp_path / ".step-2.tmp").mkdir()
    (tmp_path / ".step-2.tmp" / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".latest.123.tmp").write_text("step-")
    assert retention.remove_leftovers(tmp_path) == [".latest.123.tmp", ".step-2.tmp"]
    assert "removed the remains of an interrupted save" in caplog.text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-1"]


def _big(rank, world):
    size = 1 << 16
    return FlatShard("big", (size * world,), rank * size, (rank + 1) * size, torch.ones(size))


def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_the_previous(tmp_path):
    _save(tmp_path, 1)

    def save_big(rank):
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        save(tmp_path, 2, [_big(rank, 3)], state={}, files={}, keep=1)

    for error in on_ranks(3, save_big):
        assert isinstance(error, TitansError)
        assert error.where == "rank 1"
        assert "rank-00001.safetensors" in error.what
        assert "File too large" in error.what
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-1"]
    assert layout.newest_good(tmp_path) == (tmp_path / "step-1", [])


def test_a_rank_that_dies_while_saving_leaves_the_previous_to_all(tmp_path):
    _save(tmp_path, 1)

    def save_or_die(rank):
        if rank == 1:
            os.fsync = lambda _: os._exit(77)
        save(tmp_path, 2, [_big(rank, 2)], state={}, files={}, keep=1)

    with pytest.raises(RankDiedError):
        on_ranks(2, save_or_die)
    assert layout.newest_good(tmp_path) == (tmp_path / "step-1", [])
    _save(tmp_path, 2, keep=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-2"]


def _killed_at(victim, operation, root):
    """Save step 2 on two ranks; ``victim`` is killed before its n-th file operation, if any."""

    def train(rank):
        saver = AsyncSaver(root, keep=1)
        left = operation if rank == victim else -1

        def mortal(function):
            def call(*arguments, **options):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return function(*arguments, **options)

            return call

        for module, name in OPERATIONS:
            setattr(module, name, mortal(getattr(module, name)))
        shards = cut(make_tensors(), rank, 2)
        saver.begin(2, shards, state={"step": 2}, files={"config.yaml": b"a: 1\n"})
        while not saver.advance(devices.gather_objects(saver.poll())):
            time.sleep(0.0005)

    try:
        on_ranks(2, train)
    except RankDiedError:
        return True
    return False


@pytest.mark.parametrize(("victim", "operations"), [(0, range(0, 45, 5)), (1, range(4))])
def test_a_rank_killed_at_any_moment_of_a_save_costs_that_save_at_most(
    tmp_path, victim, operations
):
    _save(tmp_path / "before", 1, keep=1)
    found = []
    for operation in operations:
        root = tmp_path / str(operation)
        shutil.copytree(tmp_path / "before", root)
        died = _killed_at(victim, operation, root)
        path, skipped = layout.newest_good(root)
        assert path is not None
        assert skipped == []
        assert load(path, cut(make_tensors(), 0, 1, blank=True))["step"] in (1, 2)
        found.append((died, path.name))
        if path.name == "step-1":
            _save(root, 2, keep=1)
        AsyncSaver(root, keep=1)
        assert not list(root.glob(".*"))
        assert layout.newest_good(root) == (root / "step-2", [])
    assert found[0] == (True, "step-1")
    assert found[-1] == (False, "step-2")


@pytest.mark.parametrize("kib", [24, 548])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, kib):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    try:
        _save(tmp_path, 1)
        errors = on_ranks(
            2, lambda rank: save(tmp_path, 2, [_big(rank, 2)], state={}, files={}, keep=1)
        )
        for error in errors:
            assert isinstance(error, TitansError)
            assert "No space left on device" in error.what
            assert error.where.startswith("rank ")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-1"]
        assert layout.newest_good(tmp_path) == (tmp_path / "step-1", [])
    finally:
        subprocess.run(["umount", tmp_path], check=True)
