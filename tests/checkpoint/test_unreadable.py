"""What cannot be read now is not called damaged, passed over, replaced or deleted."""

import errno

import pytest
from checkpoint_cases import cut, make_tensors

from titans_pretrain import cli
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint.manifest import Unreadable
from titans_pretrain.checkpoint.save import save
from titans_pretrain.errors import TitansError

FILES = ["manifest.json", "tensors.json", "state.json", "rank-00000.safetensors"]
REASONS = {errno.EACCES: "Permission denied", errno.EIO: "Input/output error"}


def _save(root, step, keep=3):
    shards = cut(make_tensors(), 0, 1)
    return save(root, step, shards, state={"step": step}, files={}, keep=keep)


@pytest.mark.parametrize("number", REASONS)
@pytest.mark.parametrize("file", FILES)
def test_an_unreadable_checkpoint_is_neither_skipped_nor_replaced(
    file, number, tmp_path, refuse, monkeypatch
):
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in newest.iterdir()}
    refuse(newest / file, number)
    message = f"{file} cannot be read: {REASONS[number]}"
    for judge in (layout.verify, layout.resolve):
        with pytest.raises(Unreadable, match=message):
            judge(newest)
    for choose in (layout.newest_good, layout.resolve):
        with pytest.raises(Unreadable, match=f"newest checkpoint .*{message}") as caught:
            choose(tmp_path)
        assert caught.value.where == str(newest / file)
        assert f"move {newest} away" in caught.value.fix
        assert "delete" not in caught.value.fix
    with pytest.raises(TitansError, match=f"saving step-2 failed: {message}"):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == before
    assert layout.newest_good(tmp_path) == (newest, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-2"]


def test_an_older_unreadable_checkpoint_hinders_nobody(tmp_path, refuse):
    older = _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    refuse(older / "manifest.json", errno.EIO)
    assert layout.newest_good(tmp_path) == (newest, [])


def test_an_unreadable_checkpoint_is_not_deleted_nor_counted_as_kept(tmp_path, refuse, caplog):
    old = _save(tmp_path, 1)
    refuse(old / "manifest.json", errno.EACCES)
    for step in (2, 3, 4):
        _save(tmp_path, step, keep=2)
    assert layout.steps(tmp_path) == [1, 3, 4]
    assert f"{old} stays, it cannot be judged: manifest.json cannot be read" in caplog.text


def test_a_directory_in_a_files_place_is_damage(tmp_path):
    path = _save(tmp_path, 1)
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()
    assert layout.verify(path) == ["manifest.json is missing"]


def test_the_verbs_tell_unreadable_from_damaged(tmp_path, refuse, capsys):
    root = tmp_path / "checkpoints"
    unreadable, damaged, _ = (_save(root, step) for step in (1, 2, 3))
    (damaged / "state.json").unlink()
    refuse(unreadable / "manifest.json", errno.EACCES)
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "manifest.json cannot be read: Permission denied" in capsys.readouterr().out
    assert cli.main(["checkpoint", "verify", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "step-1: manifest.json cannot be read: Permission denied (it may be good)",
        "step-2: state.json is missing",
        "step-3: good",
    ]
    assert "1 of 3 checkpoints cannot be read, 1 are damaged" in told.err
    assert "delete none unread" in told.err
