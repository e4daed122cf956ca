"""``titans eval-checkpoint``: a run's checkpoint scored, once, and kept beside the metrics."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import yaml
from tiny import MODEL

from titans_pretrain import cli
from titans_pretrain import config as run_config
from titans_pretrain.checkpoint import evaluations, manifest
from titans_pretrain.errors import Misfit, TitansError, UserError
from titans_pretrain.evaluate import of_checkpoint
from titans_pretrain.files import write_json


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

    def score(checkpoint, place, config, tasks, device, results, keep):
        places.append(place)
        results["heldout"] = {"loss": 2.0, "tokens": 7}

    monkeypatch.setattr(of_checkpoint, "_score", score)
    return places


@pytest.fixture(autouse=True)
def data(request, monkeypatch):
    """Stands in for the fingerprint of the data; a test may change it."""
    data = SimpleNamespace(fingerprint="f" * 64)
    if "trained" not in request.fixturenames:
        monkeypatch.setattr(of_checkpoint, "_fingerprint", lambda manifest: data.fingerprint)
    return data


@dataclass
class Toy:
    """A task whose one cell is written as it is told."""

    name: str
    content: str = "first"

    def identity(self):
        return {"content": self.content}

    def cells(self):
        return [""]


@pytest.fixture
def toys(monkeypatch):
    """The tasks by name that are opened in the place of the real ones."""
    toys = {name: Toy(name) for name in ("piqa", "boolq")}
    monkeypatch.setattr(
        of_checkpoint.task_names, "parse", lambda text, _: [toys[n] for n in text.split(",")]
    )
    return toys


def asked(run, **more):
    config = of_checkpoint.load(run / "config.yaml")
    changed = config.pipeline.eval.model_copy(update=more)
    told = config.pipeline.model_copy(update={"eval": changed})
    return config.model_copy(update={"pipeline": told})


def evaluate(checkpoint, **more):
    return of_checkpoint.evaluate(checkpoint, asked(checkpoint.parent.parent, **more))


def of_the_run(run, **more):
    """What its jobs ask, from now on."""
    (run / "jobs").mkdir(exist_ok=True)
    config = asked(run, **more)
    (run / "jobs" / "config.yaml").write_text(run_config.dump(config))
    return config


def workplaces(run):
    return sorted((run / "evaluations").glob(".step-3-*"))


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


def test_other_data_at_the_same_place_is_scored_anew(checkpoint, scored, data, toys):
    evaluate(checkpoint, tasks=["piqa"])
    data.fingerprint = "e" * 64
    evaluate(checkpoint, tasks=["piqa"])
    assert len(scored) == 2
    toys["piqa"].content = "second"
    evaluate(checkpoint, tasks=["piqa"])
    assert len(scored) == 3
    evaluate(checkpoint, tasks=["piqa"])
    assert len(scored) == 3


def test_what_other_code_computed_is_computed_anew(checkpoint, scored, monkeypatch):
    evaluate(checkpoint)
    for code in ("another", "another"):
        monkeypatch.setattr(of_checkpoint.loaded, "code_of", lambda kind, code=code: kind + code)
        found = evaluate(checkpoint)
    assert len(scored) == 2
    assert found.settings["code"] == "titansanother"


def test_an_interrupted_evaluation_goes_on_where_it_was(run, checkpoint, scored, monkeypatch):
    score = of_checkpoint._score

    def killed(checkpoint, place, *more):
        (place / "model").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(of_checkpoint, "_score", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint)
    monkeypatch.setattr(of_checkpoint, "_score", score)
    (place,) = workplaces(run)
    assert (place / "model").is_dir()
    evaluate(checkpoint, sequences=8)  # of other settings: it goes on with nothing of that
    assert scored[0] != place
    assert not (place / "model").exists()  # nobody may ever come back for it
    evaluate(checkpoint)
    assert scored[1:] == [place]
    assert workplaces(run) == []


def test_a_bad_configuration_is_put_down_at_once(run, checkpoint, scored):
    config = of_the_run(run, tasks=["piqa"], options=["--sampels=4"])
    with pytest.raises(UserError, match="unrecognized arguments"):
        of_checkpoint.evaluate(checkpoint, config)
    found = evaluations.of_step(run, 3)
    assert found.failure.startswith("pipeline.eval.options: unrecognized arguments: --sampels=4")
    assert evaluations.awaited(run, 3, 4) == []
    assert evaluate(checkpoint).metrics == {"heldout/loss": 2.0}
    with pytest.raises(UserError, match="unrecognized arguments"):
        of_checkpoint.evaluate(checkpoint, config)
    assert evaluations.of_step(run, 3).metrics == {"heldout/loss": 2.0}  # what is known stays


def test_a_run_with_nothing_to_score_a_checkpoint_on_is_refused(run, checkpoint, scored):
    config = asked(run)
    mixed = config.data.model_copy(update={"manifest": None})
    config = config.model_copy(update={"data": mixed})
    with pytest.raises(Misfit, match="nothing to score a checkpoint on") as caught:
        of_checkpoint.evaluate(checkpoint, config)
    assert caught.value.fix == "give pipeline.eval.tasks"
    assert scored == []
    assert not evaluations.is_settled(run, 3)


@pytest.mark.parametrize(
    ("tasks", "missing"),
    [("niah_number", "--essays"), ("babilong_qa1", "--facts"), ("position", "--text or --data")],
)
def test_data_that_no_option_names_is_a_mistake_of_the_configuration(
    run, checkpoint, scored, tasks, missing
):
    config = of_the_run(run, tasks=[tasks])
    with pytest.raises(Misfit, match=f"{tasks} needs {missing}"):
        of_checkpoint.evaluate(checkpoint, config)
    assert f"pipeline.eval.options: {tasks} needs" in evaluations.of_step(run, 3).failure
    assert evaluations.awaited(run, 3, 4) == []


@pytest.mark.parametrize("asked_by_hand", [{"tasks": ["piqqa"]}, {"options": ["--sampels=4"]}])
def test_a_bad_configuration_that_is_not_the_runs_is_not_put_down(
    run, checkpoint, scored, asked_by_hand
):
    with pytest.raises(UserError, match=r"piqqa|sampels"):
        evaluate(checkpoint, **{"tasks": ["piqa"]} | asked_by_hand)
    assert evaluations.read(run) == []
    assert evaluations.awaited(run, 3, 4) == [3]
    evaluations.fail(run, 3, evaluations.identity(checkpoint), "3 jobs ended")
    assert evaluations.of_step(run, 3).failure == "3 jobs ended"


@pytest.mark.parametrize("where", ["_opened", "_contents", "_score"])
def test_data_that_cannot_be_reached_now_is_tried_again(
    run, checkpoint, monkeypatch, scored, where
):
    def unreachable(*_):
        raise UserError("the Hub was not reached", where="piqa", fix="mend the network")

    with monkeypatch.context() as patch:
        patch.setattr(of_checkpoint, where, unreachable)
        with pytest.raises(UserError, match="not reached"):
            evaluate(checkpoint)
    assert evaluations.read(run) == []
    assert evaluations.awaited(run, 3, 4) == [3]
    assert evaluate(checkpoint).metrics == {"heldout/loss": 2.0}
    assert [path.name for path in (run / "evaluations").iterdir()] == ["step-3.json"]


@pytest.mark.parametrize("where", ["_opened", "_contents", "_export"])
def test_the_last_error_is_told_when_an_evaluation_is_given_up(run, checkpoint, monkeypatch, where):
    def broken(*_):
        raise error

    monkeypatch.setattr(of_checkpoint, where, broken)
    for error in (UserError("no network", where="piqa", fix="mend it"), KeyError("shape")):
        with pytest.raises(type(error)):
            evaluate(checkpoint)
        with pytest.raises(UserError, match="sampels"):  # of another's configuration
            evaluate(checkpoint, tasks=["piqa"], options=["--sampels=4"])
        evaluations.fail(run, 3, evaluations.identity(checkpoint), "3 jobs ended")
        told = {UserError: "no network; piqa; mend it", KeyError: "KeyError: 'shape'"}[type(error)]
        assert evaluations.of_step(run, 3).failure == f"3 jobs ended; {told}"


def test_of_a_failure_the_finished_parts_are_told_when_it_is_given_up(run, checkpoint, monkeypatch):
    def score(checkpoint, place, config, tasks, device, results, keep):
        results["heldout"] = {"loss": 2.0}
        raise TitansError("piqa: out of memory")

    monkeypatch.setattr(of_checkpoint, "_score", score)
    with pytest.raises(TitansError, match="out of memory"):
        evaluate(checkpoint)
    evaluations.fail(run, 3, evaluations.identity(checkpoint), "3 jobs ended without a result")
    found = evaluations.of_step(run, 3)
    assert found.metrics == {"heldout/loss": 2.0}
    assert found.failure == "3 jobs ended without a result; piqa: out of memory"


def test_a_late_mistake_leaves_the_result_of_the_checkpoint_that_took_the_place(
    run, checkpoint, monkeypatch
):
    def replaced(*_):
        path = checkpoint / "manifest.json"
        path.write_text(path.read_text() + " ")
        now = evaluations.identity(checkpoint)
        evaluations.write(run, 3, now, metrics={"heldout/loss": 1.0}, settings={}, results={})
        raise Misfit("nothing is held out")

    monkeypatch.setattr(of_checkpoint, "_score", replaced)
    with pytest.raises(TitansError):
        evaluate(checkpoint)
    found = evaluations.of_step(run, 3)
    assert (found.metrics, found.failure) == ({"heldout/loss": 1.0}, "")
    assert not (run / "evaluations" / "step-3.error.json").exists()


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

    monkeypatch.setattr(of_checkpoint, "_score", replaced)
    with pytest.raises(TitansError, match="gave way"):
        evaluate(checkpoint)
    assert evaluations.read(run) == []
    assert workplaces(run) == []


def test_two_processes_do_not_evaluate_the_same_checkpoint(run, checkpoint, scored, monkeypatch):
    @contextlib.contextmanager
    def beside(place):
        place.mkdir(parents=True)
        with open(place / ".lock", "a") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with alone(place):
                yield

    alone = of_checkpoint._alone
    monkeypatch.setattr(of_checkpoint, "_alone", beside)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    evaluations.add_job(run, 3, "12")
    evaluations.stopped(run, 3, evaluations.identity(checkpoint), "no network")
    with pytest.raises(UserError, match="another process evaluates"):
        evaluate(checkpoint)
    assert scored == []
    assert evaluations.read(run) == []
    assert evaluations.fruitless(run, 3) == 0
    evaluations.fail(run, 3, evaluations.identity(checkpoint), "given up")
    assert evaluations.of_step(run, 3).failure == "given up; no network"


def test_a_process_that_comes_late_takes_the_result_of_the_other(
    run, checkpoint, scored, monkeypatch
):
    @contextlib.contextmanager
    def after_the_other(place):
        monkeypatch.setattr(of_checkpoint, "_alone", alone)
        evaluate(checkpoint)
        with alone(place):
            yield

    alone = of_checkpoint._alone
    monkeypatch.setattr(of_checkpoint, "_alone", after_the_other)
    assert evaluate(checkpoint).metrics == {"heldout/loss": 2.0}
    assert len(scored) == 1
    assert workplaces(run) == []


def test_an_evaluation_that_is_under_way_keeps_its_model(run, checkpoint, scored):
    place = evaluations.workplace(run, 3, evaluations.identity(checkpoint), {"asked": "by hand"})
    (place / "model").mkdir(parents=True)
    with open(place / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert evaluations.is_under_way(run, 3)
        evaluations.fail(run, 3, evaluations.identity(checkpoint), "3 jobs ended")
        evaluate(checkpoint)
        assert (place / "model").is_dir()
    assert not evaluations.is_under_way(run, 3)
    evaluate(checkpoint, sequences=8)
    assert not (place / "model").exists()


@pytest.mark.parametrize("path", ["run", "run/checkpoints/latest", "elsewhere/step-3"])
def test_only_a_checkpoint_of_a_run_is_taken(run, tmp_path, path):
    with pytest.raises(UserError, match="no checkpoint of a run"):
        of_checkpoint.evaluate(tmp_path / path, asked(run))


def test_the_options_of_tasks_are_checked(run, checkpoint, capsys):
    (run / "jobs").mkdir()
    config = asked(run, tasks=["piqa"], options=["--sampels=4"])
    (run / "jobs" / "config.yaml").write_text(run_config.dump(config))
    assert cli.main(["eval-checkpoint", str(checkpoint)]) == 2
    assert "pipeline.eval.options: unrecognized arguments: --sampels=4" in capsys.readouterr().err


@pytest.fixture
def parts(monkeypatch):
    """Stands in for export, held-out loss and tasks; counts their calls."""
    from titans_pretrain.evaluate import heldout, loaded, suite
    from titans_pretrain.export import huggingface

    parts = SimpleNamespace(heldout=0, failing="", real_suite=suite.evaluate)

    def export(checkpoint, model, **_):
        model.mkdir(exist_ok=True)

    def held_out(model, out, *_, **__):
        parts.heldout += 1
        out.mkdir()
        write_json(out / "heldout.json", {"format": heldout.FORMAT, "loss": 2.0})
        return {"loss": 2.0}

    def score(model, out, tasks, finished, **_):
        cells = out / suite.CELLS
        cells.mkdir(parents=True, exist_ok=True)
        for name in ("left", *(task.name for task in tasks)):
            if name == parts.failing:
                raise TitansError(f"{name}: no answer")
            found = {"task": name, "cell": "", "model": "m", "result": {"accuracy": 0.5, "n": 4}}
            write_json(cells / f"{name}.json", {"format": suite.FORMAT, **found})
            finished()

    monkeypatch.setattr(huggingface, "export", export)
    monkeypatch.setattr(heldout, "evaluate", held_out)
    monkeypatch.setattr(suite, "evaluate", score)
    monkeypatch.setattr(loaded, "fingerprint", lambda model: "m")
    return parts


def test_tasks_are_scored_beside_held_out_data_and_none_that_was_not_asked_for(
    checkpoint, parts, toys
):
    found = evaluate(checkpoint, tasks=["piqa", "boolq"])
    assert found.metrics == {"heldout/loss": 2.0, "piqa/accuracy": 0.5, "boolq/accuracy": 0.5}
    assert found.settings["identities"].keys() == {"piqa", "boolq"}


def test_another_try_takes_what_is_finished_also_after_it_was_given_up(
    run, checkpoint, parts, toys
):
    parts.failing = "boolq"
    with pytest.raises(TitansError, match="no answer"):
        evaluate(checkpoint, tasks=["piqa", "boolq"])
    evaluations.fail(run, 3, evaluations.identity(checkpoint), "given up")
    assert evaluations.of_step(run, 3).metrics == {"heldout/loss": 2.0, "piqa/accuracy": 0.5}
    (place,) = workplaces(run)
    assert not (place / "model").exists()
    parts.failing = ""
    assert "boolq/accuracy" in evaluate(checkpoint, tasks=["piqa", "boolq"]).metrics
    assert parts.heldout == 1


def test_what_an_earlier_try_finished_outlives_an_export_that_fails(
    run, checkpoint, parts, toys, monkeypatch
):
    from titans_pretrain.export import huggingface

    parts.failing = "boolq"
    with pytest.raises(TitansError, match="no answer"):
        evaluate(checkpoint, tasks=["piqa", "boolq"])
    evaluations.add_job(run, 3, "11")

    def full(checkpoint, model, **_):
        raise TitansError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "export", full)
        with pytest.raises(TitansError, match="no space left"):
            evaluate(checkpoint, tasks=["piqa", "boolq"])
    told = {"heldout/loss": 2.0, "piqa/accuracy": 0.5}
    (place,) = workplaces(run)
    assert json.loads((place / "parts.json").read_text())["metrics"] == told
    assert evaluations.fruitless(run, 3) == 1
    evaluations.fail(run, 3, evaluations.identity(checkpoint), "given up")
    assert evaluations.of_step(run, 3).metrics == told
    parts.failing = ""
    assert evaluate(checkpoint, tasks=["piqa", "boolq"]).metrics == told | {"boolq/accuracy": 0.5}


def test_of_a_killed_job_the_finished_cells_are_told(run, checkpoint, parts, toys, monkeypatch):
    from titans_pretrain.evaluate import loaded, suite

    def answer(model, cell, tell):
        if cell == "second":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"accuracy": 0.5}

    toy = toys["piqa"]
    toy.cells, toy.check, toy.run = lambda: ["first", "second"], lambda longest: None, answer
    monkeypatch.setattr(suite, "evaluate", parts.real_suite)
    monkeypatch.setattr(loaded, "positions", lambda model: None)
    monkeypatch.setattr(loaded, "code", lambda model: "c")
    network = SimpleNamespace(dtype="float32", device="cpu", longest=None)
    monkeypatch.setattr(loaded, "load", lambda model, **_: network)
    job = multiprocessing.get_context("fork").Process(
        target=evaluate, args=(checkpoint,), kwargs={"tasks": ["piqa"]}
    )
    evaluations.add_job(run, 3, "11")
    job.start()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    assert evaluations.fruitless(run, 3) == 0
    evaluations.fail(run, 3, evaluations.identity(checkpoint), "3 jobs ended")
    told = {"heldout/loss": 2.0, "piqa-first/accuracy": 0.5}
    assert evaluations.of_step(run, 3).metrics == told


def test_an_export_of_another_version_in_the_workplace_gives_way(tmp_path, monkeypatch):
    from titans_pretrain.export import huggingface

    model, calls = tmp_path / "model", []

    def export(checkpoint, out, **_):
        calls.append(out)
        if out.exists():
            raise UserError(f"{out} exists, and is not this export")
        out.mkdir()

    model.mkdir()
    monkeypatch.setattr(huggingface, "export", export)
    of_checkpoint._export(tmp_path, model, "float32")
    assert len(calls) == 2
    monkeypatch.setattr(
        huggingface, "export", lambda *_, **__: (_ for _ in ()).throw(UserError("no"))
    )
    model.rmdir()
    with pytest.raises(UserError, match="no"):
        of_checkpoint._export(tmp_path, model, "float32")
