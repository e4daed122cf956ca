"""``titans eval``: the trainer's validation, run again on the exported model."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import prepare
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from titans_pretrain import cli
from titans_pretrain.checkpoint import manifest as manifests
from titans_pretrain.data.loader import Batch
from titans_pretrain.errors import Misfit, TitansError, UserError
from titans_pretrain.evaluate import heldout
from titans_pretrain.evaluate.heldout import Choice

WHOLE_RUN = Choice(sequences=7)


def told(capsys):
    return capsys.readouterr().err


def test_the_loss_is_the_last_validation_loss_of_the_run(trained, manifest, tmp_path, capsys):
    assert not cli.main(
        [
            *("eval", str(trained.model), str(tmp_path / "out")),
            *("--data", str(manifest), "--sequences", "7"),
        ]
    )
    result = json.loads((tmp_path / "out/heldout.json").read_text())
    assert result["loss"] == pytest.approx(trained.validation_loss, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(trained.validation_loss), rel=1e-5)
    assert (result["sequences"], result["sequence_length"]) == (7, 32)
    assert result["tokens"] == 7 * 32
    assert result["fingerprint"] == result["training_fingerprint"]
    assert result["training_step"] == 3
    out, progress = capsys.readouterr()
    assert out == (tmp_path / "out/heldout.md").read_text()
    assert f"| loss (nats per token) | {result['loss']:.6f} |" in out
    assert "sequences 7/7  loss " in progress
    assert progress.rstrip().endswith("left")


@pytest.mark.slow
def test_the_bfloat16_export_of_a_bf16_run_has_its_loss(train, manifest, tmp_path):
    trained = train("bf16", "bfloat16")
    result = heldout.evaluate(trained.model, tmp_path, str(manifest), WHOLE_RUN)
    assert result["loss"] == pytest.approx(trained.validation_loss, rel=1e-6)
    assert result["dtype"] == "bfloat16"


def test_the_files_are_the_same_to_the_byte_when_it_runs_again(trained, manifest, tmp_path):
    for name in ("one", "two"):
        heldout.evaluate(trained.model, tmp_path / name, str(manifest), WHOLE_RUN)
    for name in ("heldout.json", "heldout.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_batch_changes_no_more_than_rounding(trained, manifest, tmp_path):
    one, three = (
        heldout.evaluate(trained.model, tmp_path, str(manifest), Choice(sequences=7, batch=batch))
        for batch in (1, 3)
    )
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert three["tokens"] == one["tokens"]


def test_all_held_out_sequences_are_scored_unless_told_otherwise(trained, manifest, tmp_path):
    result = heldout.evaluate(trained.model, tmp_path, str(manifest), Choice())
    assert result["sequences"] > 7
    assert result["loss"] != pytest.approx(trained.validation_loss, rel=1e-6)


def test_a_share_that_holds_trained_tokens_is_refused(trained, manifest, tmp_path):
    with pytest.raises(Misfit, match=r"0\.06 holds tokens that the model was trained on"):
        heldout.evaluate(trained.model, tmp_path, str(manifest), Choice(validation_fraction=0.06))
    fewer = heldout.evaluate(
        trained.model, tmp_path, str(manifest), Choice(validation_fraction=0.03)
    )
    assert fewer["tokens"] > 0


@pytest.fixture
def untold(trained, tmp_path):
    """The exported model without the manifest that tells of its training."""
    copy = shutil.copytree(trained.model, tmp_path / "untold")
    (copy / manifests.NAME).unlink()
    return copy


def test_what_an_export_does_not_tell_must_be_given(untold, trained, manifest, tmp_path):
    with pytest.raises(Misfit, match="sequence length of its training"):
        heldout.evaluate(untold, tmp_path, str(manifest), Choice())
    with pytest.raises(Misfit, match="which share of the data its training left out"):
        heldout.evaluate(untold, tmp_path, str(manifest), Choice(sequence_length=32))
    given = Choice(sequence_length=32, validation_fraction=0.05, sequences=7)
    result = heldout.evaluate(untold, tmp_path, str(manifest), given)
    assert result["loss"] == pytest.approx(trained.validation_loss, rel=1e-6)
    assert "not recorded" in heldout.table(result)


def test_held_out_documents_of_the_data_need_no_share(trained, tmp_path):
    documents = prepare(tmp_path / "documents", "--held-out", "0.2")
    result = heldout.evaluate(trained.model, tmp_path / "out", str(documents), Choice())
    assert result["tokens"] > 0
    assert result["fingerprint"] != result["training_fingerprint"]
    with pytest.raises(UserError, match="would hold out training documents"):
        heldout.evaluate(trained.model, tmp_path, str(documents), Choice(validation_fraction=0.05))


def test_data_without_anything_held_out_is_refused(untold, manifest, tmp_path):
    with pytest.raises(Misfit, match="no sequence of 32 tokens is held out"):
        heldout.evaluate(
            untold, tmp_path, str(manifest), Choice(sequence_length=32, validation_fraction=0.0)
        )


def test_data_of_another_tokenizer_is_refused(trained, tmp_path):
    other = prepare(tmp_path / "other", vocabulary=290)
    with pytest.raises(Misfit, match="tokenizer is not the model's"):
        heldout.evaluate(trained.model, tmp_path, str(other), Choice())
    assert not (tmp_path / "heldout.json").exists()


def test_a_model_of_another_kind_is_scored_and_its_limit_is_kept(trained, manifest, tmp_path):
    model = tmp_path / "gpt2"
    config = GPT2Config(
        vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=1, bos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(model)
    PreTrainedTokenizerFast.from_pretrained(trained.model).save_pretrained(model)
    choice = Choice(sequence_length=32, validation_fraction=0.05, sequences=2)
    result = heldout.evaluate(model, tmp_path, str(manifest), choice)
    assert result["loss"] == pytest.approx(math.log(300), rel=0.05)
    longer = Choice(sequence_length=33, validation_fraction=0.05)
    with pytest.raises(Misfit, match="longer than the model reads: 32"):
        heldout.evaluate(model, tmp_path, str(manifest), longer)


def test_a_model_with_fewer_embeddings_than_the_data_has_tokens_is_refused(
    trained, manifest, tmp_path
):
    model = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=299, n_positions=32, n_embd=16, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(model)
    PreTrainedTokenizerFast.from_pretrained(trained.model).save_pretrained(model)
    with pytest.raises(Misfit, match="has 300 pieces, the model 299"):
        heldout.evaluate(
            model, tmp_path, str(manifest), Choice(sequence_length=32, validation_fraction=0.05)
        )


def test_a_loss_that_is_not_finite_is_a_failure(trained, manifest, tmp_path, monkeypatch):
    load = heldout.generate.load

    def broken(*arguments, **options):
        network, tokenizer = load(*arguments, **options)
        network.lm_head.weight.data.fill_(float("nan"))
        return network, tokenizer

    monkeypatch.setattr(heldout.generate, "load", broken)
    with pytest.raises(TitansError, match="held-out loss is nan"):
        heldout.evaluate(trained.model, tmp_path, str(manifest), WHOLE_RUN)
    assert not (tmp_path / "heldout.json").exists()


def test_held_out_data_without_a_target_is_refused(trained):
    network, _ = heldout.generate.load(trained.model)
    batch = Batch(torch.zeros(1, 33, dtype=torch.long), torch.zeros(1, 32, dtype=torch.bool))
    loader = SimpleNamespace(
        validation_sequences=1,
        validation_batches=lambda **_: iter([batch]),
        corpus=SimpleNamespace(sources=[SimpleNamespace(place="data")]),
    )
    with pytest.raises(Misfit, match="no held-out target counts"):
        heldout.score(network, loader, sequences=0, batch=1)


def test_results_that_cannot_be_written_are_told_before_the_work(
    trained, manifest, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(heldout, "score", None)
    out = str(tmp_path / "file")
    assert cli.main(["eval", str(trained.model), out, "--data", str(manifest)]) == 1
    assert f"where: {out}" in told(capsys)


def test_a_run_is_no_exported_model(trained, manifest, tmp_path, capsys):
    code = cli.main(["eval", str(trained.run), str(tmp_path), "--data", str(manifest)])
    assert code == 2
    assert "export it first" in told(capsys)
