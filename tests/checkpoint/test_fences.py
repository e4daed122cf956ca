"""Starts of one run that know nothing of each other: only the newest one changes what is seen."""

import errno
import os
import shutil

import pytest
import torch

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint import publish, retention
from titans_pretrain.checkpoint.load import read_tensors
from titans_pretrain.checkpoint.save import AsyncSaver
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel.shards import FlatShard


class Superseded(Exception):
    """Another start has the run."""


def superseded():
    raise Superseded


def save_by(owner, root, step, value, fence=lambda: None):
    shards = [FlatShard("w", (2,), 0, 2, torch.full((2,), value))]
    saver = AsyncSaver(root, keep=9, owner=owner, fence=fence)
    saver.begin(step, shards, state={"step": step}, files={})
    return saver


def test_a_start_writes_beside_no_other_one_and_replaces_what_a_late_one_published(tmp_path):
    late = save_by("late", tmp_path, 3, 1.0)
    assert (tmp_path / ".step-3.late.tmp").exists()
    late.wait()
    save_by("ours", tmp_path, 3, 2.0).wait()
    assert dict(read_tensors(tmp_path / "step-3", ""))["w"].tolist() == [2.0, 2.0]
    assert layout.verify(tmp_path / "step-3") == []
    assert not list(tmp_path.glob(".*"))


def test_a_start_does_not_replace_its_own_checkpoint(tmp_path):
    saver = save_by("ours", tmp_path, 3, 1.0)
    saver.wait()
    with pytest.raises(TitansError, match="a good checkpoint of this step is there already"):
        saver.begin(3, [FlatShard("w", (2,), 0, 2, torch.zeros(2))], state={"step": 3}, files={})


@pytest.mark.parametrize("passed", [1, 2, 3, 4])
def test_a_superseded_start_makes_no_visible_change_more(tmp_path, passed):
    save_by("ours", tmp_path, 1, 1.0).wait()
    asked = []

    def fence():
        asked.append(True)
        if len(asked) > passed:
            superseded()

    with pytest.raises(TitansError, match="Superseded"):  # opening, preparing, naming, latest, old
        save_by("old", tmp_path, 2, 2.0, fence).wait()
    assert len(asked) == passed + 1
    assert (tmp_path / "step-2").exists() == (passed > 2)
    latest = (tmp_path / layout.LATEST).read_text()
    assert latest == ("step-2\n" if passed > 3 else "step-1\n")


def test_a_writer_whose_directory_the_next_start_removed_publishes_nothing(tmp_path):
    late = save_by("late", tmp_path, 3, 1.0)
    late._task.result()
    retention.remove_leftovers(tmp_path)
    with pytest.raises(TitansError, match="saving step-3 failed"):
        late.wait()
    assert layout.steps(tmp_path) == []


def value_of(root, step):
    return dict(read_tensors(root / f"step-{step}", ""))["w"].tolist()


def test_a_start_frozen_after_its_last_look_at_the_lock_takes_no_name_away(
    tmp_path, monkeypatch, caplog
):
    name = publish._name

    def thawed(place):
        monkeypatch.setattr(publish, "_name", name)
        retention.remove_leftovers(tmp_path)
        save_by("ours", tmp_path, 3, 2.0).wait()
        name(place)

    monkeypatch.setattr(publish, "_name", thawed)
    with pytest.raises(TitansError, match="saving step-3 failed"):
        save_by("late", tmp_path, 3, 1.0).wait()
    assert value_of(tmp_path, 3) == [2.0, 2.0]
    assert "is replaced" not in caplog.text
    assert not list(tmp_path.glob(".*"))


def test_a_replacement_that_fails_halfway_gives_the_name_back(tmp_path, monkeypatch):
    save_by("ours", tmp_path, 3, 2.0).wait()
    rename, thawed = os.rename, []

    def late_rename(source, target):
        if str(target).endswith("step-3") and not thawed:
            thawed.append(True)
            shutil.rmtree(source)
        rename(source, target)

    monkeypatch.setattr(publish.os, "rename", late_rename)
    with pytest.raises(TitansError, match="saving step-3 failed"):
        save_by("late", tmp_path, 3, 1.0).wait()
    assert thawed
    assert value_of(tmp_path, 3) == [2.0, 2.0]
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_whose_replacement_died_on_the_way_gets_its_name_back(tmp_path):
    save_by("ours", tmp_path, 3, 2.0).wait()
    save_by("ours", tmp_path, 4, 2.0).wait()
    (tmp_path / "step-3").rename(tmp_path / ".step-3.late.replaced.tmp")
    shutil.copytree(tmp_path / "step-4", tmp_path / ".step-4.late.replaced.tmp")
    assert retention.remove_leftovers(tmp_path) == [".step-4.late.replaced.tmp"]
    assert value_of(tmp_path, 3) == [2.0, 2.0]
    assert layout.steps(tmp_path) == [3, 4]
    assert not list(tmp_path.glob(".*"))


def test_remains_that_a_living_writer_keeps_alive_stay_and_are_told(tmp_path, monkeypatch, caplog):
    (tmp_path / ".step-2.late.tmp").mkdir()

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "not empty", str(path))

    monkeypatch.setattr(retention.shutil, "rmtree", busy)
    assert retention.remove_leftovers(tmp_path) == [".step-2.late.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == [".step-2.late.removed.tmp"]
    assert "a process still writes to" in caplog.text
