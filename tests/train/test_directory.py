import errno
import importlib.metadata
import json
import os

import pytest
import yaml

from titans_pretrain import config
from titans_pretrain.errors import UserError
from titans_pretrain.train.directory import RunDirectory, changes, write_first


def resolved(directory, **sections):
    base = {
        "model": {},
        "data": {"manifest": "/m", "sequence_length": 8},
        "train": {"steps": 4, "global_batch_size": 1, "learning_rate": 1.0},
        "run": {"directory": str(directory)},
    }
    return config.resolve(base | sections, source="test")


@pytest.fixture
def begun(tmp_path):
    """The directory of a run that has done a step."""
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    directory.begin(resolved(directory.path), "f")
    directory.metrics.write_text('{"step": 1}\n')
    return directory


def test_a_run_that_is_there_is_refused_without_resume(begun):
    with pytest.raises(UserError, match="a run is here already"):
        begun.check(resolved(begun.path), resume=False)
    assert begun.check(resolved(begun.path), resume=True) == []


def test_checkpoints_without_a_configuration_are_no_empty_directory(begun):
    begun.config.unlink()
    (begun.checkpoints / "step-3").mkdir()
    with pytest.raises(UserError, match="a run is here already"):
        begun.check(resolved(begun.path), resume=False)
    with pytest.raises(UserError, match="cannot be read") as caught:
        begun.check(resolved(begun.path), resume=True)
    assert "newest checkpoint" in caught.value.fix


@pytest.mark.parametrize("metrics", [None, "", '{"step": 1, "lo', '{"step": 1, "event": "stop"}\n'])
def test_a_start_that_failed_before_a_step_does_not_block_its_own_fix(begun, metrics):
    begun.log(0).write_text("start of rank 0\n")
    begun.metrics.unlink()
    if metrics is not None:
        begun.metrics.write_text(metrics)
    changed = resolved(begun.path, model={"hidden_size": 96})
    assert begun.check(changed, resume=False) == []
    assert begun.check(changed, resume=True) == [f"nothing to resume in {begun.path}"]


def test_a_checkpoint_without_metrics_is_a_run(begun):
    begun.metrics.unlink()
    (begun.checkpoints / "step-3").mkdir()
    with pytest.raises(UserError, match="a run is here already"):
        begun.check(resolved(begun.path), resume=False)


def test_the_state_before_the_first_step_is_no_run_and_makes_room_for_the_next_start(begun):
    begun.metrics.unlink()
    before = begun.checkpoints / "step-0"
    before.mkdir()
    assert begun.check(resolved(begun.path, model={"hidden_size": 96}), resume=False) == []
    begun.forget_last()
    assert not before.exists()


@pytest.mark.parametrize(
    "row", ['{"step": 1, "loss": 2.0}\n', '{"step": 0, "event": "rollback"}\n']
)
def test_the_state_before_the_first_step_stays_once_a_step_was_done_or_undone(begun, row):
    begun.metrics.write_text('{"step": 1, "event": "stop"}\n' + row)
    (begun.checkpoints / "step-0").mkdir()
    with pytest.raises(UserError, match="a run is here already"):
        begun.check(resolved(begun.path), resume=False)
    begun.forget_last()
    assert (begun.checkpoints / "step-0").exists()


def test_a_damaged_configuration_is_told(begun):
    begun.config.write_text("model: [")
    with pytest.raises(UserError, match="cannot be read"):
        begun.check(resolved(begun.path), resume=True)


def test_resuming_nothing_says_so(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    (sentence,) = directory.check(resolved(directory.path), resume=True)
    assert sentence == f"nothing to resume in {directory.path}"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"model": {"hidden_size": 96}}, "model.hidden_size"),
        ({"data": {"manifest": "/m", "sequence_length": 16}}, "data.sequence_length"),
        ({"data": {"manifest": "/m", "sequence_length": 8, "seed": 1}}, "data.seed"),
    ],
)
def test_what_the_model_or_the_data_order_depends_on_cannot_change(begun, section, key):
    with pytest.raises(UserError, match=f"{key}: .* differs from .* began with"):
        begun.check(resolved(begun.path, **section), resume=True)


def test_other_changes_are_told(begun):
    train = {"steps": 9, "global_batch_size": 2, "learning_rate": 1.0}
    assert begun.check(resolved(begun.path, train=train), resume=True) == [
        "train.global_batch_size is now 2, was 1",
        "train.steps is now 9, was 4",
    ]


def test_a_key_of_another_version_is_told():
    assert changes({"train": {"old": 1}}, {"train": {}}, where="") == [
        "train.old is now 'absent', was 1"
    ]


LLAMA = {"hf": "llama", "vocab_size": 64, "hidden_size": 96}
OWN = {"hf": "titans_baseline", "mixers": ["window"], "vocab_size": 64}


@pytest.mark.parametrize(
    ("first", "then", "key"),
    [
        (LLAMA, LLAMA | {"num_attention_heads": 12}, "model.num_attention_heads: 12 .* 32"),
        (LLAMA | {"num_attention_heads": 12}, LLAMA, "model.num_attention_heads: 32 .* 12"),
        (OWN, OWN | {"window_size": 512}, "model.window_size: 512 differs from 2048"),
        (OWN | {"window_size": 512}, OWN, "model.window_size: 2048 differs from 512"),
        (OWN, LLAMA, "model.hf: 'llama' differs from 'titans_baseline'"),
    ],
)
def test_another_library_s_model_is_compared_by_the_defaults_of_its_own_class(first, then, key):
    with pytest.raises(UserError, match=key):
        changes({"model": first}, {"model": then}, where="")


@pytest.mark.parametrize(
    ("short", "same"),
    [(LLAMA, {"num_attention_heads": 32, "rms_norm_eps": 1e-6}), (OWN, {"window_size": 2048})],
)
def test_a_default_of_another_library_s_model_may_be_given_or_left_out(short, same):
    assert changes({"model": short}, {"model": short | same}, where="") == []
    assert changes({"model": short | same}, {"model": short}, where="") == []


def test_a_model_that_the_installed_library_no_longer_takes_is_told():
    with pytest.raises(UserError, match=r"none any more: model\.old_key: LlamaConfig has no"):
        changes({"model": LLAMA | {"old_key": 1}}, {"model": LLAMA}, where="")


@pytest.mark.parametrize(
    ("model", "trained", "told"), [(LLAMA, "4.0", 1), (LLAMA, None, 0), ({}, "4.0", 0)]
)
def test_another_version_of_the_library_is_told(tmp_path, model, trained, told):
    settings = resolved(tmp_path, **({"model": model} if model else {}))
    run = RunDirectory(tmp_path)
    run.create()
    run.begin(settings, "f")
    now = importlib.metadata.version("transformers")
    (run.checkpoints / "step-4").mkdir()
    state = {"versions": {"transformers": trained or now}}
    (run.checkpoints / "step-4" / "state.json").write_text(json.dumps(state))
    (run.checkpoints / "step-6").mkdir()  # without a state, so an older one is asked
    notes = run.check(settings, resume=True)
    assert len(notes) == told
    assert all(f"transformers is {now}, and the run was trained with 4.0" in n for n in notes)


def forget_field(begun, name):
    """Make the run one begun before the model had a field."""
    stored = yaml.safe_load(begun.config.read_text())
    del stored["model"][name]
    begun.config.write_text(yaml.safe_dump(stored))


@pytest.mark.parametrize("name", ["attend_across_documents", "remember_across_documents"])
def test_a_run_begun_before_a_field_of_the_model_goes_on_with_its_default(begun, name):
    forget_field(begun, name)
    assert begun.check(resolved(begun.path), resume=True) == []


def test_a_run_begun_before_a_field_of_the_model_cannot_take_another_value(begun):
    forget_field(begun, "attend_across_documents")
    changed = resolved(begun.path, model={"attend_across_documents": False})
    with pytest.raises(UserError, match="attend_across_documents: False differs") as caught:
        begun.check(changed, resume=True)
    assert "use model.attend_across_documents=True" in caught.value.fix


def test_a_new_start_forgets_the_last_failure(begun):
    begun.error.write_text("{}")
    begun.forget_last()
    begun.forget_last()
    assert not begun.error.exists()


def test_the_configuration_is_written_as_resolved(begun):
    assert config.load(begun.config) == resolved(begun.path)


def test_a_directory_that_cannot_be_made_is_the_user_s_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run's directory"):
        RunDirectory(tmp_path / "file" / "run").create()


@pytest.mark.parametrize("links", [True, False])
def test_the_first_error_written_stays(tmp_path, monkeypatch, links):
    def no_links(*names):
        raise OSError(errno.EPERM, "not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "error.json"
    assert write_first(path, {"rank": 1})
    assert not write_first(path, {"rank": 0})
    assert json.loads(path.read_text()) == {"rank": 1}
    assert list(tmp_path.iterdir()) == [path]
