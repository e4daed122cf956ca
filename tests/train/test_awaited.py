"""Which checkpoints a start keeps for their evaluation."""

import pytest

from titans_pretrain import config
from titans_pretrain.checkpoint import retention
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.lease import Lease
from titans_pretrain.train.saving import awaited


@pytest.fixture
def kept(tmp_path):
    def kept(attempt, **asked):
        tree = {
            "model": {},
            "data": {"manifest": "m", "sequence_length": 8},
            "train": {"steps": 1, "global_batch_size": 1, "learning_rate": 1.0},
            "checkpoint": {"every": 2},
            "run": {"directory": str(tmp_path)},
            "pipeline": {"eval": asked},
        }
        directory = RunDirectory(tmp_path)
        lease = Lease(directory.lock, "a", attempt)
        return awaited(config.resolve(tree, source="test"), directory, lease)

    return kept


def test_an_attempt_keeps_the_oldest_that_are_not_evaluated(kept, tmp_path):
    for step in range(9):
        path = tmp_path / "checkpoints" / f"step-{step}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    assert kept(1, every=2, at_once=3)(range(9)) == [2, 4, 6]


def test_nobody_evaluates_what_no_attempt_trains(kept):
    assert kept(0, every=2) is retention.spare_none
    assert kept(1) is retention.spare_none
