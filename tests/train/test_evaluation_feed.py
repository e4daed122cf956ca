"""Evaluations on their way to wandb: each once, with the step of its checkpoint. No torch."""

import json

import pytest

from titans_pretrain.checkpoint import evaluations
from titans_pretrain.train.evaluation_feed import EvaluationFeed


@pytest.fixture
def feed(tmp_path):
    return EvaluationFeed(tmp_path)


def finish(run, step, checkpoint="a", loss=2.0, **settings):
    told = {"metrics": {"heldout/loss": loss}, "settings": settings, "results": {}}
    evaluations.write(run, step, checkpoint, **told)


def values(step, loss=2.0):
    return {"evaluation/step": step, "evaluation/heldout/loss": loss}


def test_they_come_one_by_one_in_order_of_their_steps(tmp_path, feed):
    assert feed.next() == {}
    feed.look()
    for step in (12, 4):
        finish(tmp_path, step)
    evaluations.fail(tmp_path, 8, "a", "no data")
    assert feed.next() == {}  # it looks when it is asked to
    feed.look()
    assert [feed.next() for _ in range(3)] == [values(4), values(12), {}]
    feed.look()
    assert feed.next() == {}


def test_a_later_start_gives_only_what_is_new(tmp_path, feed):
    finish(tmp_path, 4)
    feed.look()
    feed.next()
    finish(tmp_path, 8)
    later = EvaluationFeed(tmp_path)
    later.look()
    assert [later.next(), later.next()] == [values(8), {}]


def test_one_that_a_rollback_undid_comes_again_when_its_step_is_made_anew(tmp_path, feed):
    finish(tmp_path, 4)
    feed.look()
    feed.next()
    evaluations.undo(tmp_path, 0)
    finish(tmp_path, 4, checkpoint="b", loss=3.0)
    feed.look()
    assert feed.next() == values(4, 3.0)


@pytest.mark.parametrize("again", [{"dtype": "bfloat16"}, {"loss": 3.0}])
def test_one_that_was_repeated_otherwise_comes_again(again, tmp_path, feed):
    finish(tmp_path, 4, dtype="float32")
    feed.look()
    feed.next()
    finish(tmp_path, 4, **{"dtype": "float32"} | again)
    feed.look()
    assert [feed.next(), feed.next()] == [values(4, again.get("loss", 2.0)), {}]
    finish(tmp_path, 4, **{"dtype": "float32"} | again)
    feed.look()
    assert feed.next() == {}


def test_what_cannot_be_put_down_is_given_all_the_same(tmp_path, feed, monkeypatch):
    finish(tmp_path, 4)
    feed.look()
    (tmp_path / "evaluations" / "fed.json").mkdir()
    assert feed.next() == values(4)


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Makes the records of a start; what wandb got is in its list."""
    from test_metrics import run as config_of

    from titans_pretrain.train import records
    from titans_pretrain.train.directory import RunDirectory
    from titans_pretrain.train.lease import Lease

    got = []
    fake = {"write": lambda self, row: got.append(dict(row)), "close": lambda self: None}
    fake["__init__"] = lambda self, *_: None
    monkeypatch.setattr(records, "WandbLog", type("Wandb", (), fake))
    monkeypatch.setattr(records.devices, "rank", lambda: 0)

    def make(step):
        config = config_of(tmp_path, None)
        directory = RunDirectory(tmp_path)
        made = records.Records(config, directory, step, print, Lease(directory.lock))
        return made, got, config.train.steps

    return make


def row(step):
    return {"step": step, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "seconds": 0.1} | {
        "tokens_per_second": 9.0
    }


def test_wandb_gets_them_with_the_next_step_and_the_metrics_do_not(tmp_path, records):
    made, got, _ = records(0)
    finish(tmp_path, 0)
    made.sync()
    made.step(row(1))
    made.close()
    assert got == [row(1) | values(0)]
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == row(1)


def test_after_the_last_step_wandb_gets_all_that_are_there(tmp_path, records):
    made, got, steps = records(0)
    for step in range(1, steps + 1):
        made.step(row(step))
    for step in (1, 2):
        finish(tmp_path, step)
    made.close()
    assert got[steps:] == [values(1), values(2)]


def test_a_start_and_a_rollback_undo_what_was_found_of_later_states(tmp_path, records):
    for step in (2, 4, 6):
        finish(tmp_path, step)
    made, _, _ = records(4)
    assert [one.step for one in evaluations.read(tmp_path)] == [2, 4]
    event = {"step": 2, "event": "rollback", "from_step": 5, "position": 8}
    made.rollback(event | {"reason": "loss spike", "where": "rank 0"})
    assert [one.step for one in evaluations.read(tmp_path)] == [2]


def test_what_a_rollback_undid_does_not_come_to_wandb(tmp_path, records):
    made, got, _ = records(0)
    for step in (2, 4):
        finish(tmp_path, step)
    made.sync()
    event = {"step": 2, "event": "rollback", "from_step": 5, "position": 8}
    made.rollback(event | {"reason": "loss spike", "where": "rank 0"})
    for step in (3, 4):
        made.step(row(step))
    assert got == [row(3) | values(2), row(4)]


def test_the_parts_of_a_failure_come_and_the_whole_after_it(tmp_path, feed):
    place = evaluations.workplace(tmp_path, 4, "a", {})
    place.mkdir(parents=True)
    told = {"metrics": {"heldout/loss": 2.0}, "settings": {}, "results": {}}
    evaluations.keep(place, **told)
    evaluations.fail(tmp_path, 4, "a", "a task failed")
    feed.look()
    assert feed.next() == values(4)
    finish(tmp_path, 4)
    feed.look()
    assert feed.next() == values(4)
    feed.look()
    assert feed.next() == {}
