"""Which checkpoint a run goes back to, and that it never takes up a later one."""

import json

import pytest

from titans_pretrain.checkpoint import format as layout
from titans_pretrain.checkpoint.save import save
from titans_pretrain.errors import TitansError
from titans_pretrain.train import rollback
from titans_pretrain.train.lease import Fenced, Lease


@pytest.fixture
def root(tmp_path):
    for step in (0, 4, 8):
        save(tmp_path, step, [], state={"step": step}, files={}, keep=9)
    return tmp_path


def test_the_newest_checkpoint_that_is_far_enough_back_is_taken(root):
    assert rollback.choose(root, 9, 0).name == "step-8"
    assert rollback.choose(root, 9, 1).name == "step-8"
    assert rollback.choose(root, 9, 2).name == "step-4"
    assert rollback.choose(root, 9, 9).name == "step-0"


def test_a_damaged_one_is_passed_over(root):
    (root / "step-8" / "state.json").write_text("{}")
    assert rollback.choose(root, 9, 0).name == "step-4"


def test_where_none_is_far_enough_back_the_run_stops(root):
    with pytest.raises(TitansError, match="no good checkpoint at least 10 steps before step 9"):
        rollback.choose(root, 9, 10)


def test_later_checkpoints_go_and_latest_names_the_one_taken(root):
    assert rollback.remove_later(root / "step-0", lambda: None) == ["step-8", "step-4"]
    assert layout.steps(root) == [0]
    assert (root / "latest").read_text() == "step-0\n"
    assert not list(root.glob(".*"))
    assert rollback.remove_later(root / "step-0", lambda: None) == []
    assert json.loads((root / "step-0" / "state.json").read_text()) == {"step": 0}


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_start_that_is_fenced_removes_nothing_more(root, tmp_path_factory, allowed):
    lock = tmp_path_factory.mktemp("run") / ".lock"
    earlier, later = Lease(lock, "one", 1), Lease(lock, "two", 2)
    earlier.take()
    asked = []

    def fence():
        asked.append(True)
        if len(asked) > allowed:
            later.take()
        earlier.check()

    (root / "latest").write_text("step-8\n")
    with pytest.raises(Fenced):
        rollback.remove_later(root / "step-0", fence)
    assert layout.steps(root) == ([0, 4] if allowed == 2 else [0, 4, 8])
    assert (root / "latest").read_text() == ("step-0\n" if allowed else "step-8\n")
    assert [path.name for path in root.glob(".*")] == (
        [".step-8.undone.tmp"] if allowed == 2 else []
    )
    later.release()
