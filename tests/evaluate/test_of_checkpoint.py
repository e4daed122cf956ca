"""``titans eval-checkpoint``: a run's checkpoint scored, once, and kept beside the metrics."""

import fcntl
import json
import shutil

import pytest
import yaml
from tiny import MODEL

from titans_pretrain import cli
from titans_pretrain import config as run_config
from titans_pretrain.checkpoint import evaluations, manifest
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.evaluate import of_checkpoint


@pytest.fixture
def run(tmp_path):
    """A run of three steps, as far as an evaluation looks at it before it exports."""
    path = tmp_path / "run"
    place = path / "checkpoints" / "step-3"
    place.mkdir(parents=True)
    manifest.write(place, [manifest.write_file(place, "rank-0", b"weights")], {"step": 3})
    tree = {
        "model": MODEL,
        "data": {"manifest": str(tmp_path / "manifest.json"), "sequence_length": 32},
        "train": {"steps": 3, "global_batch_size": 4, "learning_rate": 0.01},
        "run": {"directory": str(path)},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def checkpoint(run):
    return run / "checkpoints" / "step-3"


@pytest.fixture
def scored(monkeypatch):
    """The places in which something was scored; without a model."""
    places = []

    def score(checkpoint, place, config, choose, device):
        places.append(place)
        return {"heldout": {"loss": 2.0, "tokens": 7}}

    monkeypatch.setattr(of_checkpoint, "_score", score)
    return places


def asked(run, **more):
    config = of_checkpoint.load(run / "config.yaml")
    changed = config.pipeline.eval.model_copy(update=more)
    told = config.pipeline.model_copy(update={"eval": changed})
    return config.model_copy(update={"pipeline": told})


def nothing(model):
    raise AssertionError("no tasks are asked for")


def evaluate(checkpoint, **more):
    return of_checkpoint.evaluate(checkpoint, asked(checkpoint.parent.parent, **more), nothing)


def test_the_loss_of_a_checkpoint_is_the_runs_validation_loss(
    trained, tmp_path, monkeypatch, capsys
):
    from titans_pretrain.export import huggingface

    monkeypatch.setattr(huggingface.verification, "verify", lambda *_: None)  # tests/export has it
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-3"
    shutil.copytree(trained.run, run)
    (run / "jobs").mkdir()
    frozen = run / "jobs" / "config.yaml"
    frozen.write_text(run_config.dump(asked(run, sequences=7)))
    assert cli.main(["eval-checkpoint", str(checkpoint), "--device", "cpu"]) == 0
    told = json.loads((run / "evaluations" / "step-3.json").read_text())
    assert told["metrics"]["heldout/loss"] == pytest.approx(trained.validation_loss, rel=1e-6)
    assert told["checkpoint"] == evaluations.identity(checkpoint)
    assert told["results"]["heldout"]["training_step"] == 3
    assert set(told["metrics"]) == {"heldout/loss", "heldout/perplexity"}
    assert f"step 3  heldout/loss {trained.validation_loss:.6g}" in capsys.readouterr().out
    assert [path.name for path in (run / "evaluations").iterdir()] == ["step-3.json"]


def test_the_same_again_does_nothing_and_another_evaluation_takes_its_place(checkpoint, scored):
    for _ in range(2):
        assert evaluate(checkpoint).metrics == {"heldout/loss": 2.0}
    assert len(scored) == 1
    evaluate(checkpoint, sequences=8)
    assert len(scored) == 2


def test_an_interrupted_evaluation_goes_on_where_it_was(checkpoint, scored, monkeypatch):
    score = of_checkpoint._score

    def killed(checkpoint, place, *more):
        (place / "model").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(of_checkpoint, "_score", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint)
    monkeypatch.setattr(of_checkpoint, "_score", score)
    place = evaluations.workplace(checkpoint.parent.parent, 3, evaluations.identity(checkpoint))
    assert (place / "model").is_dir()
    evaluate(checkpoint)
    assert scored == [place]
    assert not place.exists()


def test_what_fails_for_good_is_put_down_and_may_be_tried_by_hand(
    run, checkpoint, scored, monkeypatch
):
    score = of_checkpoint._score

    def unfit(*_):
        raise UserError("the data does not fit", where="data.manifest", fix="give another")

    monkeypatch.setattr(of_checkpoint, "_score", unfit)
    with pytest.raises(UserError, match="does not fit"):
        evaluate(checkpoint)
    assert evaluations.of_step(run, 3).failure == (
        "the data does not fit; data.manifest; give another"
    )
    assert evaluations.awaited(run, 3, 4) == []
    monkeypatch.setattr(of_checkpoint, "_score", score)
    assert evaluate(checkpoint).metrics == {"heldout/loss": 2.0}


def test_what_may_go_well_another_time_is_not_put_down(run, checkpoint, monkeypatch):
    def crash(*_):
        raise TitansError("out of memory")

    monkeypatch.setattr(of_checkpoint, "_score", crash)
    with pytest.raises(TitansError, match="out of memory"):
        evaluate(checkpoint)
    assert evaluations.read(run) == []
    assert evaluations.awaited(run, 3, 4) == [3]


def test_the_result_of_a_checkpoint_that_gave_way_does_not_count(run, checkpoint, monkeypatch):
    def replaced(*_):
        manifest = checkpoint / "manifest.json"
        manifest.write_text(manifest.read_text() + " ")
        return {"heldout": {"loss": 2.0}}

    monkeypatch.setattr(of_checkpoint, "_score", replaced)
    with pytest.raises(TitansError, match="gave way"):
        evaluate(checkpoint)
    assert evaluations.read(run) == []


def test_two_processes_do_not_evaluate_the_same_checkpoint(run, checkpoint, scored):
    place = evaluations.workplace(run, 3, evaluations.identity(checkpoint))
    place.mkdir(parents=True)
    with open(place / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process evaluates"):
            evaluate(checkpoint)
    assert scored == []
    assert evaluations.read(run) == []


@pytest.mark.parametrize("path", ["run", "run/checkpoints/latest", "elsewhere/step-3"])
def test_only_a_checkpoint_of_a_run_is_taken(run, tmp_path, path):
    with pytest.raises(UserError, match="no checkpoint of a run"):
        of_checkpoint.evaluate(tmp_path / path, asked(run), nothing)


def test_the_options_of_tasks_are_checked(run, checkpoint, capsys):
    (run / "jobs").mkdir()
    config = asked(run, tasks=["piqa"], options=["--sampels=4"])
    (run / "jobs" / "config.yaml").write_text(run_config.dump(config))
    assert cli.main(["eval-checkpoint", str(checkpoint)]) == 2
    assert "pipeline.eval.options: unrecognized arguments: --sampels=4" in capsys.readouterr().err


def test_tasks_are_scored_beside_held_out_data(run, checkpoint, monkeypatch):
    from titans_pretrain.evaluate import heldout, suite
    from titans_pretrain.export import huggingface

    found = [
        {"task": "piqa", "cell": "", "result": {"accuracy": 0.5, "samples": 4}},
        {"task": "babilong_qa1", "cell": "1k", "result": {"accuracy": 0.25, "loss": None}},
    ]
    monkeypatch.setattr(huggingface, "export", lambda *_, **__: None)
    monkeypatch.setattr(heldout, "evaluate", lambda *_, **__: {"loss": 2.0})
    monkeypatch.setattr(suite, "evaluate", lambda model, out, tasks, **_: {"results": found})
    config = asked(run, tasks=["piqa"])
    done = of_checkpoint.evaluate(checkpoint, config, lambda model: [])
    assert done.metrics == {
        "heldout/loss": 2.0,
        "piqa/accuracy": 0.5,
        "babilong_qa1-1k/accuracy": 0.25,
    }
