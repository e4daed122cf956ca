"""Initial weights out of an exported model: read exactly, or refused with what is wrong."""

import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import load_file, save_file
from saved_model import save_model
from tiny import MODEL, WORDS

from titans_pretrain import cli, config
from titans_pretrain.checkpoint.format import read_state
from titans_pretrain.errors import UserError
from titans_pretrain.export import huggingface, model_card
from titans_pretrain.parallel.shards import FlatShard
from titans_pretrain.train import initial

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def corpus(manifest):
    return manifest.parent.parent


@pytest.fixture(scope="module")
def sections(manifest):
    return {
        "model": dict(MODEL),
        "data": {"manifest": str(manifest), "sequence_length": 32},
        "train": {"steps": 3, "global_batch_size": 1, "learning_rate": 0.01},
        "run": {"directory": "/nowhere"},
    }


@pytest.fixture(scope="module")
def exported(sections, corpus, tmp_path_factory):
    """``exported("model", …)``: the same model, exported with these options; not to be changed."""
    place, known = tmp_path_factory.mktemp("exported"), {}
    run = save_model(sections, place / "run", corpus / "tokenizer.model")

    def export(name, **options):
        if name not in known:
            known[name] = place / name
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(huggingface.verification, "verify", lambda *_: None)
                huggingface.export(run, known[name], **options)
        return known[name]

    return export


@pytest.fixture
def model(exported, tmp_path):
    """An exported model to spoil."""
    return shutil.copytree(exported("model"), tmp_path / "model")


@pytest.fixture
def check(sections, corpus):
    """``check(directory, chunk_size=4)``: whether a run of that model may begin there."""

    def check(directory, pieces=None, **changed):
        asked = {
            **sections,
            "model": sections["model"] | changed,
            "train": sections["train"] | {"init_from": str(directory)},
        }
        tokenizer = pieces or (corpus / "tokenizer.model").read_bytes()
        return initial.check(config.resolve(asked, source="test"), tokenizer)

    return check


def refused(action, message, fix):
    with pytest.raises(UserError, match=message) as caught:
        action()
    assert caught.value.where.startswith("train.init_from: ")
    assert fix in caught.value.fix


def quarters(name, shape, columns):
    """The parts of a tensor that two tensor ranks and two data ranks hold, blank."""
    offsets = [(0,) * len(shape)] * 2
    sizes = tuple(shape)
    if columns and shape[-1] % 2 == 0:
        sizes = (*shape[:-1], shape[-1] // 2)
        offsets = [(0,) * len(shape), (*[0] * (len(shape) - 1), shape[-1] // 2)]
    count, parts = prod(sizes), []
    for offset in offsets:
        for start, stop in ((0, count // 2), (count // 2, count)):
            blank = torch.full((stop - start,), -777.0)
            parts.append(FlatShard(name, tuple(shape), start, stop, blank, offset, sizes))
    return parts


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("model", {}),
        ("files", {"max_shard_size": "10KB"}),
        ("bf16", {"dtype": "bfloat16", "max_shard_size": "5KB"}),
    ],
)
def test_any_rank_reads_its_parts_to_the_bit_from_any_files(exported, check, name, options):
    directory = exported(name, **options)
    told = check(directory)
    assert (told["name"], told["step"]) == (name, 30)
    stored = {}
    for file in directory.glob("*.safetensors"):
        stored |= load_file(file)
    assert len(list(directory.glob("*.safetensors"))) > 1 or name == "model"
    for key, tensor in stored.items():
        parts = quarters(f"parameters/{key}", tensor.shape, columns=tensor.dim() > 1)
        moment = replace(parts[0], name=f"exp_avg/{key}", tensor=torch.zeros(parts[0].stop))
        initial.fill(directory, [*parts, moment])
        assert not moment.tensor.any()
        for part in parts:
            offsets, sizes = part.window
            window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            whole = tensor[window].float().reshape(-1)
            assert torch.equal(part.tensor, whole[part.start : part.stop]), key


def test_half_precision_and_a_directory_without_a_manifest_are_read_too(model, check):
    stored = load_file(model / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in stored.items()}, model / WEIGHTS)
    (model / "manifest.json").unlink()
    assert check(model) == {"name": "model"}
    (part,) = [FlatShard("parameters/model.norm.weight", (16,), 0, 16, torch.zeros(16))]
    initial.fill(model, [part])
    assert torch.equal(part.tensor, stored["model.norm.weight"])


def test_a_directory_that_is_none_is_refused(exported, check, tmp_path):
    refused(lambda: check(tmp_path / "none"), "no such directory", "give what titans export wrote")
    refused(lambda: check(tmp_path), "holds no readable config.json", "give what titans export")
    run = exported("model").parent / "run"
    refused(lambda: check(run), "holds no readable config.json", f"titans export {run} MODEL_DIR")


@pytest.mark.parametrize(
    ("field", "value"),
    [("chunk_size", 8), ("memory_depth", 2), ("hidden_size", 32), ("rms_norm_eps", 1e-5)],
)
def test_a_model_that_computes_something_else_is_refused(exported, check, field, value):
    message = f"model.{field}: {value} is not the {MODEL.get(field, 1e-06)} of the initial weights"
    refused(lambda: check(exported("model"), **{field: value}), message, f"use model.{field}=")


def test_fields_that_change_no_function_may_differ(exported, check):
    free = {"initializer_range": 0.5, "forget_bias": -7.0, "remember_across_documents": False}
    check(exported("model"), **free)


def test_another_kind_of_model_is_refused(model, check):
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    (model / "manifest.json").unlink()
    refused(lambda: check(model), "is of type 'gpt2'", "an exported model of the run's kind")


def test_other_libraries_models_are_compared_by_their_own_keys(
    sections, corpus, tmp_path, monkeypatch
):
    keys = {"hf": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16}
    keys |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    pieces = corpus / "tokenizer.model"
    run = save_model(sections | {"model": keys}, tmp_path / "run", pieces)
    monkeypatch.setattr(huggingface.verification, "verify", lambda *_: None)
    huggingface.export(run, tmp_path / "model")

    def check(model):
        train = sections["train"] | {"init_from": str(tmp_path / "model")}
        asked = config.resolve(sections | {"model": model, "train": train}, source="test")
        return initial.check(asked, pieces.read_bytes())

    assert check(keys)["name"] == "model"
    message = "model.num_key_value_heads: 1 is not the 2 of the initial weights"
    refused(lambda: check(keys | {"num_key_value_heads": 1}), message, "num_key_value_heads=2")
    refused(lambda: check(sections["model"]), "is of type 'llama', not 'titans'", "of the run's")
    for key, value in (
        ("rms_norm_eps", 1e-3),
        ("attention_bias", True),
    ):  # not among the run's keys
        settings = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "manifest.json").unlink(missing_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps(settings | {key: value}))
        refused(lambda: check(keys), f"model.{key}: .* is not the {value}", f"model.{key}=")
        (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    free = {"initializer_range": 0.5, "use_cache": False, "transformers_version": "9"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings | free))
    assert check(keys)["name"] == "model"


def test_configurations_that_hold_an_infinity_are_compared_too(
    sections, corpus, tmp_path, monkeypatch
):
    keys = {"hf": "mamba2", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    keys |= {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1}
    run = save_model(sections | {"model": keys}, tmp_path / "run", corpus / "tokenizer.model")
    monkeypatch.setattr(huggingface.verification, "verify", lambda *_: None)
    huggingface.export(run, tmp_path / "model")
    assert "Infinity" in (tmp_path / "model" / "config.json").read_text()

    def check(model):
        train = sections["train"] | {"init_from": str(tmp_path / "model")}
        asked = config.resolve(sections | {"model": model, "train": train}, source="test")
        return initial.check(asked, (corpus / "tokenizer.model").read_bytes())

    assert check(keys)["name"] == "model"
    limited = keys | {"time_step_limit": [0.0, 1.0]}
    refused(lambda: check(limited), "model.time_step_limit: .* is not the", "time_step_limit=")


def test_damaged_bytes_are_refused(model, check):
    with open(model / WEIGHTS, "r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\x7f")
    refused(lambda: check(model), "damaged: model.safetensors differs", "export it again")


@pytest.mark.parametrize("manifest_too", [True, False])
def test_a_missing_file_of_weights_is_refused(exported, check, tmp_path, manifest_too):
    files = exported("files", max_shard_size="10KB")
    copy = shutil.copytree(files, tmp_path / "copy")
    next(copy.glob("model-00002-*")).unlink()
    if manifest_too:
        (copy / "manifest.json").unlink()
    message = "cannot be read: .*model-00002" if manifest_too else "model-00002-.* is missing"
    refused(lambda: check(copy), message, "export it again")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(2)}), "mismatched: model.norm.wei"),
        (lambda w: w.update({"model.norm.weight": torch.ones(16).int()}), "of type I32"),
    ],
)
def test_weights_that_are_not_the_model_s_are_refused(model, check, spoil, message):
    stored = load_file(model / WEIGHTS)
    spoil(stored)
    save_file(stored, model / WEIGHTS)
    (model / "manifest.json").unlink()
    refused(lambda: check(model), message, "export it again")


def test_another_tokenizer_is_refused(exported, check):
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[::-1])] * 50),
        model_writer=pieces,
        model_type="bpe",
        vocab_size=299,
        byte_fallback=True,
        minloglevel=2,
    )
    fix = "prepare the data with the tokenizer"
    refused(
        lambda: check(exported("model"), pieces.getvalue()),
        "another tokenizer than the data's encodes .* differently",
        fix,
    )


def test_documents_that_end_with_another_id_are_refused(model, check):
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    (model / "manifest.json").unlink()
    refused(lambda: check(model), "documents end with id 2 in the data, with 7", "prepare the data")


def test_the_option_is_the_absolute_override_whatever_the_path_looks_like(
    make_run, monkeypatch, tmp_path
):
    from titans_pretrain.train import launch

    asked = []
    monkeypatch.setattr(launch, "train", lambda run, **options: asked.append((run, options)) or 0)
    monkeypatch.chdir(tmp_path)
    run = make_run("run", train={"init_from": "relative"})
    assert config.load(run.file).train.init_from == str(tmp_path / "relative")
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (command,) = re.findall(r"^titans (train .*--init-from .*)$", page, re.MULTILINE)
    assert cli.main(shlex.split(command)) == 0
    assert asked.pop()[0].train.init_from == str(tmp_path / "exported" / "demo")
    for name in ("model", "1e3", "a: b # c"):
        assert cli.main(["train", str(run.file), "--init-from", name]) == 0
        settings, options = asked.pop()
        assert settings.train.init_from == str(tmp_path / name)
        again = config.load(run.file, options["arguments"][2:])
        assert again == settings


def test_a_run_begins_with_the_exported_bits_and_a_resumed_one_does_not_ask_for_them(
    make_run, exported, model, tmp_path, monkeypatch
):
    rollback = {"policy": "rollback"}  # which saves what a run begins with
    run = make_run("run", train={"precision": "bf16", "seed": 9, "steps": 2}, guard=rollback)
    code, told, complaints = run.train("--init-from", str(model))
    assert code == 0, complaints
    assert f"initial weights: {model}" in told
    monkeypatch.setattr(huggingface.verification, "verify", lambda *_: None)
    checkpoint = run.directory / "checkpoints" / "step-0"
    huggingface.export(checkpoint, tmp_path / "again")
    for name in (WEIGHTS, "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported("model") / name).read_bytes()

    written = yaml.safe_load((run.directory / "config.yaml").read_text())
    assert written["train"]["init_from"] == str(model)
    facts = model_card.facts(checkpoint, config.load(checkpoint / "config.yaml"))
    assert facts["initial weights"].startswith("model at step 30, manifest sha256 ")
    assert str(tmp_path) not in (tmp_path / "again" / "README.md").read_text()

    before = read_state(checkpoint)["initial"]
    shutil.rmtree(model)
    changed = ("train.steps=3", "checkpoint.every=1", "pipeline.eval={every: 1}")
    code, told, complaints = run.train(*changed, "--init-from", str(model), "--resume")
    assert code == 0, complaints
    assert told.count("pipeline.eval.every has no effect here") == 1
    assert "train.init_from has no effect: a checkpoint is there" in told
    assert read_state(run.directory / "checkpoints" / "step-3")["initial"] == before
