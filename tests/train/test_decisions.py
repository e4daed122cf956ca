"""The training loop around an engine that only counts: what the guard decides, what is told."""

import json
from types import SimpleNamespace

import pytest
import torch

from titans_pretrain import config
from titans_pretrain.checkpoint.background import Progress
from titans_pretrain.checkpoint.format import newest_good
from titans_pretrain.data.loader import Batch
from titans_pretrain.errors import TitansError
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.shards import FlatShard
from titans_pretrain.parallel.whereabouts import Whereabouts
from titans_pretrain.train import build
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.trainer import Trainer

TOKENS = 8  # of a step
NAN = float("nan")


class CountingEngine:
    """Has one weight, which is the number of updates."""

    def __init__(self):
        self.weight = torch.zeros(1)

    def gradient_norm(self):
        return 1.0

    def step(self, rate):
        self.weight += 1

    def own_gradient_finite(self):
        return True

    def discard(self):
        pass

    def restore(self, step):
        assert self.weight.item() == step

    def shards(self):
        return [FlatShard("weight", (1,), 0, 1, self.weight)]


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    """``make_trainer(bad, guard={…}, …)``: a trainer to whom these data positions are bad."""
    monkeypatch.setattr(build, "build_engine", lambda *arguments: CountingEngine())
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"pieces")
    corpus = SimpleNamespace(fingerprint="f", tokenizer=tokenizer)
    batch = Batch(torch.zeros(1, TOKENS + 1, dtype=torch.int64), None)
    loader = SimpleNamespace(
        corpus=corpus,
        batch=lambda **place: batch,
        repetitions=lambda sequences: f"{sequences} sequences repeat",
        validation_sequences=0,
    )
    groups = SimpleNamespace(data_rank=0, tensor_rank=0, sequence_rank=0)
    directory = RunDirectory(tmp_path / "run")
    directory.create()

    def make(bad=(), *, steps=6, **sections):
        settings = config.resolve(
            {
                "model": {},
                "data": {"manifest": "m", "sequence_length": TOKENS, "validation_fraction": 0},
                "train": {"steps": steps, "global_batch_size": 1, "learning_rate": 1.0},
                "checkpoint": {"every": 1, "asynchronous": False, "keep": 99},
                "run": {"directory": str(directory.path)},
                **sections,
            },
            source="test",
        )
        told = []
        parallel = SimpleNamespace(mesh=Mesh(1, 1, 1), groups=groups, whereabouts=Whereabouts())
        trainer = Trainer(
            settings,
            parallel,
            torch.device("cpu"),
            build.Data(loader),
            directory,
            SimpleNamespace(name=None),
            lambda sentence: told.append(sentence),
            lambda work: trainer.works.append(work),
        )
        trainer.works, trainer.told = [], told

        def passes(batch, valid):
            return [NAN if trainer._position // TOKENS in bad else float(valid)]

        trainer._passes = SimpleNamespace(train=passes)
        return trainer

    make.directory = directory
    return make


def rows(make_trainer):
    return [json.loads(line) for line in make_trainer.directory.metrics.read_text().splitlines()]


def resumed(trainer, make_trainer):
    trainer.restore(newest_good(make_trainer.directory.checkpoints)[0])
    return trainer


def test_a_run_tells_once_what_it_repeats(make_trainer):
    trainer = make_trainer(steps=7)
    trainer.run()
    assert trainer.told.count("7 sequences repeat") == 1


def guarded(policy, limit=3, **more):
    return {"guard": {"policy": policy, "limit": limit, **more}}


def test_bad_steps_before_the_furthest_one_do_not_let_a_run_go_back_for_ever(make_trainer):
    trainer = make_trainer({5, 7, 13}, steps=20, **guarded("rollback", rollback_steps=3))
    with pytest.raises(TitansError, match="bad step 3 in a row") as caught:
        trainer.run()
    assert "guard.policy=skip" in caught.value.fix
    found = [row for row in rows(make_trainer) if "event" in row]
    assert [row["event"] for row in found] == ["rollback", "rollback", "stop"]
    assert [row["from_step"] for row in found] == [6, 4, 6]
    assert [row["furthest"] for row in found] == [6, 6, 6]


def test_a_resume_keeps_to_the_rollback_and_its_row_of_bad_steps(make_trainer):
    make_trainer({3}, steps=5, **guarded("rollback", limit=9)).run()
    first = rows(make_trainer)
    (event,) = (row for row in first if "event" in row)
    assert (event["step"], event["position"]) == (3, 4 * TOKENS)
    for step in (5, 4):
        path = make_trainer.directory.checkpoints / f"step-{step}"
        path.rename(path.with_name(f"lost-{step}"))
    again = resumed(make_trainer(steps=5, **guarded("rollback", limit=9)), make_trainer)
    assert again._position == 4 * TOKENS
    assert again._guard.row() == {"bad": 1, "furthest": 4, "policy": "rollback", "limit": 9}
    again.run()
    assert [row.get("tokens") for row in rows(make_trainer)] == [row.get("tokens") for row in first]


def test_a_run_that_begins_again_follows_no_rollback_of_before(make_trainer):
    make_trainer({0}, steps=2, **guarded("rollback", limit=9)).run()
    directory = make_trainer.directory
    directory.checkpoints.rename(directory.path / "away")
    directory.create()
    make_trainer(steps=2, **guarded("rollback", limit=9)).run()
    for step in (2, 1):
        path = directory.checkpoints / f"step-{step}"
        path.rename(path.with_name(f"lost-{step}"))
    again = resumed(make_trainer(**guarded("rollback", limit=9)), make_trainer)
    assert again._position == 0


def test_after_a_stop_by_the_limit_the_advice_can_be_followed(make_trainer):
    bad = {3, 4}
    with pytest.raises(TitansError, match="bad step 2 in a row"):
        make_trainer(bad, **guarded("rollback", limit=2)).run()
    with pytest.raises(TitansError, match="bad step 2 in a row"):
        resumed(make_trainer(bad, **guarded("rollback", limit=2)), make_trainer).run()
    resumed(make_trainer(bad, **guarded("skip", limit=2)), make_trainer).run()
    found = rows(make_trainer)
    assert [row["step"] for row in found if "event" not in row] == [1, 2, 3, 4, 5, 6]
    decisions = [row["event"] for row in found if "event" in row]
    assert decisions == ["rollback", "stop", "stop"]


def test_skipped_steps_that_are_undone_stay_as_decisions(make_trainer):
    make_trainer({2}, steps=4, **guarded("skip")).run()
    for step in (4, 3):
        path = make_trainer.directory.checkpoints / f"step-{step}"
        path.rename(path.with_name(f"lost-{step}"))
    resumed(make_trainer({2}, steps=4, **guarded("skip")), make_trainer).run()
    found = [(row["step"], row.get("event", "skipped" in row)) for row in rows(make_trainer)]
    assert found == [(1, False), (2, False), (2, "skip"), (3, True), (4, False)]


def test_the_disk_is_waited_for_as_saving_and_not_as_a_step(make_trainer, monkeypatch):
    trainer = make_trainer(steps=1)
    records, synced = trainer._open_records(), []
    monkeypatch.setattr(records, "sync", lambda: synced.append(trainer.works[-1]))
    monkeypatch.setattr(trainer, "_open_records", lambda: records)
    trainer.run()
    assert synced == ["saving"]


@pytest.mark.parametrize(("state", "work"), [(Progress.FAILED, "saving"), (Progress.BUSY, "step")])
def test_a_failed_save_waits_for_ranks_that_write_as_saving(make_trainer, state, work):
    trainer, advanced = make_trainer(steps=1), []
    trainer._saver = SimpleNamespace(
        poll=lambda: state, advance=lambda states: advanced.append(trainer.works[-1])
    )
    trainer._enter("reading", step=1, work="step")
    trainer._agree(1.0, 1.0)
    assert advanced == [work]


def test_the_tokenizer_is_read_once(make_trainer, tmp_path):
    trainer = make_trainer(steps=2)
    (tmp_path / "tokenizer.model").unlink()
    trainer.run()
    saved = make_trainer.directory.checkpoints / "step-2" / "tokenizer.model"
    assert saved.read_bytes() == b"pieces"


def test_a_start_that_failed_before_its_first_step_is_mended_and_started_again(make_trainer):
    with pytest.raises(TitansError, match="bad step 1 in a row at step 1"):
        make_trainer({0}, **guarded("rollback", limit=1)).run()
    directory = make_trainer.directory
    assert [path.name for path in directory.checkpoints.glob("step-*")] == ["step-0"]
    trainer = make_trainer(steps=2, **guarded("rollback", limit=1))
    assert directory.check(trainer._config, resume=False) == []
    directory.forget_last()
    trainer.run()
    assert [row.get("event", row["step"]) for row in rows(make_trainer)] == ["stop", 1, 2]
