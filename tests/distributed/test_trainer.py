"""The trainer on several ranks against one, on Titans, with masked targets and rising lengths."""

import json
import random
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from titans_pretrain import cli, config
from titans_pretrain.errors import StoppedEarly, TitansError, UserError
from titans_pretrain.parallel import devices, mesh
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import StopRequest
from titans_pretrain.train.trainer import Trainer, open_data

WORDS = ("who", "what", "when", "river", "wave", "time", "test")
VARIANTS = ("lmm", "mac", "mag", "mal", "transformer")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """Data whose prompts are masked."""
    directory = tmp_path_factory.mktemp("answers")
    dice = random.Random(0)
    with open(directory / "text.jsonl", "w") as handle:
        for number in range(200):
            words = [dice.choice(WORDS) for _ in range(40)]
            cut = dice.randint(1, 30)
            row = {"id": str(number), "ask": " ".join(words[:cut]), "text": " ".join(words[cut:])}
            handle.write(json.dumps(row) + "\n")
    text, model, data = (str(directory / name) for name in ("text.jsonl", "t.model", "data"))
    tokenizer = ["data", "tokenizer", "--input", text, "--vocab-size", "290", "--output", model]
    assert not cli.main(tokenizer)
    prepare = ["data", "prepare", "--input", text, "--tokenizer", model, "--output", data]
    assert not cli.main([*prepare, "--prompt-column", "ask"])
    return f"{data}/manifest.json"


def configuration(manifest, directory, variant, **train):
    model = {
        "variant": variant,
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    memory = {"chunk_size": 4, "num_persistent_tokens": 2, "memory_expansion": 2}
    extra = {"mac": {"segment_length": 8}, "mag": {"window_size": 8}, "mal": {"window_size": 8}}
    if variant != "transformer":
        model |= memory | extra.get(variant, {})
    sections = {
        "model": model,
        "data": {
            "manifest": manifest,
            "sequence_length": 32,
            "validation_fraction": 0.05,
            "length_schedule": [{"from_step": 0, "length": 16}, {"from_step": 2, "length": 32}],
        },
        "train": {
            "steps": 4,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 0.01,
            "epsilon": 1e-3,  # a small one turns the rounding of tiny gradients into whole steps
            "precision": "fp32",
            "validation_every": 2,
            "validation_sequences": 3,
            **train,
        },
        "run": {"directory": str(directory)},
    }
    return config.resolve(sections, source="test")


def build(settings, data=None):
    directory = RunDirectory(Path(settings.run.directory))
    devices.from_first(directory.create)
    grid = mesh.plan(devices.ranks(), settings.mesh, settings.train)
    data = data or open_data(settings)
    device, stop = torch.device("cpu"), StopRequest()
    return Trainer(settings, grid, device, data, directory, stop, lambda sentence: None)


def rows(settings):
    """A run's rows without what depends on the clock."""
    build(settings).run()
    lines = RunDirectory(Path(settings.run.directory)).metrics.read_text().splitlines()
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_train_a_variant_like_one(manifest, tmp_path, variant):
    one = configuration(manifest, tmp_path / "one", variant, micro_batch_size=4)
    two = configuration(
        manifest, tmp_path / "two", variant, activation_checkpointing=variant == "mac"
    )
    (expected,) = run_ranks(rows, 1, one)
    found = run_ranks(rows, 2, two)[0]
    assert [row["step"] for row in found] == [1, 2, 2, 3, 4, 4]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


def resume_on_other_data(settings):
    trainer = build(settings)
    trainer.run()
    (saved,) = Path(settings.run.directory).glob("checkpoints/step-*")
    data = open_data(settings)
    data.shards.fingerprint = "other"
    with pytest.raises(TitansError, match="the data has fingerprint other, the run began with"):
        build(settings, data).restore(saved)


def test_a_run_cannot_go_on_with_other_data(manifest, tmp_path):
    settings = configuration(manifest, tmp_path, "transformer", steps=1, validation_every=0)
    run_ranks(resume_on_other_data, 2, settings)


def train_without_targets(settings):
    data = open_data(settings)
    whole = data.loader.batch

    def masked(**place):
        batch = whole(**place)
        batch.target_mask[:] = False
        return batch

    data.loader.batch = masked
    with pytest.raises(UserError, match="no target of step 1 counts"):
        build(settings, data).run()


def test_a_step_without_a_target_is_refused(manifest, tmp_path):
    run_ranks(train_without_targets, 1, configuration(manifest, tmp_path, "transformer"))


def validate_to_nan(settings):
    trainer = build(settings)
    summed = trainer._summed_loss

    def broken(tokens, mask):
        loss = summed(tokens, mask)
        broken_here = devices.rank() == 1 and not trainer._engine._engine.module.training
        return loss * float("nan") if broken_here else loss

    trainer._summed_loss = broken
    with pytest.raises(TitansError, match="the validation loss is nan at step 2") as caught:
        trainer.run()
    assert caught.value.where == "rank 1; data position 256"
    return not list(Path(settings.run.directory).glob("checkpoints/step-*"))


def test_a_validation_loss_that_is_not_finite_names_the_rank_and_is_not_saved(manifest, tmp_path):
    settings = configuration(manifest, tmp_path, "transformer")
    assert run_ranks(validate_to_nan, 2, settings) == [True, True]


def train_on_an_infinite_gradient(settings):
    trainer = build(settings)
    backward = trainer._engine.backward

    def broken(loss):
        backward(loss * float("inf") if devices.rank() == 1 else loss)

    trainer._engine.backward = broken
    with pytest.raises(TitansError, match="gradient norm is not finite at step 1") as caught:
        trainer.run()
    assert caught.value.where == "all ranks; data position 0"
    return not list(Path(settings.run.directory).glob("checkpoints/step-*"))


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_not_saved(manifest, tmp_path):
    settings = configuration(manifest, tmp_path, "transformer")
    assert run_ranks(train_on_an_infinite_gradient, 2, settings) == [True, True]


def stop_in_a_validation(settings):
    trainer = build(settings)
    batches = trainer._data.loader.validation_batches
    taken = []

    def asked(**place):
        for batch in batches(**place):
            taken.append(1)
            trainer._stop.name = "SIGTERM" if devices.rank() == 1 else None
            yield batch

    trainer._data.loader.validation_batches = asked
    with pytest.raises(StoppedEarly):
        trainer.run()
    saved = sorted(path.name for path in Path(settings.run.directory).glob("checkpoints/step-*"))
    return len(taken), saved


def test_a_signal_ends_a_validation_between_batches_and_saves(manifest, tmp_path):
    settings = configuration(manifest, tmp_path, "transformer", validation_sequences=0)
    for taken, saved in run_ranks(stop_in_a_validation, 2, settings):
        assert taken == 1
        assert saved == ["step-2"]


def test_a_step_larger_than_the_data_is_refused_before_the_run_begins(manifest, tmp_path):
    settings = configuration(manifest, tmp_path, "transformer", global_batch_size=4000)
    with pytest.raises(UserError, match="a step takes 4000 sequences"):
        open_data(settings)
