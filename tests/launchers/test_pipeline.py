"""``titans submit --pipeline``: which stages, what waits for what, what is not done again."""

import shutil

import pytest
import yaml
from submit_cases import rows, write_checkpoint, write_config, write_export

from launchers import pipeline, submit
from titans_pretrain import cli
from titans_pretrain import config as run_config
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.files import write_json

ALL = ["plan", "prepare", "merge", "train", "export", "eval"]


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A run that prepares its data in four tasks, two at once; its data is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").touch()
    (tmp_path / "tokenizer.model").touch()
    data = {"input": ["text/*.jsonl"], "tokenizer": "tokenizer.model", "tasks": 4, "at_once": 2}
    made = write_config(tmp_path, pipeline={"data": data})
    shutil.rmtree(tmp_path / "data")
    return made


def _titans(*words):
    return cli.main(["submit", *map(str, words), "--pipeline"])


def _prepared(tmp_path):
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / "manifest.json", {"fingerprint": "f" * 64})


def test_each_stage_waits_for_the_one_before(file, run, slurm, capsys):
    assert _titans(file) == 0
    assert [stage for stage, _ in slurm.submitted] == ALL
    assert sorted(slurm.tested) == sorted(ALL)
    assert [options for _, options in slurm.submitted] == [
        [],
        ["--dependency=afterok:11"],
        ["--dependency=afterok:12"],
        ["--dependency=afterok:13,singleton"],
        ["--dependency=afterok:14"],
        ["--dependency=afterok:15"],
    ]
    for stage in ALL:
        script = (run / "jobs" / f"{stage}.sbatch").read_text()
        assert "#SBATCH --kill-on-invalid-dep=yes" in script
    assert [(row["stage"], row["job"], row["depends"]) for row in rows(run)] == [
        (stage, str(11 + i), [str(10 + i)] if i else []) for i, stage in enumerate(ALL)
    ]
    told = capsys.readouterr().out
    assert "prepare: job 12, after 11 (plan)" in told
    for stage in ALL:
        assert (run / "jobs" / f"{stage}.sbatch").read_text() in told


def test_a_dry_run_prints_every_stage(file, run, capsys):
    assert _titans(file, "--dry-run") == 0
    told = capsys.readouterr().out
    assert told.count("#!/bin/bash\n") == len(ALL)
    assert f"# {run}/jobs/train.sbatch, after merge\n" in told
    assert not run.exists()


def test_data_that_is_there_needs_no_stages(tmp_path, run, slurm):
    assert _titans(write_config(tmp_path)) == 0
    assert [stage for stage, _ in slurm.submitted] == ["train", "export", "eval"]


@pytest.fixture
def refused(file, slurm):
    """``refused(override…, section={…})``: the error of a chain of which nothing was queued."""

    def refuse(*overrides, **sections):
        _change(file, **sections)
        with pytest.raises(UserError) as caught:
            submit.submit(str(file), overrides, chain=True)
        assert not slurm.submitted
        assert caught.value.fix
        return caught.value

    return refuse


def _change(file, **sections):
    """Change sections of a pipeline."""
    whole = yaml.safe_load(file.read_text())
    for name, values in sections.items():
        whole["pipeline"][name] = whole["pipeline"].get(name, {}) | values
    file.write_text(yaml.safe_dump(whole))


def test_text_that_is_not_there_is_refused(tmp_path, refused):
    error = refused(data={"input": ["text/*.jsonl", "no/*.jsonl"]})
    assert error.what == f"pipeline.data.input: nothing matches '{tmp_path}/no/*.jsonl'"


def test_text_at_a_url_is_left_to_the_plan(file, slurm):
    _change(file, data={"input": ["s3://b/*.jsonl"]})
    assert _titans(file) == 0


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path, refused):
    (tmp_path / "tokenizer.model").unlink()
    assert refused().where == "pipeline.data.tokenizer"


@pytest.mark.parametrize(
    ("key", "override"),
    [
        ("data.manifest", "data.manifest=file/data/manifest.json"),
        ("pipeline.export.directory", "pipeline.export={directory: file/model}"),
        ("pipeline.eval.output", "pipeline.eval={output: file/eval}"),
    ],
)
def test_a_place_that_a_later_stage_cannot_make_is_refused(key, override, tmp_path, refused):
    (tmp_path / "file").touch()
    error = refused(override)
    assert error.where == key
    assert f"{tmp_path}/file is no directory" in error.what


def test_a_place_that_may_not_be_written_is_refused(tmp_path, refused, monkeypatch):
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path / "closed")
    error = refused("pipeline.export={directory: closed/model}")
    assert f"{tmp_path}/closed may not be written" in error.what


def test_the_places_of_stages_that_are_done_are_not_looked_at(tmp_path, slurm):
    file = write_config(tmp_path, data={"validation_fraction": 0.0})
    write_checkpoint(file, tmp_path / "run", 6)
    write_export(tmp_path / "run" / "model", 6)
    (tmp_path / "run" / "eval").mkdir()
    write_json(tmp_path / "run" / "eval" / "heldout.json", {"training_step": 6})
    assert _titans(file, "--resume") == 0
    assert not slurm.submitted


def test_nothing_held_out_is_refused_before_the_evaluation_would_tell(refused):
    assert refused("data.validation_fraction=0").where == "data.validation_fraction"
    refused("data.validation_fraction=0", data={"options": ["--held-out=0.0"]})


def test_documents_that_the_plan_will_hold_out_are_enough(file, slurm):
    _change(file, data={"options": ["--held-out=0.01"]})
    assert _titans(file, "data.validation_fraction=0") == 0


@pytest.mark.parametrize(("tokens", "queued"), [(0, False), (900, True)])
def test_of_data_that_is_there_the_manifest_tells_what_is_held_out(tokens, queued, tmp_path, slurm):
    file = write_config(tmp_path)
    manifest = {"fingerprint": "f" * 64, "held_out": [], "held_out_tokens": tokens}
    write_json(tmp_path / "data" / "manifest.json", manifest)
    assert _titans(file, "data.validation_fraction=0") == (0 if queued else 2)
    assert bool(slurm.submitted) == queued


def test_data_that_nobody_makes_is_refused(tmp_path, slurm):
    file = write_config(tmp_path)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="does not exist"):
        submit.submit(str(file), chain=True)
    assert not slurm.submitted


def test_the_data_stages_need_one_manifest_on_a_file_system(file):
    with pytest.raises(UserError, match="prepared data needs a directory"):
        submit.submit(str(file), ["data.manifest=s3://b/manifest.json"], chain=True, dry_run=True)


@pytest.mark.parametrize("stage", ALL[1:])
def test_if_one_stage_is_refused_none_stays_queued(stage, file, run, slurm, capsys):
    slurm.refuse_stage = stage
    before = ALL[: ALL.index(stage)]
    with pytest.raises(TitansError, match="SLURM refused: no"):
        submit.submit(str(file), chain=True)
    assert slurm.cancelled == [str(11 + i) for i in reversed(range(len(before)))]
    told = capsys.readouterr().err
    for i, name in enumerate(before):
        assert f"cancelled job {11 + i} ({name})" in told


def test_a_job_that_cannot_be_cancelled_is_named(file, slurm, monkeypatch, capsys):
    def refuse(number, **more):
        raise TitansError("SLURM does not answer")

    slurm.refuse_stage = "prepare"
    monkeypatch.setattr("launchers.slurm_utils.cancel", refuse)
    with pytest.raises(TitansError):
        submit.submit(str(file), chain=True)
    assert "cannot cancel job 11 (plan): do it with scancel 11" in capsys.readouterr().err


def test_the_same_command_while_the_chain_lives_is_refused(file, slurm):
    assert _titans(file) == 0
    with pytest.raises(UserError, match=r"11 \(pending\), 12 \(pending\)"):
        submit.submit(str(file), chain=True, resume=True)
    assert len(slurm.submitted) == len(ALL)


def test_the_same_command_goes_on_where_the_chain_ended(tmp_path, file, run, slurm, capsys):
    assert _titans(file) == 0
    slurm.end_all()
    slurm.submitted.clear()
    assert _titans(file) == 0  # it ended within the data: its finished tasks are skipped there
    assert [stage for stage, _ in slurm.submitted] == ALL

    slurm.end_all()
    slurm.submitted.clear()
    _prepared(tmp_path)
    write_checkpoint(file, run, 2)
    assert _titans(file) == 0
    assert [stage for stage, _ in slurm.submitted] == ["train", "export", "eval"]
    assert "prepare: done, the run trains on it" in capsys.readouterr().out

    slurm.end_all()
    slurm.submitted.clear()
    write_checkpoint(file, run, 6)
    assert _titans(file) == 0
    assert [stage for stage, _ in slurm.submitted] == ["export", "eval"]
    assert slurm.submitted[0] == ("export", [])
    assert "train: finished already: step-6 of 6 steps" in capsys.readouterr().out

    slurm.end_all()
    slurm.submitted.clear()
    write_export(run / "model", 6)
    assert _titans(file) == 0
    assert [stage for stage, _ in slurm.submitted] == ["eval"]

    slurm.end_all()
    slurm.submitted.clear()
    (run / "eval").mkdir()
    write_json(run / "eval" / "heldout.json", {"training_step": 4})
    assert _titans(file) == 0
    assert [stage for stage, _ in slurm.submitted] == ["eval"]  # that was of an earlier export

    slurm.end_all()
    slurm.submitted.clear()
    write_json(run / "eval" / "heldout.json", {"training_step": 6})
    assert _titans(file) == 0
    assert not slurm.submitted
    assert "eval: done already" in capsys.readouterr().out


def test_another_command_on_a_run_with_steps_needs_resume(tmp_path, file, run, slurm, capsys):
    assert _titans(file) == 0
    slurm.end_all()
    _prepared(tmp_path)
    write_checkpoint(file, run, 2)
    assert _titans(file, "train.steps=9") == 2
    assert "a run is here already" in capsys.readouterr().err
    assert _titans(file, "train.steps=9", "--resume") == 0


def test_data_that_the_run_does_not_train_on_is_made_again(tmp_path, file, run, slurm):
    assert _titans(file) == 0
    slurm.end_all()
    slurm.submitted.clear()
    write_checkpoint(file, run, 2)
    _prepared(tmp_path)
    write_json(tmp_path / "data" / "manifest.json", {"fingerprint": "0" * 64})
    assert _titans(file) == 0
    assert [stage for stage, _ in slurm.submitted] == ALL


@pytest.mark.parametrize("step", [2, 6])
def test_an_export_of_another_step_is_in_the_way(step, tmp_path, run, slurm):
    file = write_config(tmp_path)
    write_checkpoint(file, run, step)
    write_export(run / "model", 4)
    with pytest.raises(UserError, match="is there and is no export of step 6"):
        submit.submit(str(file), chain=True, resume=True)
    assert not slurm.submitted


def test_a_damaged_last_checkpoint_is_not_the_end(tmp_path, run):
    file = write_config(tmp_path)
    write_checkpoint(file, run, 6)
    config = run_config.load(file)
    assert pipeline.finished(config, run) is not None
    (run / "checkpoints" / "step-6" / "state.json").unlink()
    assert pipeline.finished(config, run) is None


def test_the_places_of_the_pipeline_are_frozen_as_absolute(file, tmp_path, slurm):
    assert _titans(file) == 0
    told = run_config.load(tmp_path / "run" / "jobs" / "config.yaml").pipeline
    assert told.data.input == [str(tmp_path / "text/*.jsonl")]
    assert told.data.tokenizer == str(tmp_path / "tokenizer.model")
