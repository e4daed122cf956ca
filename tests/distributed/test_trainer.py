"""The trainer on several ranks against one, on Titans, with masked targets and rising lengths."""

import json
import random
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from titans_pretrain import cli, config
from titans_pretrain.checkpoint.format import newest_good, read_state
from titans_pretrain.checkpoint.load import read_tensors
from titans_pretrain.errors import StoppedEarly, TitansError, UserError
from titans_pretrain.parallel import devices, mesh
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.train.build import open_data
from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import StopRequest
from titans_pretrain.train.trainer import Trainer

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


def configuration(manifest, directory, variant, sections=None, **train):
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
    base = {
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
    return config.resolve(base | (sections or {}), source="test")


def build(settings, data=None):
    directory = RunDirectory(Path(settings.run.directory))
    devices.from_first(directory.create)
    grid = mesh.plan(devices.ranks(), settings.mesh, settings.train)
    data = data or open_data(settings)
    checkpointing = settings.train.activation_checkpointing
    parallel = Parallel(grid, devices.rank(), activation_checkpointing=checkpointing)
    device, stop = torch.device("cpu"), StopRequest()
    return Trainer(settings, parallel, device, data, directory, stop, lambda sentence: None)


def timeless(settings):
    """A run's rows without what depends on the clock, once all ranks are there."""
    devices.gather_objects(None)
    lines = RunDirectory(Path(settings.run.directory)).metrics.read_text().splitlines()
    clock = ("seconds", "tokens_per_second", "flops_per_second", "mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def rows(settings, resume=False):
    """The rows of a run that is trained, or goes on from its newest checkpoint."""
    trainer = build(settings)
    if resume:
        root = Path(settings.run.directory) / "checkpoints"
        trainer.restore(devices.from_first(lambda: newest_good(root)[0]))
    trainer.run()
    return timeless(settings)


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


def mesh_of(tensor, sequence):
    return {"mesh": {"tensor": tensor, "sequence": sequence}}


@pytest.mark.parametrize(
    ("variant", "tensor", "sequence", "count"), [("mac", 2, 2, 4), ("transformer", 1, 2, 2)]
)
def test_a_mesh_trains_and_validates_like_one_rank(
    manifest, tmp_path, variant, tensor, sequence, count
):
    one = configuration(manifest, tmp_path / "one", variant, micro_batch_size=4)
    many = configuration(manifest, tmp_path / "many", variant, mesh_of(tensor, sequence))
    (expected,) = run_ranks(rows, 1, one)
    found = run_ranks(rows, count, many)[0]
    assert [row["step"] for row in found] == [1, 2, 2, 3, 4, 4]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


def break_off(settings, position):
    with pytest.raises(Crash):
        poisoned(settings, (), position).run()


def test_a_run_goes_on_at_another_mesh(manifest, tmp_path):
    one = configuration(manifest, tmp_path / "one", "lmm", micro_batch_size=4)
    (expected,) = run_ranks(rows, 1, one)
    kept = {"checkpoint": {"every": 2, "asynchronous": False}}
    before = configuration(manifest, tmp_path / "moved", "lmm", kept)
    after = configuration(manifest, tmp_path / "moved", "lmm", kept | mesh_of(2, 2))
    run_ranks(break_off, 2, before, 256)
    found = run_ranks(rows, 4, after, True)[0]
    assert [row["step"] for row in found] == [1, 2, 2, 3, 4, 4]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


def trace(settings):
    build(settings).run()
    path = RunDirectory(Path(settings.run.directory)).trace(devices.rank())
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    return sorted({name for name in names if name.startswith("hand-over: ")})


def test_the_trace_of_a_step_names_the_hand_overs_of_each_rank(manifest, tmp_path):
    sections = mesh_of(1, 2) | {"run": {"directory": str(tmp_path), "trace_step": 2}}
    settings = configuration(manifest, tmp_path, "lmm", sections, steps=3, validation_every=0)
    first, second = run_ranks(trace, 2, settings)
    assert any(name.endswith(" to rank 1") for name in first)
    assert any(name.endswith(" from rank 1") for name in first)
    assert any(name.endswith(" from rank 0") for name in second)
    assert all("model.layers." in name for name in first + second)
    logs = {path.name for path in (tmp_path / "logs").iterdir()}
    assert logs == {"trace-rank-0.json", "trace-rank-1.json"}


def resume_on_other_data(settings):
    trainer = build(settings)
    trainer.run()
    (path,) = Path(settings.run.directory).glob("checkpoints/step-*")
    data = open_data(settings)
    data.corpus.fingerprint = "other"
    with pytest.raises(TitansError, match="the data has fingerprint other, the run began with"):
        build(settings, data).restore(path)


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
    evaluate = trainer._passes.evaluate

    def broken(batch):
        loss, count = evaluate(batch)
        return loss * (float("nan") if devices.rank() == 1 else 1.0), count

    trainer._passes.evaluate = broken
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

    def broken(loss, micro_batch):
        backward(loss * float("inf") if devices.rank() == 1 else loss, micro_batch)

    trainer._engine.backward = broken
    with pytest.raises(TitansError, match="gradient norm is not finite at step 1") as caught:
        trainer.run()
    assert caught.value.where == "rank 1; data position 0"
    assert events(settings) == [(1, "stop", "the gradient norm is not finite")]
    return not list(Path(settings.run.directory).glob("checkpoints/step-*"))


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_not_saved(manifest, tmp_path):
    settings = configuration(manifest, tmp_path, "transformer")
    assert run_ranks(train_on_an_infinite_gradient, 2, settings) == [True, True]


class Crash(Exception):
    """Stands for the death of all ranks."""


def poisoned(settings, positions, crash_at=None):
    """A trainer whose second rank has no finite loss at these data positions."""
    trainer = build(settings)
    train = trainer._passes.train

    def broken(batch, valid):
        if trainer._position == crash_at:
            raise Crash
        losses = train(batch, valid)
        bad = trainer._position in positions and devices.rank() == 1
        return [losses[0], *(float("nan") for _ in losses[1:])] if bad else losses

    trainer._passes.train = broken
    return trainer


def guarded(manifest, directory, policy, every=1, steps=6, **guard):
    sections = {"guard": {"policy": policy, **guard}, "checkpoint": {"every": every, "keep": 9}}
    return configuration(
        manifest, directory, "transformer", sections, steps=steps, validation_every=0
    )


def events(settings):
    """Step, kind and reason of the guard's decisions."""
    found = timeless(settings)
    return [(row["step"], row["event"], row["reason"]) for row in found if "event" in row]


def saved(settings, step):
    """Tensors and state of a checkpoint."""
    path = Path(settings.run.directory) / "checkpoints" / f"step-{step}"
    return dict(read_tensors(path, "")), read_state(path)


def same_outcome(straight, broken, step):
    """Whether two runs told the same and ended in the same state, to the bit."""
    for row, other in zip(timeless(broken), timeless(straight), strict=True):
        assert row == other, f"{row} instead of {other}"
    (expected, facts), (found, other_facts) = saved(straight, step), saved(broken, step)
    assert other_facts == facts
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def crash_and_resume(settings, positions, crash_at):
    with pytest.raises(Crash):
        poisoned(settings, positions, crash_at).run()
    again = poisoned(settings, positions)
    path, _ = devices.from_first(lambda: newest_good(Path(settings.run.directory) / "checkpoints"))
    again.restore(path)
    again.run()


def skip_steps(straight, broken):
    poisoned(straight, {256}).run()
    crash_and_resume(broken, {256}, 512)
    found = timeless(straight)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6, 6]
    assert [row["step"] for row in found if "skipped" in row] == [3]
    skipped = found[2]
    assert skipped["skipped"] == "the loss is nan"
    assert skipped["where"] == "rank 1 (micro-batch 1)"
    assert "loss" not in skipped
    assert skipped["tokens"] == 384
    assert saved(straight, 6)[1]["updates"] == 5
    tensors, before = saved(straight, 3)[0], saved(straight, 2)[0]
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    return same_outcome(straight, broken, 6)


def test_a_bad_step_is_skipped_and_a_resume_goes_on_as_if_never_stopped(manifest, tmp_path):
    runs = [guarded(manifest, tmp_path / name, "skip") for name in ("straight", "broken")]
    assert run_ranks(skip_steps, 2, *runs) == [True, True]


def roll_back(straight, broken, tokens):
    poisoned(straight, {4 * 128, 5 * 128}).run()
    crash_and_resume(broken, {4 * 128, 5 * 128}, 7 * 128)
    found = timeless(straight)
    told = [row.get("event", row["step"]) for row in found]
    assert told == ["rollback", "rollback", *range(1, 7), 6]
    undone, event, first = found[:3]
    assert (undone["step"], undone["from_step"], undone["undone"]) == (0, 5, True)
    assert (event["step"], event["from_step"], event["position"]) == (0, 3, 6 * 128)
    assert event["reason"] == "the loss is nan"
    assert event["where"].startswith("rank 1 (micro-batch 1); data position 640")
    assert event["bad"] == 2
    assert first["tokens"] == 7 * 128
    assert found[-2]["tokens"] == tokens
    return same_outcome(straight, broken, 6)


def test_a_run_goes_back_behind_bad_batches_and_a_resume_keeps_the_decision(manifest, tmp_path):
    runs = [
        guarded(manifest, tmp_path / name, "rollback", every=2, rollback_steps=2)
        for name in ("straight", "broken")
    ]
    assert run_ranks(roll_back, 2, *runs, 12 * 128) == [True, True]


def give_up(settings):
    with pytest.raises(TitansError, match="the loss is nan, bad step 3 in a row at step") as caught:
        poisoned(settings, {128 * n for n in range(100)}).run()
    assert caught.value.where.startswith("rank 1 (micro-batch 1); data position ")
    assert caught.value.exit_code == 1
    return [row.get("event", "skipped" in row) for row in timeless(settings)]


@pytest.mark.parametrize(
    ("policy", "told"), [("skip", [True, True, "stop"]), ("rollback", ["rollback"] * 2 + ["stop"])]
)
def test_bad_steps_in_a_row_stop_the_run(manifest, tmp_path, policy, told):
    settings = guarded(manifest, tmp_path, policy)
    assert run_ranks(give_up, 2, settings) == [told, told]


def stop_in_a_validation(settings):
    trainer = build(settings)
    batches = trainer._data.loader.validation_batches
    taken = []

    def asked(**place):
        for batch in batches(**place):
            taken.append(1)
            trainer._stopping._request.name = "SIGTERM" if devices.rank() == 1 else None
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


def stop_at_a_due_validation(straight, broken, where):
    build(straight).run()
    if where == "validation":
        stop_in_a_validation(broken)
    else:
        trainer = build(broken)
        train = trainer._passes.train

        def asked(batch, valid):
            trainer._stopping._request.name = "SIGTERM" if trainer._step == 1 else None
            return train(batch, valid)

        trainer._passes.train = asked
        with pytest.raises(StoppedEarly):
            trainer.run()
    assert [row["step"] for row in timeless(broken)] == [1, 2]
    rows(broken, resume=True)
    return same_outcome(straight, broken, 4)


@pytest.mark.parametrize("where", ["step", "validation"])
def test_a_validation_that_a_stop_left_out_is_made_up_for_at_the_resume(manifest, tmp_path, where):
    runs = [configuration(manifest, tmp_path / name, "lmm") for name in ("straight", "broken")]
    assert run_ranks(stop_at_a_due_validation, 2, *runs, where) == [True, True]


def test_a_step_larger_than_the_data_is_refused_before_the_run_begins(manifest, tmp_path):
    settings = configuration(manifest, tmp_path, "transformer", global_batch_size=4000)
    with pytest.raises(UserError, match="a step takes 4000 sequences"):
        open_data(settings)
