"""What is kept of evaluations, and which checkpoints wait for theirs. No torch."""

import json
import os

import pytest

from titans_pretrain import files
from titans_pretrain.checkpoint import evaluations, manifest, retention
from titans_pretrain.checkpoint import format as layout
from titans_pretrain.errors import UserError

DONE = {"settings": {}, "results": {}}


@pytest.fixture
def save(tmp_path):
    """Makes a checkpoint of a step; ``mark`` tells it from another of that step."""

    def save(step, mark=""):
        path = tmp_path / "checkpoints" / layout.step_name(step)
        path.mkdir(parents=True, exist_ok=True)
        index = {"format": layout.FORMAT, "files": [], "tensors": {}}
        files = [manifest.write_file(path, layout.TENSORS, json.dumps(index).encode())]
        facts = {"format": layout.FORMAT, "step": step, "tensors": {}, "mark": mark}
        manifest.write(path, files, facts)
        return evaluations.identity(path)

    return save


def finish(run, step, identity, loss=2.5):
    return evaluations.write(run, step, identity, metrics={"heldout/loss": loss}, **DONE)


def awaited(run, every=2, at_most=4):
    return evaluations.awaited(run, every, at_most)


def test_evaluations_are_read_by_step_and_damaged_ones_left_out(tmp_path):
    assert evaluations.read(tmp_path) == []
    finish(tmp_path, 10, "a", 1.5)
    finish(tmp_path, 8, "b", 2.0)
    evaluations.fail(tmp_path, 9, "c", "no data")
    (tmp_path / "evaluations" / "step-7.json").write_text('{"format": "titans-eva')
    finish(tmp_path, 6, "d").rename(tmp_path / "evaluations" / "step-5.json")
    found = evaluations.read(tmp_path)
    assert [(one.step, one.metrics.get("heldout/loss")) for one in found] == [
        (8, 2.0),
        (9, None),
        (10, 1.5),
    ]
    assert [one.failure for one in found] == ["", "no data", ""]


def test_a_metric_that_is_no_number_makes_no_evaluation(tmp_path):
    path = finish(tmp_path, 2, "a")
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"metrics": {"heldout/loss": "low"}}))
    assert evaluations.of_step(tmp_path, 2) is None


def test_due_checkpoints_wait_until_they_are_evaluated_or_cannot_be(tmp_path, save):
    kept = {step: save(step) for step in (1, 2, 3, 4, 6, 8)}
    assert awaited(tmp_path) == [2, 4, 6, 8]
    assert awaited(tmp_path, at_most=2) == [2, 4]
    assert awaited(tmp_path, at_most=None) == [2, 4, 6, 8]
    finish(tmp_path, 2, kept[2])
    evaluations.fail(tmp_path, 6, kept[6], "no data")
    assert awaited(tmp_path) == [4, 8]
    assert awaited(tmp_path, every=3) == [3]


def test_the_step_made_anew_waits_again(tmp_path, save):
    finish(tmp_path, 2, save(2))
    assert awaited(tmp_path) == []
    save(2, mark="after other data")
    assert awaited(tmp_path) == [2]


def test_jobs_count_for_the_checkpoint_they_were_submitted_for(tmp_path, save):
    save(2)
    for job in ("11", "12"):
        evaluations.add_job(tmp_path, 2, job)
    assert evaluations.jobs(tmp_path, 2) == ["11", "12"]
    save(2, mark="after other data")
    assert evaluations.jobs(tmp_path, 2) == []
    evaluations.add_job(tmp_path, 2, "13")
    assert evaluations.jobs(tmp_path, 2) == ["13"]


def test_going_back_removes_what_was_found_later(tmp_path, save):
    for step in (2, 10):
        finish(tmp_path, step, save(step))
        evaluations.add_job(tmp_path, step, "11")
        evaluations.workplace(tmp_path, step, "f" * 64, {}).mkdir()
    evaluations.undo(tmp_path, 2)
    left = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    assert left == [".step-2-ffffffff-44136fa3", "step-2.jobs.json", "step-2.json"]
    evaluations.undo(tmp_path, 0)
    assert list((tmp_path / "evaluations").iterdir()) == []


def test_a_failure_tells_and_keeps_what_was_finished_and_lets_go_of_the_model(tmp_path, save):
    identity = save(2)
    place = evaluations.workplace(tmp_path, 2, identity, {"dtype": "float32"})
    (place / "model").mkdir(parents=True)
    (place / "tasks" / "cells").mkdir(parents=True)
    told = {"metrics": {"heldout/loss": 2.5}, "settings": {"dtype": "float32"}, "results": {}}
    evaluations.keep(place, **told)
    evaluations.stopped(tmp_path, 2, identity, "the Hub was not reached")
    evaluations.fail(tmp_path, 2, identity, "3 jobs ended")
    assert sorted(path.name for path in place.iterdir()) == [".lock", "parts.json", "tasks"]
    found = evaluations.of_step(tmp_path, 2)
    assert found.failure == "3 jobs ended; the Hub was not reached"
    assert (found.metrics, found.settings) == (told["metrics"], told["settings"])


def test_an_error_is_that_of_its_checkpoint(tmp_path, save):
    evaluations.stopped(tmp_path, 2, "of another checkpoint", "out of memory")
    evaluations.fail(tmp_path, 2, save(2), "3 jobs ended")
    assert evaluations.of_step(tmp_path, 2).failure == "3 jobs ended"


def test_jobs_that_finish_nothing_new_are_counted(tmp_path, save):
    identity = save(2)
    place = evaluations.workplace(tmp_path, 2, identity, {})
    place.mkdir(parents=True)
    counted = []

    def job(name, parts):
        evaluations.add_job(tmp_path, 2, name, evaluations.fruitless(tmp_path, 2))
        results = {str(number): {} for number in range(parts)}
        evaluations.keep(place, metrics={}, settings={}, results=results)
        counted.append(evaluations.fruitless(tmp_path, 2))

    for number, parts in enumerate((0, 0, 2, 2, 2, 3)):
        job(str(number), parts)
    assert counted == [1, 2, 0, 1, 2, 0]
    save(2, mark="after other data")
    assert evaluations.fruitless(tmp_path, 2) == 0


def test_a_job_that_gave_way_is_no_try_and_hides_no_reason(tmp_path, save, monkeypatch):
    identity = save(2)
    evaluations.add_job(tmp_path, 2, "11")
    evaluations.stopped(tmp_path, 2, identity, "the Hub was not reached")
    assert evaluations.fruitless(tmp_path, 2) == 1
    evaluations.add_job(tmp_path, 2, "12", 1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    evaluations.gave_way(tmp_path, 2, identity)
    assert evaluations.fruitless(tmp_path, 2) == 1
    evaluations.add_job(tmp_path, 2, "13", 1)
    assert evaluations.fruitless(tmp_path, 2) == 2
    evaluations.fail(tmp_path, 2, identity, "given up")
    assert evaluations.of_step(tmp_path, 2).failure == "given up; the Hub was not reached"


def test_exports_with_which_nothing_goes_on_are_removed(tmp_path, save):
    kept = {step: save(step) for step in (2, 4)}
    places = {}
    for step, identity in {**kept, 6: "gone"}.items():
        places[step] = evaluations.workplace(tmp_path, step, identity, {"tasks": ["piqa"]})
        (places[step] / "model").mkdir(parents=True)
        (places[step] / "tasks").mkdir()
    half = places[2] / ".model.another-7-0123.dir"
    half.mkdir()
    guard = half.with_suffix(".tmp")
    guard.touch()
    for path in (half, guard):
        os.utime(path, (0, 0))
    finish(tmp_path, 2, kept[2])
    evaluations.tidy(tmp_path)
    assert [path.name for path in places[2].iterdir() if path.name != ".lock"] == ["tasks"]
    assert [(place / "model").exists() for place in places.values()] == [False, True, False]


def test_each_choice_of_settings_has_a_workplace_of_its_own(tmp_path):
    places = {evaluations.workplace(tmp_path, 2, "f" * 64, {"dtype": d}) for d in ("a", "b", "a")}
    assert len(places) == 2


def test_a_settled_checkpoint_is_read_once_however_often_it_is_asked_about(
    tmp_path, save, monkeypatch
):
    read = []
    files._sha256.cache_clear()
    sha256 = files.sha256_file
    finish(tmp_path, 2, save(2))
    monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path) or sha256(path))
    for _ in range(3):
        assert evaluations.is_settled(tmp_path, 2)
    assert len(read) == 1
    (tmp_path / "checkpoints" / "step-2" / manifest.NAME).write_text("another")
    assert not evaluations.is_settled(tmp_path, 2)


def test_a_checkpoint_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint to evaluate") as caught:
        evaluations.identity(tmp_path / "checkpoints" / "step-2")
    assert caught.value.where.endswith("step-2")


def test_what_is_spared_outlives_the_newest_until_it_is_evaluated(tmp_path, save):
    root = tmp_path / "checkpoints"
    kept = {step: save(step) for step in range(1, 8)}

    def prune():
        spared = evaluations.awaited
        return retention.prune(root, 7, 1, spared=lambda steps: spared(tmp_path, 2, 2, steps))

    assert prune() == [1, 3, 5, 6]
    assert prune() == []
    finish(tmp_path, 2, kept[2])
    assert prune() == [2]
    assert layout.steps(root) == [4, 7]
